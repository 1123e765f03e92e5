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

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// ---- asynchronous copies (9.7.9.25.3) ---------------------------------------------------------------

// 16 bytes from global to shared memory; 16 zeros, and nothing is read, where it is not `present`.
__device__ __forceinline__ void copy_16(void* to, const void* from, bool present) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(present ? 16 : 0)
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

// N matrices of 8 x 8 from shared memory; lanes 8 i .. 8 i + 7 name the rows (of 16 bytes) of matrix i.
// Register i then has row g, columns 2 t and 2 t + 1 of matrix i.
template <int N>
__device__ __forceinline__ void load_matrices(uint32_t (&m)[N], const void* row);

template <>
__device__ __forceinline__ void load_matrices<1>(uint32_t (&m)[1], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
               : "=r"(m[0]) : "r"(shared_address(row)) : "memory");
}
template <>
__device__ __forceinline__ void load_matrices<2>(uint32_t (&m)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(m[0]), "=r"(m[1]) : "r"(shared_address(row)) : "memory");
}
template <>
__device__ __forceinline__ void load_matrices<4>(uint32_t (&m)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3]) : "r"(shared_address(row)) : "memory");
}

// The same, each matrix transposed: register i has rows 2 t and 2 t + 1, column g of matrix i.
template <int N>
__device__ __forceinline__ void load_transposed(uint32_t (&m)[N], const void* row);

template <>
__device__ __forceinline__ void load_transposed<1>(uint32_t (&m)[1], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
               : "=r"(m[0]) : "r"(shared_address(row)) : "memory");
}
template <>
__device__ __forceinline__ void load_transposed<2>(uint32_t (&m)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(m[0]), "=r"(m[1]) : "r"(shared_address(row)) : "memory");
}
template <>
__device__ __forceinline__ void load_transposed<4>(uint32_t (&m)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3]) : "r"(shared_address(row)) : "memory");
}

// D += A B of 16 x 16 and 16 x 8, sums in float32. A: registers have rows g, g + 8, g, g + 8 and columns
// 2 t (+ 1), the last two + 8. B: rows 2 t (+ 1) and + 8, column g. D: rows g, g, g + 8, g + 8, columns 2 t
// and 2 t + 1.
template <class T>
__device__ __forceinline__ void multiply(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                         uint32_t b0, uint32_t b1);
// The same of 16 x 8 and 8 x 8: the first half of A and B.
template <class T>
__device__ __forceinline__ void multiply(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b0);

template <>
__device__ __forceinline__ void multiply<float16>(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                                 uint32_t a3, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void multiply<bfloat16>(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                                        uint32_t a3, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void multiply<float16>(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b0) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(b0));
}
template <>
__device__ __forceinline__ void multiply<bfloat16>(float (&d)[4], uint32_t a0, uint32_t a1,
                                                        uint32_t b0) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(b0));
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

// x, of which the compiler knows nothing any more: what is computed from it is computed here, and not kept in
// registers since before a loop.
__device__ __forceinline__ int again(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

}  // namespace fastnegate::ptx
