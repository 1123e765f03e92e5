// SPDX-License-Identifier: Apache-2.0
// What kernels and their launch code use of CUDA, for a C++ compiler of the host: shim.cpp executes the
// kernels on the CPU. What is missing here does not compile. That includes `__shared__`: kernels take shared
// memory from ptx::shared_memory().
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

// ---- language ---------------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)

struct alignas(8) int2 {
  int x, y;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline int2 make_int2(int x, int y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
};

using cudaStream_t = struct CUstream_st*;
enum cudaError_t : int;

namespace fastnegate::shim {

struct Coordinates {
  uint3 thread, block;
  dim3 threads, blocks;
};
extern const Coordinates* coordinates;  // of the running thread

int lane();
void sync_block();
void sync_warp(unsigned mask);
uint32_t shuffle(const char* name, unsigned mask, uint32_t value, int source);
using Join = uint32_t (*)(uint32_t, uint32_t);
uint32_t reduce(const char* name, unsigned mask, uint32_t value, Join join);

using Start = void (*)(const void* kernel, const void* parameters);
cudaError_t launch(const void* kernel, Start start, const void* parameters, dim3 grid, dim3 block,
                   size_t shared, cudaStream_t stream);

template <class To, class From>
To bits(From from) {
  static_assert(sizeof(To) == 4 && sizeof(From) == 4, "the shim knows 32-bit values only");
  To to;
  std::memcpy(&to, &from, 4);
  return to;
}

inline unsigned ballot(const char* name, unsigned mask, bool predicate) {
  return reduce(name, mask, uint32_t{predicate} << lane(), [](uint32_t a, uint32_t b) { return a | b; });
}

}  // namespace fastnegate::shim

#define threadIdx (::fastnegate::shim::coordinates->thread)
#define blockIdx (::fastnegate::shim::coordinates->block)
#define blockDim (::fastnegate::shim::coordinates->threads)
#define gridDim (::fastnegate::shim::coordinates->blocks)

inline void __syncthreads() { fastnegate::shim::sync_block(); }
inline void __syncwarp(unsigned mask = ~0u) { fastnegate::shim::sync_warp(mask); }

// Lanes exchange values within segments of `width`.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  using namespace fastnegate::shim;
  const int from = (lane() & ~(width - 1)) | (source & (width - 1));
  return bits<T>(shuffle("__shfl_sync", mask, bits<uint32_t>(value), from));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  using namespace fastnegate::shim;
  const int from = lane() ^ lanes;
  const bool inside = from <= (lane() | (width - 1));
  return bits<T>(shuffle("__shfl_xor_sync", mask, bits<uint32_t>(value), inside ? from : lane()));
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return fastnegate::shim::ballot("__ballot_sync", mask, predicate != 0);
}
inline int __any_sync(unsigned mask, int predicate) {
  return fastnegate::shim::ballot("__any_sync", mask, predicate != 0) != 0;
}
inline int __all_sync(unsigned mask, int predicate) {
  return fastnegate::shim::ballot("__all_sync", mask, predicate != 0) == ~0u;
}

template <class T>
T __reduce_add_sync(unsigned mask, T value) {
  using namespace fastnegate::shim;
  const Join join = [](uint32_t a, uint32_t b) { return a + b; };
  return bits<T>(reduce("__reduce_add_sync", mask, bits<uint32_t>(value), join));
}
template <class T>
T __reduce_min_sync(unsigned mask, T value) {
  using namespace fastnegate::shim;
  const Join join = [](uint32_t a, uint32_t b) { return bits<T>(b) < bits<T>(a) ? b : a; };
  return bits<T>(reduce("__reduce_min_sync", mask, bits<uint32_t>(value), join));
}
template <class T>
T __reduce_max_sync(unsigned mask, T value) {
  using namespace fastnegate::shim;
  const Join join = [](uint32_t a, uint32_t b) { return bits<T>(a) < bits<T>(b) ? b : a; };
  return bits<T>(reduce("__reduce_max_sync", mask, bits<uint32_t>(value), join));
}

// Of numbers of one type; nvcc also has mixed ones.
template <class T>
std::enable_if_t<std::is_integral_v<T>, T> min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
std::enable_if_t<std::is_integral_v<T>, T> max(T a, T b) {
  return a < b ? b : a;
}

template <class T>
T __ldg(const T* p) {
  return *p;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline unsigned __float_as_uint(float x) { return fastnegate::shim::bits<unsigned>(x); }
inline int __float_as_int(float x) { return fastnegate::shim::bits<int>(x); }
inline float __uint_as_float(unsigned x) { return fastnegate::shim::bits<float>(x); }
inline float __int_as_float(int x) { return fastnegate::shim::bits<float>(x); }

// ---- runtime API ------------------------------------------------------------------------------------
// Calls fail as shim.h arranges. A kernel that breaks a rule makes cudaLaunchKernel throw
// std::runtime_error, which says what happened where.

enum cudaError_t : int {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInitializationError = 3,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInsufficientDriver = 35,
  cudaErrorNoDevice = 100,
  cudaErrorInvalidDevice = 101,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorUnsupportedPtxVersion = 222,
  cudaErrorIllegalAddress = 700,
  cudaErrorLaunchOutOfResources = 701,
  cudaErrorMisalignedAddress = 716,
  cudaErrorLaunchFailure = 719,
  cudaErrorNotSupported = 801,
  cudaErrorUnknown = 999,
};
const char* cudaGetErrorName(cudaError_t error);
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();

cudaError_t cudaDriverGetVersion(int* version);
cudaError_t cudaRuntimeGetVersion(int* version);

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaDeviceSynchronize();

// The memory of the device is that of the host.
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2 };
cudaError_t cudaMalloc(void** memory, size_t bytes);
cudaError_t cudaFree(void* memory);
cudaError_t cudaMemset(void* memory, int byte, size_t bytes);
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind);

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
struct cudaFuncAttributes {
  int maxDynamicSharedSizeBytes;
  int maxThreadsPerBlock;
};
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel);

template <class P>
cudaError_t cudaFuncSetAttribute(void (*kernel)(P), cudaFuncAttribute attribute, int value) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}
template <class P>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*kernel)(P)) {
  return cudaFuncGetAttributes(attributes, reinterpret_cast<const void*>(kernel));
}

// Of kernels that take one struct. Returns when the kernel has run.
template <class P>
cudaError_t cudaLaunchKernel(void (*kernel)(P), dim3 grid, dim3 block, void** arguments, size_t shared,
                             cudaStream_t stream) {
  const auto start = [](const void* kernel, const void* parameters) {
    reinterpret_cast<void (*)(P)>(const_cast<void*>(kernel))(*static_cast<const P*>(parameters));
  };
  return fastnegate::shim::launch(reinterpret_cast<const void*>(kernel), start, arguments[0], grid, block,
                                  shared, stream);
}
