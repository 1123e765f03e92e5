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
  std::vector<Partial> partials;  // shared and prompt, if there are these, and the slots
  bool shared, prompt;

  Call(const py::tuple& arguments, double report_level) {
    const Arguments a = Arguments::from(arguments);
    problem = a.problem();
    problem.report_level = static_cast<float>(report_level);
    partials = a.partials_without_addresses();
    shared = !std::get<0>(a.partials).empty(), prompt = !std::get<1>(a.partials).empty();
    const size_t slots = partials.size() - shared - prompt;
    if (slots > 0 && (slots != static_cast<size_t>(problem.concepts) || !prompt))
      throw std::invalid_argument("slots go with a prompt, one for each concept");
    if (prompt && problem.keys > 0) throw std::invalid_argument("a prompt is in the place of keys");
  }

  // With the addresses of out and lse of each partial; `held` keeps the slots.
  void locate(const py::tuple& addresses, Problem* p, std::vector<Partial>* held) const {
    if (addresses.size() != 2 * partials.size()) throw std::invalid_argument("a partial has 2 addresses");
    *held = partials;
    for (size_t i = 0; i < held->size(); ++i) {
      (*held)[i].out.data = at<char>(addresses[2 * i].cast<uintptr_t>());
      (*held)[i].lse = at<const float>(addresses[2 * i + 1].cast<uintptr_t>());
      if (problem.batch * problem.heads * problem.queries > 0 && !((*held)[i].out.data && (*held)[i].lse))
        throw std::invalid_argument("a partial has no memory");
    }
    if (shared) p->shared = (*held)[0];
    if (prompt) p->prompt = (*held)[shared];
    if (held->size() > static_cast<size_t>(shared + prompt)) p->slots = held->data() + shared + prompt;
  }
};

// entry_table, heat and row_table are those of the problem; 0 without statistics.
void run(const Call& call, uintptr_t query, uintptr_t key, uintptr_t value, uintptr_t out, uintptr_t key_bias,
         const py::tuple& concepts, const py::tuple& partials, uintptr_t entry_table, uintptr_t heat, uintptr_t row_table,
         const std::string& isa, int threads) {
  Problem p = Addresses::from(query, key, value, out, key_bias, concepts).in(call.problem);
  std::vector<Partial> held;
  call.locate(partials, &p, &held);
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
