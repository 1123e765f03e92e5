// SPDX-License-Identifier: Apache-2.0
// The kernels of float16 and the head_dims that the build names: one, where they compile in parallel, or all.
#include "cuda/kernel/kernel.cuh"

namespace fastnegate::cuda {

#define FASTNEGATE_KERNELS(D) template Kernel kernel_of<float16, D>(CudaKind);
FASTNEGATE_CUDA_DIMS(FASTNEGATE_KERNELS)

}  // namespace fastnegate::cuda
