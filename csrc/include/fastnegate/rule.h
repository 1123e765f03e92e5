// SPDX-License-Identifier: Apache-2.0
// Scalars of one query -> coefficients: the only C++ copy of the mixing maths.
//
// Opens the namespace of an instruction set (or of the device), which has to provide F, the
// type of one scalar per query, and its functions: operators, splat, select, fma, min, max, sqrt,
// divide (0 where the divisor is below 1e-30) and exp2. Modes are uniform branches.
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

// Factor on Y from the norms of Y and Z over the scope; `limited` is 1 where `limit` acted.
FN_INLINE F norm_factor(const Rule& rule, F norm_y, F norm_z, F* limited) {
  const F one = splat(1.f), ratio = divide(norm_y, norm_z);
  *limited = splat(0.f);
  if (rule.norm == Norm::none) return one;
  F factor = divide(one, ratio);
  if (rule.norm == Norm::limit) {
    factor = select(ratio > rule.norm_limit, divide(splat(rule.norm_limit), ratio), one);
    *limited = select(ratio > rule.norm_limit, one, splat(0.f));
  }
  return select(norm_z < kTiny, one, factor);
}

}  // namespace fastnegate::FASTNEGATE_ISA
