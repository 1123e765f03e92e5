// SPDX-License-Identifier: Apache-2.0
// (problem, machine) -> how the work is cut: pure functions, each choice with its reason.
#pragma once

#include <cstdint>

namespace fastnegate {

// Of the CPU kernel. A tile is `queries` queries of one head; a unit of work, which one thread takes
// at a time, is the same queries of `heads` neighbouring heads.
struct CpuTiling {
  int64_t queries, heads;
};

struct CpuWork {
  int64_t batch, heads, queries;  // B, H, N
  int64_t head_bytes;             // packed keys and values of one head, prompt and concepts
  int64_t lanes;                  // floats per vector register
  int64_t threads;
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr CpuTiling cpu_tiling(const CpuWork& w) {
  // Two vectors of queries: register tiles of 8 x 2 (32 registers) or 4 x 2 (16) need 10 (6) loads
  // for 16 (8) multiply-adds, so that two loads a cycle keep two multipliers busy.
  const int64_t queries = 2 * w.lanes;
  // Neighbouring heads are neighbours in memory ([B, N, H, D]): together they read and write whole
  // cache lines in order. Their packed keys and values must stay in half of a 1 MiB L2.
  constexpr int64_t kCache = 512 << 10;
  int64_t heads = w.head_bytes > 0 ? kCache / w.head_bytes : w.heads;
  heads = heads < 1 ? 1 : heads > w.heads ? w.heads : heads;
  // At least four units a thread, or the last one to finish is waited for (N = 64).
  const int64_t tiles = w.batch * ceil_div(w.queries, queries);
  while (heads > 1 && tiles * ceil_div(w.heads, heads) < 4 * w.threads) heads = ceil_div(heads, 2);
  // Units of equal size.
  if (heads > 0) heads = ceil_div(w.heads, ceil_div(w.heads, heads));
  return {queries, heads};
}

}  // namespace fastnegate
