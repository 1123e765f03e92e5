// SPDX-License-Identifier: Apache-2.0
// All concepts of a row at once. Tokens of short entries lie side by side in a block of four tiles; lane t of a quad
// knows whose tile t is, gets the sums over it, and computes gate and coefficients for it, so that four entries take
// the instructions of one.
//
//   scores Q Kc'  ->  p, a softmax for each entry  ->  <Z, F> = p (Z Vc'),  |F|^2 = p G p'  ->  rule.h: a, b
//   O = a Z + (b p) Vc
//
// G is the Gram matrix of the block's values, made once a head. An entry longer than a block has pieces, and F.
#pragma once

#include "cuda/roster.cuh"

namespace fastnegate::cuda {

// ---- one tile of queries -----------------------------------------------------------------------------

// 16 queries of a head, and the lane.
struct Place {
  int batch, head, first, queries;  // no query where `queries` is 0
  int lane;

  FN_INLINE int query(int r) const { return first + lane / 4 + 8 * r; }
  FN_INLINE bool has(int r) const { return query(r) < queries; }
};

// Sums over the heads of a number of each query, of a table [H, N].
FN_INLINE float over_heads(const float* table, int heads, int64_t queries) {
  float sum = 0.f;
#pragma unroll 4
  for (int h = 0; h < heads; ++h) sum += table[h * queries];
  return sum;
}

// From Z of 16 queries and the blocks of their row, in this order: `measure` and `tally` each block; `settle`; and for
// O, `begin`, then `apply` each block, measured again if another one has been since.
template <class T, int D>
class Entries {
 public:
  FN_INLINE Entries(const Launch& launch, const Text<T, D>& text, const Place& place, const Segment<T, D>& z)
      : l(launch), p(launch.problem), rule(launch.problem.rule), text(text), place(place), z(z), t(place.lane % 4) {
    zz[0] = zz[1] = 0.f;
    if (rule.reads.products) inner(z.out, z.out, zz);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      best_g[r] = best_r[r] = level[r] = -kInfinity;
      best[r] = kNobody;
      moved[r] = total[r] = reach[r] = 0.f, exponents[r] = 0;
    }
  }

  // Softmax, inner products and gates of the entries of a block; the inner products of this head go to their table
  // where that is the goal.
  template <class Left>
  FN_INLINE void measure(int block, const Left& q) {
    const Roster& roster = text.roster(block);
    const Header header = roster.known();
    mine = &roster.slots[t];
    float zf[2] = {0.f, 0.f}, ff[2] = {0.f, 0.f};
    if (rule.reads.tokens) {
      scores(q, header.slot, header.tiles, header.joined & kMore);
      float tops[4][2];
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int r = 0; r < 2; ++r)  // of no token -inf, which must not be subtracted
          tops[i][r] = fmaxf(top_of_row(fmaxf(weight[i][2 * r], weight[i][2 * r + 1])), kLowest);
      if (header.joined & (kFirstTwo | kLastTwo | kFour)) join(header.joined, tops);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float of_tiles[4] = {tops[0][r], tops[1][r], tops[2][r], tops[3][r]};
        top[r] = own(of_tiles, t) * l.factor;
      }
      weigh(tops);
      sum_tiles(header.joined, [&](int i, int j) { return weight[i][j]; }, mass);
      inverse[0] = inverse_of(mass[0]), inverse[1] = inverse_of(mass[1]);
      if (p.token_weight) take_weights(header.slot, header.tiles);
      if (wants_products()) measure_products(block, header, zf, ff);
    }
    note(zf, ff);
  }

  // The same of an entry that is longer than a block. bring(i) is the slot of piece i of its tokens.
  template <class Left, class Bring>
  FN_INLINE void measure_long(int block, const Left& q, const Bring& bring) {
    const Roster& roster = text.roster(block);
    const Header header = roster.known();
    mine = &roster.slots[t];
    float zf[2] = {0.f, 0.f}, ff[2] = {0.f, 0.f};
    float highest[2] = {kLowest, kLowest};
    mass[0] = mass[1] = 0.f;
#pragma unroll 1
    for (int i = 0; i * kCudaBlockTokens < header.count; ++i) {
      scores(q, bring(i), tiles_of(header, i), header.joined & kMore);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float now = highest[r];
#pragma unroll
        for (int j = 0; j < 4; ++j) now = fmaxf(now, fmaxf(weight[j][2 * r], weight[j][2 * r + 1]));
        now = top_of_row(now);
        mass[r] *= exp2((highest[r] - now) * l.factor);
        highest[r] = now;
#pragma unroll
        for (int j = 0; j < 4; ++j)
          mass[r] += exp2((weight[j][2 * r] - now) * l.factor) + exp2((weight[j][2 * r + 1] - now) * l.factor);
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      mass[r] = sum_of_row(mass[r]), inverse[r] = inverse_of(mass[r]);
      unscaled_top[r] = highest[r], top[r] = highest[r] * l.factor;
    }
    if (wants_products()) {
      Rows<D> f;
      f.clear();
      add_long(block, q, bring, inverse, f);
      inner(z.out, f, zf);
      inner(f, f, ff);
    }
    note(zf, ff);
  }

  FN_INLINE void tally() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (!leads) continue;
      const float part = -slot.numbers.strength * g[r] * drawn[r].z;
      const float most = fabsf(slot.numbers.strength * (joint() ? 1.f : g[r] * drawn[r].x));
      const float own_level = joint() ? joint_level(mass[r] * g[r], biased_top(r)) : 0.f;
      if (rule.select == Select::max) {
        if (best[r] != kNobody && !better(g[r], similar[r], slot.place, best_g[r], best_r[r], best[r]))
          continue;
        best_g[r] = g[r], best_r[r] = similar[r], best[r] = slot.place;
        moved[r] = part, reach[r] = most, level[r] = own_level, total[r] = 0.f;
      } else {
        moved[r] += part, reach[r] = fmaxf(reach[r], most);
      }
      if (joint()) {
        const float higher = fmaxf(level[r], own_level);
        total[r] = total[r] * exp2(level[r] - higher) + joint_part(mass[r] * g[r], biased_top(r) - higher);
        level[r] = higher;
      }
    }
  }

  FN_INLINE void settle() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      bool counts = true;
      if (rule.select == Select::max) {
        const int mine = best[r];
        choose(r);
        counts = mine == best[r];
      }
      keep[r] = 1.f;
      if (rule.direction == Direction::difference || rule.direction == Direction::orthogonal)
        keep[r] += sum_of_row(counts ? moved[r] : 0.f);
      if (joint()) {
        const float highest = fmaxf(top_of_row(counts ? level[r] : kLowest), joint_level(z.mass[r], z.top[r]));
        const float share = joint_part(z.mass[r], z.top[r] - highest);
        const float rest = counts ? total[r] * exp2(level[r] - highest) : 0.f;
        total[r] = divide(1.f, share + sum_of_row(rest));
        level[r] = highest, keep[r] = share * total[r];
      }
      if constexpr (kNarrow) {
        const float most = top_of_row(counts ? reach[r] : 0.f);
        if (most > 1.f) exponents[r] = (__float_as_uint(most) & 0x7f800000u) + 0x800000u - kOne;
      }
    }
  }

  FN_INLINE void begin(Rows<D>& y) const {
    y = z.out;
    const float by[2] = {smaller(keep[0], 0), smaller(keep[1], 1)};
    y.scale(by);
  }

  // y += sum b X of the block that has been measured last.
  FN_INLINE void apply(int block, Rows<D>& y) const {
    float b[2];
    coefficients(b);
    if (rule.direction == Direction::fixed)
      add_vectors(b, y);
    else
      add(uniform(text.roster(block).header.slot), uniform(text.roster(block).header.tiles), b, y);
  }
  template <class Left, class Bring>
  FN_INLINE void apply_long(int block, const Left& q, const Bring& bring, Rows<D>& y) {
    float b[2];
    coefficients(b);
    if (rule.direction == Direction::fixed)
      add_vectors(b, y);
    else
      add_long(block, q, bring, b, y);
  }

  // What Y has been divided by: a power of two that keeps b p within float16.
  FN_INLINE float size(int r) const { return kNarrow ? __uint_as_float(kOne + exponents[r]) : 1.f; }

  float zz[2];

 private:
  static constexpr int kNobody = 0x7fffffff;
  static constexpr bool kNarrow = std::is_same_v<T, float16>;
  static constexpr uint32_t kOne = 0x3f800000;  // 1.f

  FN_INLINE float smaller(float x, int r) const { return kNarrow ? x * __uint_as_float(kOne - exponents[r]) : x; }

  const Launch& l;
  const Problem& p;
  const Rule& rule;
  const Text<T, D>& text;
  const Place& place;
  const Segment<T, D>& z;
  const int t;  // of the lane in its quad

  // The block that was measured last: p, not divided by the mass; then of the lane's entry, for rows g and g + 8.
  float weight[4][4];
  const Slot* mine;
  Slot slot;
  bool leads;             // whether the lane is the first of its entry
  float top[2], mass[2];  // base-2 logit of the highest token, and the mass relative to it
  float inverse[2];       // 1 / mass
  float unscaled_top[2];  // of an entry longer than a block, before it is scaled
  float share[2];         // of the mass of entry and prompt
  float g[2], similar[2];
  Pull drawn[2];

  // Of all blocks so far, those that the lane has led; after `settle`, of all.
  float best_g[2], best_r[2];  // max: the best of them, and its place
  int best[2];
  float moved[2];             // sum of b z
  float level[2], total[2];   // joint: the highest level, and the parts relative to it; then 1 / total
  float reach[2];             // the largest coefficient
  float keep[2];              // a
  uint32_t exponents[2];      // of `size`

  FN_INLINE bool joint() const { return rule.combine == Combine::joint; }
  FN_INLINE float biased_top(int r) const { return top[r] - slot.numbers.logit_bias * kLog2e; }
  // Whether inner products of this head are wanted: not if their sums over heads are known.
  FN_INLINE bool wants_products() const { return rule.reads.products && (!l.moments || l.goal == Goal::moments); }
  // Row of a table [.., H, N].
  FN_INLINE int64_t row_of_table(int64_t row) const { return (row * p.heads + place.head) * p.queries; }

  // ---- the softmax

  template <class Left>
  FN_INLINE void scores(const Left& q, int first, int tiles, bool more) {
    const Piece<D> piece = text.piece(first, place.lane);
    repeat<2>([&](auto pair) {
      constexpr int j = 2 * pair.value;
      if (j > 0 && j >= tiles) {
#pragma unroll
        for (int i = 0; i < 4; ++i) weight[j][i] = weight[j + 1][i] = -kInfinity;
        return;
      }
      score<T, D, pair.value>(q, piece.column, piece.last_column, weight[j], weight[j + 1]);
      if (!more) return;
#pragma unroll
      for (int i = j; i < j + 2; ++i) {
        const float2 added = *reinterpret_cast<const float2*>(piece.added + i * 8);
        weight[i][0] += added.x, weight[i][1] += added.y, weight[i][2] += added.x, weight[i][3] += added.y;
      }
    });
  }

  // Entries of several tiles have one top.
  FN_INLINE static void join(int joined, float (&x)[4][2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float first = fmaxf(x[0][r], x[1][r]), last = fmaxf(x[2][r], x[3][r]);
      if (joined & kFirstTwo) x[0][r] = x[1][r] = first;
      if (joined & kLastTwo) x[2][r] = x[3][r] = last;
      if (joined & kFour) x[0][r] = x[1][r] = x[2][r] = x[3][r] = fmaxf(first, last);
    }
  }

  FN_INLINE void weigh(const float (&tops)[4][2]) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        weight[i][j] = exp2((weight[i][j] - tops[i][j / 2]) * l.factor);
      }
  }

  FN_INLINE void take_weights(int first, int tiles) {
    const float* of_values = text.weights(first) + 2 * t;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i / 2 * 2 >= tiles) continue;
      const float2 w = *reinterpret_cast<const float2*>(of_values + i * 8);
      weight[i][0] *= w.x, weight[i][1] *= w.y, weight[i][2] *= w.x, weight[i][3] *= w.y;
    }
  }

  // Sums over the tokens of the lane's entry of f(tile, j), j as in Rows.
  template <class Term>
  FN_INLINE void sum_tiles(int joined, const Term& f, float (&sum)[2]) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float of_tiles[4] = {f(0, 2 * r) + f(0, 2 * r + 1), f(1, 2 * r) + f(1, 2 * r + 1),
                                 f(2, 2 * r) + f(2, 2 * r + 1), f(3, 2 * r) + f(3, 2 * r + 1)};
      sum[r] = joined_sum(joined, own_sum(of_tiles, t));
    }
  }
  FN_INLINE float joined_sum(int joined, float x) const {
    if (joined & (kFirstTwo | kLastTwo | kFour)) {
      const float pair = x + ptx::exchange<1>(x), four = pair + ptx::exchange<2>(pair);
      x = mine->tiles == 1 ? x : mine->tiles == 2 ? pair : four;
    }
    return x;
  }

  // ---- inner products

  FN_INLINE void measure_products(int block, const Header& header, float (&zf)[2], float (&ff)[2]) {
    const Piece<D> piece = text.piece(header.slot, place.lane);
    const ptx::Address column = piece.column + l.tiling.values, last = piece.last_column + l.tiling.values;
    const float* norms = text.norms(header.slot) + 2 * t;
    Packed<T, D> rounded_z;
    rounded_z.round(z.out);
    float scaled[4][4], product[4][4];
    uint32_t packed[2][4];
    repeat<2>([&](auto pair) {
      constexpr int j = 2 * pair.value;
      if (j > 0 && j >= header.tiles) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
          scaled[j][i] = scaled[j + 1][i] = product[j][i] = product[j + 1][i] = 0.f, packed[pair.value][i] = 0;
        return;
      }
      score<T, D, pair.value>(rounded_z, column, last, product[j], product[j + 1]);
#pragma unroll
      for (int i = j; i < j + 2; ++i) {
        const float2 n = *reinterpret_cast<const float2*>(norms + i * 8);
        scaled[i][0] = weight[i][0] * n.x, scaled[i][1] = weight[i][1] * n.y;
        scaled[i][2] = weight[i][2] * n.x, scaled[i][3] = weight[i][3] * n.y;
      }
      pack_pair<T>(scaled[j], scaled[j + 1], packed[pair.value]);
    });
    sum_tiles(header.joined, [&](int i, int j) { return weight[i][j] * product[i][j]; }, zf);
    gram_product(block, header, packed, product);
    sum_tiles(header.joined, [&](int i, int j) { return scaled[i][j] * product[i][j]; }, ff);
    bool small = p.token_weight;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      small |= mine->entry >= 0 && ff[r] < kCancels * mass[r] * mass[r];
    }
    const bool cancel = __any_sync(~0u, small) && values_cancel(header, norms, ff);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float unit = mine->scale * inverse[r];
      zf[r] *= inverse[r], ff[r] *= unit * unit;
    }
    if (cancel) measure_features(header, zf, ff);
  }

  // Whether for some query the values of an entry, so weighted, cancel: |F| is small beside what it would be if they
  // were parallel. That is at most the mass, which is known without this, if weights of values are at most 1.
  FN_INLINE bool values_cancel(const Header& header, const float* norms, const float (&ff)[2]) const {
    float parallel[2];
    sum_tiles(header.joined, [&](int i, int j) {
      return i / 2 * 2 < header.tiles ? fabsf(weight[i][j] * norms[i * 8 + j % 2]) : 0.f;
    }, parallel);
    return __any_sync(~0u, mine->entry >= 0 && (ff[0] < kCancels * parallel[0] * parallel[0] ||
                                               ff[1] < kCancels * parallel[1] * parallel[1]));
  }

  // As in section 10 of the definition: the Gram matrix is used to 2^-16 at least.
  static constexpr float kCancels = 1e-3f;

  // scaled G, tile after tile; G only has what is within entries, so that of a pair, or of all four tiles.
  FN_INLINE void gram_product(int block, const Header& header, const uint32_t (&packed)[2][4],
                              float (&product)[4][4]) const {
    const int lane = place.lane;
    const ptx::Address row = ptx::address(text.gram(block)) +
                             (lane % 8 * kCudaGramRow + lane / 16 * kCudaBlockTokens + lane / 8 % 2 * 8) * 2;
    repeat<4>([&](auto tile) {
      constexpr int i = tile.value, kRow = i * 8 * kCudaGramRow * 2, kOwn = i / 2, kOther = 1 - kOwn;
      if (i > 1 && header.tiles <= 2) return;
      uint32_t m[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) product[i][j] = 0.f;
      ptx::load_matrices<kRow + kOwn * 32>(m, row);
      ptx::multiply<T>(product[i], packed[kOwn], m[0], m[1], product[i]);
      ptx::multiply<T>(product[i], packed[kOwn], m[2], m[3], product[i]);
      if (header.joined & kFour) {
        ptx::load_matrices<kRow + kOther * 32>(m, row);
        ptx::multiply<T>(product[i], packed[kOther], m[0], m[1], product[i]);
        ptx::multiply<T>(product[i], packed[kOther], m[2], m[3], product[i]);
      }
    });
  }

  // Of entries whose values cancel, or that are longer than a block: F itself.
  FN_INLINE void measure_features(const Header& header, float (&zf)[2], float (&ff)[2]) const {
#pragma unroll 1
    for (int i = 0; i < header.tiles; ++i) {
      if (!__any_sync(~0u, mine->entry >= 0 && t == i && t % mine->tiles == 0)) continue;
      const bool own_entry = (t & ~(mine->tiles - 1)) == i;
      const float b[2] = {own_entry ? inverse[0] : 0.f, own_entry ? inverse[1] : 0.f};
      Rows<D> f;
      f.clear();
      add(header.slot, header.tiles, b, f);
      float with_z[2], with_f[2];
      inner(z.out, f, with_z);
      inner(f, f, with_f);
#pragma unroll
      for (int r = 0; r < 2; ++r) zf[r] = own_entry ? with_z[r] : zf[r], ff[r] = own_entry ? with_f[r] : ff[r];
    }
  }

  // y += sum b p V; each lane has b of its tile.
  FN_INLINE void add(int first, int tiles, const float (&b)[2], Rows<D>& y) const {
    const Piece<D> piece = text.piece(first, place.lane);
    repeat<2>([&](auto pair) {
      constexpr int j = 2 * pair.value;
      if (j > 0 && j >= tiles) return;
      float mixed[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float by[2] = {i ? ptx::of_lane<j + 1>(b[0]) : ptx::of_lane<j>(b[0]),
                             i ? ptx::of_lane<j + 1>(b[1]) : ptx::of_lane<j>(b[1])};
#pragma unroll
        for (int c = 0; c < 4; ++c) mixed[i][c] = weight[j + i][c] * by[c / 2];
      }
      uint32_t packed[4];
      pack_pair<T>(mixed[0], mixed[1], packed);
      add_values<T, D, pair.value>(packed, piece.value, y);
    });
  }

  FN_INLINE static int tiles_of(const Header& header, int piece) {
    return ::min((header.count - piece * kCudaBlockTokens + 7) / 8, kCudaBlockTiles);
  }

  // The same for an entry that is longer than a block.
  template <class Left, class Bring>
  FN_INLINE void add_long(int block, const Left& q, const Bring& bring, const float (&b)[2], Rows<D>& y) {
    const Header header = text.roster(block).known();
    float tops[4][2];
#pragma unroll
    for (int i = 0; i < 4; ++i) tops[i][0] = unscaled_top[0], tops[i][1] = unscaled_top[1];
#pragma unroll 1
    for (int i = 0; i * kCudaBlockTokens < header.count; ++i) {
      const int first = bring(i), tiles = tiles_of(header, i);
      scores(q, first, tiles, header.joined & kMore);
      weigh(tops);
      if (p.token_weight) take_weights(first, tiles);
      add(first, tiles, b, y);
    }
  }

  // ---- directions

  // The lane's channels of an entry's vector, of [C, H, D].
  FN_INLINE const float* vector(const float* vectors, int entry) const {
    return vectors + (int64_t{concept_of(p, entry)} * p.heads + place.head) * D + 2 * t;
  }

  FN_INLINE void measure_along(float (&along)[2]) const {
    along[0] = along[1] = 0.f;
#pragma unroll 1
    for (int i = 0; i < kCudaBlockTiles; ++i) {
      const int entry = __shfl_sync(~0u, slot.entry, i, 4);
      if (entry < 0) continue;
      const float* u = vector(p.direction, entry);
      float sum[2];
      over_channels<D>([&](int n, int j, float part) {
        return fmaf(z.out.at[n][j], __ldg(u + 8 * n + j % 2), part);
      }, sum);
      if (t == i) along[0] = sum[0], along[1] = sum[1];
    }
  }

  FN_INLINE void add_vectors(const float (&b)[2], Rows<D>& y) const {
    const float* updates = p.update ? p.update : p.direction;
#pragma unroll 1
    for (int i = 0; i < kCudaBlockTiles; ++i) {
      const int entry = __shfl_sync(~0u, leads ? slot.entry : -1, i, 4);
      const float by[2] = {__shfl_sync(~0u, b[0], i, 4), __shfl_sync(~0u, b[1], i, 4)};
      if (entry < 0) continue;
      const float* u = vector(updates, entry);
#pragma unroll
      for (int n = 0; n < D / 8; ++n)
#pragma unroll
        for (int j = 0; j < 4; ++j) y.at[n][j] = fmaf(by[j / 2], __ldg(u + 8 * n + j % 2), y.at[n][j]);
    }
  }

  // ---- the rule

  FN_INLINE void note(const float (&zf)[2], const float (&ff)[2]) {
    slot = *mine;  // not before: registers are for the products
    leads = slot.entry >= 0 && t % slot.tiles == 0;
    Moments m[2];
    float along[2] = {0.f, 0.f};
    if (rule.reads.direction && (!l.moments || l.goal == Goal::moments)) measure_along(along);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      share[r] = 0.f;
      if (rule.reads.tokens && (rule.reads.mass || l.trace_entries))
        share[r] = mass_share(z.top[r], z.mass[r], top[r], mass[r], slot.numbers);
      m[r] = {zz[r], zf[r], ff[r], along[r], share[r]};
      if (l.moments && slot.entry >= 0 && place.has(r)) exchange(r, m[r]);
      m[r].along += slot.offset;
      similar[r] = similarity(rule, m[r]);
      g[r] = slot.entry >= 0 ? gate(rule, slot.numbers, similar[r]) : 0.f;
      drawn[r] = pull(rule, m[r]);
    }
  }

  // Inner products to their table, or from there the sums over heads.
  FN_INLINE void exchange(int r, Moments& m) const {
    const int64_t apart = p.entries * p.heads * p.queries;
    if (l.goal == Goal::moments) {
      if (!leads) return;
      float* to = l.moments + row_of_table(slot.entry) + place.query(r);
      if (rule.reads.products) to[kZz * apart] = m.zz, to[kZf * apart] = m.zf, to[kFf * apart] = m.ff;
      if (rule.reads.direction) to[kAlong * apart] = m.along;
      if (rule.reads.mass) to[kMass * apart] = m.mass;
      return;
    }
    const float* from = l.moments + int64_t{slot.entry} * p.heads * p.queries + place.query(r);
    const auto sum = [&](int plane) {
      return over_heads(from + plane * apart, static_cast<int>(p.heads), p.queries);
    };
    if (rule.reads.products) m.zz = sum(kZz), m.zf = sum(kZf), m.ff = sum(kFf);
    if (rule.reads.direction) m.along = sum(kAlong);
    if (rule.reads.mass) m.mass = sum(kMass) * l.per_head;
  }

  // b of the lane's entry, to be multiplied with p; and its numbers for statistics.
  FN_INLINE void coefficients(float (&b)[2]) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float chosen = rule.select == Select::all || slot.place == best[r] ? g[r] : 0.f;
      const float gate = shown(chosen, similar[r]);
      if (l.trace_entries && leads && place.has(r)) {
        const int64_t apart = p.entries * p.heads * p.queries;
        float* to = l.trace_entries + row_of_table(slot.entry) + place.query(r);
        to[0] = gate, to[apart] = similar[r], to[2 * apart] = share[r];
      }
      float amount = gate * drawn[r].x;
      if (joint()) amount = joint_part(mass[r] * gate, biased_top(r) - level[r]) * total[r];
      if (rule.direction != Direction::fixed) amount *= inverse[r];
      b[r] = slot.entry < 0 ? 0.f : smaller(-slot.numbers.strength * amount, r);
    }
  }

  // The place of the best of the quad's lanes: of the largest g, of these of the largest r, of these the first.
  FN_INLINE void choose(int r) {
    if (best_g[r] < top_of_row(best_g[r])) best_r[r] = -kInfinity, best[r] = kNobody;
    if (best_r[r] < top_of_row(best_r[r])) best[r] = kNobody;
    best[r] = ::min(best[r], ptx::exchange<1>(best[r]));
    best[r] = ::min(best[r], ptx::exchange<2>(best[r]));
  }
};

}  // namespace fastnegate::cuda
