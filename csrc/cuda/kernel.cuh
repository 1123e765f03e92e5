// SPDX-License-Identifier: Apache-2.0
// `negated_attention` in CUDA: a block keeps the keys and values of a head in shared memory; each of its
// warps takes 16 queries at a time, on its own.
//
// For its queries a warp attends to the prompt (Z), then takes the entries of its batch row one by one:
// attention to the concept's tokens (F), inner products, gate, coefficients, one update of what is removed.
// So one softmax is alive at a time, any number of entries fits, Q is read and O is written once. Text that
// does not fit in shared memory is read piece by piece, by all warps together.
//
// Tokens come in tiles of 8 and channels in steps of 16 or 8: no size is padded to a power of two.
//
// Scope `feature` needs sums over heads before an output exists. The same kernel is then launched once per
// sum: to write the inner products of each head (Goal::moments), to write the norms of Y and Z of each head
// (Goal::norms), and for the output, which adds up over the heads what it needs. Q is read again, Z and F are
// never stored.
#pragma once

#include <cuda/ptx.cuh>
#include <cuda_runtime.h>

#include "cuda/launch.h"
#include "fastnegate/tile.h"

#define FASTNEGATE_ISA cuda
#define FN_INLINE __device__ __forceinline__

namespace fastnegate::cuda {

// What rule.h asks for: a scalar of one query is a float.
using F = float;
constexpr float kTiny = 1e-30f;
constexpr float kLowest = -3e38f;  // stands for the top of an empty or fully masked softmax

FN_INLINE float splat(float x) { return x; }
FN_INLINE float select(bool condition, float yes, float no) { return condition ? yes : no; }
FN_INLINE float fma(float a, float b, float c) { return fmaf(a, b, c); }
FN_INLINE float min(float a, float b) { return fminf(a, b); }
FN_INLINE float max(float a, float b) { return fmaxf(a, b); }
FN_INLINE float sqrt(float x) { return ptx::sqrt(x); }
FN_INLINE float exp2(float x) { return ptx::exp2(x); }
// Rounded as by division but for the last bit of a few, and x / x is 1. The operator `/` and sqrtf() of CUDA
// call functions for rare operands, around which nothing stays in registers.
FN_INLINE float divide(float x, float y) {
  const float inverse = ptx::reciprocal(y), q = x * inverse, better = fmaf(fmaf(-q, y, x), inverse, q);
  return y < kTiny ? 0.f : better == better ? better : q;  // of infinite operands q is right
}

}  // namespace fastnegate::cuda

#include "fastnegate/rule.h"

namespace fastnegate::cuda {

constexpr int kWarp = 32;
constexpr float kInfinity = __builtin_huge_valf();

// Sum over the four lanes that share a row: the same bits in each.
FN_INLINE float sum_of_row(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}
FN_INLINE float top_of_row(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

// Values that storing turns into inf start here (round to nearest even).
template <class T>
constexpr float overflow();
template <>
constexpr float overflow<float16>() { return 65520.f; }
template <>
constexpr float overflow<bfloat16>() { return 0x1.ffp127f; }

// x, which is the same in all lanes. Only after this does the compiler know that it is: that a loop of so many
// turns keeps a warp together, and no shuffle has to be prepared for the case that it does not.
FN_INLINE int uniform(int x) { return __reduce_max_sync(~0u, x); }

FN_INLINE float finite_top(float top) { return top == -kInfinity ? 0.f : top; }

// Tokens in shared memory: rows of keys and values of cuda_row(D) elements.
template <class T>
struct Tokens {
  T *key, *value;
  float* added;   // to the logits before they are scaled; -inf where there is no token
  float* weight;  // of the values
};

// Where tokens are in global memory.
template <class T>
struct Source {
  const T *key, *value;  // of the first token
  int64_t key_row, value_row;
  const float *bias, *weight;  // or null
  int64_t bias_step;
  int count;
};

// What a warp has of 16 queries: a lane has channels 8 i + 2 t and + 1 of rows g and g + 8.
template <int D>
struct Rows {
  float at[D / 8][4];
  FN_INLINE void clear() {
#pragma unroll
    for (int i = 0; i < D / 8; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) at[i][j] = 0.f;
  }
  FN_INLINE float4 operator()(int i) const { return make_float4(at[i][0], at[i][1], at[i][2], at[i][3]); }
};

// A softmax and what it selected.
template <int D>
struct Attended {
  Rows<D> out;
  float top[2], mass[2];
};

// The same where registers do not suffice: blocks of 8 channels from kRegisters on lie in shared memory, where
// each lane reads what it wrote itself.
template <int D, int kRegisters>
struct Held {
  float at[kRegisters > 0 ? kRegisters : 1][4];
  float4* rest;
  FN_INLINE explicit Held(float4* lane_memory) : rest(lane_memory) {}
  FN_INLINE float4 operator()(int i) const {
    if (kRegisters == 0 || i >= kRegisters) return rest[(i - kRegisters) * kWarp];
    return make_float4(at[i][0], at[i][1], at[i][2], at[i][3]);
  }
  FN_INLINE void set(int i, float4 x) {
    if (i < kRegisters)
      at[i][0] = x.x, at[i][1] = x.y, at[i][2] = x.z, at[i][3] = x.w;
    else
      rest[(i - kRegisters) * kWarp] = x;
  }
};

// The queries of a warp as the left operand: registers, or reloaded from shared memory where there are none.
template <class T, int D, bool kShared = (D > 64)>
struct Queries {
  uint32_t at[D / 8][2];
  FN_INLINE void set(const T* rows, int lane) {
#pragma unroll
    for (int k = 0; k < D / 8; k += 2) load(rows, lane, k, at);
  }
  FN_INLINE static void load(const T* rows, int lane, int k, uint32_t (&to)[D / 8][2]) {
    constexpr int kRow = cuda_row(D);
    const T* row = rows + (lane % 16) * kRow + k * 8;
    if (k + 1 < D / 8) {
      uint32_t m[4];
      ptx::load_matrices<4>(m, row + lane / 16 * 8);
      to[k][0] = m[0], to[k][1] = m[1], to[k + 1][0] = m[2], to[k + 1][1] = m[3];
    } else {
      ptx::load_matrices<2>(to[k], row);
    }
  }
  // Registers of channels 8 k ... 8 k + 15 (or + 7, at the end).
  FN_INLINE void get(int k, uint32_t (&a)[4]) const {
    a[0] = at[k][0], a[1] = at[k][1];
    if (k + 1 < D / 8) a[2] = at[k + 1][0], a[3] = at[k + 1][1];
  }
};
template <class T, int D>
struct Queries<T, D, true> {
  const T* row;
  int lane;
  FN_INLINE void set(const T* rows, int lane_) {
    lane = lane_;
    row = rows + (lane % 16) * cuda_row(D);
  }
  FN_INLINE void get(int k, uint32_t (&a)[4]) const {
    if (k + 1 < D / 8) {
      ptx::load_matrices<4>(a, row + k * 8 + lane / 16 * 8);
    } else {
      uint32_t half[2];
      ptx::load_matrices<2>(half, row + k * 8);
      a[0] = half[0], a[1] = half[1];
    }
  }
};

// `left` matrices, four at most; with three the last one comes twice.
template <bool kTransposed>
FN_INLINE void load_some(uint32_t (&m)[4], const void* row, int left) {
  if (left >= 3) {
    kTransposed ? ptx::load_transposed<4>(m, row) : ptx::load_matrices<4>(m, row);
  } else if (left == 2) {
    uint32_t two[2];
    kTransposed ? ptx::load_transposed<2>(two, row) : ptx::load_matrices<2>(two, row);
    m[0] = two[0], m[1] = two[1];
  } else {
    uint32_t one[1];
    kTransposed ? ptx::load_transposed<1>(one, row) : ptx::load_matrices<1>(one, row);
    m[0] = one[0];
  }
}

// Scores of 16 queries with tiles `first` and, if kPair, first + 1 of 8 tokens.
template <class T, int D, bool kPair>
FN_INLINE void score(const Queries<T, D>& q, const T* key, int lane, int first, float (*s)[4]) {
  constexpr int kRow = cuda_row(D), kTiles = kPair ? 2 : 1;
#pragma unroll
  for (int i = 0; i < kTiles; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) s[i][j] = 0.f;
  if (kPair) {
    // A load of four: both halves of 16 channels of both tiles.
    const T* row = key + (first * 8 + lane / 16 * 8 + lane % 8) * kRow + lane / 8 % 2 * 8;
#pragma unroll
    for (int k = 0; k < D / 8; k += 2) {
      uint32_t a[4], b[4];
      q.get(k, a);
      if (k + 1 < D / 8) {
        ptx::load_matrices<4>(b, row + k * 8);
#pragma unroll
        for (int i = 0; i < kTiles; ++i) ptx::multiply<T>(s[i], a[0], a[1], a[2], a[3], b[2 * i], b[2 * i + 1]);
      } else {
        uint32_t half[2];
        ptx::load_matrices<2>(half, key + (first * 8 + lane % 16) * kRow + k * 8);
#pragma unroll
        for (int i = 0; i < kTiles; ++i) ptx::multiply<T>(s[i], a[0], a[1], half[i]);
      }
    }
  } else {
    // A load of four: 32 channels.
#pragma unroll
    for (int k = 0; k < D / 8; k += 4) {
      const int left = D / 8 - k;
      uint32_t a[4], b[4];
      load_some<false>(b, key + (first * 8 + lane % 8) * kRow + (k + ::min(lane / 8, left - 1)) * 8, left);
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        if (i >= left) break;
        q.get(k + i, a);
        if (i + 1 < left)
          ptx::multiply<T>(s[0], a[0], a[1], a[2], a[3], b[i], b[i + 1]);
        else
          ptx::multiply<T>(s[0], a[0], a[1], b[i]);
      }
    }
  }
}

// out += p V of tiles `first` and, if kPair, first + 1; p: the probabilities as a left operand.
template <class T, int D, bool kPair>
FN_INLINE void take(const uint32_t (&p)[4], const T* value, int lane, int first, Rows<D>& out) {
  constexpr int kRow = cuda_row(D), kN = D / 8;
  if (kPair) {
    const T* row = value + (first * 8 + lane % 16) * kRow;
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      if (n + 1 < kN) {
        uint32_t b[4];
        ptx::load_transposed<4>(b, row + (n + lane / 16) * 8);
        ptx::multiply<T>(out.at[n], p[0], p[1], p[2], p[3], b[0], b[1]);
        ptx::multiply<T>(out.at[n + 1], p[0], p[1], p[2], p[3], b[2], b[3]);
      } else {
        uint32_t b[2];
        ptx::load_transposed<2>(b, row + n * 8);
        ptx::multiply<T>(out.at[n], p[0], p[1], p[2], p[3], b[0], b[1]);
      }
    }
  } else {
#pragma unroll
    for (int n = 0; n < kN; n += 4) {
      const int left = kN - n;
      uint32_t b[4];
      load_some<true>(b, value + (first * 8 + lane % 8) * kRow + (n + ::min(lane / 8, left - 1)) * 8, left);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (i < left) ptx::multiply<T>(out.at[n + i], p[0], p[1], b[i]);
    }
  }
}

// `sums`, empty if `fresh`, and up to 8 kTiles tokens: not yet divided by the mass, which each lane has of its
// own tokens.
template <class T, int D, int kTiles>
FN_INLINE void attend(const Queries<T, D>& q, const Tokens<T>& tokens, int count, bool biased, bool weighted,
                      float factor, bool fresh, int lane, Attended<D>& sums) {
  static_assert(kTiles % 2 == 0);
  float s[kTiles][4];
  float top[2] = {sums.top[0], sums.top[1]};
  const int tiles = static_cast<int>(ceil_div(count, 8)), column = lane % 4 * 2;
#pragma unroll
  for (int j = 0; j < kTiles; j += 2) {
    if (j >= tiles) break;
    if (j + 1 < tiles) {
      score<T, D, true>(q, tokens.key, lane, j, s + j);
    } else {
      score<T, D, false>(q, tokens.key, lane, j, s + j);
#pragma unroll
      for (int i = 0; i < 4; ++i) s[j + 1][i] = -kInfinity;
    }
    // Only the last tiles hold places without a token.
    if (biased || (j + 2) * 8 > count) {
#pragma unroll
      for (int i = j; i < j + 2; ++i) {
        if (i >= tiles) break;
        const float2 added = *reinterpret_cast<const float2*>(tokens.added + i * 8 + column);
        s[i][0] += added.x, s[i][1] += added.y, s[i][2] += added.x, s[i][3] += added.y;
      }
    }
#pragma unroll
    for (int i = j; i < j + 2; ++i)
#pragma unroll
      for (int r = 0; r < 2; ++r) top[r] = fmaxf(top[r], fmaxf(s[i][2 * r], s[i][2 * r + 1]));
  }
  float base[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    top[r] = top_of_row(top[r]);
    base[r] = finite_top(top[r]);
    if (!fresh) {
      const float shrink = ptx::exp2((sums.top[r] - base[r]) * factor);
      sums.mass[r] *= shrink;
#pragma unroll
      for (int i = 0; i < D / 8; ++i) sums.out.at[i][2 * r] *= shrink, sums.out.at[i][2 * r + 1] *= shrink;
    }
    sums.top[r] = top[r];
  }
#pragma unroll
  for (int j = 0; j < kTiles; j += 2) {
    if (j >= tiles) break;
    const bool pair = j + 1 < tiles;
#pragma unroll
    for (int i = j; i < j + 2; ++i) {
      if (i > j && !pair) break;
      // Scaled after the subtraction, the weights of the tokens that matter are the most exact.
#pragma unroll
      for (int c = 0; c < 4; ++c) s[i][c] = ptx::exp2((s[i][c] - base[c / 2]) * factor);
      sums.mass[0] += s[i][0] + s[i][1];
      sums.mass[1] += s[i][2] + s[i][3];
      if (weighted) {
        const float2 w = *reinterpret_cast<const float2*>(tokens.weight + i * 8 + column);
        s[i][0] *= w.x, s[i][1] *= w.y, s[i][2] *= w.x, s[i][3] *= w.y;
      }
    }
    uint32_t p[4] = {ptx::pack<T>(s[j][0], s[j][1]), ptx::pack<T>(s[j][2], s[j][3]), 0, 0};
    if (pair) {
      p[2] = ptx::pack<T>(s[j + 1][0], s[j + 1][1]), p[3] = ptx::pack<T>(s[j + 1][2], s[j + 1][3]);
      take<T, D, true>(p, tokens.value, lane, j, sums.out);
    } else {
      take<T, D, false>(p, tokens.value, lane, j, sums.out);
    }
  }
}

// Sums over head_dim of the rows, for two operands given by channel. With kUnroll < D / 8, for operands of which
// none is in registers, fewer are loaded ahead.
template <int D, int kUnroll = D / 8, class A, class B>
FN_INLINE void inner(const A& a, const B& b, float (&sum)[2]) {
  float part[2] = {0.f, 0.f};
#pragma unroll kUnroll
  for (int i = 0; i < D / 8; ++i) {
    const float4 x = a(i), y = b(i);
    part[0] = fmaf(x.x, y.x, fmaf(x.y, y.y, part[0]));
    part[1] = fmaf(x.z, y.z, fmaf(x.w, y.w, part[1]));
  }
  sum[0] = sum_of_row(part[0]), sum[1] = sum_of_row(part[1]);
}

// An entry of the batch row.
struct Entry {
  int number, concept_index, begin, length;
  Numbers numbers;
  bool active;
};

FN_INLINE Entry find_entry(const Problem& p, int e, int lane) {
  // The index is data: whatever it holds, nothing outside the arrays is read.
  Entry entry;
  entry.number = e;
  const int concepts = static_cast<int>(p.concepts), tokens = static_cast<int>(p.tokens);
  const int c = uniform(::min(::max(__ldg(p.index + e), 0), concepts - 1));
  entry.concept_index = c;
  entry.begin = uniform(::min(::max(__ldg(p.index + p.entries + c), 0), tokens));
  const int longest = ::min(static_cast<int>(p.longest), tokens - entry.begin);
  entry.length = uniform(::max(::min(__ldg(p.index + p.entries + p.concepts + c), longest), 0));
  const float mine = __ldg(p.numbers + e * kNumberColumns + lane % kNumberColumns);
  const Numbers& d = p.rule.defaults;
  const auto number = [&](int column, float otherwise) {
    const float x = __shfl_sync(~0u, mine, column);
    return x == x ? x : otherwise;  // NaN stands for the rule's default
  };
  Numbers& n = entry.numbers;
  n.strength = number(0, d.strength);
  n.logit_bias = number(1, d.logit_bias);
  n.threshold = number(2, d.threshold);
  n.width = number(3, d.width > 0.f ? d.width : 1.f - n.threshold);
  n.cap = number(4, d.cap);
  n.active = __shfl_sync(~0u, mine, 5);
  entry.active = __any_sync(~0u, n.active > 0.f);
  return entry;
}

// Of the entries so far: Y = (1 + moved) Z + removed; for `joint`, removed and weight are relative to 2^level.
template <int D>
struct Mix {
  Held<D, cuda_removed_registers(D) / 8> removed;
  float moved[2], weight[2], level[2];
  float best_g[2], best_r[2];
  int best_concept[2], best[2];
  int existing;
};

template <class T, int D>
class Block {
 public:
  FN_INLINE explicit Block(const Launch& launch)
      : l(launch), p(launch.problem), rule(launch.problem.rule), lane(threadIdx.x % kWarp),
        warp(uniform(static_cast<int>(threadIdx.x / kWarp))), warps(blockDim.x / kWarp) {}

  FN_INLINE void run() {
    for (int head = share().begin / share().tiles; head * share().tiles < share().end; ++head) {
      b = head / static_cast<int>(p.heads), h = head % static_cast<int>(p.heads);
      first_entry = last_entry = 0;
      concepts_stay = true;
      if (p.index) {
        const int32_t* rows = p.index + p.entries + 2 * p.concepts;
        first_entry = uniform(::max(__ldg(rows + b), 0));
        last_entry = uniform(::min(__ldg(rows + b + 1), static_cast<int>(p.entries)));
      }
      const int first = ::max(share().begin - head * share().tiles, 0);
      const int last = ::min(share().end - head * share().tiles, share().tiles);
      fetch(first + warp, last, 0);
      load_text();
      int stage = 0;
      // Where no text is read piece by piece, no warp waits for another one.
      const bool alone = prompt_stays() && concepts_stay;
      for (int tile = first + warp; alone ? tile < last : tile - warp < last; tile += warps) {
        if (l.tiling.stages == 2) {
          fetch(tile + warps, last, stage ^ 1);
          ptx::wait<1>();
        } else {
          ptx::wait<0>();
        }
        __syncwarp();
        work(tile, tile < last, buffer(stage));
        __syncwarp();
        if (l.tiling.stages == 2)
          stage ^= 1;
        else
          fetch(tile + warps, last, 0);
      }
      ptx::wait<0>();
      __syncthreads();  // the text of this head is not needed any more
    }
  }

 private:
  static constexpr int kRow = cuda_row(D);

  const Launch& l;
  const Problem& p;
  const Rule& rule;
  int lane;
  const int warp, warps;
  int b, h;
  int first_entry, last_entry;
  bool concepts_stay;

  // The tiles of all heads, one head after the other, in equal shares: few blocks see two heads. Computed again
  // wherever it is asked for: registers are for the tiles.
  struct Share {
    int tiles, begin, end;  // of a head, and of this block
  };
  FN_INLINE Share share() const {
    const int tiles = static_cast<int>(ceil_div(p.queries, kCudaQueries)), blocks = gridDim.x;
    const int all = static_cast<int>(p.batch * p.heads) * tiles, block = ptx::again(blockIdx.x);
    const int each = all / blocks, more = all % blocks, begin = each * block + ::min(block, more);
    return {tiles, begin, begin + each + (block < more)};
  }

  FN_INLINE bool prompt_stays() const { return l.tiling.prompt_slots > 0 || p.keys == 0; }
  FN_INLINE static const T* row_of(const Strided& s, int64_t b, int64_t h) {
    return reinterpret_cast<const T*>(s.data) + b * s.batch + h * s.head;
  }

  // ---- shared memory: keys, values, what is added to logits, weights; then of each warp queries, Z, removed

  // From a slot on.
  FN_INLINE Tokens<T> text(int slot) const {
    const int slots = l.tiling.prompt_slots + l.tiling.concept_slots;
    T* memory = reinterpret_cast<T*>(ptx::shared_memory());
    float* numbers = reinterpret_cast<float*>(memory + 2 * slots * kRow);
    return {memory + slot * kRow, memory + (slots + slot) * kRow, numbers + slot, numbers + slots + slot};
  }
  FN_INLINE T* buffer(int stage) const {
    const int slots = l.tiling.prompt_slots + l.tiling.concept_slots;
    char* mine = ptx::shared_memory() + slots * cuda_slot_bytes(D) + warp * cuda_warp_bytes(D, l.tiling.stages);
    return reinterpret_cast<T*>(mine) + stage * kCudaQueries * kRow;
  }
  // The lane's part of what registers do not hold.
  FN_INLINE float4* held() const { return reinterpret_cast<float4*>(buffer(l.tiling.stages)) + lane; }

  // ---- text -----------------------------------------------------------------------------------------

  FN_INLINE Source<T> prompt() const {
    const float* bias = p.key_bias ? p.key_bias + b * p.bias_batch + h * p.bias_head : nullptr;
    return {row_of(p.key, b, h), row_of(p.value, b, h), p.key.row, p.value.row, bias, nullptr, p.bias_key,
            static_cast<int>(p.keys)};
  }
  FN_INLINE Source<T> concept_of(const Entry& e) const {
    const int64_t begin = e.begin;
    return {row_of(p.concept_key, 0, h) + begin * p.concept_key.row,
            row_of(p.concept_value, 0, h) + begin * p.concept_value.row, p.concept_key.row,
            p.concept_value.row, p.token_bias ? p.token_bias + begin : nullptr,
            p.token_weight ? p.token_weight + begin : nullptr, 1, read_tokens(e)};
  }
  // Tokens of an entry that are read.
  FN_INLINE int read_tokens(const Entry& e) const { return e.active && l.reads_tokens ? e.length : 0; }

  // All threads of the block: tokens `first` ... of a source to the slots, `count` of them, and places
  // without a token up to a multiple of 8.
  FN_INLINE void load(const Source<T>& source, int first, int count, const Tokens<T>& to) {
    const int padded = static_cast<int>(ceil_div(count, 8)) * 8;
    const auto bias_of = [&](int token) {
      return token >= count ? -kInfinity
             : source.bias  ? __ldg(source.bias + (first + token) * source.bias_step)
                            : 0.f;
    };
#pragma unroll 1
    for (int done = 0; done < padded * (D / 8); done += blockDim.x) {
      const int i = done + threadIdx.x, token = i / (D / 8), unit = i % (D / 8);
      if (i >= padded * (D / 8)) continue;
      // A masked token is absent: its key and value are not even read, they may hold NaN.
      const bool present = bias_of(token) != -kInfinity;
      const int64_t from = present ? first + token : 0;
      ptx::copy_16(to.key + token * kRow + unit * 8, source.key + from * source.key_row + unit * 8, present);
      ptx::copy_16(to.value + token * kRow + unit * 8, source.value + from * source.value_row + unit * 8, present);
    }
#pragma unroll 1
    for (int done = 0; done < padded; done += blockDim.x) {
      const int token = done + threadIdx.x;
      if (token >= padded) continue;
      const float bias = bias_of(token);
      // Some callers mask with the lowest number, which must not become -inf. A NaN is no mask: it shows.
      const float added = bias * l.bias_factor;
      to.added[token] = bias == -kInfinity ? bias : added < kLowest ? kLowest : added;
      to.weight[token] = source.weight && token < count ? __ldg(source.weight + first + token) : 1.f;
    }
  }

  FN_INLINE void load_text() {
    if (l.tiling.prompt_slots > 0) load(prompt(), 0, static_cast<int>(p.keys), text(0));
    int slots = 0;
#pragma unroll 1
    for (int e = first_entry; e < last_entry; ++e)
      slots += static_cast<int>(ceil_div(read_tokens(find_entry(p, e, lane)), 8)) * 8;
    concepts_stay = prompt_stays() && slots <= l.tiling.concept_slots;  // else pieces of the prompt lie there
    if (concepts_stay) {
      slots = l.tiling.prompt_slots;
#pragma unroll 1
      for (int e = first_entry; e < last_entry; ++e) {
        const Source<T> source = concept_of(find_entry(p, e, lane));
        load(source, 0, source.count, text(slots));
        slots += static_cast<int>(ceil_div(source.count, 8)) * 8;
      }
    }
    ptx::commit();
    ptx::wait<0>();
    __syncthreads();
  }

  // Attention to a source, kTiles tiles of it at a time, which stays in `slots` or is read piece by piece.
  // Whether it has a token.
  template <int kTiles>
  FN_INLINE bool attend_to(const Queries<T, D>& q, const Source<T>& source, bool stays, int slot, Attended<D>& to) {
    to.out.clear();
    to.top[0] = to.top[1] = -kInfinity;
    to.mass[0] = to.mass[1] = 0.f;
    bool some = false;
#pragma unroll 1
    for (int done = 0; done < source.count; done += 8 * kTiles) {
      const int count = ::min(source.count - done, 8 * kTiles);
      lane = ptx::again(lane);
      const Tokens<T> tokens = text(stays ? slot + done : l.tiling.prompt_slots);
      if (!stays) {
        __syncthreads();  // the piece before is not needed any more
        load(source, done, count, tokens);
        ptx::commit();
        ptx::wait<0>();
        __syncthreads();
      }
#pragma unroll 1
      for (int first = 0; first < count; first += kWarp)
        some |= first + lane < count && tokens.added[first + lane] != -kInfinity;
      attend<T, D, kTiles>(q, tokens, count, source.bias, source.weight, l.factor, done == 0, lane, to);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      to.mass[r] = sum_of_row(to.mass[r]);
      const float inverse = divide(1.f, to.mass[r]);
#pragma unroll
      for (int i = 0; i < D / 8; ++i) to.out.at[i][2 * r] *= inverse, to.out.at[i][2 * r + 1] *= inverse;
      // In base-2 logits, and a number that may be subtracted.
      to.top[r] = fmaxf(to.top[r] * l.factor, kLowest);
    }
    return __any_sync(~0u, some);
  }

  // ---- one tile of queries --------------------------------------------------------------------------

  // Asks for the queries of a tile; of no row beyond the end, or if the tile is not before `last`.
  FN_INLINE void fetch(int tile, int last, int stage) {
    T* to = buffer(stage);
    const T* from = row_of(p.query, b, h);
#pragma unroll 1
    for (int done = 0; done < kCudaQueries * (D / 8); done += kWarp) {
      const int i = done + lane, row = i / (D / 8), unit = i % (D / 8), n = tile * kCudaQueries + row;
      if (i >= kCudaQueries * (D / 8)) continue;
      const bool present = tile < last && n < p.queries;
      ptx::copy_16(to + row * kRow + unit * 8, from + int64_t{present ? n : 0} * p.query.row + unit * 8, present);
    }
    ptx::commit();
  }

  // Query of row r (0: g, 1: g + 8) of a tile, and whether this lane writes its number into tables.
  FN_INLINE int query_of(int tile, int r) const {
    return tile * kCudaQueries + lane / 4 + 8 * r;
  }
  FN_INLINE bool writes(int tile, bool active, int r) const {
    return active && lane % 4 == 0 && query_of(tile, r) < p.queries;
  }
  // A row of a table [..., H, N].
  FN_INLINE int64_t place(int64_t row, int64_t n) const { return (row * p.heads + h) * p.queries + n; }

  // Sums over the heads of kTables tables [H, N], `apart` numbers from one to the next, for both rows of the lane.
  // All numbers of four heads are asked for before the first is waited for.
  template <int kTables>
  FN_INLINE void over_heads(const float* table, int64_t apart, int tile, float (&sum)[kTables][2]) const {
#pragma unroll
    for (int i = 0; i < kTables; ++i) sum[i][0] = sum[i][1] = 0.f;
#pragma unroll 1
    for (int first = 0; first < p.heads; first += 4) {
      const int head = first + lane % 4;
      float x[kTables][2];
#pragma unroll
      for (int i = 0; i < kTables; ++i)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int n = query_of(tile, r);
          x[i][r] = head < p.heads && n < p.queries ? table[i * apart + head * p.queries + n] : 0.f;
        }
#pragma unroll
      for (int i = 0; i < kTables; ++i) sum[i][0] += x[i][0], sum[i][1] += x[i][1];
    }
#pragma unroll
    for (int i = 0; i < kTables; ++i) sum[i][0] = sum_of_row(sum[i][0]), sum[i][1] = sum_of_row(sum[i][1]);
  }

  FN_INLINE void work(int tile, bool active, T* queries) {
    lane = ptx::again(lane), h = ptx::again(h), b = ptx::again(b);
    Queries<T, D> q;
    q.set(queries, lane);
    Attended<D> z;
    attend_to<cuda_prompt_tokens(D) / 8>(q, prompt(), prompt_stays(), 0, z);
    Held<D, cuda_z_registers(D) / 8> z_of(held());
#pragma unroll
    for (int i = 0; i < D / 8; ++i) z_of.set(i, z.out(i));
    float zz[2] = {0.f, 0.f};
    if (first_entry < last_entry) inner<D>(z_of, z_of, zz);

    Mix<D> mix{Held<D, cuda_removed_registers(D) / 8>(held() + (D - cuda_z_registers(D)) / 8 * kWarp)};
#pragma unroll
    for (int i = 0; i < D / 8; ++i) mix.removed.set(i, make_float4(0.f, 0.f, 0.f, 0.f));
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      mix.moved[r] = mix.weight[r] = 0.f;
      mix.level[r] = rule.combine == Combine::joint ? -kInfinity : 0.f;
      mix.best_g[r] = mix.best_r[r] = -kInfinity;
      mix.best_concept[r] = mix.best[r] = 0;
    }
    mix.existing = 0;
    int slot = l.tiling.prompt_slots;
#pragma unroll 1
    for (int e = first_entry; e < last_entry; ++e) {
      h = ptx::again(h);
      const Entry entry = find_entry(p, e, lane);
      Attended<D> f;
      const Source<T> source = concept_of(entry);
      const bool some = attend_to<kCudaConceptTokens / 8>(q, source, concepts_stay, slot, f);
      slot += static_cast<int>(ceil_div(source.count, 8)) * 8;
      if (entry.active && (some || !l.reads_tokens)) consider(entry, f, z, z_of, zz, tile, active, mix);
    }
    if (l.goal == Goal::moments) return;

    lane = ptx::again(lane), h = ptx::again(h), b = ptx::again(b);
    float limited[2] = {0.f, 0.f};
    const bool negated = mix.existing > 0;
    if (negated) finish(mix, z, z_of, zz, tile, active, limited);
    if (l.goal == Goal::norms) return;
    if (negated && l.trace_entries && rule.select == Select::max) {
      // Only now is the winner known.
#pragma unroll
      for (int r = 0; r < 2; ++r)
        if (writes(tile, active, r)) l.trace_entries[place(mix.best[r], query_of(tile, r))] = mix.best_g[r];
    }
    if (!negated) {  // Z to the last bit
#pragma unroll
      for (int i = 0; i < D / 8; ++i) mix.removed.set(i, z_of(i));
    }
    const auto& o_of = mix.removed;
    if (l.trace_rows) trace(o_of, z_of, limited, tile, active);
    write(o_of, tile, active, queries);
  }

  // `mix` with the entry, whose attention is f.
  template <class Z>
  FN_INLINE void consider(const Entry& entry, const Attended<D>& f, const Attended<D>& z, const Z& z_of,
                          const float (&zz)[2], int tile, bool active, Mix<D>& mix) {
    const Rows<D>& f_of = f.out;
    lane = ptx::again(lane), h = ptx::again(h), b = ptx::again(b);
    float zf[2] = {0.f, 0.f}, ff[2] = {0.f, 0.f}, along[2] = {0.f, 0.f}, mass[2] = {0.f, 0.f};
    const bool reads_mass = rule.similarity == Similarity::mass;
    if (l.reads_moments) inner<D>(z_of, f_of, zf), inner<D>(f_of, f_of, ff);
    if (p.direction)
      inner<D, cuda_z_registers(D) == 0 ? 4 : D / 8>(z_of, vector(p.direction, entry.concept_index), along);
    if (reads_mass || l.trace_entries) {
#pragma unroll
      for (int r = 0; r < 2; ++r)
        mass[r] = mass_share(z.top[r], z.mass[r], f.top[r], f.mass[r], entry.numbers);
    }
    mix.existing += 1;
    const int64_t apart = p.entries * p.heads * p.queries;  // from plane to plane
    if (l.goal == Goal::moments) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (!writes(tile, active, r)) continue;
        float* to = l.moments + place(entry.number, query_of(tile, r));
        if (l.reads_moments) to[kZz * apart] = zz[r], to[kZf * apart] = zf[r], to[kFf * apart] = ff[r];
        if (p.direction) to[kAlong * apart] = along[r];
        if (reads_mass) to[kMass * apart] = mass[r];
      }
      return;
    }
    Moments moments[2] = {{zz[0], zf[0], ff[0], along[0], mass[0]}, {zz[1], zf[1], ff[1], along[1], mass[1]}};
    if (l.moments) {
      const float* from = l.moments + entry.number * p.heads * p.queries;
      float inner_products[3][2], one[1][2];
      if (l.reads_moments) {
        over_heads(from + kZz * apart, apart, tile, inner_products);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          moments[r].zz = inner_products[kZz][r];
          moments[r].zf = inner_products[kZf][r];
          moments[r].ff = inner_products[kFf][r];
        }
      }
      if (p.direction) {
        over_heads(from + kAlong * apart, apart, tile, one);
        moments[0].along = one[0][0], moments[1].along = one[0][1];
      }
      if (reads_mass) {
        over_heads(from + kMass * apart, apart, tile, one);
        moments[0].mass = one[0][0] * l.per_head, moments[1].mass = one[0][1] * l.per_head;
      }
    }
    float part[2], old[2];  // of X, and of what was removed so far
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      Moments& m = moments[r];
      if (p.offset) m.along += __ldg(p.offset + entry.concept_index);
      const float similar = similarity(rule, m);
      float g = gate(rule, entry.numbers, similar);
      // A similarity that is NaN, from a concept that holds one, must show in the output: min and max lose it.
      if (similar != similar) g = similar;

      // This entry's part of (removed, moved, weight, level).
      const Pull d = pull(rule, m);
      float amount = g, level = 0.f;
      if (rule.combine == Combine::joint) {
        // amount 2^level, with an amount of 1 to 2, however small mass and gate are.
        amount = f.mass[r] * g;
        const int exponent = (__float_as_int(amount) >> 23) - 127;
        level = f.top[r] - entry.numbers.logit_bias * kLog2e + static_cast<float>(exponent);
        level = amount == 0.f ? -kInfinity : level;
        amount = amount == 0.f ? 0.f : amount * __uint_as_float(static_cast<uint32_t>(127 - exponent) << 23);
      }
      // It is added, or with `max` replaces the part of an entry it beats.
      float now = 1.f;
      old[r] = 1.f;
      if (rule.select == Select::max) {
        const bool tie = similar > mix.best_r[r] ||
                         (similar == mix.best_r[r] && entry.concept_index < mix.best_concept[r]);
        const bool wins = g != g || g > mix.best_g[r] || (g == mix.best_g[r] && tie);
        if (wins) {
          mix.best_g[r] = g, mix.best_r[r] = similar;
          mix.best_concept[r] = entry.concept_index, mix.best[r] = entry.number;
          mix.level[r] = level;
        }
        old[r] = wins ? 0.f : 1.f;
        now = 1.f - old[r];
      } else if (rule.combine == Combine::joint) {
        const float higher = fmaxf(mix.level[r], level), base = finite_top(higher);
        old[r] = ptx::exp2(mix.level[r] - base);
        now = ptx::exp2(level - base);
        mix.level[r] = higher;
      }
      if (l.trace_entries && writes(tile, active, r)) {
        float* to = l.trace_entries + place(entry.number, query_of(tile, r));
        if (rule.select == Select::all) to[0] = g;
        to[apart] = similar, to[2 * apart] = mass[r];
      }
      const float taken = -entry.numbers.strength * amount * now;
      part[r] = taken * d.x;
      mix.moved[r] = fmaf(mix.moved[r], old[r], taken * d.z);
      mix.weight[r] = fmaf(mix.weight[r], old[r], amount * now);
    }
    const auto update = [&](const auto& x_of) {
#pragma unroll
      for (int i = 0; i < D / 8; ++i) {
        const float4 x = x_of(i), y = mix.removed(i);
        mix.removed.set(i, make_float4(fmaf(part[0], x.x, y.x * old[0]), fmaf(part[0], x.y, y.y * old[0]),
                                       fmaf(part[1], x.z, y.z * old[1]), fmaf(part[1], x.w, y.w * old[1])));
      }
    };
    if (rule.direction == Direction::fixed)
      update(vector(p.update ? p.update : p.direction, entry.concept_index));
    else
      update(f_of);
  }

  // The lane's channels of a vector [C, H, D], for both of its rows.
  struct Vector {
    const float* at;
    FN_INLINE float4 operator()(int i) const {
      const float2 x = __ldg(reinterpret_cast<const float2*>(at + 8 * i));
      return make_float4(x.x, x.y, x.x, x.y);
    }
  };
  FN_INLINE Vector vector(const float* vectors, int concept_index) const {
    return {vectors + (concept_index * p.heads + h) * D + lane % 4 * 2};
  }

  // Sum over the channels of |x|, or of x x.
  template <class X>
  FN_INLINE void norm_sum(const X& x_of, float (&sum)[2]) const {
    if (rule.norm_order == 2) return inner<D>(x_of, x_of, sum);
    const auto sign = [&](int i) {
      const float4 x = x_of(i);
      return make_float4(copysignf(1.f, x.x), copysignf(1.f, x.y), copysignf(1.f, x.z), copysignf(1.f, x.w));
    };
    inner<D>(x_of, sign, sum);
  }

  // O, in place of what is removed, and where `limit` acted.
  template <class Z>
  FN_INLINE void finish(Mix<D>& mix, const Attended<D>& z, const Z& z_of, const float (&zz)[2], int tile,
                        bool active, float (&limited)[2]) {
    float keep[2], taken[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      keep[r] = 1.f + mix.moved[r], taken[r] = 1.f;
      if (rule.combine == Combine::joint) {
        const float base = fmaxf(z.top[r], mix.level[r]);
        const float share = z.mass[r] * ptx::exp2(z.top[r] - base);
        taken[r] = ptx::exp2(mix.level[r] - base);
        const float total = fmaf(mix.weight[r], taken[r], share);
        keep[r] = divide(share, total), taken[r] = divide(taken[r], total);
      }
    }
#pragma unroll
    for (int i = 0; i < D / 8; ++i) {
      const float4 x = z_of(i), y = mix.removed(i);
      mix.removed.set(i, make_float4(fmaf(keep[0], x.x, taken[0] * y.x), fmaf(keep[0], x.y, taken[0] * y.y),
                                     fmaf(keep[1], x.z, taken[1] * y.z), fmaf(keep[1], x.w, taken[1] * y.w)));
    }
    float factor[2] = {1.f, 1.f};
    if (rule.norm != Norm::none) {
      float sum_y[2], sum_z[2] = {zz[0], zz[1]};
      norm_sum(mix.removed, sum_y);
      if (rule.norm_order == 1) norm_sum(z_of, sum_z);
      const int64_t apart = p.batch * p.heads * p.queries;  // from the sums of Y to those of Z
      if (l.goal == Goal::norms) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          if (!writes(tile, active, r)) continue;
          float* to = l.norms + place(b, query_of(tile, r));
          to[0] = sum_y[r], to[apart] = sum_z[r];
        }
        return;
      }
      if (l.norms) {
        float sums[2][2];
        over_heads(l.norms + b * p.heads * p.queries, apart, tile, sums);
#pragma unroll
        for (int r = 0; r < 2; ++r) sum_y[r] = sums[0][r], sum_z[r] = sums[1][r];
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (rule.norm_order == 2) sum_y[r] = sqrt(sum_y[r]), sum_z[r] = sqrt(sum_z[r]);
        factor[r] = norm_factor(rule, sum_y[r], sum_z[r], &limited[r]);
      }
    }
    const float rest = 1.f - rule.blend, own[2] = {rule.blend * factor[0], rule.blend * factor[1]};
#pragma unroll
    for (int i = 0; i < D / 8; ++i) {
      const float4 x = z_of(i), y = mix.removed(i);
      mix.removed.set(i, make_float4(fmaf(own[0], y.x, rest * x.x), fmaf(own[0], y.y, rest * x.y),
                                     fmaf(own[1], y.z, rest * x.z), fmaf(own[1], y.w, rest * x.w)));
    }
  }

  // ---- what is written ------------------------------------------------------------------------------

  // Through the queries' place in shared memory, so that 16 bytes of a row are stored at a time.
  template <class O>
  FN_INLINE void write(const O& o_of, int tile, bool active, T* staging) {
    __syncwarp();  // every lane has read its queries
    T* to = staging + lane / 4 * kRow + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < D / 8; ++i) {
      const float4 o = o_of(i);
      *reinterpret_cast<uint32_t*>(to + 8 * i) = ptx::pack<T>(o.x, o.y);
      *reinterpret_cast<uint32_t*>(to + 8 * kRow + 8 * i) = ptx::pack<T>(o.z, o.w);
    }
    __syncwarp();
    T* out = reinterpret_cast<T*>(p.out.data) + b * p.out.batch + h * p.out.head;
#pragma unroll 1
    for (int done = 0; done < kCudaQueries * (D / 8); done += kWarp) {
      const int i = done + lane, row = i / (D / 8), unit = i % (D / 8), n = tile * kCudaQueries + row;
      if (active && i < kCudaQueries * (D / 8) && n < p.queries)
        *reinterpret_cast<uint4*>(out + int64_t{n} * p.out.row + unit * 8) =
            *reinterpret_cast<const uint4*>(staging + row * kRow + unit * 8);
    }
  }

  template <class O, class Z>
  FN_INLINE void trace(const O& o_of, const Z& z_of, const float (&limited)[2], int tile, bool active) {
    float moved[2], energy[2], nonfinite[2];
    const auto change = [&](int i) {
      const float4 o = o_of(i), x = z_of(i);
      return make_float4(o.x - x.x, o.y - x.y, o.z - x.z, o.w - x.w);
    };
    const auto overflows = [&](int i) {
      const float4 o = o_of(i);
      const auto one = [](float x) { return fabsf(x) < overflow<T>() ? 0.f : 1.f; };
      return make_float4(one(o.x), one(o.y), one(o.z), one(o.w));
    };
    inner<D>(change, change, moved);
    inner<D>(z_of, z_of, energy);
    inner<D>(overflows, overflows, nonfinite);
#pragma unroll
    for (int r = 0; r < 2; ++r)
      if (writes(tile, active, r)) {
        const int64_t apart = p.batch * p.heads * p.queries;
        float* to = l.trace_rows + place(b, query_of(tile, r));
        to[0] = moved[r], to[apart] = energy[r], to[2 * apart] = limited[r], to[3 * apart] = nonfinite[r];
      }
  }
};

template <class T, int D>
__global__ void __launch_bounds__(kWarp * kCudaMostWarps) attention(const __grid_constant__ Launch launch) {
  Block<T, D>(launch).run();
}

}  // namespace fastnegate::cuda
