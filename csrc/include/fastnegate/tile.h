// SPDX-License-Identifier: Apache-2.0
// (problem, machine) -> how the work is cut: pure functions, each choice with its reason.
#pragma once

#include <cstdint>

namespace fastnegate {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Of the CPU kernel. A tile is `queries` queries of one head; a unit of work, which a thread takes at
// a time, is the same queries of `heads` neighbouring heads.
struct CpuTiling {
  int64_t queries, heads;
};

struct CpuWork {
  int64_t batch, heads, queries, keys, tokens, dim;  // B, H, N, M, T, D
  int64_t lanes;                                     // floats per vector register
  int64_t threads;
};

constexpr CpuTiling cpu_tiling(const CpuWork& w) {
  // Two vectors of queries: register tiles of 8 x 2 (of 32 registers) and 4 x 2 (of 16) take 10 and 6
  // loads for 16 and 8 multiply-adds, so that two loads a cycle keep two multipliers busy.
  const int64_t queries = 2 * w.lanes;
  // Neighbouring heads are neighbours in [B, N, H, D] memory: together they use whole cache lines and
  // pages (N = 4096, two threads: head by head takes 1.16 of the time at D = 40, 1.15 at D = 64). As many
  // as keep their packed keys and values in half of a 1 MiB second-level cache, which other tiles of the
  // same heads then find there.
  const int64_t head_bytes = 2 * (w.keys + w.tokens) * w.dim * 4;
  int64_t heads = head_bytes > 0 ? (512 << 10) / head_bytes : w.heads;
  heads = heads < 1 ? 1 : heads > w.heads ? w.heads : heads;
  // At least four units a thread, or the last one to finish is waited for: 2 x 8 heads of 64 queries
  // on 2 threads are 4 units otherwise.
  const int64_t tiles = w.batch * ceil_div(w.queries, queries);
  while (heads > 1 && tiles * ceil_div(w.heads, heads) < 4 * w.threads) heads = ceil_div(heads, 2);
  // Units of equal size.
  return {queries, heads > 1 ? ceil_div(w.heads, ceil_div(w.heads, heads)) : 1};
}

// SD1.5's layers and SDXL's on two threads of AVX-512: cache, balance, and the end of the range.
static_assert(cpu_tiling({2, 8, 4096, 77, 0, 40, 16, 2}).heads == 8);
static_assert(cpu_tiling({2, 20, 1024, 77, 32, 64, 16, 2}).heads == 7);
static_assert(cpu_tiling({2, 8, 64, 77, 0, 160, 16, 2}).heads == 4);
static_assert(cpu_tiling({1, 8, 1, 1024, 1024, 256, 16, 64}).heads == 1);

// ---- the CUDA kernel --------------------------------------------------------------------------------

// Elements from one row to the next in shared memory: an odd number of 16 bytes, so that eight rows in a row
// lie in eight different groups of banks, and nothing has to be permuted.
constexpr int cuda_row(int dim) { return (dim / 8 | 1) * 8; }

// Tokens of a softmax at a time. 77 keys are 80: scores take 40 registers while nothing but Z is alive, dim / 2 of
// them. With 160 channels that is too many.
constexpr int cuda_prompt_tokens(int dim) { return dim <= 128 ? 80 : 64; }
// Of a concept fewer: F, and what is removed, are alive beside Z.
constexpr int kCudaConceptTokens = 16;

constexpr int kCudaQueries = 16;  // of a warp at a time: the rows of a matrix instruction

constexpr int kCudaMostWarps = 8;  // of a block: with 255 registers a lane they fill a multiprocessor

// Bytes of shared memory that a block may have, by compute capability (CUDA C++ Programming Guide, table
// "Technical Specifications per Compute Capability": what a multiprocessor has, but for 1 KiB of the system).
constexpr int cuda_shared_limit(int arch) {
  return arch == 80 || arch == 87                              ? 163 << 10
         : arch == 90 || arch == 100 || arch == 103 || arch == 110 ? 227 << 10
                                                               : 99 << 10;  // 86, 89, 120, 121
}

struct CudaTiling {
  int warps, blocks;
  int stages;         // 2: the next queries are read while these are worked on
  int prompt_slots;   // tokens of the prompt that stay in shared memory: all, or 0
  int concept_slots;  // the same of the concepts of a batch row: all of them, or pieces take turns
  int shared;         // bytes
};

struct CudaWork {
  int64_t batch, heads, queries, keys, tokens, dim;  // tokens: at most, of the concepts of a batch row
  int shared_limit, multiprocessors;
};

// Channels of Z, and of what is removed, that a warp has in registers; the rest of them lies in shared memory. As
// many as compilers for 8.0 to 12.0 find room for, of 255 registers, without spilling.
constexpr int cuda_z_registers(int dim) { return dim < 64 ? dim : dim == 64 ? 48 : 0; }
constexpr int cuda_removed_registers(int dim) { return dim <= 96 ? dim : dim <= 128 ? 48 : 24; }

constexpr int cuda_slot_bytes(int dim) { return 2 * cuda_row(dim) * 2 + 2 * 4; }  // key, value, bias, weight
constexpr int cuda_warp_bytes(int dim, int stages) {
  const int rest = 2 * dim - cuda_z_registers(dim) - cuda_removed_registers(dim);
  return stages * kCudaQueries * cuda_row(dim) * 2 + kCudaQueries * rest * 4;
}

// Turns that the slowest block takes: in each, its warps have one tile of 16 queries of the same head. Blocks have
// equal shares of the tiles of all heads, so some see two heads, and have a turn more.
constexpr int64_t cuda_turns(int64_t heads, int64_t tiles, int64_t blocks, int64_t warps) {
  int64_t most = 0;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t all = heads * tiles, each = all / blocks, more = all % blocks;
    const int64_t begin = each * block + (block < more ? block : more), end = begin + each + (block < more);
    int64_t turns = 0;
    for (int64_t head = begin / tiles; head * tiles < end; ++head) {
      const int64_t first = begin > head * tiles ? begin : head * tiles;
      const int64_t last = end < (head + 1) * tiles ? end : (head + 1) * tiles;
      turns += ceil_div(last - first, warps);
    }
    most = turns > most ? turns : most;
  }
  return most;
}

constexpr CudaTiling cuda_tiling(const CudaWork& w) {
  const int dim = static_cast<int>(w.dim), slot = cuda_slot_bytes(dim);
  const int64_t heads = w.batch * w.heads, tiles = ceil_div(w.queries, kCudaQueries);
  // One block on every multiprocessor, with as many warps as there is work for: keys and values are then read
  // once for the longest run of queries.
  const int64_t share = ceil_div(heads * tiles, w.multiprocessors);
  const int wanted = static_cast<int>(share < 1 ? 1 : share > kCudaMostWarps ? kCudaMostWarps : share);
  // A piece, where not everything fits: the longer of prompt and concept pieces.
  const int64_t prompt = ceil_div(w.keys, 8) * 8, concepts = ceil_div(w.tokens, 8) * 8;
  const int64_t prompt_piece = prompt < cuda_prompt_tokens(dim) ? prompt : cuda_prompt_tokens(dim);
  const int64_t concept_piece = concepts < kCudaConceptTokens ? concepts : kCudaConceptTokens;
  const int64_t piece = prompt_piece > concept_piece ? prompt_piece : concept_piece;
  struct Choice {
    int64_t prompt, concepts;
  };
  const Choice choices[] = {{prompt, concepts}, {prompt, concept_piece}, {0, piece}};
  CudaTiling t{0, 0, 0, 0, 0, 0};
  // Half of the warps, or waiting for the queries, costs less than reading the text again for every tile.
  for (int i = 0; i < 3 && t.warps == 0; ++i)
    for (int least = i < 2 ? (wanted + 1) / 2 : 1, warps = wanted; warps >= least && t.warps == 0; --warps)
      for (int stages = 2; stages >= 1 && t.warps == 0; --stages) {
        const int64_t bytes = (choices[i].prompt + choices[i].concepts) * slot +
                              static_cast<int64_t>(warps) * cuda_warp_bytes(dim, stages);
        if (bytes <= w.shared_limit)
          t = {warps, 0, stages, static_cast<int>(choices[i].prompt), static_cast<int>(choices[i].concepts),
               static_cast<int>(bytes)};
      }
  if (t.warps == 0) return t;  // not even one warp fits
  // Equal shares for all multiprocessors; or, where that saves a turn, blocks that see one head each.
  const int64_t most = heads * tiles < w.multiprocessors ? heads * tiles : w.multiprocessors;
  const int64_t even = heads > 0 ? most / heads * heads : 0;
  const int64_t turns = most > 0 ? cuda_turns(heads, tiles, most, t.warps) : 1;
  const bool aligned = even > 0 && cuda_turns(heads, tiles, even, t.warps) < turns;
  t.blocks = static_cast<int>(aligned ? even : most);
  // No more warps than take the same turns, and a row's concepts stay if there is room for them: how many they
  // are is known on the device.
  while (t.warps > 1 && most > 0 &&
         cuda_turns(heads, tiles, t.blocks, t.warps - 1) == cuda_turns(heads, tiles, t.blocks, t.warps))
    --t.warps;
  const int64_t taken = t.prompt_slots * slot + t.warps * cuda_warp_bytes(dim, t.stages);
  const int64_t room = (w.shared_limit - taken) / slot / 8 * 8;
  if (t.prompt_slots > 0) t.concept_slots = static_cast<int>(concepts < room ? concepts : room);
  t.shared = static_cast<int>(taken + t.concept_slots * slot);
  return t;
}

// SD1.5's layers and SDXL's with four concepts of 8 tokens: all multiprocessors of an A100 and an H100, all text.
static_assert(cuda_tiling({2, 8, 4096, 77, 32, 40, cuda_shared_limit(80), 108}).blocks == 108);
static_assert(cuda_tiling({2, 8, 4096, 77, 32, 40, cuda_shared_limit(90), 132}).blocks == 128);  // a turn less
static_assert(cuda_tiling({2, 20, 1024, 77, 32, 64, cuda_shared_limit(90), 132}).concept_slots == 32);
static_assert(cuda_tiling({2, 8, 64, 77, 32, 160, cuda_shared_limit(80), 108}).blocks == 64);  // a tile each
static_assert(cuda_tiling({2, 8, 256, 77, 320, 160, cuda_shared_limit(89), 128}).shared <= 99 << 10);

}  // namespace fastnegate
