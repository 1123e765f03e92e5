// SPDX-License-Identifier: Apache-2.0
// Python -> plain structs. Tensors arrive as addresses and strides, so that no torch header is
// needed; the caller has validated them and holds them for the duration of the call.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <vector>

#include "cpu/kernel.h"
#include "cpu/run.h"

namespace py = pybind11;
using namespace fastnegate;

namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

Strided strided(uintptr_t address, const std::array<int64_t, 3>& strides) {
  return {at<char>(address), strides[0], strides[1], strides[2]};
}

// Order of the fields: python/fastnegate/backends/cpu.py.
void run(const std::array<uintptr_t, 17>& addresses, const std::array<int64_t, 9>& sizes,
         const std::array<std::array<int64_t, 3>, 6>& strides,
         const std::array<int64_t, 4>& bias_strides, int dtype, double scale,
         const std::array<int, 8>& codes, const std::array<double, 8>& numbers, double report_level,
         const std::string& isa, int threads) {
  const auto f = [&](int i) { return static_cast<float>(numbers[i]); };
  Problem p{};
  p.batch = sizes[0], p.heads = sizes[1], p.queries = sizes[2], p.keys = sizes[3], p.dim = sizes[4];
  p.tokens = sizes[5], p.concepts = sizes[6], p.entries = sizes[7], p.longest = sizes[8];
  p.dtype = static_cast<Dtype>(dtype);
  p.scale = static_cast<float>(scale);
  p.query = strided(addresses[0], strides[0]);
  p.key = strided(addresses[1], strides[1]);
  p.value = strided(addresses[2], strides[2]);
  p.out = strided(addresses[3], strides[3]);
  p.concept_key = strided(addresses[4], strides[4]);
  p.concept_value = strided(addresses[5], strides[5]);
  p.key_bias = at<const float>(addresses[6]);
  p.bias_batch = bias_strides[0], p.bias_head = bias_strides[1];
  p.bias_query = bias_strides[2], p.bias_key = bias_strides[3];
  p.token_bias = at<const float>(addresses[7]);
  p.token_weight = at<const float>(addresses[8]);
  p.direction = at<const float>(addresses[9]);
  p.update = at<const float>(addresses[10]);
  p.offset = at<const float>(addresses[11]);
  p.index = at<const int32_t>(addresses[12]);
  p.numbers = at<const float>(addresses[13]);
  p.entry_table = at<float>(addresses[14]);
  p.heat = at<float>(addresses[15]);
  p.row_table = at<float>(addresses[16]);
  p.report_level = static_cast<float>(report_level);
  p.rule = {static_cast<Similarity>(codes[0]), static_cast<Gate>(codes[1]),
            static_cast<Direction>(codes[2]),  static_cast<Combine>(codes[3]),
            static_cast<Select>(codes[4]),     static_cast<Norm>(codes[5]),
            codes[6],                          static_cast<Scope>(codes[7]),
            f(0),                              f(1),
            f(2),                              {f(3), f(4), f(5), f(6), f(7), 1.f}};
  py::gil_scoped_release release;
  run_cpu(p, isa, threads);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of fastnegate; called by fastnegate.backends.";
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
