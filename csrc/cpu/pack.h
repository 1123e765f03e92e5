// SPDX-License-Identifier: Apache-2.0
// Keys and values of a head into the layout of the products (Pack), once per call. Like vec.h, included
// once per instruction set, in that set's namespace.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernel.h"
#include "product.h"
#include "vec.h"
// after vec.h, whose F and functions it uses
#include "fastnegate/rule.h"

namespace fastnegate::FASTNEGATE_ISA {
namespace {

// How queries and keys are held for Q K^T: as floats, or as words of two bfloat16, which pass through
// as if each were a float. `tiled`: both products of attention are made of tiles, and queries padded to them.
template <class Storage>
struct Scored {
  static constexpr bool pairs = kPairs && std::is_same_v<Storage, BFloat16>;
  static constexpr bool tiled = kTiles && pairs;
  using Op = std::conditional_t<pairs, PairProduct, Product>;
  using Elements = std::conditional_t<pairs, Float32, Storage>;
  static constexpr int64_t depth(int64_t dim) { return pairs ? dim / 2 : dim; }
  static constexpr int64_t padded(int64_t dim) {
    return tiled ? ceil_div(dim, kTileDepth) * kTileRows : depth(dim);
  }
};

// Rows `rows` of data in blocks [dim][kRows].
template <class Storage>
void pack_blocks(const char* data, int64_t row_bytes, const int64_t* rows, int64_t count, int64_t dim,
                 float* blocks) {
  for (int64_t i = 0; i < count; i += W) {
    const char* row[W];  // beyond the last row its copies, which are never read
    for (int j = 0; j < W; ++j) row[j] = data + rows[i + j < count ? i + j : count - 1] * row_bytes;
    load_rows<Storage>(row, dim, blocks + i / kRows * dim * kRows + i % kRows, kRows);
  }
}

// Channels of the same rows, times weight, in blocks [count][kRows].
template <class Storage>
void pack_channels(const char* data, int64_t row_bytes, const int64_t* rows, int64_t count, int64_t dim,
                   const float* weight, float* blocks) {
  using T = typename Storage::T;
  for (int64_t i = 0; i < count; ++i) {
    const T* row = reinterpret_cast<const T*>(data + rows[i] * row_bytes);
    const float w = weight ? weight[rows[i]] : 1.f;
    for (int64_t d = 0; d < dim; d += W) {
      const T* from = row + d;
      alignas(64) T part[W] = {};
      if (dim - d < W) {
        std::memcpy(part, from, (dim - d) * sizeof(T));
        from = part;
      }
      store(blocks + (d / kRows * count + i) * kRows + d % kRows, Storage::load(from) * w);
    }
  }
}

// The same rows as tiles [ceil(count / kTileRows)][ceil(dim / kTileDepth)] for multiply_tiles, padded with zeros.
inline void pack_rows_as_tiles(const char* data, int64_t row_bytes, const int64_t* rows, int64_t count, int64_t dim,
                               float* tiles) {
  const int64_t steps = ceil_div(dim, kTileDepth);
  std::memset(tiles, 0, ceil_div(count, kTileRows) * steps * kTileFloats * sizeof(float));
  for (int64_t i = 0; i < count; ++i) {
    const char* row = data + rows[i] * row_bytes;
    char* to = reinterpret_cast<char*>(tiles + i / kTileRows * steps * kTileFloats) + i % kTileRows * kTileBytes;
    for (int64_t at = 0; at < 2 * dim; at += kTileBytes, to += kTileRows * kTileBytes)
      std::memcpy(to, row + at, std::min(kTileBytes, 2 * dim - at));
  }
}

// Channels of the same rows, times weight, as tiles [ceil(dim / kTileRows)][ceil(count / kTileDepth)]: a channel of 32
// tokens is a row, words of an even token and an odd one. Weighted values are rounded to bfloat16, as operands may be.
inline void pack_channels_as_tiles(const char* data, int64_t row_bytes, const int64_t* rows, int64_t count, int64_t dim,
                                   const float* weight, float* tiles) {
  const int64_t steps = ceil_div(count, kTileDepth);
  std::memset(tiles, 0, ceil_div(dim, kTileRows) * steps * kTileFloats * sizeof(float));
  for (int64_t k = 0; k < steps; ++k) {
    const char* row[2][W];
    F w[2];
    I absent[2] = {};
    for (int i = 0; i < 2 * W; ++i) {
      const int64_t token = k * kTileDepth + i, from = rows[std::min(token, count - 1)];
      row[i % 2][i / 2] = data + from * row_bytes;
      w[i % 2][i / 2] = weight ? weight[from] : 1.f;
      absent[i % 2][i / 2] = token < count ? 0 : -1;
    }
    for (int64_t d = 0; d < dim; d += 8) {
      U words[2][4];  // two channels each, of even and of odd tokens
      for (int i = 0; i < 2; ++i) load_words(row[i], 2 * d, words[i]);
      for (int i = 0; i < 4; ++i) {
        F even[2], odd[2];
        BFloat16::unpack(words[0][i], even);
        BFloat16::unpack(words[1][i], odd);
        for (int c = 0; c < 2; ++c) {
          const int64_t channel = d + 2 * i + c;
          const F both[2] = {select(absent[0], F{}, even[c] * w[0]), select(absent[1], F{}, odd[c] * w[1])};
          store(tiles + (channel / kTileRows * steps + k) * kTileFloats + channel % kTileRows * kTileRows,
                (F)BFloat16::pack(both));
        }
      }
    }
  }
}

// Keys of one head for Q K^T, values of one head for P V, values as keys for `retrieve`.
template <class Storage>
void pack_tokens(const Strided& key, const Strided& value, int64_t dim, const int64_t* rows, int64_t count,
                 const float* weight, Pack& pack) {
  constexpr int64_t kSize = sizeof(typename Storage::T);
  using Keys = Scored<Storage>;
  if constexpr (Keys::tiled) {
    pack_rows_as_tiles(key.data, key.row * kSize, rows, count, dim, pack.key);
    pack_channels_as_tiles(value.data, value.row * kSize, rows, count, dim, weight, pack.value);
  } else {
    pack_blocks<typename Keys::Elements>(key.data, key.row * kSize, rows, count, Keys::depth(dim), pack.key);
    pack_channels<Storage>(value.data, value.row * kSize, rows, count, dim, weight, pack.value);
  }
  if (pack.memory) pack_blocks<Storage>(value.data, value.row * kSize, rows, count, dim, pack.memory);
}

template <class Work>
void with_storage(Dtype dtype, const Work& work) {
  switch (dtype) {
    case Dtype::float32: return work(Float32{});
    case Dtype::bfloat16: return work(BFloat16{});
    case Dtype::float16: return work(Float16{});
  }
}

// The rows of one head.
Strided head(const Problem& p, const Strided& t, int64_t b, int64_t h) {
  const int64_t size = p.dtype == Dtype::float32 ? 4 : 2;
  return {t.data + (b * t.batch + h * t.head) * size, 0, 0, t.row};
}

// A bias in base-2 logits. The lowest float is a number, not a mask, and must not become -inf.
FN_INLINE float base2(float bias) {
  const float scaled = bias * kLog2e;
  return scaled < kLowest && bias > -INFINITY ? kLowest : scaled;
}

void pack_prompt(const Plan& plan, int64_t b, int64_t h) {
  const Problem& p = *plan.problem;
  Pack& pack = plan.prompts[b * plan.prompt_batch_stride + h];
  const float* bias = p.key_bias ? p.key_bias + b * p.bias_batch + h * p.bias_head : nullptr;
  const bool per_query = p.bias_query != 0;
  int64_t rows[kMostKeys], count = 0;
  for (int64_t j = 0; j < p.keys; ++j) {
    const float x = bias && !per_query ? bias[j * p.bias_key] : 0.f;
    if (x == -INFINITY) continue;  // absent, whatever its key and value hold
    if (pack.bias) pack.bias[count] = base2(x);
    rows[count++] = j;
  }
  pack.count = count;
  with_storage(p.dtype, [&](auto storage) {
    pack_tokens<decltype(storage)>(head(p, p.key, b, h), head(p, p.value, b, h), p.dim, rows, count, nullptr,
                                   pack);
  });
}

void pack_concept(const Plan& plan, int64_t slot, int64_t h) {
  const Problem& p = *plan.problem;
  const Span& span = plan.spans[slot];
  Pack& pack = plan.concepts[slot * p.heads + h];
  int64_t rows[kMostKeys], count = 0;
  for (int64_t j = span.begin; j < span.begin + span.length; ++j) {
    const float x = p.token_bias ? p.token_bias[j] : 0.f;
    if (x == -INFINITY) continue;
    if (pack.bias) pack.bias[count] = base2(x);
    rows[count++] = j;
  }
  pack.count = count;
  with_storage(p.dtype, [&](auto storage) {
    pack_tokens<decltype(storage)>(head(p, p.concept_key, span.batch, h), head(p, p.concept_value, span.batch, h), p.dim, rows,
                                   count, p.token_weight, pack);
  });
}

}  // namespace
}  // namespace fastnegate::FASTNEGATE_ISA
