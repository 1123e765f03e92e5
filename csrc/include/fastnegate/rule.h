// SPDX-License-Identifier: Apache-2.0
// Scalars of one query -> coefficients: the only C++ copy of the mixing maths.
//
// Opens the namespace of an instruction set (or of the device), which has to provide F, the
// type of one scalar per query, I, that of a comparison, and their functions: operators, splat, select, fma, min,
// max, sqrt, divide (0 where the divisor is below 1e-30), exp2 and exponent. Modes are uniform branches.
#pragma once

#include <cmath>

#include "fastnegate/problem.h"

namespace fastnegate::FASTNEGATE_ISA {

constexpr float kLog2e = 1.44269504088896f;

// Inner products over the scope of one query with one entry.
struct Moments {
  F zz, zf, ff;  // <Z,Z>, <Z,F>, <F,F>
  F along;       // <Z,u> + offset
  F mass;        // exp(L_e - beta) / (exp L + exp(L_e - beta)), head mean for scope `feature`
};

FN_INLINE F similarity(const Rule& rule, const Moments& m) {
  switch (rule.similarity) {
    case Similarity::cosine: return divide(m.zf, sqrt(m.zz) * sqrt(m.ff));
    case Similarity::direction: return m.along;
    case Similarity::mass: return m.mass;
    default: return splat(1.f);
  }
}

// g = active * min(psi(r), cap): the schedule enters through g alone.
FN_INLINE F gate(const Rule& rule, const Numbers& n, F r) {
  F psi = splat(1.f);
  const F above = r - n.threshold;
  switch (rule.gate) {
    case Gate::step: psi = select(above > 0.f, psi, splat(0.f)); break;
    case Gate::ramp: psi = min(max(divide(above, splat(n.width)), splat(0.f)), psi); break;
    case Gate::sigmoid:
      psi = divide(psi, 1.f + exp2(min(above * (-n.width * kLog2e), splat(126.f))));
      break;
    default: break;
  }
  return n.active * min(psi, splat(n.cap));
}

// A similarity that is NaN, from a concept that holds one, must show in the output. min and max lose it, and the
// query would come out as if the gate were closed.
FN_INLINE F shown(F g, F r) { return select(r == r, g, r); }

// Whether, of two entries, select="max" keeps the first: the larger g; ties: larger r, then lower concept, then lower
// entry. `place` is that of the entry among the others by the last two.
template <class Place>
FN_INLINE I better(F g, F r, Place place, F than_g, F than_r, Place than_place) {
  const I tie = (r > than_r) | ((r == than_r) & (place < than_place));
  return (g > than_g) | ((g == than_g) & tie);
}

// What is subtracted, D = x X + z Z.
struct Pull {
  F x, z;
};
FN_INLINE Pull pull(const Rule& rule, const Moments& m) {
  switch (rule.direction) {
    case Direction::difference: return {splat(1.f), splat(-1.f)};
    case Direction::orthogonal: return {splat(1.f), -divide(m.zf, m.zz)};
    case Direction::projection: return {divide(m.zf, m.ff), splat(0.f)};
    case Direction::fixed: return {m.along, splat(0.f)};
    default: return {splat(1.f), splat(0.f)};
  }
}

// Share of the second of two segments in the mass of both; the top of the second, a base-2 logit, is `gap` higher.
FN_INLINE F mass_share(F gap, F mass, F second_mass) {
  const F less = exp2(min(gap, splat(0.f) - gap)), one = splat(1.f);  // the higher of both weighs 1
  const F ours = second_mass * select(gap < 0.f, less, one);
  return divide(ours, fma(mass, select(gap < 0.f, one, less), ours));
}
// Of the prompt and an entry.
FN_INLINE F mass_share(F top, F mass, F entry_top, F entry_mass, const Numbers& n) {
  return mass_share(entry_top - n.logit_bias * kLog2e - top, mass, entry_mass);
}

// Of combine="joint", one softmax over segments: a segment weighs w 2^t, where w is its mass, of an entry times its
// gate, and t its top, of an entry less its bias. Its level, below which nothing is that matters, brings w to 1 .. 2,
// however small it is; then its part, relative to the highest level of all.
FN_INLINE F joint_level(F w, F t) { return select(w > 0.f, t + exponent(w), splat(kLowest)); }
FN_INLINE F joint_part(F w, F gap) {
  return select(w == 0.f, splat(0.f), w * exp2(min(splat(127.f), gap)));  // in this order: NaN shows
}

// Factor on Y from the norms of Y and Z over the scope; `limited` is 1 where `limit` acted.
FN_INLINE F norm_factor(const Rule& rule, F norm_y, F norm_z, F* limited) {
  const F one = splat(1.f), most = norm_z * (rule.norm == Norm::limit ? rule.norm_limit : 1.f);
  const I acts = rule.norm == Norm::limit ? (norm_y > most) & (norm_z >= kTiny) : norm_z >= kTiny;
  *limited = rule.norm == Norm::limit ? select(acts, one, splat(0.f)) : splat(0.f);
  return rule.norm == Norm::none ? one : select(acts, divide(most, norm_y), one);
}

}  // namespace fastnegate::FASTNEGATE_ISA
