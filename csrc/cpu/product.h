// SPDX-License-Identifier: Apache-2.0
// Products of small matrices in registers, and rows in memory <-> [channel][lane]. Like vec.h, included
// once per instruction set, in that set's namespace.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "fastnegate/tile.h"
#include "kernel.h"
#include "tiles.h"
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

// ---- products of tiles --------------------------------------------------------------------------

// c = a b for BLOCKS tiles of rows of a, `steps` tiles deep. Tiles 0 to 3 sum, 4 and 5 hold rows of a, 6 and 7 queries
// of b: each that is loaded serves two products.
template <int BLOCKS, int NQ>
FN_INLINE void multiply_tiles_step(const float* a, int64_t steps, const float* b, float* c) {
  constexpr int64_t kStride = NQ * W * sizeof(float);
  const float* below = a + steps * kTileFloats;
  tile_zero(0);
  if constexpr (NQ == 2) tile_zero(1);
  if constexpr (BLOCKS == 2) tile_zero(2);
  if constexpr (BLOCKS == 2 && NQ == 2) tile_zero(3);
  for (int64_t k = 0; k < steps; ++k, a += kTileFloats, below += kTileFloats, b += kTileRows * NQ * W) {
    tile_load(4, a, kTileBytes);
    tile_load(6, b, kStride);
    tile_add_product(0, 4, 6);
    if constexpr (NQ == 2) {
      tile_load(7, b + W, kStride);
      tile_add_product(1, 4, 7);
    }
    if constexpr (BLOCKS == 2) {
      tile_load(5, below, kTileBytes);
      tile_add_product(2, 5, 6);
      if constexpr (NQ == 2) tile_add_product(3, 5, 7);
    }
  }
  float* under = c + kTileRows * NQ * W;
  tile_store(0, c, kStride);
  if constexpr (NQ == 2) tile_store(1, c + W, kStride);
  if constexpr (BLOCKS == 2) tile_store(2, under, kStride);
  if constexpr (BLOCKS == 2 && NQ == 2) tile_store(3, under + W, kStride);
}

// c[r][q] = scale[q] * sum_k a[r][k] b[k][q] for `rows` rows: a in tiles [ceil(rows / kTileRows)][steps], b in words
// [steps * kTileRows][NQ W]. Without scale, 1.
template <int NQ, class Between = Nothing>
void multiply_tiles(int64_t rows, const float* a, int64_t steps, const float* b, const F* scale, float* c,
                    Between between = {}) {
  static_assert(NQ * W == NQ * kTileRows, "a vector of queries is as wide as a tile");
  std::atomic_signal_fence(std::memory_order_seq_cst);  // g++ 12 does not know that loading a tile reads memory
  alignas(64) float apart[2 * kTileRows * NQ * W];
  F factor[NQ];
  for (int q = 0; q < NQ; ++q) factor[q] = scale ? scale[q] : splat(1.f);
  for (int64_t r = 0; r < rows; r += 2 * kTileRows, a += 2 * steps * kTileFloats) {
    const int64_t left = std::min(2 * kTileRows, rows - r);
    float* to = c + r * NQ * W;
    float* into = scale || left % kTileRows ? apart : to;  // tiles are written whole
    if (left > kTileRows)
      multiply_tiles_step<2, NQ>(a, steps, b, into);
    else
      multiply_tiles_step<1, NQ>(a, steps, b, into);
    if (into != to)
      for (int64_t i = 0; i < left; ++i)
        for (int q = 0; q < NQ; ++q) store(to + (i * NQ + q) * W, load(into + (i * NQ + q) * W) * factor[q]);
    between();
  }
}

// Weights s[n][lane], times `scale` if there is one, become words of two tokens, s[ceil(n / 2)][lane], and zeros
// up to whole tiles. In place: a word is written where weights have been read.
template <int NQ>
FN_INLINE void pack_weights(float* s, int64_t n, const F* scale) {
  const auto weight = [&](int64_t j, int q) {
    const F w = load(s + (j * NQ + q) * W);
    return scale ? w * scale[q] : w;
  };
  const auto put = [&](int64_t j, int q, F even, F odd) {
    const F both[2] = {even, odd};
    store(s + (j * NQ + q) * W, (F)BFloat16::pack(both));
  };
  for (int64_t j = 0; j < n / 2; ++j)
    for (int q = 0; q < NQ; ++q) put(j, q, weight(2 * j, q), weight(2 * j + 1, q));
  for (int q = 0; n % 2 && q < NQ; ++q) put(n / 2, q, weight(n - 1, q), F{});
  const int64_t words = (n + 1) / 2, padded = ceil_div(n, kTileDepth) * kTileRows;
  std::memset(s + words * NQ * W, 0, sizeof(float) * (padded - words) * NQ * W);
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
