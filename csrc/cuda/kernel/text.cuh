// SPDX-License-Identifier: Apache-2.0
// Tokens in shared memory: where they lie there, and how they come there.
#pragma once

#include "cuda/launch.h"
#include "cuda/kernel/segment.cuh"

namespace fastnegate::cuda {

struct Roster;  // roster.cuh

// A token in global memory, or none, of which nothing is read.
template <class T>
struct Token {
  const T *key, *value;
  float bias;  // -inf: there is none
};

template <class T, int D>
class Text {
 public:
  FN_INLINE explicit Text(const Launch& launch) : l(launch) {}

  FN_INLINE static ptx::Address keys(int slot) { return ptx::address(ptx::shared_memory()) + slot * kRowBytes; }
  FN_INLINE ptx::Address values(int slot) const { return keys(slot) + l.tiling.values; }
  FN_INLINE float* added(int slot) const { return numbers(l.tiling.added) + slot; }
  // Of concepts, whose slots begin at tiling.concepts.
  FN_INLINE float* weights(int slot) const { return numbers(l.tiling.weights) + slot - l.tiling.concepts; }
  FN_INLINE float* norms(int slot) const { return numbers(l.tiling.norms) + slot - l.tiling.concepts; }

  FN_INLINE Roster& roster(int block) const {
    return *reinterpret_cast<Roster*>(ptx::shared_memory() + l.tiling.roster + block * kCudaRosterBytes);
  }
  FN_INLINE T* gram(int block) const {
    return reinterpret_cast<T*>(ptx::shared_memory() + l.tiling.grams + block * kCudaGramBytes);
  }

  FN_INLINE Piece<D> piece(int slot, int lane) const {
    const ptx::Address key = keys(slot);
    return {column_of<D>(key, lane), last_column_of<D>(key, lane), value_of<D>(key + l.tiling.values, lane),
            added(slot) + lane % 4 * 2};
  }

  // All threads of the block: token_at(0) ... token_at(count - 1) to the slots from `slot` on, and places without
  // a token up to a multiple of 16.
  template <class TokenAt>
  FN_INLINE void load(int slot, int count, const TokenAt& token_at) const {
    const int places = (count + 15) / 16 * 16;
    const ptx::Address to = keys(slot);
#pragma unroll 1
    for (int i = threadIdx.x; i < places * kUnits; i += blockDim.x) {
      const int place = i / kUnits, unit = i % kUnits;
      // A masked token is absent: its key and value are not even read, they may hold NaN.
      const Token<T> token = token_at(place);
      const bool present = token.bias != -kInfinity;
      const ptx::Address at = to + place * kRowBytes + unit * 16;
      ptx::copy_16(at, token.key + unit * 8, present);
      ptx::copy_16(at + l.tiling.values, token.value + unit * 8, present);
    }
#pragma unroll 1
    for (int place = threadIdx.x; place < places; place += blockDim.x) {
      const float bias = token_at(place).bias;
      // Some callers mask with the lowest number, which must not become -inf. A NaN is no mask: it shows.
      const float more = bias * l.bias_factor;
      added(slot)[place] = bias == -kInfinity ? bias : more < kLowest ? kLowest : more;
    }
  }

 private:
  static constexpr int kRowBytes = cuda_row(D) * 2, kUnits = D / 8;  // units of 16 bytes

  const Launch& l;

  FN_INLINE static float* numbers(int at) { return reinterpret_cast<float*>(ptx::shared_memory() + at); }
};

}  // namespace fastnegate::cuda
