// SPDX-License-Identifier: Apache-2.0
// Fixed vectors of entries, [C, H, D], for 16 queries. Lane t of a quad has the entry of tile t, and in turn all four
// have what it has.
#pragma once

#include "cuda/kernel/roster.cuh"

namespace fastnegate::cuda {

// The lane's channels of an entry's vector.
template <int D>
FN_INLINE const float* vector_of(const Problem& p, const Place& place, const float* vectors, int entry) {
  return vectors + (int64_t{concept_of(p, entry)} * p.heads + place.turn.h) * D + place.lane % 4 * 2;
}

// <Z, u> of the lane's entry.
template <int D>
FN_INLINE void measure_along(const Problem& p, const Place& place, const Rows<D>& z, const Slot& slot,
                             float (&along)[2]) {
#pragma unroll 1
  for (int i = 0; i < kCudaBlockTiles; ++i) {
    const int entry = __shfl_sync(~0u, slot.entry, i, 4);
    if (entry < 0) continue;
    const float* u = vector_of<D>(p, place, p.direction, entry);
    float sum[2];
    over_channels<D>([&](int n, int j, float part) {
      return fmaf(z.at[n][j], __ldg(u + 8 * n + j % 2), part);
    }, sum);
    if (place.lane % 4 == i) along[0] = sum[0], along[1] = sum[1];
  }
}

// y += sum b u; `entry` is that which the lane leads, or -1, and b its coefficient.
template <int D>
FN_INLINE void add_vectors(const Problem& p, const Place& place, int entry, const float (&b)[2], Rows<D>& y) {
  const float* updates = p.update ? p.update : p.direction;
#pragma unroll 1
  for (int i = 0; i < kCudaBlockTiles; ++i) {
    const int of_lane = __shfl_sync(~0u, entry, i, 4);
    const float by[2] = {__shfl_sync(~0u, b[0], i, 4), __shfl_sync(~0u, b[1], i, 4)};
    if (of_lane < 0) continue;
    const float* u = vector_of<D>(p, place, updates, of_lane);
#pragma unroll
    for (int n = 0; n < D / 8; ++n)
#pragma unroll
      for (int j = 0; j < 4; ++j) y.at[n][j] = fmaf(by[j / 2], __ldg(u + 8 * n + j % 2), y.at[n][j]);
  }
}

}  // namespace fastnegate::cuda
