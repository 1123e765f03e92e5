// SPDX-License-Identifier: Apache-2.0
// The CPU kernels for Python.
#include <string>
#include <vector>

#include "arguments.h"
#include "cpu/kernel.h"
#include "cpu/run.h"

namespace py = pybind11;
using namespace fastnegate;

namespace {

// Calls of one signature: what differs are addresses.
struct Call {
  Problem problem;

  Call(const py::tuple& arguments, double report_level) : problem(Arguments::from(arguments).problem()) {
    problem.report_level = static_cast<float>(report_level);
  }
};

// entry_table, heat and row_table are those of the problem; 0 without statistics.
void run(const Call& call, uintptr_t query, uintptr_t key, uintptr_t value, uintptr_t out, uintptr_t key_bias,
         const py::tuple& concepts, uintptr_t entry_table, uintptr_t heat, uintptr_t row_table,
         const std::string& isa, int threads) {
  Problem p = Addresses::from(query, key, value, out, key_bias, concepts).in(call.problem);
  p.entry_table = at<float>(entry_table), p.heat = at<float>(heat), p.row_table = at<float>(row_table);
  py::gil_scoped_release release;
  run_cpu(p, isa, threads);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of fastnegate; called by fastnegate.operator.backends.";
  py::class_<Call>(m, "Call", "Calls that differ in addresses alone.").def(py::init<const py::tuple&, double>());
  m.def("run_cpu", &run);
  m.def("tiling", [](const std::string& isa, const std::array<int64_t, 6>& sizes, int threads) {
    const CpuTiling t = tiling(isa, sizes, threads);
    return py::make_tuple(t.queries, t.heads);
  }, "(queries of a tile, heads of a unit of work) for sizes B, H, N, M, T, D.");
  m.def("fma_peak", &fma_peak, py::call_guard<py::gil_scoped_release>(),
        "Floating-point operations per second of register-only multiply-adds.");
  m.def("is_forked", &is_forked, "Whether the kernel is limited to one thread by a fork.");
  m.attr("MOST_KEYS") = kMostKeys;
  m.def("usable_isas", &usable_isas, "Instruction sets usable on this machine, best first.");
  m.def("built_isas", &built_isas, "Instruction sets in this build.");
}
