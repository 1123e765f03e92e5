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

#include "cuda/kernel/directions.cuh"
#include "cuda/kernel/gram.cuh"

namespace fastnegate::cuda {

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
      : l(launch), p(launch.problem), rule(launch.problem.rule), text(text), place(place), z(z), t(place.lane % 4),
        weights(launch, text, place.lane) {
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
      weights.score_tiles(q, header.slot, header.tiles, header.joined & kMore);
      float tops[4][2];
      weights.find_tops(header.joined, tops);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float of_tiles[4] = {tops[0][r], tops[1][r], tops[2][r], tops[3][r]};
        top[r] = own(of_tiles, t) * l.factor;
      }
      weights.weigh(tops);
      sum_tiles(*mine, header.joined, t, [&](int i, int j) { return weights.at[i][j]; }, mass);
      inverse[0] = inverse_of(mass[0]), inverse[1] = inverse_of(mass[1]);
      if (p.token_weight) weights.take_weights(header.slot, header.tiles);
      if (wants_products()) {
        const Products<T, D> products(l, text, weights, z.out, *mine, place.lane);
        products.measure(block, header, mass, inverse, zf, ff);
      }
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
      weights.score_tiles(q, bring(i), tiles_of(header, i), header.joined & kMore);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float now = highest[r];
#pragma unroll
        for (int j = 0; j < 4; ++j) now = fmaxf(now, fmaxf(weights.at[j][2 * r], weights.at[j][2 * r + 1]));
        now = top_of_row(now);
        mass[r] *= exp2((highest[r] - now) * l.factor);
        highest[r] = now;
#pragma unroll
        for (int j = 0; j < 4; ++j)
          mass[r] += exp2((weights.at[j][2 * r] - now) * l.factor) + exp2((weights.at[j][2 * r + 1] - now) * l.factor);
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
      add_vectors(p, place, leads ? slot.entry : -1, b, y);
    else
      weights.add(uniform(text.roster(block).header.slot), uniform(text.roster(block).header.tiles), b, y);
  }
  template <class Left, class Bring>
  FN_INLINE void apply_long(int block, const Left& q, const Bring& bring, Rows<D>& y) {
    float b[2];
    coefficients(b);
    if (rule.direction == Direction::fixed)
      add_vectors(p, place, leads ? slot.entry : -1, b, y);
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

  // Of the block that was measured last; from `mine` on of the lane's entry, for rows g and g + 8.
  Weights<T, D> weights;
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
  FN_INLINE int64_t row_of_table(int64_t row) const { return (row * p.heads + place.turn.h) * p.queries; }

  // ---- an entry that is longer than a block, a piece of its tokens after the other

  FN_INLINE static int tiles_of(const Header& header, int piece) {
    return ::min((header.count - piece * kCudaBlockTokens + 7) / 8, kCudaBlockTiles);
  }

  // y += sum b p V; p is made again of the highest score.
  template <class Left, class Bring>
  FN_INLINE void add_long(int block, const Left& q, const Bring& bring, const float (&b)[2], Rows<D>& y) {
    const Header header = text.roster(block).known();
    float tops[4][2];
#pragma unroll
    for (int i = 0; i < 4; ++i) tops[i][0] = unscaled_top[0], tops[i][1] = unscaled_top[1];
#pragma unroll 1
    for (int i = 0; i * kCudaBlockTokens < header.count; ++i) {
      const int first = bring(i), tiles = tiles_of(header, i);
      weights.score_tiles(q, first, tiles, header.joined & kMore);
      weights.weigh(tops);
      if (p.token_weight) weights.take_weights(first, tiles);
      weights.add(first, tiles, b, y);
    }
  }

  // ---- the rule

  FN_INLINE void note(const float (&zf)[2], const float (&ff)[2]) {
    slot = *mine;  // not before: registers are for the products
    leads = slot.entry >= 0 && t % slot.tiles == 0;
    Moments m[2];
    float along[2] = {0.f, 0.f};
    if (rule.reads.direction && (!l.moments || l.goal == Goal::moments)) measure_along(p, place, z.out, slot, along);
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
