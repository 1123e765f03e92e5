// SPDX-License-Identifier: Apache-2.0
// What rule.h asks for, of the GPU: a scalar of one query is a float of a lane.
#pragma once

#include <cuda/ptx.cuh>
#include <cuda_runtime.h>

#define FASTNEGATE_ISA cuda
#define FN_INLINE __device__ __forceinline__

namespace fastnegate::cuda {

using F = float;
using I = bool;
constexpr float kTiny = 1e-30f;
constexpr float kLowest = -3e38f;  // stands for the top of an empty or fully masked softmax
constexpr float kInfinity = __builtin_huge_valf();

FN_INLINE float splat(float x) { return x; }
FN_INLINE float select(bool condition, float yes, float no) { return condition ? yes : no; }
FN_INLINE float fma(float a, float b, float c) { return fmaf(a, b, c); }
FN_INLINE float min(float a, float b) { return fminf(a, b); }
FN_INLINE float max(float a, float b) { return fmaxf(a, b); }
FN_INLINE float sqrt(float x) { return ptx::sqrt(x); }
FN_INLINE float exp2(float x) { return ptx::exp2(x); }
// The exponent e of a positive x = m 2^e, 1 <= m < 2.
FN_INLINE float exponent(float x) { return static_cast<float>((__float_as_int(x) >> 23) - 127); }
// Rounded as by division but for the last bit of a few, and x / x is 1. The operator `/` and sqrtf() of CUDA
// call functions for rare operands, around which nothing stays in registers.
FN_INLINE float divide(float x, float y) {
  const float inverse = ptx::reciprocal(y), q = x * inverse, better = fmaf(fmaf(-q, y, x), inverse, q);
  return y < kTiny ? 0.f : better == better ? better : q;  // of infinite operands q is right
}

// 1 / y of a mass, within an ulp; 0 of none.
FN_INLINE float inverse_of(float y) { return y < kTiny ? 0.f : ptx::reciprocal(y); }

}  // namespace fastnegate::cuda

#include "fastnegate/rule.h"
