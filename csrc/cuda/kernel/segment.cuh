// SPDX-License-Identifier: Apache-2.0
// Attention of 16 queries to some tokens, a piece of them after the other.
#pragma once

#include "cuda/kernel/fragments.cuh"

namespace fastnegate::cuda {

// What a block works on, of which it has one copy, in shared memory: a head, of its tiles of 16 queries those from
// `first` to `last`, queries before `end`; how many tiles of later heads follow; and blocks of concept tokens.
struct Turn {
  int b, h, first, last, end, left, blocks;
};
static_assert(sizeof(Turn) <= kCudaTurnBytes);

// 16 queries of the head, and the lane.
struct Place {
  const Turn& turn;
  int first, lane;

  FN_INLINE int query(int r) const { return first + lane / 4 + 8 * r; }
  FN_INLINE bool has(int r) const { return query(r) < turn.end; }
};

// A piece of text in shared memory, as a lane reads it.
template <int D>
struct Piece {
  ptx::Address column, last_column, value;  // of its first token
  const float* added;  // to the logits before they are scaled, of the lane's columns; -inf where there is no token
};

// Softmax sums: out is not yet divided by the mass, which each lane has of its own tokens.
template <class T, int D>
struct Segment {
  Rows<D> out;
  float top[2], mass[2];  // the highest score, before it is scaled

  FN_INLINE void empty() {
    out.clear();
    top[0] = top[1] = -kInfinity;
    mass[0] = mass[1] = 0.f;
  }

  // 16 kPairs tokens at most. `fresh`: the first ones. As many as that have code of their own, in which nothing is
  // asked and no score is kept alive that might not have been computed.
  template <int kPairs, class Left>
  FN_INLINE void add(const Left& q, const Piece<D>& piece, int count, bool biased, float factor, bool fresh) {
    if (count > (kPairs - 1) * 16)
      add_pairs<kPairs, true>(q, piece, count, biased, factor, fresh);
    else
      add_pairs<kPairs, false>(q, piece, count, biased, factor, fresh);
  }

  // Means in the place of sums; the top as a base-2 logit, a number that may be subtracted.
  FN_INLINE void finish(float factor) {
    float inverse[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      mass[r] = sum_of_row(mass[r]);
      inverse[r] = inverse_of(mass[r]);
      top[r] = fmaxf(top[r], kLowest) * factor;
    }
    out.scale(inverse);
  }

 private:
  template <int kPairs, bool kAll, class Left>
  FN_INLINE void add_pairs(const Left& q, const Piece<D>& piece, int count, bool biased, float factor, bool fresh) {
    float s[2 * kPairs][4];
    float highest[2] = {top[0], top[1]};
    repeat<kPairs>([&](auto pair) {
      constexpr int j = 2 * pair.value;
      if (!kAll && j * 8 >= count) {
#pragma unroll
        for (int c = 0; c < 4; ++c) s[j][c] = s[j + 1][c] = -kInfinity;
        return;
      }
      score<T, D, pair.value>(q, piece.column, piece.last_column, s[j], s[j + 1]);
      // Only the last pair has places without a token.
      if (biased || ((!kAll || pair.value == kPairs - 1) && (j + 2) * 8 > count)) {
#pragma unroll
        for (int i = j; i < j + 2; ++i) {
          const float2 more = *reinterpret_cast<const float2*>(piece.added + i * 8);
          s[i][0] += more.x, s[i][1] += more.y, s[i][2] += more.x, s[i][3] += more.y;
        }
      }
#pragma unroll
      for (int i = j; i < j + 2; ++i)
#pragma unroll
        for (int r = 0; r < 2; ++r) highest[r] = fmaxf(highest[r], fmaxf(s[i][2 * r], s[i][2 * r + 1]));
    });
    float base[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      highest[r] = top_of_row(highest[r]);
      base[r] = ptx::opaque(fmaxf(highest[r], kLowest));  // of no token -inf, which must not be subtracted
    }
    if (!fresh) {
      const float shrink[2] = {ptx::exp2((top[0] - base[0]) * factor), ptx::exp2((top[1] - base[1]) * factor)};
      mass[0] *= shrink[0], mass[1] *= shrink[1];
      out.scale(shrink);
    }
    top[0] = highest[0], top[1] = highest[1];
    repeat<kPairs>([&](auto pair) {
      constexpr int j = 2 * pair.value;
#pragma unroll
      for (int i = j; i < j + 2; ++i) {
        // Scaled after the subtraction, the weights of the tokens that matter are the most exact.
#pragma unroll
        for (int c = 0; c < 4; ++c) s[i][c] = ptx::exp2((s[i][c] - base[c / 2]) * factor);
        mass[0] += s[i][0] + s[i][1];
        mass[1] += s[i][2] + s[i][3];
      }
      if (!kAll && j * 8 >= count) return;
      uint32_t p[4];
      pack_pair<T>(s[j], s[j + 1], p);
      add_values<T, D, pair.value>(p, piece.value, out);
    });
  }
};

}  // namespace fastnegate::cuda
