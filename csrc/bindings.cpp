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

// `tables`: entry_table, heat and row_table of the problem.
void run(const py::tuple& arguments, const std::array<uintptr_t, 3>& tables, double report_level,
         const std::string& isa, int threads) {
  Problem p = Arguments::from(arguments).problem();
  p.entry_table = at<float>(tables[0]);
  p.heat = at<float>(tables[1]);
  p.row_table = at<float>(tables[2]);
  p.report_level = static_cast<float>(report_level);
  py::gil_scoped_release release;
  run_cpu(p, isa, threads);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of fastnegate; called by fastnegate.operator.backends.";
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
