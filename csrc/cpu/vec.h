// SPDX-License-Identifier: Apache-2.0
// The vector type of the CPU kernel: W floats, one per query. Included once per instruction set, in
// that set's namespace (FASTNEGATE_ISA), so that code compiled for one never runs on another.
//
// The build says how wide W is (FASTNEGATE_LANES), not the compiler's macros: flags of the user's, such
// as -march=native, must not turn one level into another.
//
// Plain operators are those of GCC/Clang vector types, which with the few functions below are all that
// the kernel needs: less than a dependency on a vector library, which pip cannot bring. Multiply-add is always spelled `fma`: the
// files are compiled with -ffp-contract=off, so that every lane of every tile rounds alike.
#pragma once

#include <cstdint>
#include <cstring>

#if FASTNEGATE_LANES >= 8
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define FN_INLINE inline __attribute__((always_inline))

namespace fastnegate::FASTNEGATE_ISA {

constexpr int W = FASTNEGATE_LANES;

typedef float F __attribute__((vector_size(W * 4)));
typedef int32_t I __attribute__((vector_size(W * 4)));
typedef uint32_t U __attribute__((vector_size(W * 4)));
typedef uint16_t H __attribute__((vector_size(W * 2)));

#if FASTNEGATE_LANES == 16
FN_INLINE F splat(float x) { return (F)_mm512_set1_ps(x); }
#elif FASTNEGATE_LANES == 8
FN_INLINE F splat(float x) { return (F)_mm256_set1_ps(x); }
#else
FN_INLINE F splat(float x) { return x - F{}; }  // exact, -0 included, so that a broadcast remains
#endif
FN_INLINE F load(const float* p) {
  F x;
  std::memcpy(&x, p, sizeof(F));
  return x;
}
FN_INLINE void store(float* p, F x) { std::memcpy(p, &x, sizeof(F)); }
FN_INLINE F as_float(I x) { return (F)x; }
FN_INLINE I as_int(F x) { return (I)x; }
FN_INLINE F select(I mask, F yes, F no) { return mask ? yes : no; }

#if FASTNEGATE_LANES == 16
FN_INLINE F fma(F a, F b, F c) { return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
FN_INLINE F max(F a, F b) { return (F)_mm512_max_ps((__m512)a, (__m512)b); }
FN_INLINE F min(F a, F b) { return (F)_mm512_min_ps((__m512)a, (__m512)b); }
FN_INLINE F sqrt(F a) { return (F)_mm512_sqrt_ps((__m512)a); }
#elif FASTNEGATE_LANES == 8
FN_INLINE F fma(F a, F b, F c) { return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
FN_INLINE F max(F a, F b) { return (F)_mm256_max_ps((__m256)a, (__m256)b); }
FN_INLINE F min(F a, F b) { return (F)_mm256_min_ps((__m256)a, (__m256)b); }
FN_INLINE F sqrt(F a) { return (F)_mm256_sqrt_ps((__m256)a); }
#elif defined(__aarch64__)
FN_INLINE F fma(F a, F b, F c) { return (F)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
FN_INLINE F max(F a, F b) { return a > b ? a : b; }  // not FMAX: b if either is NaN, as on x86
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

// c + a b per lane. A PairProduct takes words of two bfloat16 and sums both products, in float32.
struct Product {
  static FN_INLINE F apply(F a, F b, F c) { return fma(a, b, c); }
};
#if defined(FASTNEGATE_PAIRS)
constexpr bool kPairs = true;
struct PairProduct {
  static FN_INLINE F apply(F a, F b, F c) {
    return (F)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
  }
};
#else
constexpr bool kPairs = false;
using PairProduct = Product;
#endif

// Over the lanes. Pairs of halves, so that the order does not depend on the compiler.
template <class Fold>
FN_INLINE float fold(F x, Fold f) {
  for (int n = W / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) x[i] = f(x[i], x[i + n]);
  return x[0];
}
#if FASTNEGATE_LANES == 16
FN_INLINE float sum(F x) { return _mm512_reduce_add_ps((__m512)x); }
FN_INLINE float largest(F x) { return _mm512_reduce_max_ps((__m512)x); }
#else
FN_INLINE float sum(F x) {
  return fold(x, [](float a, float b) { return a + b; });
}
FN_INLINE float largest(F x) {
  return fold(x, [](float a, float b) { return a > b ? a : b; });
}
#endif
FN_INLINE F lane_numbers() {
  F x;
  for (int i = 0; i < W; ++i) x[i] = static_cast<float>(i);
  return x;
}

// The exponent e of a positive x = m 2^e, 1 <= m < 2.
FN_INLINE F exponent(F x) { return __builtin_convertvector((as_int(x) >> 23) - 127, F); }
FN_INLINE F abs(F x) { return as_float(as_int(x) & 0x7fffffff); }

// 2^x for x <= 127. n = round(x), a minimax polynomial of degree 6 for 2^(x-n) on [-.5, .5]
// (relative error 2.0e-9 before rounding) and an exponent shift. Below -126 the result is 0 (-inf
// included), so a masked logit weighs exactly nothing. NaN stays NaN.
FN_INLINE F exp2_fraction(F f) {
  F p = splat(1.535336182e-4f);
  p = fma(p, f, splat(1.339887445e-3f));
  p = fma(p, f, splat(9.618437358e-3f));
  p = fma(p, f, splat(5.550332471e-2f));
  p = fma(p, f, splat(2.402264791e-1f));
  p = fma(p, f, splat(6.931472029e-1f));
  return fma(p, f, splat(1.f));
}

#if FASTNEGATE_LANES == 16
FN_INLINE F exp2(F x) {  // 10 instructions of the 18 that it takes without rounding and scaling ones
  const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.f), _CMP_NLT_UQ);
  const F n = (F)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return (F)_mm512_maskz_scalef_ps(normal, (__m512)exp2_fraction(x - n), (__m512)n);
}
#else
FN_INLINE F exp2(F x) {
  const F clamped = max(x, splat(-126.f));
  const F shifted = clamped + 12582912.f;  // 1.5 * 2^23: the sum's low bits are round(x)
  const F p = exp2_fraction(clamped - (shifted - 12582912.f));
  const F scaled = as_float(as_int(p) + (as_int(shifted) << 23));
  return select(x >= -126.f, scaled, select(x < -126.f, F{}, x));
}
#endif

constexpr float kTiny = 1e-30f;  // x / y means 0 where y < kTiny; there is no other epsilon
FN_INLINE F divide(F x, F y) {
  const I zero = y < kTiny;
  return select(zero, F{}, x / select(zero, splat(1.f), y));
}

// ---- storage types ----------------------------------------------------------------------------

// A type of elements in memory. `load`: W consecutive elements. `unpack`: the kPerWord elements of a
// 32-bit word, one word per lane; `pack` is its inverse, rounding to nearest even.

struct Float32 {
  using T = float;
  static constexpr int kPerWord = 1;
  static FN_INLINE F load(const T* p) { return FASTNEGATE_ISA::load(p); }
  static FN_INLINE void unpack(U words, F* x) { x[0] = (F)words; }
  static FN_INLINE U pack(const F* x) { return (U)x[0]; }
};

struct BFloat16 {
  using T = uint16_t;
  static constexpr int kPerWord = 2;
  static FN_INLINE F load(const T* p) {
    H h;
    std::memcpy(&h, p, sizeof(H));
    return (F)(__builtin_convertvector(h, U) << 16);
  }
  static FN_INLINE void unpack(U words, F* x) {
    x[0] = (F)(words << 16);
    x[1] = (F)(words & 0xffff0000u);
  }
#if defined(FASTNEGATE_TILES)
  // Two instructions in the place of fourteen. They take denormal numbers for zeros, as products of tiles do.
  static FN_INLINE U pack(const F* x) {
    const __m512i in_turn = _mm512_setr_epi32(  // 16 halves of x[0], 16 of x[1] -> one of each
        0x100000, 0x110001, 0x120002, 0x130003, 0x140004, 0x150005, 0x160006, 0x170007, 0x180008, 0x190009, 0x1a000a,
        0x1b000b, 0x1c000c, 0x1d000d, 0x1e000e, 0x1f000f);
    const auto both = (__m512i)_mm512_cvtne2ps_pbh((__m512)x[1], (__m512)x[0]);
    return (U)_mm512_permutexvar_epi16(in_turn, both);
  }
#else
  static FN_INLINE U pack(const F* x) { return round(x[0]) >> 16 | (round(x[1]) & 0xffff0000u); }

 private:
  static FN_INLINE U round(F x) {  // the high half; NaN stays NaN
    const U bits = (U)x;
    return (x != x) ? (U{} + 0x7fc00000u) : bits + 0x7fffu + ((bits >> 16) & 1u);
  }
#endif
};

struct Float16 {
  using T = uint16_t;
  static constexpr int kPerWord = 2;
  static FN_INLINE F load(const T* p) {
    H h;
    std::memcpy(&h, p, sizeof(H));
    return widen(__builtin_convertvector(h, U));
  }
  static FN_INLINE void unpack(U words, F* x) {
    x[0] = widen(words & 0xffffu);
    x[1] = widen(words >> 16);
  }
  static FN_INLINE U pack(const F* x) { return narrow(x[0]) | narrow(x[1]) << 16; }

 private:  // a half in the low bits of each word <-> float
#if FASTNEGATE_LANES == 16
  static FN_INLINE F widen(U h) {
    return (F)_mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)h));
  }
  static FN_INLINE U narrow(F x) {
    return (U)_mm512_cvtepu16_epi32(
        _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
#elif FASTNEGATE_LANES == 8
  static FN_INLINE F widen(U h) {
    const __m128i low = _mm256_castsi256_si128((__m256i)h), high = _mm256_extracti128_si256((__m256i)h, 1);
    return (F)_mm256_cvtph_ps(_mm_packus_epi32(low, high));
  }
  static FN_INLINE U narrow(F x) {
    return (U)_mm256_cvtepu16_epi32(
        _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
#elif defined(__aarch64__)
  static FN_INLINE F widen(U h) {
    return (F)vcvt_f32_f16(vreinterpret_f16_u16(vmovn_u32((uint32x4_t)h)));
  }
  static FN_INLINE U narrow(F x) {
    return (U)vmovl_u16(vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)x)));
  }
#else
  static FN_INLINE F widen(U x) {
    const U magnitude = x & 0x7fffu;
    U f = (magnitude << 13) + (112u << 23);  // rebased exponent
    f = (magnitude < 0x400u) ? (U)(__builtin_convertvector(magnitude, F) * 0x1p-24f) : f;
    f = (magnitude >= 0x7c00u) ? (magnitude << 13) | 0x7f800000u : f;
    return (F)(f | (x & 0x8000u) << 16);
  }
  static FN_INLINE U narrow(F x) {
    const U bits = (U)x, sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    const U normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
    const U subnormal = (U)((F)magnitude + 0.5f) - 0x3f000000u;  // rounds at the last half bit
    U h = (magnitude < (113u << 23)) ? subnormal : normal;
    h = (magnitude >= 0x477ff000u) ? (U{} + 0x7c00u) : h;
    h = (magnitude > 0x7f800000u) ? (U{} + 0x7e00u) : h;
    return h | sign;
  }
#endif
};

// ---- rows <-> lanes ---------------------------------------------------------------------------

// Four words of each of W rows: in memory 16 bytes of every row, in registers row 4 l + i in the
// l-th 128 bits of r[i]. transpose() turns that into word i of row r in lane r of r[i], and back: 8
// shuffles for 4 W words, where a W x W transposition takes 4 log2(W) for as many.
#if FASTNEGATE_LANES == 16
FN_INLINE U gather(const char* a, const char* b, const char* c, const char* d) {
  const auto at = [](const char* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); };
  __m512i r = _mm512_castsi128_si512(at(a));
  r = _mm512_mask_broadcast_i32x4(r, 0x00f0, at(b));
  r = _mm512_mask_broadcast_i32x4(r, 0x0f00, at(c));
  return (U)_mm512_mask_broadcast_i32x4(r, 0xf000, at(d));
}
template <int L>
FN_INLINE void scatter(U r, char* p) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_extracti32x4_epi32((__m512i)r, L));
}
FN_INLINE void transpose(U (&r)[4]) {
  const auto lo = [](U a, U b) { return _mm512_unpacklo_epi32((__m512i)a, (__m512i)b); };
  const auto hi = [](U a, U b) { return _mm512_unpackhi_epi32((__m512i)a, (__m512i)b); };
  const __m512i a = lo(r[0], r[1]), b = hi(r[0], r[1]), c = lo(r[2], r[3]), d = hi(r[2], r[3]);
  r[0] = (U)_mm512_unpacklo_epi64(a, c);
  r[1] = (U)_mm512_unpackhi_epi64(a, c);
  r[2] = (U)_mm512_unpacklo_epi64(b, d);
  r[3] = (U)_mm512_unpackhi_epi64(b, d);
}
#elif FASTNEGATE_LANES == 8
FN_INLINE U gather(const char* a, const char* b) {
  const auto at = [](const char* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); };
  return (U)_mm256_inserti128_si256(_mm256_castsi128_si256(at(a)), at(b), 1);
}
template <int L>
FN_INLINE void scatter(U r, char* p) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_extracti128_si256((__m256i)r, L));
}
FN_INLINE void transpose(U (&r)[4]) {
  const auto lo = [](U a, U b) { return _mm256_unpacklo_epi32((__m256i)a, (__m256i)b); };
  const auto hi = [](U a, U b) { return _mm256_unpackhi_epi32((__m256i)a, (__m256i)b); };
  const __m256i a = lo(r[0], r[1]), b = hi(r[0], r[1]), c = lo(r[2], r[3]), d = hi(r[2], r[3]);
  r[0] = (U)_mm256_unpacklo_epi64(a, c);
  r[1] = (U)_mm256_unpackhi_epi64(a, c);
  r[2] = (U)_mm256_unpacklo_epi64(b, d);
  r[3] = (U)_mm256_unpackhi_epi64(b, d);
}
#else
FN_INLINE U gather(const char* p) {
  U r;
  std::memcpy(&r, p, sizeof(U));
  return r;
}
template <int L>
FN_INLINE void scatter(U r, char* p) {
  std::memcpy(p, &r, sizeof(U));
}
FN_INLINE void transpose(U (&r)[4]) {
#if defined(__aarch64__)
  const auto lo = [](U a, U b) { return (uint64x2_t)vzip1q_u32((uint32x4_t)a, (uint32x4_t)b); };
  const auto hi = [](U a, U b) { return (uint64x2_t)vzip2q_u32((uint32x4_t)a, (uint32x4_t)b); };
  const uint64x2_t a = lo(r[0], r[1]), b = hi(r[0], r[1]), c = lo(r[2], r[3]), d = hi(r[2], r[3]);
  r[0] = (U)vzip1q_u64(a, c);
  r[1] = (U)vzip2q_u64(a, c);
  r[2] = (U)vzip1q_u64(b, d);
  r[3] = (U)vzip2q_u64(b, d);
#else
  const U a = r[0], b = r[1], c = r[2], d = r[3];
  for (int i = 0; i < 4; ++i) r[i] = U{a[i], b[i], c[i], d[i]};
#endif
}
#endif

// Word i of the 16 bytes at `offset` of every row, in r[i].
FN_INLINE void load_words(const char* const (&row)[W], int64_t offset, U (&r)[4]) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
#if FASTNEGATE_LANES == 16
    r[i] = gather(row[i] + offset, row[4 + i] + offset, row[8 + i] + offset, row[12 + i] + offset);
#elif FASTNEGATE_LANES == 8
    r[i] = gather(row[i] + offset, row[4 + i] + offset);
#else
    r[i] = gather(row[i] + offset);
#endif
  transpose(r);
}

// The inverse, for the first `count` rows.
FN_INLINE void store_words(char* const (&row)[W], int64_t offset, int64_t count, U (&r)[4]) {
  transpose(r);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    if (i < count) scatter<0>(r[i], row[i] + offset);
#if FASTNEGATE_LANES >= 8
    if (4 + i < count) scatter<1>(r[i], row[4 + i] + offset);
#endif
#if FASTNEGATE_LANES == 16
    if (8 + i < count) scatter<2>(r[i], row[8 + i] + offset);
    if (12 + i < count) scatter<3>(r[i], row[12 + i] + offset);
#endif
  }
}

}  // namespace fastnegate::FASTNEGATE_ISA
