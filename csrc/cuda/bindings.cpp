// SPDX-License-Identifier: Apache-2.0
// The CUDA kernels for Python: a module of its own, so that the CPU kernels do not depend on it.
#include <string>

#include "arguments.h"
#include "cuda/run.h"

namespace py = pybind11;
using namespace fastnegate;

namespace {

// Calls of one signature on one device: what differs are addresses.
Arguments without_partials(const Arguments& a) {
  if (!a.partials_without_addresses().empty()) throw std::invalid_argument("partials are not implemented");
  return a;
}

struct Call {
  Problem problem;
  CudaPlan plan;

  Call(const py::tuple& arguments, int device)
      : problem(without_partials(Arguments::from(arguments)).problem()), plan(plan_cuda(problem, device)) {}
};

// Tables as in CudaTables, 0 where they are not wanted.
void run(const Call& call, uintptr_t query, uintptr_t key, uintptr_t value, uintptr_t out, uintptr_t key_bias,
         const py::tuple& concepts, uintptr_t moments, uintptr_t norms, uintptr_t trace_entries,
         uintptr_t trace_rows, uintptr_t stream) {
  const Problem p = Addresses::from(query, key, value, out, key_bias, concepts).in(call.problem);
  const CudaTables tables{at<float>(moments), at<float>(norms), at<float>(trace_entries), at<float>(trace_rows)};
  py::gil_scoped_release release;
  run_cuda(call.plan, p, tables, at<void>(stream));
}

py::tuple tiling(const Call& call) {
  const CudaTiling& t = call.plan.tiling;
  return py::make_tuple(static_cast<int>(t.kind), t.warps, t.blocks, t.stages, t.prompt_slots, t.concept_slots,
                        t.rosters, t.shared);
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of fastnegate; called by fastnegate.operator.backends.cuda.";
  py::register_exception<CudaError>(m, "CudaError", PyExc_RuntimeError);
  py::class_<Call>(m, "Call", "Calls on one device that differ in addresses alone.")
      .def(py::init<const py::tuple&, int>());
  m.def("run", &run);
  m.def("tiling", &tiling,
        "(kind of kernel, warps of a block, blocks, stages, prompt tokens, concept tokens and blocks of these that stay, "
        "bytes of shared memory).");
  m.def("unavailable", &cuda_unavailable, "Why no kernel can run on this machine; empty if one can.");
  m.def("supports_dim", &cuda_supports_dim);
  m.attr("ARCHS") = FASTNEGATE_CUDA_ARCHS;
  m.attr("OLDEST_DRIVER") = kOldestDriver;
  m.attr("OLDEST_DRIVER_BRANCH") = kOldestDriverBranch;
}
