// SPDX-License-Identifier: Apache-2.0
// Kernels for test_cuda_shim.py, right and wrong ones. As a library: `run` and calls of the runtime API. As a
// program: runs the kernels it is given the names of, on memory of exactly the size they may use.
#include <cuda/ptx.cuh>
#include <cuda_runtime.h>
#include <shim.h>

#include <cstdio>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>

using namespace fastnegate;

namespace {

struct Task {
  const uint32_t* in;
  uint32_t* out;
  int n;  // words of each
};

constexpr unsigned kAll = ~0u;

__device__ uint32_t* shared() { return reinterpret_cast<uint32_t*>(ptx::shared_memory()); }
__device__ ptx::Address line(unsigned word) { return ptx::address(shared() + word); }
__device__ int block_and_thread() { return static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); }

// ---- numbers ----------------------------------------------------------------------------------------

template <class F>
__device__ void for_each(const Task& task, F f) {
  for (unsigned i = threadIdx.x; i < static_cast<unsigned>(task.n); i += blockDim.x) task.out[i] = f(i);
}
__device__ float number(const Task& task, unsigned i) { return __uint_as_float(__ldg(task.in + i)); }

__global__ void exponential(const __grid_constant__ Task task) {
  for_each(task, [&](unsigned i) { return __float_as_uint(ptx::exp2(number(task, i))); });
}
__global__ void reciprocal(const __grid_constant__ Task task) {
  for_each(task, [&](unsigned i) { return __float_as_uint(ptx::reciprocal(number(task, i))); });
}
__global__ void root(const __grid_constant__ Task task) {
  for_each(task, [&](unsigned i) { return __float_as_uint(ptx::sqrt(number(task, i))); });
}
template <class T>
__global__ void packed(const __grid_constant__ Task task) {  // with 1.0 in the high half
  for_each(task, [&](unsigned i) { return ptx::pack<T>(number(task, i), 1.f); });
}
template <class T>
__global__ void unpacked(const __grid_constant__ Task task) {  // the low halves; of the first, the high one
  for_each(task, [&](unsigned i) {
    return __float_as_uint(i > 0 ? ptx::low<T>(task.in[i]) : ptx::high<T>(task.in[i]));
  });
}

// ---- matrices ---------------------------------------------------------------------------------------

template <class T>
__global__ void multiply_16(const __grid_constant__ Task task) {  // a lane's 4 of A, 2 of B, 4 of D
  const uint32_t* in = task.in + threadIdx.x * 10;
  float c[4], d[4];
  for (int i = 0; i < 4; ++i) c[i] = __uint_as_float(in[6 + i]);
  ptx::multiply<T>(d, {in[0], in[1], in[2], in[3]}, in[4], in[5], c);
  for (int i = 0; i < 4; ++i) task.out[threadIdx.x * 4 + i] = __float_as_uint(d[i]);
}
template <class T>
__global__ void multiply_8(const __grid_constant__ Task task) {  // a lane's 2 of A, 1 of B, 4 of D
  const uint32_t* in = task.in + threadIdx.x * 7;
  float c[4], d[4];
  for (int i = 0; i < 4; ++i) c[i] = __uint_as_float(in[3 + i]);
  ptx::multiply_half<T>(d, {in[0], in[1]}, in[2], c);
  for (int i = 0; i < 4; ++i) task.out[threadIdx.x * 4 + i] = __float_as_uint(d[i]);
}
// `in`: 32 words, the byte where a lane's row begins (of no meaning in lanes from 8 N on), then what shared memory
// holds. Loaded from 16 bytes before it, with an offset of 16.
template <int N, bool kTransposed>
__global__ void load(const __grid_constant__ Task task) {
  for (int i = static_cast<int>(threadIdx.x); i < task.n - 32; i += 32) shared()[i] = task.in[32 + i];
  __syncwarp();
  uint32_t m[N];
  const ptx::Address row = ptx::address(ptx::shared_memory()) + task.in[threadIdx.x];
  kTransposed ? ptx::load_transposed<16>(m, row - 16) : ptx::load_matrices<16>(m, row - 16);
  for (int i = 0; i < N; ++i) task.out[threadIdx.x * N + i] = m[i];
}

// ---- asynchronous copies ----------------------------------------------------------------------------

// Two groups, a copy of each thread in each, of lines of 4 words; a line that begins with 0 is not present.
// Out come the first words: at once, with one group left to wait for, and with none.
__global__ void copies(const __grid_constant__ Task task) {
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  for (int group = 0; group < 2; ++group) {
    const int word = (group * threads + thread) * 4;
    const bool present = task.in[word] != 0;
    ptx::copy_16(line(word), present ? task.in + word : nullptr, present);
    ptx::commit();
  }
  uint32_t* out = task.out + thread * 6;
  const auto look = [&] {
    for (int group = 0; group < 2; ++group) *out++ = shared()[(group * threads + thread) * 4];
  };
  look();
  ptx::wait<1>();
  look();
  ptx::wait<0>();
  look();
}
__global__ void copy_not_waited_for(const __grid_constant__ Task task) {
  ptx::copy_16(line(threadIdx.x * 4), task.in, true);  // of no group: not what wait<0> waits for
  ptx::wait<0>();
}
__global__ void copy_strided(const __grid_constant__ Task task) {  // all of a warp in one bank of each four
  ptx::copy_16(line(threadIdx.x * 32), task.in, true);
  if (threadIdx.x < 16) ptx::copy_16(line(threadIdx.x * 4), task.in, false);
  ptx::copy_16(line(threadIdx.x * 4), task.in, true);
  ptx::commit();
  ptx::wait<0>();
}
__global__ void copy_in_turn(const __grid_constant__ Task task) {  // the first lane once, the last 32 times
  for (unsigned i = 0; i <= threadIdx.x % 32; ++i) ptx::copy_16(line(threadIdx.x * 4), task.in + threadIdx.x * 4, true);
  ptx::commit();
  ptx::wait<0>();
  task.out[block_and_thread()] = shared()[threadIdx.x * 4];
}
__global__ void copy_to_byte_8(const __grid_constant__ Task task) {
  ptx::copy_16(line(2), task.in, true);
}
__global__ void copy_from_byte_8(const __grid_constant__ Task task) {
  ptx::copy_16(line(0), reinterpret_cast<const char*>(task.in) + 8, true);
}
__global__ void copy_beyond(const __grid_constant__ Task task) {  // into the last 8 bytes and beyond
  if (threadIdx.x == 3) ptx::copy_16(line(4), task.in, true);
}
__global__ void row_beyond(const __grid_constant__ Task) {
  uint32_t m[2];
  ptx::load_matrices<0>(m, line(threadIdx.x * 4));
}

// ---- threads that meet ------------------------------------------------------------------------------

__global__ void shuffles(const __grid_constant__ Task task) {
  const int i = static_cast<int>(threadIdx.x);
  uint32_t* out = task.out + i * 6;
  out[0] = __shfl_sync(kAll, task.in[i], 5);
  out[1] = __shfl_sync(kAll, task.in[i], (i * 7) % 32);
  out[2] = __shfl_sync(kAll, task.in[i], i + 1, 8);
  out[3] = __shfl_xor_sync(kAll, task.in[i], 9);
  out[4] = __float_as_uint(__shfl_xor_sync(kAll, number(task, threadIdx.x), 3, 4));
  out[5] = __shfl_xor_sync(kAll, task.in[i], 6, 4);  // out of the segment: its own
}
__global__ void votes(const __grid_constant__ Task task) {
  const uint32_t x = task.in[threadIdx.x];
  task.out[threadIdx.x * 3] = __ballot_sync(kAll, x & 256);
  task.out[threadIdx.x * 3 + 1] = static_cast<uint32_t>(__any_sync(kAll, x & 512));
  task.out[threadIdx.x * 3 + 2] = static_cast<uint32_t>(__all_sync(kAll, x & 1024));
}
__global__ void reductions(const __grid_constant__ Task task) {
  const uint32_t x = task.in[threadIdx.x];
  uint32_t* out = task.out + threadIdx.x * 5;
  out[0] = __reduce_add_sync(kAll, x);
  out[1] = __reduce_min_sync(kAll, x);
  out[2] = __reduce_max_sync(kAll, x);
  out[3] = static_cast<uint32_t>(__reduce_min_sync(kAll, static_cast<int>(x)));
  out[4] = static_cast<uint32_t>(__reduce_max_sync(kAll, static_cast<int>(x)));
}
__global__ void coordinates(const __grid_constant__ Task task) {
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  task.out[block * blockDim.x * blockDim.y * blockDim.z + thread] = block * 1000 + thread;
}
// In which order threads and blocks go on; only the schedule orders them.
__global__ void order(const __grid_constant__ Task task) {
  for (int round = 0; round < 2; ++round) {
    __syncwarp();
    task.out[1 + task.out[0]++] = static_cast<uint32_t>(block_and_thread());
  }
}
__global__ void reversed(const __grid_constant__ Task task) {
  for (int round = 0; round < 3; ++round) {
    shared()[threadIdx.x] = task.in[threadIdx.x] + static_cast<uint32_t>(round);
    __syncthreads();
    const uint32_t other = shared()[blockDim.x - 1 - threadIdx.x];
    __syncthreads();
    task.out[(blockIdx.x * 3 + static_cast<uint32_t>(round)) * blockDim.x + threadIdx.x] = other;
  }
}
__global__ void half_shuffles(const __grid_constant__ Task task) {
  if (threadIdx.x % 32 < 16)
    __syncwarp();
  else
    task.out[0] = __shfl_sync(kAll, 1u, 0);
}
__global__ void half_leaves(const __grid_constant__ Task) {
  if (threadIdx.x < 40) __syncthreads();
}
__global__ void warps_part(const __grid_constant__ Task) {
  threadIdx.x < 32 || threadIdx.x == 40 ? __syncthreads() : __syncwarp();
}
__global__ void half_mask(const __grid_constant__ Task) { __syncwarp(0xffff); }
__global__ void kernel_throws(const __grid_constant__ Task) { throw std::runtime_error("out of ideas"); }

// ---- memory errors and races ------------------------------------------------------------------------

__global__ void reads_beyond(const __grid_constant__ Task task) {
  task.out[threadIdx.x] = task.in[static_cast<int>(threadIdx.x) + task.n - 31];
}
__global__ void copies_beyond(const __grid_constant__ Task task) {
  ptx::copy_16(line(threadIdx.x * 4), task.in + task.n - 124 + threadIdx.x * 4, true);
  ptx::commit();
  ptx::wait<0>();
}
__global__ void writes_beyond(const __grid_constant__ Task) { shared()[threadIdx.x + 1] = 0; }
__global__ void writes_misaligned(const __grid_constant__ Task) {
  *reinterpret_cast<uint4*>(shared() + 2) = make_uint4(1, 2, 3, 4);
}

enum class Missing { nothing, first_barrier, last_barrier, wait, first_warp, last_warp };

// Warp by warp, each through its own part of shared memory, then across warps; twice through the same memory.
template <Missing kMissing>
__global__ void pipeline(const __grid_constant__ Task task) {
  const unsigned thread = threadIdx.x, lane = thread % 32, base = thread - lane;
  char* lines = ptx::shared_memory();
  auto* words = reinterpret_cast<uint32_t*>(lines + blockDim.x * 16);
  uint32_t sum = 0;
  for (int round = 0; round < 2; ++round) {
    ptx::copy_16(ptx::address(lines + thread * 16), task.in + thread * 4, true);
    ptx::commit();
    if (kMissing != Missing::wait || round > 0) ptx::wait<0>();
    if (kMissing != Missing::first_barrier) __syncthreads();
    uint32_t m[4];
    ptx::load_matrices<0>(m, ptx::address(lines + (blockDim.x - 1 - thread) * 16));
    float d[4] = {};
    ptx::multiply<float16>(d, m, m[0], m[1], d);
    sum += __float_as_uint(d[0]) + (__any_sync(kAll, 1) != 0);
    words[thread] = sum;
    if (kMissing != Missing::first_warp)
      __syncwarp();
    else
      sum += __shfl_sync(kAll, sum, 0);  // a meeting, but memory is not ordered by it
    sum += words[base + (lane + 1) % 32];
    if (kMissing != Missing::last_warp) __syncwarp();
    words[thread] = sum;
    if (kMissing != Missing::last_barrier) __syncthreads();
  }
  task.out[blockIdx.x * blockDim.x + thread] = sum;
}
__global__ void blocks_meet(const __grid_constant__ Task task) { task.out[threadIdx.x] = blockIdx.x; }

using Kernel = void (*)(Task);
const std::map<std::string, Kernel> kernels = {
    {"exp2", exponential},
    {"reciprocal", reciprocal},
    {"sqrt", root},
    {"pack_float16", packed<float16>},
    {"pack_bfloat16", packed<bfloat16>},
    {"unpack_float16", unpacked<float16>},
    {"unpack_bfloat16", unpacked<bfloat16>},
    {"multiply_16_float16", multiply_16<float16>},
    {"multiply_16_bfloat16", multiply_16<bfloat16>},
    {"multiply_8_float16", multiply_8<float16>},
    {"multiply_8_bfloat16", multiply_8<bfloat16>},
    {"load_2", load<2, false>},
    {"load_4", load<4, false>},
    {"load_2_transposed", load<2, true>},
    {"load_4_transposed", load<4, true>},
    {"copies", copies},
    {"copy_not_waited_for", copy_not_waited_for},
    {"copy_strided", copy_strided},
    {"copy_in_turn", copy_in_turn},
    {"copy_to_byte_8", copy_to_byte_8},
    {"copy_from_byte_8", copy_from_byte_8},
    {"copy_beyond", copy_beyond},
    {"row_beyond", row_beyond},
    {"shuffles", shuffles},
    {"votes", votes},
    {"reductions", reductions},
    {"coordinates", coordinates},
    {"order", order},
    {"reversed", reversed},
    {"half_shuffles", half_shuffles},
    {"half_leaves", half_leaves},
    {"warps_part", warps_part},
    {"half_mask", half_mask},
    {"kernel_throws", kernel_throws},
    {"reads_beyond", reads_beyond},
    {"copies_beyond", copies_beyond},
    {"writes_beyond", writes_beyond},
    {"writes_misaligned", writes_misaligned},
    {"pipeline", pipeline<Missing::nothing>},
    {"no_first_barrier", pipeline<Missing::first_barrier>},
    {"no_last_barrier", pipeline<Missing::last_barrier>},
    {"no_wait", pipeline<Missing::wait>},
    {"no_first_syncwarp", pipeline<Missing::first_warp>},
    {"no_last_syncwarp", pipeline<Missing::last_warp>},
    {"blocks_meet", blocks_meet},
};

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// Null, the name of the error the launch returned, or what it threw.
const char* run(const char* name, const void* in, void* out, int n, const unsigned* grid,
                const unsigned* block, size_t shared) {
  Task task{static_cast<const uint32_t*>(in), static_cast<uint32_t*>(out), n};
  void* arguments[] = {&task};
  const dim3 blocks(grid[0], grid[1], grid[2]), threads(block[0], block[1], block[2]);
  try {
    const cudaError_t error = cudaLaunchKernel(kernels.at(name), blocks, threads, arguments, shared, nullptr);
    return error == cudaSuccess ? nullptr : cudaGetErrorName(error);
  } catch (const std::runtime_error&) {
    return fastnegate_shim_last_error();
  }
}

int allow_shared(const char* name, int bytes) {
  return cudaFuncSetAttribute(kernels.at(name), cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}
int allowed_shared(const char* name) {
  cudaFuncAttributes attributes{};
  cudaFuncGetAttributes(&attributes, kernels.at(name));
  return attributes.maxDynamicSharedSizeBytes;
}
int get_device(int* device) { return cudaGetDevice(device); }
int set_device(int device) { return cudaSetDevice(device); }
int device_count(int* count) { return cudaGetDeviceCount(count); }
int attribute(int* value, int which, int device) {
  return cudaDeviceGetAttribute(value, static_cast<cudaDeviceAttr>(which), device);
}
int driver_version(int* version) { return cudaDriverGetVersion(version); }
int runtime_version(int* version) { return cudaRuntimeGetVersion(version); }
int get_last_error() { return cudaGetLastError(); }
int peek_at_last_error() { return cudaPeekAtLastError(); }
const char* error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
}
#pragma GCC visibility pop

// Two blocks of 64 threads with 64 words of shared memory each beside 64 lines. After a kernel that failed on
// purpose, others must find nothing of it.
int main(int count, char** names) {
  constexpr int n = 384;
  const auto in = std::make_unique<uint32_t[]>(n), out = std::make_unique<uint32_t[]>(n);
  const unsigned grid[] = {2, 1, 1}, block[] = {64, 1, 1};
  for (int i = 1; i < count; ++i) {
    const bool tight = std::string(names[i]) == "writes_beyond";
    const char* error = run(names[i], in.get(), out.get(), n, grid, block, tight ? 256 : 64 * 20);
    std::printf("%s: %s\n", names[i], error ? error : "done");
    std::fflush(stdout);
  }
}
