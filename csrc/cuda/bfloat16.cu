// SPDX-License-Identifier: Apache-2.0
// One file for each dtype: they compile in parallel.
#include "cuda/kernels.cuh"

namespace fastnegate::cuda {

Kernel kernel_bfloat16(CudaKind kind, int dim) { return kernel<bfloat16>(kind, dim); }

}  // namespace fastnegate::cuda
