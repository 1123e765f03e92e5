// SPDX-License-Identifier: Apache-2.0
// The vector type of the CPU kernel: W floats, one per query. Included once per instruction set, in
// that set's namespace (FASTNEGATE_ISA), so that code compiled for one never runs on another.
//
// Plain operators are those of GCC/Clang vector types. Multiply-add is always spelled `fma`: the
// files are compiled with -ffp-contract=off, so that every lane of every tile rounds alike.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define FN_INLINE inline __attribute__((always_inline))

namespace fastnegate::FASTNEGATE_ISA {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float F __attribute__((vector_size(W * 4)));
typedef int32_t I __attribute__((vector_size(W * 4)));
typedef uint32_t U __attribute__((vector_size(W * 4)));
typedef uint16_t H __attribute__((vector_size(W * 2)));

FN_INLINE F splat(float x) { return F{} + x; }
FN_INLINE F load(const float* p) {
  F x;
  std::memcpy(&x, p, sizeof(F));
  return x;
}
FN_INLINE void store(float* p, F x) { std::memcpy(p, &x, sizeof(F)); }
FN_INLINE F as_float(I x) { return (F)x; }
FN_INLINE I as_int(F x) { return (I)x; }
FN_INLINE F select(I mask, F yes, F no) { return mask ? yes : no; }

#if defined(__AVX512F__)
FN_INLINE F fma(F a, F b, F c) { return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
FN_INLINE F max(F a, F b) { return (F)_mm512_max_ps((__m512)a, (__m512)b); }
FN_INLINE F min(F a, F b) { return (F)_mm512_min_ps((__m512)a, (__m512)b); }
FN_INLINE F sqrt(F a) { return (F)_mm512_sqrt_ps((__m512)a); }
#elif defined(__AVX2__)
FN_INLINE F fma(F a, F b, F c) { return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
FN_INLINE F max(F a, F b) { return (F)_mm256_max_ps((__m256)a, (__m256)b); }
FN_INLINE F min(F a, F b) { return (F)_mm256_min_ps((__m256)a, (__m256)b); }
FN_INLINE F sqrt(F a) { return (F)_mm256_sqrt_ps((__m256)a); }
#elif defined(__aarch64__)
FN_INLINE F fma(F a, F b, F c) { return (F)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
FN_INLINE F max(F a, F b) { return a > b ? a : b; }
FN_INLINE F min(F a, F b) { return a < b ? a : b; }
FN_INLINE F sqrt(F a) { return (F)vsqrtq_f32((float32x4_t)a); }
#else
FN_INLINE F fma(F a, F b, F c) { return a * b + c; }
FN_INLINE F max(F a, F b) { return a > b ? a : b; }
FN_INLINE F min(F a, F b) { return a < b ? a : b; }
FN_INLINE F sqrt(F a) {
  for (int i = 0; i < W; ++i) a[i] = __builtin_sqrtf(a[i]);
  return a;
}
#endif

// The exponent e of a positive x = m 2^e, 1 <= m < 2.
FN_INLINE F exponent(F x) { return __builtin_convertvector((as_int(x) >> 23) - 127, F); }
FN_INLINE F abs(F x) { return as_float(as_int(x) & 0x7fffffff); }

// 2^x for x <= 127. n = round(x), a minimax polynomial of degree 6 for 2^(x-n) on [-.5, .5]
// (relative error 2.0e-9 before rounding) and an exponent shift. Below -126 the result is 0 (-inf
// included), so a masked logit weighs exactly nothing. NaN stays NaN.
FN_INLINE F exp2(F x) {
  const F clamped = max(x, splat(-126.f));
  const F shifted = clamped + 12582912.f;  // 1.5 * 2^23: the sum's low bits are round(x)
  const F f = clamped - (shifted - 12582912.f);
  F p = splat(1.535336182e-4f);
  p = fma(p, f, splat(1.339887445e-3f));
  p = fma(p, f, splat(9.618437358e-3f));
  p = fma(p, f, splat(5.550332471e-2f));
  p = fma(p, f, splat(2.402264791e-1f));
  p = fma(p, f, splat(6.931472029e-1f));
  p = fma(p, f, splat(1.f));
  const F scaled = as_float(as_int(p) + (as_int(shifted) << 23));
  return select(x >= -126.f, scaled, select(x < -126.f, F{}, x));
}

constexpr float kTiny = 1e-30f;  // x / y means 0 where y < kTiny; there is no other epsilon
FN_INLINE F divide(F x, F y) {
  const I zero = y < kTiny;
  return select(zero, F{}, x / select(zero, splat(1.f), y));
}

// ---- storage types: W consecutive elements <-> W floats -------------------------------------

struct Float32 {
  using T = float;
  static FN_INLINE F load(const T* p) { return FASTNEGATE_ISA::load(p); }
  static FN_INLINE void store(T* p, F x) { FASTNEGATE_ISA::store(p, x); }
};

struct BFloat16 {
  using T = uint16_t;
  static FN_INLINE F load(const T* p) {
    H h;
    std::memcpy(&h, p, sizeof(H));
    return (F)(__builtin_convertvector(h, U) << 16);
  }
  static FN_INLINE void store(T* p, F x) {  // round to nearest even; NaN stays NaN
    const U bits = (U)x;
    U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    rounded = (x != x) ? (U{} + 0x7fc0u) : rounded;
    const H h = __builtin_convertvector(rounded, H);
    std::memcpy(p, &h, sizeof(H));
  }
};

struct Float16 {
  using T = uint16_t;
#if defined(__AVX512F__)
  static FN_INLINE F load(const T* p) {
    return (F)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static FN_INLINE void store(T* p, F x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
#elif defined(__AVX2__)  // every CPU with AVX2 has F16C
  static FN_INLINE F load(const T* p) {
    return (F)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static FN_INLINE void store(T* p, F x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
#elif defined(__aarch64__)
  static FN_INLINE F load(const T* p) {
    float16x4_t h;
    std::memcpy(&h, p, sizeof(h));
    return (F)vcvt_f32_f16(h);
  }
  static FN_INLINE void store(T* p, F x) {
    const float16x4_t h = vcvt_f16_f32((float32x4_t)x);
    std::memcpy(p, &h, sizeof(h));
  }
#else
  static FN_INLINE F load(const T* p) {
    H h;
    std::memcpy(&h, p, sizeof(H));
    const U x = __builtin_convertvector(h, U), magnitude = x & 0x7fffu;
    U f = (magnitude << 13) + (112u << 23);  // rebased exponent
    f = (magnitude < 0x400u) ? (U)(__builtin_convertvector(magnitude, F) * 0x1p-24f) : f;
    f = (magnitude >= 0x7c00u) ? (magnitude << 13) | 0x7f800000u : f;
    return (F)(f | (x & 0x8000u) << 16);
  }
  static FN_INLINE void store(T* p, F x) {
    const U bits = (U)x, sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    const U normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
    const U subnormal = (U)((F)magnitude + 0.5f) - 0x3f000000u;  // rounds at the last half bit
    U h = (magnitude < (113u << 23)) ? subnormal : normal;
    h = (magnitude >= 0x477ff000u) ? (U{} + 0x7c00u) : h;
    h = (magnitude > 0x7f800000u) ? (U{} + 0x7e00u) : h;
    const H out = __builtin_convertvector(h | sign, H);
    std::memcpy(p, &out, sizeof(H));
  }
#endif
};

// ---- transposition of a W x W block ---------------------------------------------------------

#if defined(__AVX512F__)
FN_INLINE void transpose(F (&r)[W]) {
  __m512 t[16], u[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps((__m512)r[i], (__m512)r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps((__m512)r[i], (__m512)r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      const __m512d a = _mm512_castps_pd(t[i + j]), b = _mm512_castps_pd(t[i + j + 2]);
      u[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      u[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512 a = _mm512_shuffle_f32x4(u[j], u[4 + j], 0x88);
    const __m512 b = _mm512_shuffle_f32x4(u[8 + j], u[12 + j], 0x88);
    const __m512 c = _mm512_shuffle_f32x4(u[j], u[4 + j], 0xdd);
    const __m512 d = _mm512_shuffle_f32x4(u[8 + j], u[12 + j], 0xdd);
    r[j] = (F)_mm512_shuffle_f32x4(a, b, 0x88);
    r[8 + j] = (F)_mm512_shuffle_f32x4(a, b, 0xdd);
    r[4 + j] = (F)_mm512_shuffle_f32x4(c, d, 0x88);
    r[12 + j] = (F)_mm512_shuffle_f32x4(c, d, 0xdd);
  }
}
#else
FN_INLINE void transpose(F (&r)[W]) {
  F t[W] = {};
  for (int i = 0; i < W; ++i)
    for (int j = 0; j < W; ++j) t[i][j] = r[j][i];
  for (int i = 0; i < W; ++i) r[i] = t[i];
}
#endif

}  // namespace fastnegate::FASTNEGATE_ISA
