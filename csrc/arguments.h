// SPDX-License-Identifier: Apache-2.0
// Python -> plain structs. Tensors arrive as addresses and strides, so that no torch header is needed; the caller
// has validated them and holds them for the duration of the call. What stays while shapes, strides and rule stay
// is unpacked once, into a Problem without addresses.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "fastnegate/problem.h"

namespace fastnegate {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// The word of a code. `last` is the last one that this build knows: a number beyond it would not be refused by the
// switches of a kernel, but taken for another word.
template <class Word>
Word word(const char* name, int code, Word last) {
  if (code < 0 || code > static_cast<int>(last))
    throw std::invalid_argument(std::string(name) + " has code " + std::to_string(code) + ": must be from 0 to " +
                                std::to_string(static_cast<int>(last)));
  return static_cast<Word>(code);
}

// Codes and numbers in the order of python/fastnegate/operator/rule.py; words as backends/native.py numbers them.
inline Rule rule_of(const std::array<int, 9>& codes, const std::array<double, 8>& numbers,
                    const std::array<bool, 4>& reads) {
  if (codes[6] != 1 && codes[6] != 2)
    throw std::invalid_argument("norm_order is " + std::to_string(codes[6]) + ": must be 1 or 2");
  const auto f = [&](int i) { return static_cast<float>(numbers[i]); };
  return {word("similarity", codes[0], Similarity::mass),
          word("gate", codes[1], Gate::sigmoid),
          word("direction", codes[2], Direction::retrieve),
          word("combine", codes[3], Combine::joint),
          word("select", codes[4], Select::max),
          word("norm", codes[5], Norm::preserve),
          codes[6],
          word("scope", codes[7], Scope::feature),
          word("shared", codes[8], Shared::outside),
          f(0), f(1), f(2),
          {f(3), f(4), f(5), f(6), f(7), 1.f},
          {reads[0], reads[1], reads[2], reads[3]}};
}

// A call but for its addresses. Order of the fields: python/fastnegate/operator/backends/native.py.
struct Arguments {
  std::array<int64_t, 10> sizes;
  std::array<std::array<int64_t, 3>, 6> strides;  // of query, key, value, out, concept_key, concept_value
  std::array<int64_t, 4> bias_strides;
  int dtype;
  double scale;
  std::array<int, 9> codes;
  std::array<double, 8> numbers;
  std::array<bool, 4> reads;
  // Strides of out (3) and lse (3), or nothing, for shared and prompt; of each slot.
  std::tuple<std::vector<int64_t>, std::vector<int64_t>, std::vector<std::vector<int64_t>>> partials;

  static Arguments from(const pybind11::tuple& t) {
    if (t.size() != 9) throw std::invalid_argument("a call has 9 arguments, not " + std::to_string(t.size()));
    return {t[0].cast<decltype(sizes)>(),        t[1].cast<decltype(strides)>(),
            t[2].cast<decltype(bias_strides)>(), t[3].cast<int>(),
            t[4].cast<double>(),                 t[5].cast<decltype(codes)>(),
            t[6].cast<decltype(numbers)>(),      t[7].cast<decltype(reads)>(),
            t[8].cast<decltype(partials)>()};
  }

  // Of shared, prompt and the slots: which there are, and their strides. Addresses come with a call.
  std::vector<Partial> partials_without_addresses() const {
    std::vector<Partial> all;
    const auto add = [&](const std::vector<int64_t>& s) {
      if (s.size() != 6) throw std::invalid_argument("a partial has 6 strides");
      all.push_back({{nullptr, s[0], s[1], s[2]}, nullptr, s[3], s[4], s[5]});
    };
    const auto& [shared, prompt, slots] = partials;
    if (!shared.empty()) add(shared);
    if (!prompt.empty()) add(prompt);
    for (const auto& slot : slots) add(slot);
    return all;
  }

  Problem problem() const {
    const auto strided = [&](int i) { return Strided{nullptr, strides[i][0], strides[i][1], strides[i][2]}; };
    Problem p{};
    p.batch = sizes[0], p.heads = sizes[1], p.queries = sizes[2], p.keys = sizes[3], p.dim = sizes[4];
    p.entries = sizes[5], p.concepts = sizes[6], p.longest = sizes[7], p.busiest = sizes[8], p.tokens = sizes[9];
    p.dtype = word("dtype", dtype, Dtype::float16);
    p.scale = static_cast<float>(scale);
    p.query = strided(0), p.key = strided(1), p.value = strided(2), p.out = strided(3);
    p.concept_key = strided(4), p.concept_value = strided(5);
    p.bias_batch = bias_strides[0], p.bias_head = bias_strides[1];
    p.bias_query = bias_strides[2], p.bias_key = bias_strides[3];
    p.rule = rule_of(codes, numbers, reads);
    return p;
  }
};

// The addresses of one call: query, key, value, out, key_bias; then those of the concepts in the order of
// python/fastnegate/operator/tokens.py, TENSORS, or none.
struct Addresses {
  uintptr_t query, key, value, out, key_bias;
  std::array<uintptr_t, 9> concepts;

  static Addresses from(uintptr_t query, uintptr_t key, uintptr_t value, uintptr_t out, uintptr_t key_bias,
                        const pybind11::tuple& concepts) {
    Addresses a{query, key, value, out, key_bias, {}};
    if (concepts.empty()) return a;
    if (concepts.size() != a.concepts.size()) throw std::invalid_argument("concepts have 9 addresses");
    for (size_t i = 0; i < a.concepts.size(); ++i) a.concepts[i] = concepts[i].cast<uintptr_t>();
    return a;
  }

  // `problem` with them.
  Problem in(const Problem& problem) const {
    if (problem.batch * problem.heads * problem.queries > 0 && !(query && out && (problem.keys == 0 || (key && value))))
      throw std::invalid_argument("query, key, value or the output has no memory");
    Problem p = problem;
    p.query.data = at<char>(query), p.key.data = at<char>(key), p.value.data = at<char>(value);
    p.out.data = at<char>(out), p.key_bias = at<const float>(key_bias);
    p.concept_key.data = at<char>(concepts[0]), p.concept_value.data = at<char>(concepts[1]);
    p.index = at<const int32_t>(concepts[2]), p.numbers = at<const float>(concepts[3]);
    p.token_bias = at<const float>(concepts[4]), p.token_weight = at<const float>(concepts[5]);
    p.direction = at<const float>(concepts[6]), p.update = at<const float>(concepts[7]);
    p.offset = at<const float>(concepts[8]);
    return p;
  }
};

}  // namespace fastnegate
