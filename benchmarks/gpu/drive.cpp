// SPDX-License-Identifier: Apache-2.0
// Runs the CUDA kernels without Python and torch, under a sanitizer or a profiler, and checks what they write
// against the definition, evaluated in double precision.
//
// Inputs are small multiples of 1/64, which every dtype holds exactly and of which none is zero.
#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "cuda/run.h"

using namespace fastnegate;

namespace {

constexpr int kWrong = 1, kUsage = 2, kNoDevice = 3;  // exit statuses
constexpr int kDevice = 0;
constexpr double kTiny = 1e-30;  // smaller divisors give 0
constexpr float kNan = std::numeric_limits<float>::quiet_NaN(), kInfinity = std::numeric_limits<float>::infinity();

// ---- what is driven -----------------------------------------------------------------------------------

struct Layer {
  const char* name;
  int64_t heads, queries, dim, keys;
};
// Those of benchmarks/operator/cases.py, at batch 2.
constexpr Layer kLayers[] = {
    {"sd15-64", 8, 4096, 40, 77},    {"sd15-32", 8, 1024, 80, 77},     {"sd15-16", 8, 256, 160, 77},
    {"sd15-8", 8, 64, 160, 77},      {"sd15-1k-32", 8, 1024, 160, 77}, {"sdxl-64", 10, 4096, 64, 77},
    {"sdxl-32", 20, 1024, 64, 77},   {"pixart-64", 16, 4096, 72, 120}, {"wan-480p", 12, 4096, 128, 512},
};

struct Concepts {
  const char* name;
  std::vector<int> lengths;  // tokens of each
};
const Concepts kConcepts[] = {{"none", {}}, {"1x8", {8}}, {"4x8", {8, 8, 8, 8}}};

constexpr float kDense = -1.f;  // a threshold below every cosine: each gate is open

// Width 0: 1 - threshold.
constexpr Rule kProtore = {Similarity::cosine, Gate::ramp, Direction::projection, Combine::separate, Select::max,
                           Norm::limit, 2, Scope::head, Shared::outside, 1.f, 1.f, 0.f, {2.f, 0.f, .5f, 0.f, 1.f, 1.f},
                           {true, false, true, false}};
constexpr Rule kNag = {Similarity::one, Gate::open, Direction::difference, Combine::separate, Select::all,
                       Norm::limit, 1, Scope::feature, Shared::inside, 2.5f, .375f, 0.f, {2.f, 0.f, 0.f, 1.f, 1.f, 1.f},
                       {true, false, false, false}};

Rule over_all_heads(Rule rule) {
  rule.scope = Scope::feature;
  return rule;
}

struct Case {
  std::string name;
  Dtype dtype;
  int64_t heads, queries, keys, dim;
  std::vector<int> lengths;  // tokens of each concept
  std::array<int, 2> rows;   // how many concepts each of the two batch rows negates: the first ones
  Rule rule;
  bool masked = false;       // the prompt of batch row 1 has keys that are not there
  bool traced = false;       // with statistics
  int64_t every = 1;         // of so many queries one is checked
};

constexpr int64_t kBatch = 2;
constexpr Dtype kBrain = Dtype::bfloat16, kHalf = Dtype::float16;

// What the kernel does differently for different problems, as small as it may be under a sanitizer.
const std::vector<Case> kSmall = {
    {"attention", kBrain, 3, 100, 77, 40, {}, {0, 0}, kProtore},
    {"attention, masked keys", kHalf, 2, 130, 77, 64, {}, {0, 0}, kProtore, true},
    {"protore 4x8, statistics", kBrain, 2, 200, 77, 64, {8, 8, 8, 8}, {4, 3}, kProtore, false, true},
    {"protore 4x8, masked keys", kHalf, 2, 57, 77, 40, {8, 8, 8, 8}, {4, 0}, kProtore, true},
    {"protore 8, 3, 16, more tiles than warps", kBrain, 8, 1100, 20, 40, {8, 3, 16}, {3, 2}, kProtore, false, false, 7},
    {"protore 3x77, concepts in pieces", kBrain, 2, 150, 77, 160, {77, 77, 77}, {3, 1}, kProtore},
    {"protore 4x8, prompt in pieces", kHalf, 4, 280, 333, 160, {8, 8, 8, 8}, {4, 2}, kProtore, true, true, 3},
    {"nag 2x77", kBrain, 3, 100, 77, 64, {77, 77}, {1, 2}, kNag, false, true},
    {"nag 77, masked keys", kHalf, 3, 70, 77, 40, {77}, {1, 1}, kNag, true},
    {"protore 4x8 over all heads", kHalf, 3, 90, 77, 64, {8, 8, 8, 8}, {2, 4}, over_all_heads(kProtore), false, true},
};

// ---- inputs -------------------------------------------------------------------------------------------

uint32_t hash(uint32_t x) {
  x = (x ^ x >> 16) * 0x7feb352du;
  x = (x ^ x >> 15) * 0x846ca68bu;
  return x ^ x >> 16;
}

// An odd multiple of 1/64 between -2 and 2; another sequence for each `stream`.
float drawn(uint32_t stream, size_t i) {
  const uint32_t bits = hash(static_cast<uint32_t>(i) ^ hash(stream));
  return static_cast<float>(static_cast<int>(bits % 128) * 2 - 127) / 64.f;
}

// x, which the dtype holds exactly, or NaN.
uint16_t encoded(Dtype dtype, float x) {
  if (x != x) return 0xffff;
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (dtype == Dtype::bfloat16) return static_cast<uint16_t>(bits >> 16);
  return static_cast<uint16_t>((bits >> 16 & 0x8000) | ((bits & 0x7fffffff) - (112u << 23)) >> 13);
}

double decoded(Dtype dtype, uint16_t bits) {
  const int fraction_bits = dtype == Dtype::bfloat16 ? 7 : 10, exponents = 0x7fff >> fraction_bits;
  const int fraction = bits & ((1 << fraction_bits) - 1), exponent = bits >> fraction_bits & exponents;
  if (exponent == exponents) return fraction ? kNan : bits >> 15 ? -kInfinity : kInfinity;
  const int scale = std::max(exponent, 1) - exponents / 2 - fraction_bits;
  const double size = std::ldexp(exponent ? fraction + (1 << fraction_bits) : fraction, scale);
  return bits >> 15 ? -size : size;
}

struct Inputs {
  std::vector<float> query, key, value;           // [B, N, H, D], [B, M, H, D]
  std::vector<float> concept_key, concept_value;  // [T, H, D]
  std::vector<float> key_bias;                    // [B, M], or empty
  std::vector<int32_t> begin;                     // [C]: a concept's first token
  std::vector<int32_t> index;                     // as in Problem
  std::vector<float> numbers;                     // as in Problem
  std::array<int, kBatch + 1> entries;            // the first entry of each batch row, and their number

  explicit Inputs(const Case& c) {
    const auto fill = [](std::vector<float>& to, int64_t size, uint32_t stream) {
      to.resize(static_cast<size_t>(size));
      for (size_t i = 0; i < to.size(); ++i) to[i] = drawn(stream, i);
    };
    const int64_t row = c.heads * c.dim;
    fill(query, kBatch * c.queries * row, 1);
    fill(key, kBatch * c.keys * row, 2);
    fill(value, kBatch * c.keys * row, 3);
    int tokens = 0;
    for (const int length : c.lengths) begin.push_back(tokens), tokens += length;
    fill(concept_key, tokens * row, 4);
    fill(concept_value, tokens * row, 5);
    // Concepts resemble the prompt of batch row 0: three of four channels are its own.
    for (size_t i = 0; i < concept_value.size(); ++i)
      if (hash(static_cast<uint32_t>(i)) % 4) concept_value[i] = value[i % static_cast<size_t>(c.keys * row)];
    if (c.masked) {
      key_bias.assign(static_cast<size_t>(kBatch * c.keys), 0.f);
      for (int64_t m = 0; m < c.keys; ++m) {
        key_bias[m] = .25f * drawn(6, m);
        if (m % 3 != 1) continue;
        key_bias[c.keys + m] = -kInfinity;
        for (int64_t i = (c.keys + m) * row; i < (c.keys + m + 1) * row; ++i) key[i] = value[i] = kNan;
      }
    }
    entries = {0, c.rows[0], c.rows[0] + c.rows[1]};
    for (const int count : c.rows)
      for (int concept_index = 0; concept_index < count; ++concept_index) index.push_back(concept_index);
    index.insert(index.end(), begin.begin(), begin.end());
    index.insert(index.end(), c.lengths.begin(), c.lengths.end());
    index.insert(index.end(), entries.begin(), entries.end());
    // Strength, logit_bias, threshold, width, cap, active; NaN is the rule's default.
    for (int e = 0; e < entries[kBatch]; ++e)
      for (const float number : {kNan, kNan, kDense, kNan, kNan, e % 2 ? .75f : 1.f, kNan, kNan})
        numbers.push_back(number);
  }
};

// ---- the definition -----------------------------------------------------------------------------------

using Vector = std::vector<double>;

double divide(double x, double y) { return y < kTiny ? 0. : x / y; }

struct Segment {
  Vector out;      // of one head
  double log_sum;  // log of the sum of exponentials
};

// Attention of one query of one head to `count` tokens that lie `row` numbers apart.
Segment attended(const float* q, const float* key, const float* value, const float* bias, int64_t count, int64_t row,
                 int64_t dim) {
  const double scale = 1. / std::sqrt(static_cast<double>(dim));
  Vector logits(static_cast<size_t>(count));
  double top = -kInfinity, sum = 0.;
  for (int64_t m = 0; m < count; ++m) {
    double product = 0.;
    for (int64_t d = 0; d < dim; ++d) product += double{q[d]} * key[m * row + d];
    logits[m] = bias && bias[m] == -kInfinity ? -kInfinity : product * scale + (bias ? bias[m] : 0.);
    top = std::max(top, logits[m]);
  }
  Segment segment{Vector(static_cast<size_t>(dim), 0.), 0.};
  for (int64_t m = 0; m < count; ++m) {
    const double weight = std::exp(logits[m] - top);
    if (weight == 0.) continue;  // a masked token may hold NaN
    sum += weight;
    for (int64_t d = 0; d < dim; ++d) segment.out[d] += weight * value[m * row + d];
  }
  for (double& x : segment.out) x /= sum;
  segment.log_sum = top + std::log(sum);
  return segment;
}

// One query of one head.
struct Expected {
  Vector out;
  double magnitude;            // max |a| |Z| + sum |b| |F| of its channels: what rounding errors are relative to
  Vector gate, similarity, mass;  // of each entry
  double removed, own;         // |O - Z|, |Z|
  double growth;               // |Y| / |Z| in the norm of the rule
  bool near;                   // the two largest gates are so close that either may be kept
};

// All heads of query n. With `runner_up` the second largest gate is kept in place of the largest.
std::vector<Expected> expected(const Case& c, const Inputs& in, int64_t b, int64_t n, bool runner_up, double eps) {
  const Rule& rule = c.rule;
  const int64_t row = c.heads * c.dim;
  const int count = c.rows[b];
  std::vector<Segment> z;
  std::vector<std::vector<Segment>> f(count);  // [entry][head]
  for (int64_t h = 0; h < c.heads; ++h) {
    const float* q = &in.query[(b * c.queries + n) * row + h * c.dim];
    const int64_t prompt = b * c.keys * row + h * c.dim;
    z.push_back(attended(q, &in.key[prompt], &in.value[prompt], c.masked ? &in.key_bias[b * c.keys] : nullptr, c.keys,
                         row, c.dim));
    for (int e = 0; e < count; ++e) {
      const int64_t tokens = in.begin[e] * row + h * c.dim;
      f[e].push_back(
          attended(q, &in.concept_key[tokens], &in.concept_value[tokens], nullptr, c.lengths[e], row, c.dim));
    }
  }
  // A sum over the channels of head h or, for scope `feature`, of all heads.
  const auto summed = [&](int64_t h, const auto& term) {
    double sum = 0.;
    for (int64_t i = 0; i < c.heads; ++i)
      if (rule.scope == Scope::feature || i == h)
        for (int64_t d = 0; d < c.dim; ++d) sum += term(i, d);
    return sum;
  };

  std::vector<Expected> found(static_cast<size_t>(c.heads));
  std::vector<Vector> y(static_cast<size_t>(c.heads)), size = y;  // Y, and |a| |Z| + sum |b| |F| of it
  for (int64_t h = 0; h < c.heads; ++h) {
    Expected& to = found[h];
    Vector x(count);  // the direction is x F, or F - Z
    const double zz = summed(h, [&](int64_t i, int64_t d) { return z[i].out[d] * z[i].out[d]; });
    for (int e = 0; e < count; ++e) {
      const double zf = summed(h, [&](int64_t i, int64_t d) { return z[i].out[d] * f[e][i].out[d]; });
      const double ff = summed(h, [&](int64_t i, int64_t d) { return f[e][i].out[d] * f[e][i].out[d]; });
      const float* numbers = &in.numbers[(in.entries[b] + e) * kNumberColumns];
      const double threshold = numbers[2], active = numbers[5];
      const double r = rule.similarity == Similarity::cosine ? divide(zf, std::sqrt(zz * ff)) : 1.;
      const double psi =
          rule.gate == Gate::ramp ? std::min(std::max((r - threshold) / (1. - threshold), 0.), 1.) : 1.;
      to.similarity.push_back(r);
      to.gate.push_back(active * psi);
      to.mass.push_back(1. / (1. + std::exp(z[h].log_sum - f[e][h].log_sum)));
      x[e] = rule.direction == Direction::projection ? divide(zf, ff) : 1.;
    }
    to.near = false;
    if (rule.select == Select::max && count > 0) {
      std::vector<int> order(count);
      for (int e = 0; e < count; ++e) order[e] = e;
      std::stable_sort(order.begin(), order.end(), [&](int one, int other) { return to.gate[one] > to.gate[other]; });
      to.near = count > 1 && to.gate[order[0]] - to.gate[order[1]] <= 4 * eps;
      const int kept = order[runner_up && count > 1];
      for (int e = 0; e < count; ++e)
        if (e != kept) to.gate[e] = 0.;
    }
    y[h] = z[h].out;
    double a = 1.;
    for (int e = 0; e < count; ++e) {
      const double taken = rule.defaults.strength * to.gate[e];
      const double of_z = rule.direction == Direction::difference ? 1. : 0.;
      a += taken * of_z;
      for (int64_t d = 0; d < c.dim; ++d) y[h][d] -= taken * (x[e] * f[e][h].out[d] - of_z * z[h].out[d]);
    }
    size[h].resize(y[h].size());
    for (int64_t d = 0; d < c.dim; ++d) {
      size[h][d] = std::fabs(a * z[h].out[d]);
      for (int e = 0; e < count; ++e)
        size[h][d] += std::fabs(rule.defaults.strength * to.gate[e] * x[e] * f[e][h].out[d]);
    }
  }
  const auto norm = [&](int64_t h, const auto& of) {
    if (rule.norm_order == 1) return summed(h, [&](int64_t i, int64_t d) { return std::fabs(of(i, d)); });
    return std::sqrt(summed(h, [&](int64_t i, int64_t d) { return of(i, d) * of(i, d); }));
  };
  for (int64_t h = 0; h < c.heads; ++h) {
    Expected& to = found[h];
    to.growth = divide(norm(h, [&](int64_t i, int64_t d) { return y[i][d]; }),
                       norm(h, [&](int64_t i, int64_t d) { return z[i].out[d]; }));
    const bool limited = count > 0 && to.growth > rule.norm_limit;
    const double factor = limited ? rule.norm_limit / to.growth : 1., blend = count > 0 ? rule.blend : 1.;
    to.magnitude = to.removed = to.own = 0.;
    for (int64_t d = 0; d < c.dim; ++d) {
      const double own = z[h].out[d], out = blend * factor * y[h][d] + (1. - blend) * own;
      to.out.push_back(out);
      to.magnitude = std::max(to.magnitude, blend * factor * size[h][d] + (1. - blend) * std::fabs(own));
      to.removed += (out - own) * (out - own), to.own += own * own;
    }
    to.removed = std::sqrt(to.removed), to.own = std::sqrt(to.own);
  }
  return found;
}

// ---- the device ---------------------------------------------------------------------------------------

void check(cudaError_t error, const char* call) {
  if (error != cudaSuccess)
    throw CudaError(std::string(call) + ": " + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")");
}

// An array of exactly this size, in an allocation of its own: a sanitizer sees where it ends.
template <class T>
class OnDevice {
 public:
  explicit OnDevice(int64_t count) : count_(static_cast<size_t>(count)) {
    if (count_) check(cudaMalloc(reinterpret_cast<void**>(&data_), bytes()), "cudaMalloc");
  }
  explicit OnDevice(const std::vector<T>& from) : OnDevice(static_cast<int64_t>(from.size())) {
    if (count_) check(cudaMemcpy(data_, from.data(), bytes(), cudaMemcpyHostToDevice), "cudaMemcpy to the device");
  }
  OnDevice(const OnDevice&) = delete;
  ~OnDevice() { cudaFree(data_); }

  T* get() const { return data_; }  // null if it is empty
  void fill(int byte) {
    if (count_) check(cudaMemset(data_, byte, bytes()), "cudaMemset");
  }
  std::vector<T> values() const {
    std::vector<T> to(count_);
    if (count_) check(cudaMemcpy(to.data(), data_, bytes(), cudaMemcpyDeviceToHost), "cudaMemcpy from the device");
    return to;
  }

 private:
  size_t bytes() const { return count_ * sizeof(T); }

  size_t count_;
  T* data_ = nullptr;
};

OnDevice<uint16_t> stored(Dtype dtype, const std::vector<float>& numbers) {
  std::vector<uint16_t> bits;
  for (const float x : numbers) bits.push_back(encoded(dtype, x));
  return OnDevice<uint16_t>(bits);
}

struct Outputs {
  std::vector<uint16_t> out;                // [B, N, H, D]
  std::vector<float> trace_entries, trace_rows;  // as in CudaTables, or empty
};

constexpr int kNanByte = 0xff;  // numbers made of it are NaN, in each dtype

// What the kernel writes, and in `cut` how it cut the work.
Outputs run(const Case& c, const Inputs& in, int launches, std::string& cut) {
  const int64_t row = c.heads * c.dim, table = c.heads * c.queries, entries = in.entries[kBatch];
  const auto query = stored(c.dtype, in.query), key = stored(c.dtype, in.key), value = stored(c.dtype, in.value);
  const auto concept_key = stored(c.dtype, in.concept_key), concept_value = stored(c.dtype, in.concept_value);
  const OnDevice<float> key_bias(in.key_bias), numbers(in.numbers);
  const OnDevice<int32_t> index(in.index);
  // Sums over heads stay as they are allocated: initcheck finds what is read of them and was never written.
  const bool feature = c.rule.scope == Scope::feature;
  const OnDevice<float> moments(feature && c.rule.similarity == Similarity::cosine ? 5 * entries * table : 0);
  const OnDevice<float> norms(feature && entries ? 2 * kBatch * table : 0);
  OnDevice<uint16_t> out(kBatch * c.queries * row);
  OnDevice<float> trace_entries(c.traced ? 3 * entries * table : 0), trace_rows(c.traced ? 4 * kBatch * table : 0);
  out.fill(kNanByte), trace_rows.fill(kNanByte), trace_entries.fill(0);

  const auto strided = [&](const OnDevice<uint16_t>& from, int64_t rows) {
    return Strided{reinterpret_cast<char*>(from.get()), rows * row, c.dim, row};
  };
  Problem p{};
  p.batch = kBatch, p.heads = c.heads, p.queries = c.queries, p.keys = c.keys, p.dim = c.dim;
  p.dtype = c.dtype;
  p.scale = 1.f / std::sqrt(static_cast<float>(c.dim));
  p.query = strided(query, c.queries), p.key = strided(key, c.keys), p.value = strided(value, c.keys);
  p.out = strided(out, c.queries);
  p.key_bias = key_bias.get(), p.bias_batch = c.keys, p.bias_key = 1;
  p.concepts = static_cast<int64_t>(c.lengths.size()), p.entries = entries;
  for (const int length : c.lengths) p.tokens += length, p.longest = std::max<int64_t>(p.longest, length);
  p.busiest = std::max(c.rows[0], c.rows[1]);
  p.concept_key = strided(concept_key, 0), p.concept_value = strided(concept_value, 0);
  p.index = index.get(), p.numbers = numbers.get();
  p.rule = c.rule;

  const CudaPlan plan = plan_cuda(p, kDevice);
  const CudaTiling& tiling = plan.tiling;
  int64_t slots = 0;
  for (int e = 0; e < p.busiest; ++e) slots += ceil_div(c.lengths[e], 8) * 8;
  const bool stays = tiling.prompt_slots > 0;
  cut = std::to_string(tiling.blocks) + " blocks of " + std::to_string(tiling.warps) + " warps, " +
        (!stays ? "all text in pieces" : slots <= tiling.concept_slots ? "all text stays" : "concepts in pieces");
  const CudaTables tables{moments.get(), norms.get(), trace_entries.get(), trace_rows.get()};
  for (int i = 0; i < launches; ++i) {
    run_cuda(plan, p, tables, nullptr);
    check(cudaDeviceSynchronize(), "the kernel");
  }
  return {out.values(), trace_entries.values(), trace_rows.values()};
}

// ---- verdicts -----------------------------------------------------------------------------------------

// What is wrong with one query of one head, or nothing. `used` grows to the share of what rounding may cost that
// the output has used.
std::string wrong(const Case& c, const Inputs& in, const Outputs& got, const Expected& want, double eps, int64_t b,
                  int64_t h, int64_t n, double& used) {
  const double allowed = 2 * eps * want.magnitude;
  const auto says = [](const std::string& what, double is, double must) {
    char text[100];
    std::snprintf(text, sizeof text, " is %.6g, must be %.6g", is, must);
    return what + text;
  };
  const uint16_t* row = &got.out[((b * c.queries + n) * c.heads + h) * c.dim];
  for (int64_t d = 0; d < c.dim; ++d) {
    const double x = decoded(c.dtype, row[d]), error = std::fabs(x - want.out[d]);
    if (!(error <= allowed)) return says("channel " + std::to_string(d), x, want.out[d]);
    used = std::max(used, error / allowed);
  }
  if (!c.traced) return "";
  const int64_t table = c.heads * c.queries, apart = in.entries[kBatch] * table;
  for (int e = 0; e < c.rows[b]; ++e) {
    const float* at = &got.trace_entries[(in.entries[b] + e) * table + h * c.queries + n];
    const struct {
      const char* name;
      double is, must;
    } numbers[] = {{"gate", at[0], want.gate[e]},
                   {"similarity", at[apart], want.similarity[e]},
                   {"mass", at[2 * apart], want.mass[e]}};
    for (const auto& number : numbers)
      if (!(std::fabs(number.is - number.must) <= 2 * eps))
        return says(number.name + (" of entry " + std::to_string(e)), number.is, number.must);
  }
  const float* at = &got.trace_rows[(b * c.heads + h) * c.queries + n];
  const int64_t plane = kBatch * table;
  const double length = allowed * std::sqrt(static_cast<double>(c.dim));
  if (!(std::fabs(std::sqrt(at[0]) - want.removed) <= length)) return says("|O - Z|", std::sqrt(at[0]), want.removed);
  if (!(std::fabs(std::sqrt(at[plane]) - want.own) <= length)) return says("|Z|", std::sqrt(at[plane]), want.own);
  const double limited = c.rows[b] > 0 && want.growth > c.rule.norm_limit;
  if (at[2 * plane] != limited && std::fabs(want.growth - c.rule.norm_limit) > 4 * eps * want.growth)
    return says("whether the norm is limited", at[2 * plane], limited);
  return at[3 * plane] == 0.f ? "" : says("count of values that are not finite", at[3 * plane], 0.);
}

// The queries that are checked, the last one among them.
std::vector<int64_t> sampled(const Case& c) {
  std::vector<int64_t> queries;
  for (int64_t n = 0; n < c.queries; n += c.every) queries.push_back(n);
  if (queries.back() != c.queries - 1) queries.push_back(c.queries - 1);
  return queries;
}

// Runs a case and prints a line; whether all is right.
bool drive(const Case& c, int launches) {
  const Inputs in(c);
  const double eps = c.dtype == Dtype::bfloat16 ? 0x1p-7 : 0x1p-10;
  const std::string name = c.name + ", " + (c.dtype == Dtype::bfloat16 ? "bfloat16" : "float16") + ", head_dim " +
                           std::to_string(c.dim);
  std::string cut;
  const Outputs got = run(c, in, launches, cut);
  const auto fails = [&](int64_t b, int64_t h, int64_t n, const std::string& what) {
    std::printf("%s: WRONG: batch row %lld, head %lld, query %lld: %s (%s)\n", name.c_str(), static_cast<long long>(b),
                static_cast<long long>(h), static_cast<long long>(n), what.c_str(), cut.c_str());
    return false;
  };
  for (size_t i = 0; i < got.out.size(); ++i) {
    const int64_t row = static_cast<int64_t>(i) / c.dim, query = row / c.heads;
    if (!std::isfinite(decoded(c.dtype, got.out[i])))
      return fails(query / c.queries, row % c.heads, query % c.queries, "an output is not finite, or was not written");
  }
  double used = 0.;
  int64_t checked = 0;
  for (int64_t b = 0; b < kBatch; ++b)
    for (const int64_t n : sampled(c)) {
      const auto want = expected(c, in, b, n, false, eps);
      for (int64_t h = 0; h < c.heads; ++h, ++checked) {
        double share = 0.;
        std::string what = wrong(c, in, got, want[h], eps, b, h, n, share);
        if (!what.empty() && want[h].near) {
          share = 0.;
          if (wrong(c, in, got, expected(c, in, b, n, true, eps)[h], eps, b, h, n, share).empty()) what.clear();
        }
        if (!what.empty()) return fails(b, h, n, what);
        used = std::max(used, share);
      }
    }
  std::printf("%s: ok: %lld rows, %.2f of the allowed error, %s\n", name.c_str(), static_cast<long long>(checked), used,
              cut.c_str());
  return true;
}

// ---- the command --------------------------------------------------------------------------------------

const char kHelp[] =
    "usage: drive small                  every kind of problem, each as small as it may be\n"
    "       drive layer NAME CONCEPTS    a layer of a real model, for a profiler: one launch, then three more\n"
    "       drive list                   what NAME and CONCEPTS may be\n";

int usage(const std::string& problem) {
  std::fprintf(stderr, "drive: %s\n%s", problem.c_str(), kHelp);
  return kUsage;
}

template <class Named, size_t kCount>
const Named* find(const Named (&all)[kCount], const std::string& name) {
  for (const Named& one : all)
    if (one.name == name) return &one;
  return nullptr;
}

template <class Named, size_t kCount>
std::string names(const Named (&all)[kCount]) {
  std::string text;
  for (const Named& one : all) text += (text.empty() ? "" : ", ") + std::string(one.name);
  return text;
}

int command(const std::vector<std::string>& words) {
  const std::string verb = words.empty() ? "" : words[0];
  const size_t wanted = verb == "layer" ? 3 : 1;
  if (verb != "small" && verb != "layer" && verb != "list")
    return usage(words.empty() ? "no command" : "command '" + verb + "': allowed are small, layer, list");
  if (words.size() != wanted)
    return usage(verb + " takes " + std::to_string(wanted - 1) + " arguments, not " + std::to_string(words.size() - 1));
  if (verb == "list") {
    for (const Layer& layer : kLayers)
      std::printf("layer %s B%lld H%lld N%lld M%lld D%lld\n", layer.name, static_cast<long long>(kBatch),
                  static_cast<long long>(layer.heads), static_cast<long long>(layer.queries),
                  static_cast<long long>(layer.keys), static_cast<long long>(layer.dim));
    for (const Concepts& concepts : kConcepts) std::printf("concepts %s\n", concepts.name);
    return 0;
  }
  const Layer* layer = nullptr;
  const Concepts* concepts = nullptr;
  if (verb == "layer") {
    layer = find(kLayers, words[1]), concepts = find(kConcepts, words[2]);
    if (!layer) return usage("NAME '" + words[1] + "': allowed are " + names(kLayers));
    if (!concepts) return usage("CONCEPTS '" + words[2] + "': allowed are " + names(kConcepts));
  }
  const std::string missing = cuda_unavailable();
  if (!missing.empty()) {
    std::fprintf(stderr, "drive: %s\n", missing.c_str());
    return kNoDevice;
  }
  bool right = true;
  if (layer) {
    const int count = static_cast<int>(concepts->lengths.size());
    right = drive({words[1] + " " + words[2], kBrain, layer->heads, layer->queries, layer->keys, layer->dim,
                   concepts->lengths, {count, count}, kProtore, false, false, 61},
                  4);
  } else {
    for (const Case& c : kSmall) right = drive(c, 1) && right;
  }
  return right ? 0 : kWrong;
}

}  // namespace

int main(int count, char** words) {
  try {
    return command({words + 1, words + count});
  } catch (const std::exception& error) {
    std::fprintf(stderr, "drive: %s\n", error.what());
    return kWrong;
  }
}
