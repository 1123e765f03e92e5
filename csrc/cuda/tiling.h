// SPDX-License-Identifier: Apache-2.0
// (problem, GPU) -> how the work is cut: pure functions, each choice with its reason.
#pragma once

#include <cstdint>

#include "fastnegate/tile.h"

namespace fastnegate {

constexpr int kCudaQueries = 16;      // of a warp at a time: the rows of a matrix instruction
constexpr int kCudaBlockTokens = 32;  // of concepts side by side: four tiles of 8, one for each lane of a row
constexpr int kCudaBlockTiles = kCudaBlockTokens / 8;

// Elements from one row to the next in shared memory: an odd number of 16 bytes, so that eight rows in a row
// lie in eight different groups of banks, and nothing has to be permuted.
constexpr int cuda_row(int dim) { return (dim / 8 | 1) * 8; }

// Keys of the prompt at a time. 77 are 80: scores take 40 registers while nothing but Z is alive, dim / 2 of them.
// With 160 channels that is too many.
constexpr int cuda_prompt_tokens(int dim) { return dim <= 128 ? 80 : 64; }

// Pieces of it in shared memory, where not all fits: one is read while the other is worked on.
constexpr int cuda_most_pieces(int dim) { return dim > 64 ? 2 : 1; }

// One kernel for each: what is compiled apart is what needs other registers.
enum class CudaKind : int {
  plain,  // no entries
  one,    // the entries of a row lie side by side in one block of tokens
  many,   // any entries
};

// Warps of a block, which fills a multiprocessor: of 65536 registers each lane may have 128, 168 or 255. A multiple
// of 4, one or more for each of its four schedulers.
constexpr int cuda_most_warps(CudaKind kind, int dim) {
  if (kind == CudaKind::plain) return dim <= 64 ? 16 : dim <= 96 ? 12 : 8;
  if (kind == CudaKind::one) return dim <= 64 ? 12 : 8;
  return 8;
}

// Bytes of shared memory that a block may have, by compute capability (CUDA C++ Programming Guide, table
// "Technical Specifications per Compute Capability": what a multiprocessor has, but for 1 KiB of the system).
constexpr int cuda_shared_limit(int arch) {
  return arch == 80 || arch == 87                              ? 163 << 10
         : arch == 90 || arch == 100 || arch == 103 || arch == 110 ? 227 << 10
                                                               : 99 << 10;  // 86, 89, 120, 121
}

// Of a block of concept tokens: whose they are (a header and four slots, entries.cuh), and their Gram matrix, whose
// rows are 32 high halves, 32 low ones and a gap.
constexpr int kCudaHeaderBytes = 32, kCudaSlotBytes = 48;
constexpr int kCudaTurnBytes = 32;  // what a block works on (kernel.cuh)
constexpr int kCudaRosterBytes = kCudaHeaderBytes + kCudaBlockTiles * kCudaSlotBytes;
constexpr int kCudaGramRow = 2 * kCudaBlockTokens + 8;
constexpr int kCudaGramBytes = kCudaBlockTokens * kCudaGramRow * 2;

struct CudaTiling {
  CudaKind kind;
  int warps, blocks;
  int stages;         // 2: the next queries are read while these are worked on
  int prompt_slots;   // tokens of the prompt that stay in shared memory: all, or 0
  int pieces;         // else of it in turn: with 2, one is read while the other is worked on
  int concept_slots;  // the same of the concepts of a batch row: all of them, or blocks take turns
  int rosters;        // blocks of concept tokens that stay
  // Where things begin in shared memory, in bytes. Keys are at 0: first the prompt's, or two pieces of it, then those
  // of concepts. Values and what is added to logits have the same order; weights and norms are the concepts' alone.
  int concepts, values, added, weights, norms, roster, grams, queries, turn;
  int shared;  // bytes of all
};

struct CudaWork {
  int64_t batch, heads, queries, keys, dim;
  int64_t entries, longest;  // of a batch row, and tokens of each, at most; 0: no entries
  bool grams;                // whether Gram matrices are wanted
  int shared_limit, multiprocessors;
};

// Tokens that entries take, of which each has `longest` at most: 1, 2 or 4 tiles of 8 that begin at a multiple, or,
// if it is longer than a block, whole pairs of tiles.
constexpr int64_t cuda_entry_tiles(int64_t longest) {
  const int64_t tiles = ceil_div(longest > 0 ? longest : 1, 8);
  return tiles <= 2 ? tiles : tiles <= kCudaBlockTiles ? kCudaBlockTiles : ceil_div(tiles, 2) * 2;
}
constexpr int64_t cuda_concept_tokens(int64_t entries, int64_t longest) {
  return ceil_div(entries * cuda_entry_tiles(longest), 2) * 16;
}

// Bytes of a warp.
constexpr int cuda_warp_bytes(int dim, int stages) { return stages * kCudaQueries * cuda_row(dim) * 2; }

constexpr CudaTiling cuda_laid_out(CudaTiling t, int dim, bool grams) {
  const int row = cuda_row(dim) * 2, prompt = t.prompt_slots + t.pieces * cuda_prompt_tokens(dim);
  const int slots = prompt + t.concept_slots;
  t.concepts = prompt;
  t.values = slots * row;
  t.added = 2 * t.values;
  t.weights = t.added + slots * 4;
  t.norms = t.weights + t.concept_slots * 4;
  t.roster = t.norms + t.concept_slots * 4;
  t.grams = t.roster + t.rosters * kCudaRosterBytes;
  t.queries = t.grams + (grams ? t.rosters * kCudaGramBytes : 0);
  t.turn = t.queries + t.warps * cuda_warp_bytes(dim, t.stages);
  t.shared = t.turn + kCudaTurnBytes;
  return t;
}

// Tiles of 16 queries that the busiest scheduler has: each has every fourth warp of a block, and blocks have equal
// shares of the tiles of all heads, so some see two heads, one after the other.
constexpr int64_t cuda_busiest(int64_t heads, int64_t tiles, int64_t blocks, int64_t warps) {
  const int64_t schedulers = warps < 4 ? warps : 4;
  int64_t most = 0;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t all = heads * tiles, each = all / blocks, more = all % blocks;
    const int64_t begin = each * block + (block < more ? block : more), end = begin + each + (block < more);
    int64_t turns = 0;
    for (int64_t head = begin / tiles; head * tiles < end; ++head) {
      const int64_t first = begin > head * tiles ? begin : head * tiles;
      const int64_t last = end < (head + 1) * tiles ? end : (head + 1) * tiles;
      turns += ceil_div(last - first, schedulers);
    }
    most = turns > most ? turns : most;
  }
  return most;
}

constexpr CudaTiling cuda_tiling(const CudaWork& w) {
  const int dim = static_cast<int>(w.dim);
  const int64_t heads = w.batch * w.heads, tiles = ceil_div(w.queries, kCudaQueries);
  const int64_t concepts = w.entries > 0 ? cuda_concept_tokens(w.entries, w.longest) : 0;
  const CudaKind kind = concepts == 0                  ? CudaKind::plain
                        : concepts <= kCudaBlockTokens ? CudaKind::one
                                                       : CudaKind::many;
  // One block on every multiprocessor, with as many warps as there is work for, but in fours: keys and values are
  // then read once for the longest run of queries.
  const int64_t share = ceil_div(heads * tiles, w.multiprocessors);
  const int64_t most = cuda_most_warps(kind, dim);
  const int64_t fours = share / 4 * 4 < most ? share / 4 * 4 : most;
  const int wanted = static_cast<int>(share < 1 ? 1 : share < 4 ? share : fours);
  // What does not fit all is read piece by piece, a block of tokens at a time.
  const int64_t prompt = ceil_div(w.keys, 16) * 16;
  const int64_t full = ceil_div(concepts, kCudaBlockTokens), blocks = full < w.entries ? full : w.entries;
  const int64_t rosters = w.longest > kCudaBlockTokens ? w.entries : blocks;
  const int64_t piece = concepts < kCudaBlockTokens ? concepts : kCudaBlockTokens;
  struct Choice {
    int64_t prompt, pieces, concepts, rosters;
  };
  const Choice choices[] = {{prompt, 0, concepts, rosters},
                            {prompt, 0, piece, concepts > 0},
                            {0, cuda_most_pieces(dim), concepts, rosters},
                            {0, cuda_most_pieces(dim), piece, concepts > 0},
                            {0, 1, piece, concepts > 0}};
  CudaTiling t{};
  // Half of the warps, or waiting for the queries, costs less than reading the text again for every tile.
  for (int i = 0; i < 5 && t.warps == 0; ++i)
    for (int least = i < 2 ? (wanted + 1) / 2 : 1, warps = wanted; warps >= least && t.warps == 0;
         warps -= warps > 4 ? 4 : 1)
      for (int stages = 2; stages >= 1 && t.warps == 0; --stages) {
        if (choices[i].concepts + choices[i].prompt > 1 << 20) continue;  // no GPU has that, and bytes are an int
        CudaTiling made{};
        made.kind = kind, made.warps = warps, made.stages = stages;
        made.prompt_slots = static_cast<int>(choices[i].prompt);
        made.pieces = static_cast<int>(choices[i].pieces);
        made.concept_slots = static_cast<int>(choices[i].concepts);
        made.rosters = static_cast<int>(choices[i].rosters);
        made = cuda_laid_out(made, dim, w.grams);
        if (made.shared <= w.shared_limit) t = made;
      }
  if (t.warps == 0) return t;  // not even one warp fits
  // Equal shares for all multiprocessors; or, where that is done earlier, blocks that see one head each.
  const int64_t shares = heads * tiles < w.multiprocessors ? heads * tiles : w.multiprocessors;
  const int64_t even = heads > 0 ? shares / heads * heads : 0;
  const bool aligned =
      even > 0 && cuda_busiest(heads, tiles, even, t.warps) < cuda_busiest(heads, tiles, shares, t.warps);
  t.blocks = static_cast<int>(aligned ? even : shares);
  return t;
}

// SD1.5's layers and SDXL's with four concepts of 8 tokens: all multiprocessors of an A100 and an H100, all text.
static_assert(cuda_tiling({2, 8, 4096, 77, 40, 4, 8, true, cuda_shared_limit(80), 108}).blocks == 108);
static_assert(cuda_tiling({2, 20, 1024, 77, 64, 4, 8, true, cuda_shared_limit(90), 132}).concept_slots == 32);
static_assert(cuda_tiling({2, 20, 1024, 77, 64, 4, 8, true, cuda_shared_limit(90), 132}).kind == CudaKind::one);
static_assert(cuda_tiling({2, 8, 64, 77, 160, 4, 8, true, cuda_shared_limit(80), 108}).blocks == 64);  // a tile each
static_assert(cuda_tiling({2, 8, 256, 77, 160, 4, 77, true, cuda_shared_limit(89), 128}).shared <= 99 << 10);

}  // namespace fastnegate
