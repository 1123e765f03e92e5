// SPDX-License-Identifier: Apache-2.0
// One operator call from a file, for a processor that has no Python here (test_cross.py): reads what
// bindings.cpp would get, runs it on one thread, writes the memory of the outputs back.
//
// The file: int64[17] sizes of the arrays in bytes, 0 for null; int64[40]: sizes [9], strides [6][3],
// strides of the bias [4], dtype, codes [8]; double[10]: scale, report level, numbers [8]; the arrays.
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <string>
#include <vector>

#include "cpu/run.h"

using namespace fastnegate;

int main(int count, char** arguments) {
  if (count != 3) return std::fprintf(stderr, "usage: %s instruction-set file\n", arguments[0]), 2;
  std::fstream file(arguments[2], std::ios::in | std::ios::out | std::ios::binary);
  const auto read = [&](auto* to, int64_t n) { file.read(reinterpret_cast<char*>(to), n * sizeof(*to)); };
  int64_t bytes[17], n[40];
  double x[10];
  read(bytes, 17), read(n, 40), read(x, 10);
  std::vector<char> memory[17];
  std::streamoff at[17];
  for (int i = 0; i < 17; ++i) {
    memory[i].resize(bytes[i]);
    at[i] = file.tellg();
    read(memory[i].data(), bytes[i]);
  }
  if (!file) return std::fprintf(stderr, "cannot read %s\n", arguments[2]), 2;

  const auto floats = [&](int i) { return bytes[i] ? reinterpret_cast<float*>(memory[i].data()) : nullptr; };
  const auto strided = [&](int i) {
    const int64_t* strides = n + 9 + 3 * i;
    return Strided{bytes[i] ? memory[i].data() : nullptr, strides[0], strides[1], strides[2]};
  };
  const int64_t* code = n + 32;
  const auto f = [&](int i) { return static_cast<float>(x[i]); };
  Problem p{};
  p.batch = n[0], p.heads = n[1], p.queries = n[2], p.keys = n[3], p.dim = n[4];
  p.tokens = n[5], p.concepts = n[6], p.entries = n[7], p.longest = n[8];
  p.bias_batch = n[27], p.bias_head = n[28], p.bias_query = n[29], p.bias_key = n[30];
  p.dtype = static_cast<Dtype>(n[31]);
  p.scale = f(0), p.report_level = f(1);
  p.query = strided(0), p.key = strided(1), p.value = strided(2), p.out = strided(3);
  p.concept_key = strided(4), p.concept_value = strided(5);
  p.key_bias = floats(6), p.token_bias = floats(7), p.token_weight = floats(8);
  p.direction = floats(9), p.update = floats(10), p.offset = floats(11);
  p.index = reinterpret_cast<const int32_t*>(floats(12));
  p.numbers = floats(13);
  p.entry_table = floats(14), p.heat = floats(15), p.row_table = floats(16);
  p.rule = {static_cast<Similarity>(code[0]), static_cast<Gate>(code[1]), static_cast<Direction>(code[2]),
            static_cast<Combine>(code[3]), static_cast<Select>(code[4]), static_cast<Norm>(code[5]),
            static_cast<int>(code[6]), static_cast<Scope>(code[7]), f(2), f(3), f(4),
            {f(5), f(6), f(7), f(8), f(9), 1.f}};
  run_cpu(p, arguments[1], 1);

  for (const int i : {3, 14, 15, 16}) {
    file.seekp(at[i]);
    file.write(memory[i].data(), bytes[i]);
  }
  return file.flush() ? 0 : 2;
}
