// SPDX-License-Identifier: Apache-2.0
// What run.cpp (compiled once, plain) and kernel.cpp (compiled per instruction set) share.
//
// Lanes are queries. A tile is up to 2 W queries of one batch row; scores, features and outputs of
// a tile are held transposed, [key or channel][query], so that a softmax, an inner product or a gate
// is a plain loop without reductions across lanes, no head dimension or key count is padded (but for tile
// registers, with zeros), and every query is computed by the same sequence of operations wherever it lies.
#pragma once

#include <cstdint>

#include "fastnegate/problem.h"

namespace fastnegate {

constexpr int64_t kRows = 16;      // keys or channels per block of a Pack: the widest vector, a multiple of all steps
constexpr int64_t whole_blocks(int64_t n) { return (n + kRows - 1) / kRows * kRows; }
constexpr int64_t kMostKeys = 1024;  // of the prompt, and of one concept
constexpr int kEntryColumns = 6;   // partial statistics: max g, sum g, count, sum mass, max r, sum of shares
constexpr int kRowColumns = 5;     // sum |O-Z|^2, sum |Z|^2, count limited, count not finite, sum of shares
constexpr float kLowest = -3e38f;  // stands for the top of an empty or fully masked softmax

// Keys and values of one segment and head, masked tokens left out, in the layout of the products:
// keys [ceil(n/16)][D][16], values [ceil(D/16)][n][16], bias [n] times log2(e). Or keys and values in tiles
// (pack_rows_as_tiles), which take no more room than whole blocks of 16 tokens and 16 channels.
struct Pack {
  float *key, *value, *bias;  // bias: null if there is none
  float* memory;              // `retrieve` only: unweighted values, laid out like keys
  int64_t count;
};

// An entry that exists: its concept has what the rule reads, and its schedule value is not 0.
struct Live {
  int64_t entry, concept_index, slot;  // slot: index into Plan::spans
  Numbers numbers;
};

// Tokens of a concept that some entry uses, clamped to the arrays.
struct Span {
  int64_t concept_index, begin, length;
  int64_t batch;  // whose tokens: 0 where all rows share them
};

struct Plan {
  const Problem* problem;
  Pack* prompts;                 // [batch or 1][heads]; none where the prompt is a partial
  int64_t prompt_batch_stride;   // heads, or 0 where all rows share keys, values and bias
  const Span* spans;             // concepts in use
  Pack* concepts;                // [spans][heads]; none where concepts are partials
  const Live* live;              // entries of all rows, in order
  const int64_t* live_begin;     // [batch + 1]
  int64_t most_live;             // over the rows
  int64_t group;                 // heads per task: 1 for scope `head`, else all
  Reads reads;                   // of the rule; statistics read mass, too
  double *entry_partials, *row_partials;  // per task, or null without statistics
  float* gates;                  // [entries][heads / group][queries], or null
};

struct Task {
  int64_t batch, first_head, first_query, index;
};

// One instruction set.
struct Isa {
  const char* name;
  int64_t lanes;                        // floats per vector, W
  int64_t (*scratch)(const Plan&);      // floats a thread needs
  void (*pack_prompt)(const Plan&, int64_t batch, int64_t head);
  void (*pack_concept)(const Plan&, int64_t slot, int64_t head);
  void (*run)(const Plan&, const Task&, const Task* next, float* scratch);  // next: to fetch early, or null
  int64_t (*multiply_adds)(int64_t steps);
};

}  // namespace fastnegate
