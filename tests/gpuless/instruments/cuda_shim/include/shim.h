// SPDX-License-Identifier: Apache-2.0
// The simulated GPU: what it says about itself, which calls fail, and what its launches did.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include <cuda_runtime.h>

namespace fastnegate::shim {

struct Device {  // an A100; `count` of them
  int64_t count = 1;
  int64_t major = 8, minor = 0;
  int64_t multiprocessors = 108;
  int64_t shared = 163 << 10;  // bytes a block may ask for
  int64_t driver = 13000, runtime = 13000;
  int64_t seed = 0;  // 0: warps and lanes run in order, else in an order drawn from it
};
Device& device();

// The next call of `function` returns `error` and does nothing else.
void fail_next(const std::string& function, cudaError_t error);

struct Counts {
  // Instructions, of a warp each; reductions with votes.
  uint64_t mma_k16, mma_k8, ldmatrix, shuffles, reductions;
  // Wavefronts of shared memory beyond those that take no bank twice. Which copies of a warp's lanes are one
  // instruction is not known for sure: those of one place in the code and one group, in order.
  uint64_t ldmatrix_conflicts, copy_conflicts;
  uint64_t copied, zeroed;  // bytes of asynchronous copies, present and not
  uint64_t exp2;            // of a thread each
  uint64_t barriers;        // __syncthreads of a block
  uint64_t switches;        // from one thread to another, here on the CPU
};

struct Launch {
  const void* kernel;
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
  int device;
  Counts counts;
};
const std::vector<Launch>& launches();

// What the last launch that threw has thrown.
const std::string& last_error();

// As if nothing had happened yet, but for what kernels were allowed (cudaFuncSetAttribute): programs ask once.
void reset();

}  // namespace fastnegate::shim

// The same for ctypes. Names are those of the fields above; -1: there is no such name (or launch).
#pragma GCC visibility push(default)
extern "C" {
int fastnegate_shim_set(const char* field, int64_t value);
int fastnegate_shim_fail_next(const char* function, int error);
int64_t fastnegate_shim_launches();
int64_t fastnegate_shim_count(int64_t launch, const char* field);
const char* fastnegate_shim_last_error();
void fastnegate_shim_reset();
}
#pragma GCC visibility pop
