// SPDX-License-Identifier: Apache-2.0
// Matrices in registers, as matrix instructions lay them out: a warp has 16 rows, of which lane l has g = l / 4 and
// g + 8, and of each tile of 8 columns the columns 2 t and 2 t + 1, t = l % 4. The four lanes of a row are a quad.
#pragma once

#include <type_traits>

#include "cuda/kernel/scalars.cuh"
#include "cuda/tiling.h"

namespace fastnegate::cuda {

constexpr int kWarp = 32;

// f(0), f(1), ..., whose argument is known when compiling: an offset of an instruction can be made of it.
template <int kValue>
struct Number {
  static constexpr int value = kValue;
};
template <int kCount, int kFirst = 0, class Body>
FN_INLINE void repeat(const Body& f) {
  if constexpr (kFirst < kCount) {
    f(Number<kFirst>{});
    repeat<kCount, kFirst + 1>(f);
  }
}

// x, which is the same in all lanes. Only after this does the compiler know that it is: that a branch or a loop keeps a
// warp together, and no exchange of lanes has to be prepared for the case that it does not.
FN_INLINE int uniform(int x) { return __reduce_max_sync(~0u, x); }

// ---- the lanes of a row -----------------------------------------------------------------------------

// The same bits in each lane of a quad.
FN_INLINE float sum_of_row(float x) {
  x += ptx::exchange<1>(x);
  return x + ptx::exchange<2>(x);
}
FN_INLINE float top_of_row(float x) {
  x = fmaxf(x, ptx::exchange<1>(x));
  return fmaxf(x, ptx::exchange<2>(x));
}

// Four sums over the quad, of which lane t gets that of x[t]: 3 exchanges instead of 8.
FN_INLINE float own_sum(const float (&x)[4], int t) {
  const bool high = t & 2, odd = t & 1;
  const float even = (high ? x[2] : x[0]) + ptx::exchange<2>(high ? x[0] : x[2]);
  const float next = (high ? x[3] : x[1]) + ptx::exchange<2>(high ? x[1] : x[3]);
  return (odd ? next : even) + ptx::exchange<1>(odd ? even : next);
}

FN_INLINE float own(const float (&x)[4], int t) {
  const bool high = t & 2;
  return t & 1 ? (high ? x[3] : x[1]) : (high ? x[2] : x[0]);
}

// ---- rows of channels -------------------------------------------------------------------------------

// 16 rows of D channels: at[i] has those of tile i, of row g, g, g + 8 and g + 8.
template <int D>
struct Rows {
  float at[D / 8][4];
  FN_INLINE void clear() {
#pragma unroll
    for (int i = 0; i < D / 8; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) at[i][j] = 0.f;
  }
  FN_INLINE void scale(const float (&by)[2]) {
#pragma unroll
    for (int i = 0; i < D / 8; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) at[i][j] *= by[j / 2];
  }
};

// Sums over the channels of each row of f(i, j), j as in Rows.
template <int D, class Term>
FN_INLINE void over_channels(const Term& f, float (&sum)[2]) {
  float part[2] = {0.f, 0.f};
#pragma unroll
  for (int i = 0; i < D / 8; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) part[j / 2] = f(i, j, part[j / 2]);
  sum[0] = sum_of_row(part[0]), sum[1] = sum_of_row(part[1]);
}
template <int D>
FN_INLINE void inner(const Rows<D>& a, const Rows<D>& b, float (&sum)[2]) {
  over_channels<D>([&](int i, int j, float part) { return fmaf(a.at[i][j], b.at[i][j], part); }, sum);
}

// ---- left operands: 16 rows of D channels, rounded -----------------------------------------------------

// In registers.
template <class T, int D>
struct Packed {
  uint32_t at[D / 8][2];
  // Of 16 rows in shared memory.
  FN_INLINE void load(ptx::Address rows, int lane) {
    const ptx::Address row = rows + (lane % 16 * cuda_row(D) + lane / 16 * 8) * 2;
    repeat<D / 16>([&](auto k) {
      uint32_t m[4];
      ptx::load_matrices<k.value * 32>(m, row);
      at[2 * k.value][0] = m[0], at[2 * k.value][1] = m[1];
      at[2 * k.value + 1][0] = m[2], at[2 * k.value + 1][1] = m[3];
    });
    if constexpr (D % 16 != 0) ptx::load_matrices<D / 16 * 32>(at[D / 8 - 1], row);
  }
  FN_INLINE void round(const Rows<D>& rows) {
#pragma unroll
    for (int i = 0; i < D / 8; ++i)
      at[i][0] = ptx::pack<T>(rows.at[i][0], rows.at[i][1]), at[i][1] = ptx::pack<T>(rows.at[i][2], rows.at[i][3]);
  }
  // Registers of channels 16 k ... 16 k + 15 (or + 7, at the end).
  template <int k>
  FN_INLINE void get(uint32_t (&a)[4]) const {
    a[0] = at[2 * k][0], a[1] = at[2 * k][1];
    if constexpr (2 * k + 1 < D / 8) a[2] = at[2 * k + 1][0], a[3] = at[2 * k + 1][1];
  }
};

// In shared memory, from where they are loaded again at every use: wide heads leave no registers.
template <class T, int D>
struct Stored {
  ptx::Address row;
  FN_INLINE void load(ptx::Address rows, int lane) { row = rows + (lane % 16 * cuda_row(D) + lane / 16 * 8) * 2; }
  template <int k>
  FN_INLINE void get(uint32_t (&a)[4]) const {
    if constexpr (2 * k + 1 < D / 8) {
      ptx::load_matrices<k * 32>(a, row);
    } else {
      uint32_t half[2];
      ptx::load_matrices<k * 32>(half, row);
      a[0] = half[0], a[1] = half[1];
    }
  }
};
template <class T, int D>
using Queries = std::conditional_t<D <= 64, Packed<T, D>, Stored<T, D>>;

// Two tiles of 8 columns as the left operand of a product over them.
template <class T>
FN_INLINE void pack_pair(const float (&x)[4], const float (&y)[4], uint32_t (&a)[4]) {
  a[0] = ptx::pack<T>(x[0], x[1]), a[1] = ptx::pack<T>(x[2], x[3]);
  a[2] = ptx::pack<T>(y[0], y[1]), a[3] = ptx::pack<T>(y[2], y[3]);
}

// ---- products with tokens: rows of D channels in shared memory ------------------------------------------

// Where a lane's rows are, of keys (or values) of 16 tokens as the columns of a right operand.
template <int D>
FN_INLINE ptx::Address column_of(ptx::Address tokens, int lane) {
  return tokens + ((lane / 16 * 8 + lane % 8) * cuda_row(D) + lane / 8 % 2 * 8) * 2;
}
// And of the last 8 channels, where D is no multiple of 16.
template <int D>
FN_INLINE ptx::Address last_column_of(ptx::Address tokens, int lane) {
  return tokens + (lane % 16 * cuda_row(D) + D - 8) * 2;
}
// Of values of 16 tokens as the rows of a right operand.
template <int D>
FN_INLINE ptx::Address value_of(ptx::Address tokens, int lane) {
  return tokens + (lane % 16 * cuda_row(D) + lane / 16 * 8) * 2;
}

// Inner products of 16 rows with the tokens 16 kPair ... of a text: s[0] and s[1] are tiles of 8.
template <class T, int D, int kPair, class Left>
FN_INLINE void score(const Left& left, ptx::Address column, ptx::Address last_column, float (&first)[4],
                     float (&second)[4]) {
  constexpr int kAt = kPair * 16 * cuda_row(D) * 2;
#pragma unroll
  for (int i = 0; i < 4; ++i) first[i] = second[i] = 0.f;
  repeat<D / 16>([&](auto k) {
    uint32_t a[4], b[4];
    left.template get<k.value>(a);
    ptx::load_matrices<kAt + k.value * 32>(b, column);
    ptx::multiply<T>(first, a, b[0], b[1], first);
    ptx::multiply<T>(second, a, b[2], b[3], second);
  });
  if constexpr (D % 16 != 0) {
    uint32_t a[4], b[2];
    left.template get<D / 16>(a);
    ptx::load_matrices<kAt>(b, last_column);
    ptx::multiply_half<T>(first, a, b[0], first);
    ptx::multiply_half<T>(second, a, b[1], second);
  }
}

// out += p V of the tokens 16 kPair ...
template <class T, int D, int kPair>
FN_INLINE void add_values(const uint32_t (&p)[4], ptx::Address value, Rows<D>& out) {
  constexpr int kAt = kPair * 16 * cuda_row(D) * 2;
  repeat<D / 16>([&](auto n) {
    uint32_t b[4];
    ptx::load_transposed<kAt + n.value * 32>(b, value);
    ptx::multiply<T>(out.at[2 * n.value], p, b[0], b[1], out.at[2 * n.value]);
    ptx::multiply<T>(out.at[2 * n.value + 1], p, b[2], b[3], out.at[2 * n.value + 1]);
  });
  if constexpr (D % 16 != 0) {
    uint32_t b[2];
    ptx::load_transposed<kAt + D / 16 * 32>(b, value);
    ptx::multiply<T>(out.at[D / 8 - 1], p, b[0], b[1], out.at[D / 8 - 1]);
  }
}

}  // namespace fastnegate::cuda
