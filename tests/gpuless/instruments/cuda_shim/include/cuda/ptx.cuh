// SPDX-License-Identifier: Apache-2.0
// The functions of csrc/cuda/ptx.cuh for the CPU. Lanes of a warp meet in shim.cpp; memory is accessed here,
// in functions that become part of the kernel, so that sanitizers see it done by the thread and name the
// line.
#pragma once

#include <cmath>
#include <cstdint>

#include <cuda_runtime.h>

namespace fastnegate {

struct float16 {
  uint16_t bits;
};
struct bfloat16 {
  uint16_t bits;
};

}  // namespace fastnegate

namespace fastnegate::shim {

struct Copy {
  uint4* to;
  const uint4* from;  // null: zeros
  int64_t group;
};

char* shared_memory();
void begin_copy(void* to, const void* from);
void commit_copies();
bool finish_copy(int groups, Copy& copy);  // the next copy of all groups but the last `groups`

const uint4* matrix_row(const void* row);
void exchange_rows(int count, bool transposed, const uint4* address, const uint4& row, uint32_t* registers);
void multiply(bool brain, float* d, const uint32_t (&a)[4], const uint32_t (&b)[2]);  // k16
void multiply(bool brain, float* d, const uint32_t (&a)[2], uint32_t b);              // k8
void count_exp2();
uint16_t round_to_half(float x);
uint16_t round_to_brain(float x);
float from_half(uint16_t x);

template <int N>
[[gnu::always_inline]] inline void load(bool transposed, uint32_t (&m)[N], const void* row) {
  const uint4* address = nullptr;
  uint4 data{};
  if (lane() < 8 * N) {  // the others' addresses are not looked at
    address = matrix_row(row);
    data = *address;
  }
  exchange_rows(N, transposed, address, data, m);
}

// Subnormal numbers become zeros (.ftz).
inline float flush(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.f, x) : x; }

template <class T>
constexpr bool is_brain = false;
template <>
constexpr bool is_brain<bfloat16> = true;

}  // namespace fastnegate::shim

namespace fastnegate::ptx {

inline char* shared_memory() { return shim::shared_memory(); }

using Address = char*;
inline Address address(const void* shared) { return static_cast<char*>(const_cast<void*>(shared)); }

// The copy is made when it is waited for, as late as it may be; until then its destination holds NaN. That,
// not ThreadSanitizer, shows who reads it too early.
[[gnu::always_inline]] inline void copy_16(Address to, const void* from, bool present) {
  shim::begin_copy(to, present ? from : nullptr);
  if (present) {  // a bad address shows here
    (void)static_cast<const volatile uint64_t*>(from)[0];
    (void)static_cast<const volatile uint64_t*>(from)[1];
  }
  *reinterpret_cast<uint4*>(to) = {~0u, ~0u, ~0u, ~0u};
}

inline void commit() { shim::commit_copies(); }

template <int N>
[[gnu::always_inline]] inline void wait() {
  for (shim::Copy copy; shim::finish_copy(N, copy);) *copy.to = copy.from ? *copy.from : uint4{};
}

template <int kOffset, int N>
[[gnu::always_inline]] inline void load_matrices(uint32_t (&m)[N], Address row) {
  static_assert(N == 2 || N == 4, "no other ldmatrix is used");
  shim::load(false, m, row + kOffset);
}

template <int kOffset, int N>
[[gnu::always_inline]] inline void load_transposed(uint32_t (&m)[N], Address row) {
  static_assert(N == 2 || N == 4, "no other ldmatrix is used");
  shim::load(true, m, row + kOffset);
}

template <class T>
inline void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const float (&c)[4]) {
  float sums[4] = {c[0], c[1], c[2], c[3]};
  shim::multiply(shim::is_brain<T>, sums, a, {b0, b1});
  for (int i = 0; i < 4; ++i) d[i] = sums[i];
}

template <class T>
inline void multiply_half(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, const float (&c)[4]) {
  float sums[4] = {c[0], c[1], c[2], c[3]};
  shim::multiply(shim::is_brain<T>, sums, {a[0], a[1]}, b0);
  for (int i = 0; i < 4; ++i) d[i] = sums[i];
}

inline float exp2(float x) {
  shim::count_exp2();
  return shim::flush(std::exp2(shim::flush(x)));
}

inline float reciprocal(float x) { return 1.f / x; }

inline float sqrt(float x) { return std::sqrt(x); }

template <class T>
inline uint32_t pack(float low, float high) {
  const auto round = shim::is_brain<T> ? shim::round_to_brain : shim::round_to_half;
  return round(low) | static_cast<uint32_t>(round(high)) << 16;
}

template <class T>
inline float low(uint32_t both) {
  return shim::is_brain<T> ? __uint_as_float(both << 16) : shim::from_half(static_cast<uint16_t>(both));
}
template <class T>
inline float high(uint32_t both) {
  return low<T>(both >> 16);
}

template <int kLanes, class X>
inline X exchange(X x) {
  return __shfl_xor_sync(~0u, x, kLanes);
}
template <int i>
inline float of_lane(float x) {
  return __shfl_sync(~0u, x, i, 4);
}

inline int opaque(int x) { return x; }
inline float opaque(float x) { return x; }

}  // namespace fastnegate::ptx
