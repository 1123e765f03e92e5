// SPDX-License-Identifier: Apache-2.0
// With this instead of its kernels, the launch code of csrc/cuda runs on the shim and starts nothing: whoever
// executes the compiled kernels elsewhere asks the module `recorder` how.
#include <cuda/ptx.cuh>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>
#include <utility>
#include <vector>

#include "cuda/launch.h"
#include "shim.h"

namespace py = pybind11;

namespace fastnegate::cuda {

namespace {

std::vector<Launch> parameters;  // of each launch since `take`

void record(Launch launch) {
  if (threadIdx.x == 0 && blockIdx.x == 0) parameters.push_back(launch);
}

// Grid, block, bytes of shared memory, and the parameter of each launch since the last call.
std::vector<std::tuple<unsigned, unsigned, size_t, py::bytes>> take() {
  std::vector<std::tuple<unsigned, unsigned, size_t, py::bytes>> taken;
  const auto& launches = shim::launches();
  const size_t before = launches.size() - parameters.size();
  for (size_t i = 0; i < parameters.size(); ++i) {
    const shim::Launch& launch = launches[before + i];
    const py::bytes parameter(reinterpret_cast<const char*>(&parameters[i]), sizeof(Launch));
    taken.emplace_back(launch.grid.x, launch.block.x, launch.shared, parameter);
  }
  parameters.clear();
  return taken;
}

}  // namespace

template <class T, int D>
Kernel kernel_of(CudaKind) {
  return &record;
}
#define FASTNEGATE_KERNELS(D)                      \
  template Kernel kernel_of<float16, D>(CudaKind); \
  template Kernel kernel_of<bfloat16, D>(CudaKind);
FASTNEGATE_CUDA_DIMS(FASTNEGATE_KERNELS)

}  // namespace fastnegate::cuda

PYBIND11_MODULE(recorder, m) {
  m.def("take", &fastnegate::cuda::take);
  m.def("tokens_at_a_time", [](int dim) {
    return std::pair(fastnegate::cuda_prompt_tokens(dim), fastnegate::kCudaBlockTokens);
  }, "Of a softmax of the prompt, and of concepts.");
}
