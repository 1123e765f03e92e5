// SPDX-License-Identifier: Apache-2.0
// The CUDA kernels for Python: a module of its own, so that the CPU kernels do not depend on it.
#include <string>

#include "arguments.h"
#include "cuda/run.h"

namespace py = pybind11;
using namespace fastnegate;

namespace {

// `tables`: those of CudaTables, in order.
void run(const py::tuple& arguments, const std::array<uintptr_t, 4>& tables, int device, uintptr_t stream) {
  const Problem p = Arguments::from(arguments).problem();
  const CudaTables t{at<float>(tables[0]), at<float>(tables[1]), at<float>(tables[2]), at<float>(tables[3])};
  py::gil_scoped_release release;
  run_cuda(p, t, device, at<void>(stream));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of fastnegate; called by fastnegate.operator.backends.cuda.";
  py::register_exception<CudaError>(m, "CudaError", PyExc_RuntimeError);
  m.def("run", &run);
  m.def("unavailable", &cuda_unavailable, "Why no kernel can run on this machine; empty if one can.");
  m.def("tiling", [](const py::tuple& arguments, int device) {
    const CudaTiling t = cuda_tiling(Arguments::from(arguments).problem(), device);
    return py::make_tuple(t.warps, t.blocks, t.stages, t.prompt_slots, t.concept_slots, t.shared);
  }, "(warps of a block, blocks, stages, prompt tokens and concept tokens that stay, bytes of shared memory).");
  m.def("supports_dim", [](int dim) { return cuda::kernel_float16(dim) != nullptr; });
  m.attr("ARCHS") = FASTNEGATE_CUDA_ARCHS;
  m.attr("OLDEST_DRIVER") = kOldestDriver;
  m.attr("OLDEST_DRIVER_BRANCH") = kOldestDriverBranch;
}
