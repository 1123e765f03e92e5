// SPDX-License-Identifier: Apache-2.0
// From Y and Z of 16 queries to O: norm, blend, what is written.
#pragma once

#include "cuda/kernel/entries.cuh"

namespace fastnegate::cuda {

// Values that storing turns into inf start here (round to nearest even).
template <class T>
constexpr float kOverflow = std::is_same_v<T, float16> ? 65520.f : 0x1.ffp127f;

// Sum over the channels of |x|, or of x x.
template <int D>
FN_INLINE void norm_sum(const Rule& rule, const Rows<D>& x, float (&sum)[2]) {
  if (rule.norm_order == 2) return inner(x, x, sum);
  over_channels<D>([&](int i, int j, float part) { return part + fabsf(x.at[i][j]); }, sum);
}

// O in the place of Y, which is `size` times as large, and where the norm was limited; or, where that is the goal,
// the norms of this head to their table.
template <class T, int D>
FN_INLINE void finish(const Launch& l, const Place& place, const Entries<T, D>& entries, const Rows<D>& z, Rows<D>& y,
                      float (&limited)[2]) {
  const Problem& p = l.problem;
  const Rule& rule = p.rule;
  float factor[2] = {1.f, 1.f};
  if (rule.norm != Norm::none) {
    const bool root = rule.norm_order == 2;
    float of_y[2], of_z[2] = {entries.zz[0], entries.zz[1]};
    norm_sum(rule, y, of_y);
    if (!root || !rule.reads.products) norm_sum(rule, z, of_z);
    const int64_t apart = p.batch * p.heads * p.queries;  // from the sums of Y to those of Z
    const int64_t row = int64_t{place.turn.b} * p.heads * p.queries;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float size = entries.size(r);
      of_y[r] *= root ? size * size : size;
      if (l.norms && place.has(r)) {
        if (l.goal == Goal::norms) {
          float* to = l.norms + row + place.turn.h * p.queries + place.query(r);
          if (place.lane % 4 == 0) to[0] = of_y[r], to[apart] = of_z[r];
          continue;
        }
        const float* from = l.norms + row + place.query(r);
        of_y[r] = over_heads(from, static_cast<int>(p.heads), p.queries);
        of_z[r] = over_heads(from + apart, static_cast<int>(p.heads), p.queries);
      }
      if (root) of_y[r] = sqrt(of_y[r]), of_z[r] = sqrt(of_z[r]);
      factor[r] = norm_factor(rule, of_y[r], of_z[r], &limited[r]);
    }
    if (l.goal == Goal::norms) return;
  }
  const float rest = 1.f - rule.blend;
  const float by[2] = {rule.blend * factor[0] * entries.size(0), rule.blend * factor[1] * entries.size(1)};
  y.scale(by);
  if (rest == 0.f) return;
#pragma unroll
  for (int i = 0; i < D / 8; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) y.at[i][j] = fmaf(rest, z.at[i][j], y.at[i][j]);
}

// Through shared memory, the place of the queries, so that 16 bytes of a row are stored at a time.
template <class T, int D>
FN_INLINE void write(const Problem& p, const Place& place, const Rows<D>& o, T* staging) {
  constexpr int kRow = cuda_row(D), kUnits = D / 8;
  const int lane = place.lane;
  __syncwarp();  // every lane has read its queries
  T* to = staging + lane / 4 * kRow + lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < D / 8; ++i) {
    *reinterpret_cast<uint32_t*>(to + 8 * i) = ptx::pack<T>(o.at[i][0], o.at[i][1]);
    *reinterpret_cast<uint32_t*>(to + 8 * kRow + 8 * i) = ptx::pack<T>(o.at[i][2], o.at[i][3]);
  }
  __syncwarp();
  const int g = lane / 4, t = lane % 4;
  const T* from = staging + g * kRow + t * 8;
  T* out = reinterpret_cast<T*>(p.out.data) + place.turn.b * p.out.batch + place.turn.h * p.out.head + t * 8;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (!place.has(r)) continue;
    T* row = out + place.query(r) * p.out.row;
#pragma unroll
    for (int k = 0; k < kUnits; k += 4)
      if (k + 3 < kUnits || k + t < kUnits)
        *reinterpret_cast<uint4*>(row + k * 8) = *reinterpret_cast<const uint4*>(from + r * 8 * kRow + k * 8);
  }
}

// For statistics.
template <class T, int D>
FN_INLINE void trace(const Launch& l, const Place& place, const Rows<D>& o, const Rows<D>& z,
                     const float (&limited)[2]) {
  const Problem& p = l.problem;
  float moved[2], energy[2], nonfinite[2];
  over_channels<D>([&](int i, int j, float part) {
    const float by = o.at[i][j] - z.at[i][j];
    return fmaf(by, by, part);
  }, moved);
  inner(z, z, energy);
  over_channels<D>([&](int i, int j, float part) { return part + (fabsf(o.at[i][j]) < kOverflow<T> ? 0.f : 1.f); },
                   nonfinite);
#pragma unroll
  for (int r = 0; r < 2; ++r)
    if (place.has(r) && place.lane % 4 == 0) {
      const int64_t apart = p.batch * p.heads * p.queries;
      float* to = l.trace_rows + (int64_t{place.turn.b} * p.heads + place.turn.h) * p.queries + place.query(r);
      to[0] = moved[r], to[apart] = energy[r], to[2 * apart] = limited[r], to[3 * apart] = nonfinite[r];
    }
}

}  // namespace fastnegate::cuda
