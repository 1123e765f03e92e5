// SPDX-License-Identifier: Apache-2.0
// Products of small matrices in registers, and rows in memory <-> [channel][lane]. Like vec.h, included
// once per instruction set, in that set's namespace.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernel.h"
#include "vec.h"

namespace fastnegate::FASTNEGATE_ISA {
namespace {

#if FASTNEGATE_LANES == 16 || defined(__aarch64__)
constexpr int kStep = 8;  // rows per register tile: 8 x 2 of 32 registers
#else
constexpr int kStep = 4;  // 4 x 2 of 16 registers
#endif

// A float32 sum of n products is off by up to n roundings; cutting it into chains keeps sums within the
// accuracy budget: over the full grid chains of 64 used up to 1.15 of it, chains of 32 up to 1.03 and
// chains of 16 up to 1.09, in short sums only (D = 16); with chains of 8 there, the worst of all is 0.93.
constexpr int64_t chain(int64_t depth) { return depth <= 32 ? 8 : 16; }

// c[r][q] = scale[q] * sum_k a[k][r] b[k][q] for ROWS rows and NQ vectors of queries; a[k] starts kRows
// floats after a[k - 1]. Without scale, 1.
template <class Op, int ROWS, int NQ>
FN_INLINE void multiply_step(const float* a, int64_t depth, const float* b,
                             const F* scale, float* c) {
  int64_t begin = 0;
  do {
    const int64_t end = std::min(depth, begin + chain(depth));
    F sum[ROWS][NQ] = {};
    for (int64_t k = begin; k < end; ++k, a += kRows, b += NQ * W) {
      F x[NQ];
      for (int q = 0; q < NQ; ++q) x[q] = load(b + q * W);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) {
        const F y = splat(a[r]);
        for (int q = 0; q < NQ; ++q) sum[r][q] = Op::apply(y, x[q], sum[r][q]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
      for (int q = 0; q < NQ; ++q) {
        float* at = c + (r * NQ + q) * W;
        const F total = begin ? load(at) + sum[r][q] : sum[r][q];
        store(at, scale && end == depth ? total * scale[q] : total);
      }
    begin = end;
  } while (begin < depth);
}

template <class Op, int NQ>
void multiply_rest(int64_t rows, const float* a, int64_t depth, const float* b,
                   const F* scale, float* c) {
  switch (rows) {
    case 1: return multiply_step<Op, 1, NQ>(a, depth, b, scale, c);
    case 2: return multiply_step<Op, 2, NQ>(a, depth, b, scale, c);
    case 3: return multiply_step<Op, 3, NQ>(a, depth, b, scale, c);
  }
  if constexpr (kStep == 8) switch (rows) {
      case 4: return multiply_step<Op, 4, NQ>(a, depth, b, scale, c);
      case 5: return multiply_step<Op, 5, NQ>(a, depth, b, scale, c);
      case 6: return multiply_step<Op, 6, NQ>(a, depth, b, scale, c);
      case 7: return multiply_step<Op, 7, NQ>(a, depth, b, scale, c);
    }
}

struct Nothing {
  void operator()() const {}
};

// The same for any number of rows in blocks a[rows / kRows][depth][kRows], with something done between
// steps.
template <class Op, int NQ, class Between = Nothing>
void multiply(int64_t rows, const float* a, int64_t depth, const float* b, const F* scale, float* c,
              Between between = {}) {
  for (int64_t r = 0; r < rows; r += kStep) {
    const float* from = a + r / kRows * depth * kRows + r % kRows;
    float* to = c + r * NQ * W;
    if (rows - r >= kStep)
      multiply_step<Op, kStep, NQ>(from, depth, b, scale, to);
    else
      multiply_rest<Op, NQ>(rows - r, from, depth, b, scale, to);
    between();
  }
}

// ---- rows in memory <-> [channel][lane] ---------------------------------------------------------

// x[channel][lane] of W rows; channels are `stride` floats apart.
template <class Storage>
FN_INLINE void load_rows(const char* const (&row)[W], int64_t dim, float* x, int64_t stride) {
  constexpr int kPer = Storage::kPerWord;
  for (int64_t d = 0; d < dim; d += 4 * kPer) {
    U words[4];
    load_words(row, d * sizeof(typename Storage::T), words);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      F channels[kPer];
      Storage::unpack(words[i], channels);
      for (int k = 0; k < kPer; ++k) store(x + (d + i * kPer + k) * stride, channels[k]);
    }
  }
}

// The inverse, for the first `count` rows: channel d is channel(d, j), where j counts 4 kPerWord channels.
template <class Storage, class Channel>
FN_INLINE void store_rows(char* const (&row)[W], int64_t count, int64_t dim, Channel channel) {
  constexpr int kPer = Storage::kPerWord;
  for (int64_t d = 0; d < dim; d += 4 * kPer) {
    U words[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      F channels[kPer];
      for (int k = 0; k < kPer; ++k) channels[k] = channel(d + i * kPer + k, i * kPer + k);
      words[i] = Storage::pack(channels);
    }
    store_words(row, d * sizeof(typename Storage::T), count, words);
  }
}

}  // namespace
}  // namespace fastnegate::FASTNEGATE_ISA
