// SPDX-License-Identifier: Apache-2.0
// The CUDA kernels, called from the host. Nothing here allocates or waits, so a call may be captured into a
// CUDA graph once another one like it has run.
#pragma once

#include <stdexcept>
#include <string>

#include "cuda/launch.h"

namespace fastnegate {

// A call of CUDA's runtime that failed; the message names it.
struct CudaError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A binary of CUDA 13 runs with every driver of CUDA 13. The first of them is of branch 580: CUDA Toolkit Release
// Notes, "CUDA Toolkit and Corresponding Driver Versions".
constexpr int kOldestDriver = 13000;  // as cudaDriverGetVersion says it
constexpr int kOldestDriverBranch = 580;

// Why no CUDA kernel can run on this machine; empty if one can.
std::string cuda_unavailable();

// Whether this build has kernels for a head_dim.
bool cuda_supports_dim(int dim);

// Tables of float32 in device memory that the caller has allocated; null if they are not wanted.
struct CudaTables {
  float *moments, *norms;              // [5, E, H, N] and [2, B, H, N]: scope `feature`
  float *trace_entries, *trace_rows;   // [3, E, H, N], cleared, and [4, B, H, N]: statistics
};

// How problems that differ in addresses alone run on a device.
struct CudaPlan {
  int device;
  cuda::Kernel kernel;  // null: there is nothing to compute
  CudaTiling tiling;
};

// Throws std::invalid_argument for what the kernel does not take, CudaError if the device cannot be asked.
CudaPlan plan_cuda(const Problem& problem, int device);

// Starts the operator on one of the device's streams. `problem` has the sizes and strides of the plan's. Throws
// std::invalid_argument for addresses that the kernel does not take, before anything is started, and CudaError if
// starting fails.
void run_cuda(const CudaPlan& plan, const Problem& problem, const CudaTables& tables, void* stream);

}  // namespace fastnegate
