// SPDX-License-Identifier: Apache-2.0
// The instructions that CUDA C++ has no name for: one function each, with the section of the PTX ISA (9.0)
// that defines it. All of them exist from compute capability 8.0 on.
//
// Nothing else of the kernel knows that it runs on a GPU: a host that gives these functions another
// definition can execute it.
#pragma once

#include <cstdint>

namespace fastnegate {

// Types of stored numbers; the kernel computes with neither.
struct float16 {
  uint16_t bits;
};
struct bfloat16 {
  uint16_t bits;
};

}  // namespace fastnegate

namespace fastnegate::ptx {

// Shared memory of the launch, aligned to 16 bytes.
__device__ __forceinline__ char* shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

// Where something lies in shared memory. Sums of it with constants cost nothing: instructions add them.
using Address = uint32_t;
__device__ __forceinline__ Address address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// ---- asynchronous copies (9.7.9.25.3) ---------------------------------------------------------------

// 16 bytes from global to shared memory; 16 zeros, and nothing is read, where it is not `present`.
__device__ __forceinline__ void copy_16(Address to, const void* from, bool present) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(present ? 16 : 0)
               : "memory");
}

// Ends a group of this thread's copies.
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all of this thread's groups but the last N.
template <int N>
__device__ __forceinline__ void wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// ---- matrices (9.7.14.5) ----------------------------------------------------------------------------
// Lane l has g = l / 4 and t = l % 4. A register holds two neighbours of a row.

// N matrices of 8 x 8 from shared memory; lanes 8 i .. 8 i + 7 name the rows (of 16 bytes) of matrix i, kOffset
// bytes before them. Register i then has row g, columns 2 t and 2 t + 1 of matrix i.
template <int kOffset>
__device__ __forceinline__ void load_matrices(uint32_t (&m)[2], Address row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2 + %3];"
               : "=r"(m[0]), "=r"(m[1]) : "r"(row), "n"(kOffset));
}
template <int kOffset>
__device__ __forceinline__ void load_matrices(uint32_t (&m)[4], Address row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4 + %5];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3]) : "r"(row), "n"(kOffset));
}

// The same, each matrix transposed: register i has rows 2 t and 2 t + 1, column g of matrix i.
template <int kOffset>
__device__ __forceinline__ void load_transposed(uint32_t (&m)[2], Address row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2 + %3];"
               : "=r"(m[0]), "=r"(m[1]) : "r"(row), "n"(kOffset));
}
template <int kOffset>
__device__ __forceinline__ void load_transposed(uint32_t (&m)[4], Address row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4 + %5];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3]) : "r"(row), "n"(kOffset));
}

// D = A B + C of 16 x 16 and 16 x 8, sums in float32. A: registers have rows g, g + 8, g, g + 8 and columns
// 2 t (+ 1), the last two + 8. B: rows 2 t (+ 1) and + 8, column g. C and D: rows g, g, g + 8, g + 8, columns
// 2 t and 2 t + 1.
template <class T>
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                         const float (&c)[4]);
// The same of 16 x 8 and 8 x 8: the first half of A and B.
template <class T>
__device__ __forceinline__ void multiply_half(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, const float (&c)[4]);

template <>
__device__ __forceinline__ void multiply<float16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                                const float (&c)[4]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%10, %11, %12, %13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}
template <>
__device__ __forceinline__ void multiply_half<float16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                                     const float (&c)[4]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
      "{%7, %8, %9, %10};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(b0), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}
template <>
__device__ __forceinline__ void multiply<bfloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                                const float (&c)[4]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%10, %11, %12, %13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}
template <>
__device__ __forceinline__ void multiply_half<bfloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                                     const float (&c)[4]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
      "{%7, %8, %9, %10};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(b0), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

// ---- numbers ----------------------------------------------------------------------------------------

// 2^x, within 2 ulp; 0 for -inf and where the result is below 2^-126 (9.7.3.20).
__device__ __forceinline__ float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x, within 1 ulp (9.7.3.13).
__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The square root, within 1 ulp (9.7.3.15).
__device__ __forceinline__ float sqrt(float x) {
  float y;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two numbers rounded to T, `low` in the low half (9.7.9.21).
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high);

template <>
__device__ __forceinline__ uint32_t pack<float16>(float low, float high) {
  uint32_t both;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}
template <>
__device__ __forceinline__ uint32_t pack<bfloat16>(float low, float high) {
  uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

// The low and the high one of two such numbers.
template <class T>
__device__ __forceinline__ float low(uint32_t both);
template <class T>
__device__ __forceinline__ float high(uint32_t both) {
  return low<T>(both >> 16);
}

template <>
__device__ __forceinline__ float low<float16>(uint32_t both) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(static_cast<uint16_t>(both)));
  return x;
}
template <>
__device__ __forceinline__ float low<bfloat16>(uint32_t both) {
  return __uint_as_float(both << 16);
}

// ---- lanes (9.7.9.6) ----------------------------------------------------------------------------------

// x of the lane whose number differs in the bits kLanes.
template <int kLanes>
__device__ __forceinline__ float exchange(float x) {
  float y;
  asm volatile("shfl.sync.bfly.b32 %0, %1, %2, 31, -1;" : "=f"(y) : "f"(x), "n"(kLanes));
  return y;
}
template <int kLanes>
__device__ __forceinline__ int exchange(int x) {
  int y;
  asm volatile("shfl.sync.bfly.b32 %0, %1, %2, 31, -1;" : "=r"(y) : "r"(x), "n"(kLanes));
  return y;
}

// x of lane i of the four that share a row.
template <int i>
__device__ __forceinline__ float of_lane(float x) {
  float y;
  asm volatile("shfl.sync.idx.b32 %0, %1, %2, 7199, -1;" : "=f"(y) : "f"(x), "n"(i));  // 7199: 28 << 8 | 31
  return y;
}

// ---- the compiler -------------------------------------------------------------------------------------

// x, of which the compiler knows nothing any more: what it is made of is not computed again wherever it is used, and
// what is made of it is not kept in registers since before a loop.
__device__ __forceinline__ int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}
__device__ __forceinline__ float opaque(float x) {
  asm volatile("" : "+f"(x));
  return x;
}

}  // namespace fastnegate::ptx
