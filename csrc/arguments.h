// SPDX-License-Identifier: Apache-2.0
// Python -> plain structs. Tensors arrive as addresses and strides, so that no torch header is
// needed; the caller has validated them and holds them for the duration of the call.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "fastnegate/problem.h"

namespace fastnegate {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Order of the fields: python/fastnegate/arguments.py.
struct Arguments {
  std::array<uintptr_t, 14> addresses;
  std::array<int64_t, 10> sizes;
  std::array<std::array<int64_t, 3>, 6> strides;
  std::array<int64_t, 4> bias_strides;
  int dtype;
  double scale;
  std::array<int, 8> codes;
  std::array<double, 8> numbers;

  static Arguments from(const pybind11::tuple& t) {
    return {t[0].cast<decltype(addresses)>(), t[1].cast<decltype(sizes)>(),
            t[2].cast<decltype(strides)>(),   t[3].cast<decltype(bias_strides)>(),
            t[4].cast<int>(),                 t[5].cast<double>(),
            t[6].cast<decltype(codes)>(),     t[7].cast<decltype(numbers)>()};
  }

  Problem problem() const {
    const auto f = [&](int i) { return static_cast<float>(numbers[i]); };
    const auto strided = [&](int i) {
      return Strided{at<char>(addresses[i]), strides[i][0], strides[i][1], strides[i][2]};
    };
    Problem p{};
    p.batch = sizes[0], p.heads = sizes[1], p.queries = sizes[2], p.keys = sizes[3], p.dim = sizes[4];
    p.tokens = sizes[5], p.concepts = sizes[6], p.entries = sizes[7], p.longest = sizes[8], p.busiest = sizes[9];
    p.dtype = static_cast<Dtype>(dtype);
    p.scale = static_cast<float>(scale);
    p.query = strided(0), p.key = strided(1), p.value = strided(2), p.out = strided(3);
    p.concept_key = strided(4), p.concept_value = strided(5);
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
    p.rule = {static_cast<Similarity>(codes[0]), static_cast<Gate>(codes[1]),
              static_cast<Direction>(codes[2]),  static_cast<Combine>(codes[3]),
              static_cast<Select>(codes[4]),     static_cast<Norm>(codes[5]),
              codes[6],                          static_cast<Scope>(codes[7]),
              f(0),                              f(1),
              f(2),                              {f(3), f(4), f(5), f(6), f(7), 1.f}};
    return p;
  }
};

}  // namespace fastnegate
