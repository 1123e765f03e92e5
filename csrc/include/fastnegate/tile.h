// SPDX-License-Identifier: Apache-2.0
// (problem, machine) -> how the CPU kernel cuts the work: pure functions, each choice with its reason.
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

}  // namespace fastnegate
