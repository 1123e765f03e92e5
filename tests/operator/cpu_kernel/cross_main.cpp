// SPDX-License-Identifier: Apache-2.0
// One operator call from a file, for a processor that has no Python here (test_cross.py): reads what
// bindings.cpp would get, runs it on one thread, writes the memory of the outputs back.
//
// The file: int64[17] sizes of the arrays in bytes, 0 for null; int64[45]: sizes [10], strides [6][3],
// strides of the bias [4], dtype, codes [8], what the rule reads [4]; double[10]: scale, report level,
// numbers [8]; the arrays, in the order of the bindings' addresses.
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
  int64_t bytes[17], n[46];
  double x[10];
  read(bytes, 17), read(n, 46), read(x, 10);
  std::vector<char> memory[17];
  std::streamoff at[17];
  for (int i = 0; i < 17; ++i) {
    memory[i].resize(bytes[i]);
    at[i] = file.tellg();
    read(memory[i].data(), bytes[i]);
  }
  if (!file) return std::fprintf(stderr, "cannot read %s\n", arguments[2]), 2;

  const auto floats = [&](int i) { return bytes[i] ? reinterpret_cast<float*>(memory[i].data()) : nullptr; };
  const auto strided = [&](int i, int array) {
    const int64_t* strides = n + 10 + 3 * i;
    return Strided{bytes[array] ? memory[array].data() : nullptr, strides[0], strides[1], strides[2]};
  };
  const int64_t* code = n + 33, *reads = n + 42;
  const auto f = [&](int i) { return static_cast<float>(x[i]); };
  Problem p{};
  p.batch = n[0], p.heads = n[1], p.queries = n[2], p.keys = n[3], p.dim = n[4];
  p.entries = n[5], p.concepts = n[6], p.longest = n[7], p.busiest = n[8], p.tokens = n[9];
  p.bias_batch = n[28], p.bias_head = n[29], p.bias_query = n[30], p.bias_key = n[31];
  p.dtype = static_cast<Dtype>(n[32]);
  p.scale = f(0), p.report_level = f(1);
  p.query = strided(0, 0), p.key = strided(1, 1), p.value = strided(2, 2), p.out = strided(3, 3);
  p.key_bias = floats(4);
  p.concept_key = strided(4, 5), p.concept_value = strided(5, 6);
  p.index = reinterpret_cast<const int32_t*>(floats(7));
  p.numbers = floats(8);
  p.token_bias = floats(9), p.token_weight = floats(10);
  p.direction = floats(11), p.update = floats(12), p.offset = floats(13);
  p.entry_table = floats(14), p.heat = floats(15), p.row_table = floats(16);
  p.rule = {static_cast<Similarity>(code[0]), static_cast<Gate>(code[1]), static_cast<Direction>(code[2]),
            static_cast<Combine>(code[3]), static_cast<Select>(code[4]), static_cast<Norm>(code[5]),
            static_cast<int>(code[6]), static_cast<Scope>(code[7]), static_cast<Shared>(code[8]), f(2), f(3), f(4),
            {f(5), f(6), f(7), f(8), f(9), 1.f},
            {reads[0] != 0, reads[1] != 0, reads[2] != 0, reads[3] != 0}};
  run_cpu(p, arguments[1], 1);

  for (const int i : {3, 14, 15, 16}) {
    file.seekp(at[i]);
    file.write(memory[i].data(), bytes[i]);
  }
  return file.flush() ? 0 : 2;
}
