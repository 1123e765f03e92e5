// SPDX-License-Identifier: Apache-2.0
// The kernels of one dtype, by kind and head_dim.
#pragma once

#include "cuda/kernel.cuh"

// A build for tests may have fewer.
#ifndef FASTNEGATE_CUDA_DIMS
#define FASTNEGATE_CUDA_DIMS(X) X(32) X(40) X(64) X(72) X(80) X(88) X(96) X(112) X(128) X(160)
#endif

namespace fastnegate::cuda {

template <class T, int D>
Kernel kernel_of(CudaKind kind) {
  switch (kind) {
    case CudaKind::plain: return &attention<T, D, CudaKind::plain>;
    case CudaKind::one: return &attention<T, D, CudaKind::one>;
    case CudaKind::many: return &attention<T, D, CudaKind::many>;
  }
  return nullptr;
}

template <class T>
Kernel kernel(CudaKind kind, int dim) {
  switch (dim) {
#define FASTNEGATE_CASE(D) \
  case D: return kernel_of<T, D>(kind);
    FASTNEGATE_CUDA_DIMS(FASTNEGATE_CASE)
#undef FASTNEGATE_CASE
    default: return nullptr;
  }
}

}  // namespace fastnegate::cuda
