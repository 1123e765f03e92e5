// SPDX-License-Identifier: Apache-2.0
// One operator call as plain structs: what crosses the boundary between the bindings and a kernel.
// Mirrors python/fastnegate/operator/rule.py (words in their order, Reads) and tokens.py (index, numbers);
// tests/operator/test_words.py reads this file and compares.
#pragma once

#include <cstdint>

namespace fastnegate {

enum class Dtype : int { float32, bfloat16, float16 };

enum class Similarity : int { one, cosine, direction, mass };
enum class Gate : int { open, step, ramp, sigmoid };
enum class Direction : int { raw, difference, orthogonal, projection, fixed, retrieve };
enum class Combine : int { separate, joint };
enum class Select : int { all, max };
enum class Norm : int { none, limit, preserve };
enum class Scope : int { head, feature };
enum class Shared : int { inside, joint, outside };

// The numbers of one entry, in the column order of ConceptTokens.numbers.
struct Numbers {
  float strength, logit_bias, threshold, width, cap, active;
};
inline constexpr int kNumberColumns = 8;

// Of a row of that table, where NaN stands for the default of the rule, and of `active` for 1.
constexpr Numbers numbers_of(const float* row, const Numbers& defaults) {
  const auto number = [](float x, float otherwise) { return x == x ? x : otherwise; };
  const float threshold = number(row[2], defaults.threshold);
  return {number(row[0], defaults.strength), number(row[1], defaults.logit_bias), threshold,
          number(row[3], defaults.width > 0.f ? defaults.width : 1.f - threshold),
          number(row[4], defaults.cap), number(row[5], 1.f)};
}

// What a rule reads; the rest need not be there, and is not computed.
struct Reads {
  bool tokens;     // L_e or F_e: an entry without tokens does not exist
  bool direction;  // the fixed vector u: a concept without one does not exist
  bool products;   // <Z,Z>, <Z,F> and <F,F>
  bool mass;       // the share of the concept's softmax mass
};

struct Rule {
  Similarity similarity;
  Gate gate;
  Direction direction;
  Combine combine;
  Select select;
  Norm norm;
  int norm_order;
  Scope scope;
  Shared shared;
  float norm_limit, blend;
  float temperature;  // of `retrieve`; 0: 1 / scale
  Numbers defaults;   // width 0: 1 - threshold of the entry
  Reads reads;
};

// A tensor whose last dimension is contiguous; strides in elements, 0 is legal.
struct Strided {
  char* data;
  int64_t batch, head, row;
};

// Attention to some keys of a softmax: out [B, H, N, D] in the storage type, and its natural log-sum-exp
// [B, H, N]; -inf: no keys, whatever `out` holds. Without data there is no such partial.
struct Partial {
  Strided out;
  const float* lse;
  int64_t lse_batch, lse_head, lse_query;
};

struct Problem {
  int64_t batch, heads, queries, keys, dim;  // B, H, N, M, D
  Dtype dtype;
  float scale;
  Strided query, key, value, out;
  const float* key_bias;  // or null; added to the logits, -inf masks
  int64_t bias_batch, bias_head, bias_query, bias_key;

  int64_t tokens, concepts, entries;           // T, C, E
  int64_t longest, busiest;                    // capacities: tokens of a concept, entries of a batch row
  Strided concept_key, concept_value;          // [T, H, D], or [B, T, H, D] if `batch` is not 0
  const float *token_bias, *token_weight;      // [T] or null
  const float *direction, *update, *offset;    // [C, H, D], [C, H, D], [C], or null
  const int32_t* index;                        // concept[E], begin[C], length[C], rows[B + 1]
  const float* numbers;                        // [E, kNumberColumns]; NaN: the rule's default
  Rule rule;

  Partial shared;        // keys of prompt and concepts alike
  Partial prompt;        // in the place of key and value
  const Partial* slots;  // [C], in the place of concept_key and concept_value, or null

  // Statistics, or null: entry_table [E, 6], heat [E, N], row_table [B, 4].
  float *entry_table, *heat, *row_table;
  float report_level;  // entry_table counts gates above this
};

}  // namespace fastnegate
