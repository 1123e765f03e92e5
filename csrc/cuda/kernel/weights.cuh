// SPDX-License-Identifier: Apache-2.0
// What 16 queries give to the tokens of a block: scores, then p of a softmax for each entry, not divided by its mass.
#pragma once

#include "cuda/kernel/roster.cuh"

namespace fastnegate::cuda {

// Sums over the tokens of the entry that has tile t, which the lane t of a quad gets, of f(tile, j), j as in Rows.
template <class Term>
FN_INLINE void sum_tiles(const Slot& mine, int joined, int t, const Term& f, float (&sum)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float of_tiles[4] = {f(0, 2 * r) + f(0, 2 * r + 1), f(1, 2 * r) + f(1, 2 * r + 1),
                               f(2, 2 * r) + f(2, 2 * r + 1), f(3, 2 * r) + f(3, 2 * r + 1)};
    sum[r] = own_sum(of_tiles, t);
    if (joined & (kFirstTwo | kLastTwo | kFour)) {
      const float pair = sum[r] + ptx::exchange<1>(sum[r]), four = pair + ptx::exchange<2>(pair);
      sum[r] = mine.tiles == 1 ? sum[r] : mine.tiles == 2 ? pair : four;
    }
  }
}

template <class T, int D>
class Weights {
 public:
  FN_INLINE Weights(const Launch& launch, const Text<T, D>& text, int lane) : l(launch), text(text), lane(lane) {}

  float at[4][4];  // of each tile, as in Rows

  // Scores of the tokens from slot `first` on. `more`: something is added to them.
  template <class Left>
  FN_INLINE void score_tiles(const Left& q, int first, int tiles, bool more) {
    const Piece<D> piece = text.piece(first, lane);
    repeat<2>([&](auto pair) {
      constexpr int j = 2 * pair.value;
      if (j > 0 && j >= tiles) {
#pragma unroll
        for (int i = 0; i < 4; ++i) at[j][i] = at[j + 1][i] = -kInfinity;
        return;
      }
      score<T, D, pair.value>(q, piece.column, piece.last_column, at[j], at[j + 1]);
      if (!more) return;
#pragma unroll
      for (int i = j; i < j + 2; ++i) {
        const float2 added = *reinterpret_cast<const float2*>(piece.added + i * 8);
        at[i][0] += added.x, at[i][1] += added.y, at[i][2] += added.x, at[i][3] += added.y;
      }
    });
  }

  // The highest score of each tile's entry; of no token the lowest number, -inf must not be subtracted.
  FN_INLINE void find_tops(int joined, float (&tops)[4][2]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int r = 0; r < 2; ++r) tops[i][r] = fmaxf(top_of_row(fmaxf(at[i][2 * r], at[i][2 * r + 1])), kLowest);
    if (!(joined & (kFirstTwo | kLastTwo | kFour))) return;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float first = fmaxf(tops[0][r], tops[1][r]), last = fmaxf(tops[2][r], tops[3][r]);
      if (joined & kFirstTwo) tops[0][r] = tops[1][r] = first;
      if (joined & kLastTwo) tops[2][r] = tops[3][r] = last;
      if (joined & kFour) tops[0][r] = tops[1][r] = tops[2][r] = tops[3][r] = fmaxf(first, last);
    }
  }

  // From scores to p.
  FN_INLINE void weigh(const float (&tops)[4][2]) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) at[i][j] = exp2((at[i][j] - tops[i][j / 2]) * l.factor);
  }

  // Times the weights of the values, which no mass has.
  FN_INLINE void take_weights(int first, int tiles) {
    const float* of_values = text.weights(first) + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i / 2 * 2 >= tiles) continue;
      const float2 w = *reinterpret_cast<const float2*>(of_values + i * 8);
      at[i][0] *= w.x, at[i][1] *= w.y, at[i][2] *= w.x, at[i][3] *= w.y;
    }
  }

  // y += sum b p V; each lane has b of its tile.
  FN_INLINE void add(int first, int tiles, const float (&b)[2], Rows<D>& y) const {
    const Piece<D> piece = text.piece(first, lane);
    repeat<2>([&](auto pair) {
      constexpr int j = 2 * pair.value;
      if (j > 0 && j >= tiles) return;
      float mixed[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float by[2] = {i ? ptx::of_lane<j + 1>(b[0]) : ptx::of_lane<j>(b[0]),
                             i ? ptx::of_lane<j + 1>(b[1]) : ptx::of_lane<j>(b[1])};
#pragma unroll
        for (int c = 0; c < 4; ++c) mixed[i][c] = at[j + i][c] * by[c / 2];
      }
      uint32_t packed[4];
      pack_pair<T>(mixed[0], mixed[1], packed);
      add_values<T, D, pair.value>(packed, piece.value, y);
    });
  }

 private:
  const Launch& l;
  const Text<T, D>& text;
  const int lane;
};

}  // namespace fastnegate::cuda
