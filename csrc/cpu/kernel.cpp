// SPDX-License-Identifier: Apache-2.0
// The CPU kernel; compiled once per instruction set with FASTNEGATE_ISA naming it.
//
// Order of work for a tile: for each head of the scope, attention to the prompt (Z) and to each
// concept (F), then the inner products; once all heads are known, gates and coefficients; then
// O = a Z + sum b X, its norm, and the one write of O. Scores never leave the cache.
#include "kernel.h"

#include <algorithm>

#include "pack.h"
#include "product.h"
#include "vec.h"
// after vec.h, whose F and functions it uses
#include "fastnegate/rule.h"

namespace fastnegate::FASTNEGATE_ISA {
namespace {

constexpr int kTile = 2 * W;

// ---- queries in, outputs out ------------------------------------------------------------------

// Rows of one head of [B, H, N, ..] for the `count` queries of a task: x[d][lane] of `depth` elements each; lanes
// beyond repeat the last query and are never stored.
template <class Elements, int NQ>
FN_INLINE void load_tile(const Strided& t, const Task& task, int64_t h, int64_t count, int64_t size, int64_t depth,
                         float* x) {
  const char* base = t.data + (task.batch * t.batch + h * t.head + task.first_query * t.row) * size;
  for (int v = 0; v < NQ; ++v) {
    const char* row[W];
    for (int i = 0; i < W; ++i) row[i] = base + std::min<int64_t>(v * W + i, count - 1) * t.row * size;
    load_rows<Elements>(row, depth, x + v * W, NQ * W);
  }
}

// The mass of a segment: mass 2^(top + low). The top is the highest of its logits to the base of 2. Of a partial it is
// the log-sum-exp, and `low` what its conversion to that base has rounded away, or two partials with like masses would
// be merged less exactly than by natural logarithms.
struct Mass {
  F top, low, mass;
};
FN_INLINE F gap(const Mass& from, const Mass& to) { return (to.top - from.top) + (to.low - from.low); }
FN_INLINE F share_of(const Mass& first, const Mass& second) {
  return mass_share(gap(first, second), first.mass, second.mass);
}

// The mass of a partial: of its log-sum-exp itself, so 1, or 0 without keys.
FN_INLINE Mass mass_of(const Partial& partial, const Task& task, int64_t h, int64_t count, int v) {
  const float* lse = partial.lse + task.batch * partial.lse_batch + h * partial.lse_head;
  F x;
  for (int i = 0; i < W; ++i)
    x[i] = lse[(task.first_query + std::min<int64_t>(v * W + i, count - 1)) * partial.lse_query];
  const I empty = x == -INFINITY;
  x = max(splat(-2e38f), x);  // else the lowest float would become -inf; NaN and +inf show
  // Both factors in halves of 12 bits, whose first product is exact also where there is no fused multiply-add.
  constexpr float kHigh = 2955.f / 2048, kLow = static_cast<float>(1.4426950408889634 - kHigh);
  const F top = x * kLog2e, high = as_float(as_int(x) & ~0xfff), rest = x - high;
  const F low = (high * kHigh - top) + (high * kLow + rest * kHigh + rest * kLow);
  return {select(empty, splat(kLowest), top), select(empty, F{}, low), select(empty, F{}, splat(1.f))};  // NaN shows
}

// Fetches rows of one head into the cache, some at a time between steps of other work: they lie too far
// apart in [B, N, H, D] memory for the hardware to foresee, and all at once they are more lines than a
// core can wait for. Spread is 5 to 15 % of plain attention faster than in one burst.
template <int kWrite>
class Fetch {
 public:
  Fetch(const Strided& t, int64_t size, int64_t dim, const Task& task, int64_t head, int64_t rows)
      : row(t.data + (task.batch * t.batch + head * t.head + task.first_query * t.row) * size),
        stride(t.row * size), bytes(dim * size), left(rows) {}

  bool some() {  // whether there was anything left
    const bool any = left > 0;
    for (int i = 0; i < 4 && left > 0; ++i, --left, row += stride)
      for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(row + at, kWrite);
    return any;
  }

 private:
  const char* row;
  int64_t stride, bytes, left;
};

// Channel d of the v-th vector of queries is channel(d, j), as in store_rows.
template <class Storage, class Channel>
FN_INLINE void store_outputs(const Problem& p, const Task& task, int64_t h, int64_t count, int v, Channel channel) {
  constexpr int64_t kSize = sizeof(typename Storage::T);
  char* base = p.out.data + (task.batch * p.out.batch + h * p.out.head + task.first_query * p.out.row) * kSize;
  char* row[W];
  for (int i = 0; i < W; ++i) row[i] = base + (v * W + i) * p.out.row * kSize;
  store_rows<Storage>(row, count - v * W, p.dim, channel);
}

// ---- one segment ------------------------------------------------------------------------------

// s[n][lane], logits in base 2 once multiplied by `scale` -> weights 2^(scale s - top), their top and
// their sum. The top is subtracted before scaling: it weighs exactly 1 however large it is, and the
// weights that matter are the most exact. Two chains of each query's maxima and short chains of its sum:
// for latency, and for rounding.
template <int NQ>
FN_INLINE void softmax(float* s, int64_t n, float scale, F* top, F* mass) {
  if (scale < 0.f) {  // the lowest score is the highest logit
    for (int64_t i = 0; i < n * NQ; ++i) store(s + i * W, -load(s + i * W));
    scale = -scale;
  }
  F highest[2][NQ], total[NQ] = {};
  for (int q = 0; q < NQ; ++q) highest[0][q] = highest[1][q] = splat(kLowest);
  const auto raise = [&](int64_t j, int chain) {  // a NaN leaves the top alone
    for (int q = 0; q < NQ; ++q) highest[chain][q] = max(load(s + (j * NQ + q) * W), highest[chain][q]);
  };
  int64_t j = 0;
  for (; j + 2 <= n; j += 2) raise(j, 0), raise(j + 1, 1);
  if (j < n) raise(j, 0);
  for (int q = 0; q < NQ; ++q) highest[0][q] = max(highest[0][q], highest[1][q]);
  for (int64_t begin = 0; begin < n; begin += 8) {
    F sum[NQ] = {};
    for (j = begin; j < n && j < begin + 8; ++j)
      for (int q = 0; q < NQ; ++q) {
        float* at = s + (j * NQ + q) * W;
        const F w = exp2((load(at) - highest[0][q]) * scale);
        store(at, w);
        sum[q] = sum[q] + w;
      }
    for (int q = 0; q < NQ; ++q) total[q] = total[q] + sum[q];
  }
  for (int q = 0; q < NQ; ++q) top[q] = highest[0][q] * scale, mass[q] = total[q];
}

// Logits scale s[n][lane] -> out[d][lane], the mean of n packed values with the softmax of the logits.
// `exact`: divided by the mass at the end, with one rounding, though weights may be fewer than channels.
// Tiles take weights rounded to bfloat16; the mass is of those before, as that of any segment is that it may be weighed
// against. Roundings of many tokens cancel, and a token that has all the weight has it exactly.
template <class Storage, int NQ, class Between = Nothing>
FN_INLINE void mean_value(const float* values, int64_t n, int64_t dim, bool exact, float scale, float* s,
                          float* out, F* top, F* mass, Between between = {}) {
  softmax<NQ>(s, n, scale, top, mass);
  F inverse[NQ];
  for (int q = 0; q < NQ; ++q) inverse[q] = divide(splat(1.f), mass[q]);
  const bool at_end = exact || n >= dim;
  if constexpr (Scored<Storage>::tiled) {
    pack_weights<NQ>(s, n, at_end ? nullptr : inverse);
    multiply_tiles<NQ>(dim, values, ceil_div(n, kTileDepth), s, at_end ? inverse : nullptr, out, between);
  } else {
    for (int64_t j = 0; !at_end && j < n; ++j)
      for (int q = 0; q < NQ; ++q) {
        float* at = s + (j * NQ + q) * W;
        store(at, load(at) * inverse[q]);
      }
    multiply<Product, NQ>(dim, values, n, s, at_end ? inverse : nullptr, out, between);
  }
}

// ---- one tile ---------------------------------------------------------------------------------

// Where a thread keeps a tile; every array is [..][lane].
struct Scratch {
  float *query, *scores, *feature;
  float *z, *y;       // [group][D]
  float* x;           // [group][entries][D]: what an entry adds, F or the retrieved value
  float *top, *low, *mass;  // [group][1 + entries], the prompt first: see Mass
  float* entry;       // [entries][kEntryRows]
  float* zz;          // <Z,Z>
  float *shared, *shared_top, *shared_low, *shared_mass;  // [group][D], [group]: keys of prompt and concepts alike
};
// kShare: of shared keys and concept; kThere: partials of it that have keys; kB: coefficient of X.
enum EntryRow { kZf, kFf, kAlong, kMass, kShare, kThere, kR, kG, kB, kEntryRows };

int64_t lay_out(const Plan& plan, Scratch* s, float* base) {
  const Problem& p = *plan.problem;
  const int64_t g = plan.group, e = plan.most_live;
  int64_t used = 0;
  const auto take = [&](float*& at, int64_t vectors) {
    at = base + used;
    used += vectors * kTile;
  };
  take(s->query, whole_blocks(p.dim));
  take(s->scores, whole_blocks(std::max(p.keys, p.longest)) + 1);
  take(s->feature, p.dim);
  take(s->z, g * p.dim);
  take(s->y, g * p.dim);
  take(s->x, p.rule.direction == Direction::fixed ? 0 : g * e * p.dim);
  take(s->top, g * (1 + e));
  take(s->low, g * (1 + e));
  take(s->mass, g * (1 + e));
  take(s->entry, e * kEntryRows);
  take(s->zz, 1);
  const int64_t shared = p.shared.out.data ? g : 0;
  take(s->shared, shared * p.dim);
  take(s->shared_top, shared);
  take(s->shared_low, shared);
  take(s->shared_mass, shared);
  return used;
}

int64_t scratch(const Plan& plan) {
  Scratch s;
  return lay_out(plan, &s, nullptr);
}

// Values that storing turns into inf start here (round to nearest even).
float overflow(Dtype dtype) {
  return dtype == Dtype::float16 ? 65520.f : dtype == Dtype::bfloat16 ? 0x1.ffp127f : INFINITY;
}

template <class Storage, int NQ>
class Tile {
 public:
  Tile(const Plan& plan, const Task& task, const Task* next, int64_t count, float* memory)
      : plan(plan), p(*plan.problem), rule(p.rule), task(task), next(next), count(count),
        live(plan.live + plan.live_begin[task.batch]),
        entries(plan.live_begin[task.batch + 1] - plan.live_begin[task.batch]) {
    lay_out(plan, &s, memory);
  }

  void run() {
    for (int64_t g = 0; g < plan.group; ++g) {
      see_prompt(g);
      for (int64_t e = 0; e < entries; ++e) measure(g, e);
      if (plan.reads.mass && plan.reads.tokens) weigh(g);
    }
    if (entries == 0) {
      for (int64_t g = 0; g < plan.group; ++g)
        write(g, [&](int64_t d, int q) { return load(vec(z(g), d, q)); });
      return;
    }
    open_gates();
    if (plan.entry_partials) report_gates();
    mix();
  }

 private:
  static constexpr int64_t L = NQ * W;

  const Plan& plan;
  const Problem& p;
  const Rule& rule;
  const Task& task;
  const Task* const next;  // what this thread does afterwards, or null
  const int64_t count;  // queries
  const Live* const live;
  const int64_t entries;
  Scratch s;

  static float* vec(float* array, int64_t row, int q) { return array + (row * NQ + q) * W; }
  static void add(float* at, F value) { store(at, load(at) + value); }
  float* z(int64_t g) { return s.z + g * p.dim * L; }
  float* y(int64_t g) { return s.y + g * p.dim * L; }
  float* x(int64_t g, int64_t e) { return s.x + (g * entries + e) * p.dim * L; }
  float* entry(int64_t e, EntryRow row, int q) { return vec(s.entry, e * kEntryRows + row, q); }
  float* top(int64_t g, int64_t segment, int q) {
    return vec(s.top, g * (1 + entries) + segment, q);
  }
  float* mass(int64_t g, int64_t segment, int q) {
    return vec(s.mass, g * (1 + entries) + segment, q);
  }

  float* low(int64_t g, int64_t segment, int q) {
    return vec(s.low, g * (1 + entries) + segment, q);
  }
  Mass mass_of_segment(int64_t g, int64_t segment, int q) {
    return {load(top(g, segment, q)), load(low(g, segment, q)), load(mass(g, segment, q))};
  }
  void keep(int64_t g, int64_t segment, int q, Mass m) {
    store(top(g, segment, q), m.top);
    store(low(g, segment, q), m.low);
    store(mass(g, segment, q), m.mass);
  }

  // ---- partials

  Mass shared(int64_t g, int q) {
    return {load(vec(s.shared_top, g, q)), load(vec(s.shared_low, g, q)), load(vec(s.shared_mass, g, q))};
  }

  // A partial in place of attention to tokens: out[d][lane], 0 without keys, its top and mass.
  void take(const Partial& partial, int64_t g, int64_t segment, float* out) {
    constexpr int64_t kSize = sizeof(typename Storage::T);
    const int64_t h = task.first_head + g;
    load_tile<Storage, NQ>(partial.out, task, h, count, kSize, p.dim, out);
    for (int q = 0; q < NQ; ++q) {
      const Mass m = mass_of(partial, task, h, count, q);
      keep(g, segment, q, m);
      for (int64_t d = 0; d < p.dim; ++d) store(vec(out, d, q), select(m.mass == 0.f, F{}, load(vec(out, d, q))));
    }
  }

  void take_shared(int64_t g) {
    constexpr int64_t kSize = sizeof(typename Storage::T);
    const int64_t h = task.first_head + g;
    load_tile<Storage, NQ>(p.shared.out, task, h, count, kSize, p.dim, s.shared + g * p.dim * L);
    for (int q = 0; q < NQ; ++q) {
      const Mass m = mass_of(p.shared, task, h, count, q);
      store(vec(s.shared_top, g, q), m.top);
      store(vec(s.shared_low, g, q), m.low);
      store(vec(s.shared_mass, g, q), m.mass);
    }
  }

  // x[d][lane], the output of a segment of mass m or what has been made of it, becomes that of one softmax over the
  // shared keys and the segment. Where one of them has no keys the other stays, to the last bit.
  void merge_shared(int64_t g, int64_t segment, float* x) {
    const float* from = s.shared + g * p.dim * L;
    for (int q = 0; q < NQ; ++q) {
      const Mass first = shared(g, q), m = mass_of_segment(g, segment, q);
      // Both shares as they are: 1 - part would have no more than absolute accuracy, beside large values.
      const F part = share_of(first, m), rest = share_of(m, first);
      const I alone = first.mass == 0.f, absent = m.mass == 0.f;
      for (int64_t d = 0; d < p.dim; ++d) {
        const F own = load(vec(x, d, q)), other = load(from + (d * NQ + q) * W);
        store(vec(x, d, q), select(alone, own, select(absent, other, fma(part, own, rest * other))));
      }
    }
  }

  // The mass of both in the place of the prompt's.
  void add_shared_mass(int64_t g) {
    for (int q = 0; q < NQ; ++q) {
      const Mass first = shared(g, q), m = mass_of_segment(g, 0, q);
      const F highest = max(first.top, m.top);
      const auto part = [&](const Mass& x) { return x.mass * exp2((x.top - highest) + x.low); };
      const F both = part(first) + part(m);
      const I alone = first.mass == 0.f;
      keep(g, 0, q, {select(alone, m.top, highest), select(alone, m.low, F{}), select(alone, m.mass, both)});
    }
  }

  bool outside() const { return p.shared.out.data && rule.shared == Shared::outside && entries > 0; }

  // ---- segments

  // Attention of the queries to a pack; tops and masses of `segment` are kept. add_bias(scale) may add to
  // the logits after scaling them, and returns the scale that is left.
  template <class AddBias, class Between = Nothing>
  void attend(const Pack& pack, int64_t g, int64_t segment, AddBias add_bias, float* out, Between between = {}) {
    using Keys = Scored<Storage>;
    F top_[NQ], mass_[NQ];
    if constexpr (Keys::tiled)
      multiply_tiles<NQ>(whole_blocks(pack.count), pack.key, ceil_div(p.dim, kTileDepth), s.query, nullptr, s.scores,
                         between);
    else
      multiply<typename Keys::Op, NQ>(pack.count, pack.key, Keys::depth(p.dim), s.query, nullptr, s.scores, between);
    const float scale = add_bias(p.scale * kLog2e);
    mean_value<Storage, NQ>(pack.value, pack.count, p.dim, segment == 0, scale, s.scores, out, top_, mass_, between);
    for (int q = 0; q < NQ; ++q) keep(g, segment, q, {top_[q], F{}, mass_[q]});
  }

  // Attention of Z to the values of a pack, for `retrieve`.
  void recall(const Pack& pack, int64_t g, float* out) {
    F top_[NQ], mass_[NQ];
    const float inverse = rule.temperature > 0.f ? 1.f / rule.temperature : p.scale;
    multiply<Product, NQ>(pack.count, pack.memory, p.dim, z(g), nullptr, s.scores);
    const float scale = add_token_bias(pack, inverse * kLog2e);
    mean_value<Storage, NQ>(pack.value, pack.count, p.dim, true, scale, s.scores, out, top_, mass_);
  }

  float add_token_bias(const Pack& pack, float scale) {
    if (!pack.bias) return scale;
    for (int64_t j = 0; j < pack.count; ++j)
      for (int q = 0; q < NQ; ++q) {
        float* at = vec(s.scores, j, q);
        store(at, fma(load(at), splat(scale), splat(pack.bias[j])));
      }
    return 1.f;
  }

  // Z of one head.
  void see_prompt(int64_t g) {
    if (!p.slots && !(p.prompt.out.data && entries == 0)) load_queries(g);
    if (p.prompt.out.data)
      take(p.prompt, g, 0, z(g));
    else
      attend_prompt(g);
    if (p.shared.out.data) {
      take_shared(g);
      if (plan.row_partials)
        for (int q = 0; q < NQ; ++q) {
          const Mass first = shared(g, q), m = mass_of_segment(g, 0, q);
          plan.row_partials[task.index * kRowColumns + 4] +=
              sum(present(q, share_of(first, m))) / static_cast<double>(plan.group);
        }
      if (!outside()) {
        merge_shared(g, 0, z(g));
        add_shared_mass(g);
      }
    }
    if (entries == 0) return;
    if (g == 0) {
      std::memset(s.entry, 0, sizeof(float) * entries * kEntryRows * L);
      std::memset(s.zz, 0, sizeof(float) * L);
    }
    if (plan.reads.products)
      for (int q = 0; q < NQ; ++q) add(vec(s.zz, 0, q), dot(z(g), z(g), q));
  }

  void load_queries(int64_t g) {
    using Keys = Scored<Storage>;
    load_tile<typename Keys::Elements, NQ>(p.query, task, task.first_head + g, count, sizeof(typename Storage::T),
                                           Keys::depth(p.dim), s.query);
    const int64_t depth = Keys::depth(p.dim);
    std::memset(s.query + depth * L, 0, sizeof(float) * (Keys::padded(p.dim) - depth) * L);
  }

  void attend_prompt(int64_t g) {
    const int64_t h = task.first_head + g;
    const Pack& pack = plan.prompts[task.batch * plan.prompt_batch_stride + h];
    // Meanwhile: what is written at the end of this head, and what is read for the next one.
    constexpr int64_t kSize = sizeof(typename Storage::T);
    const bool last = g + 1 == plan.group;
    const Task& after = last && next ? *next : task;
    const int64_t rows = last && !next ? 0 : std::min(L, p.queries - after.first_query);
    Fetch<1> output(p.out, kSize, p.dim, task, h, count);
    Fetch<0> query(p.query, kSize, p.dim, after, last ? after.first_head : h + 1, rows);
    const auto fetch = [&] { return output.some() || query.some(); };
    if (p.key_bias && p.bias_query != 0)
      attend(pack, g, 0, [&](float scale) { return add_query_bias(h, pack.count, scale); }, z(g), fetch);
    else
      attend(pack, g, 0, [&](float scale) { return add_token_bias(pack, scale); }, z(g), fetch);
    while (fetch()) {}
  }

  // The [N, M] form of key_bias is read where it is needed: rare, so not tuned.
  float add_query_bias(int64_t h, int64_t keys, float scale) {
    const float* bias = p.key_bias + task.batch * p.bias_batch + h * p.bias_head;
    for (int64_t j = 0; j < keys; ++j)
      for (int q = 0; q < NQ; ++q) {
        F added;
        for (int i = 0; i < W; ++i) {
          const int64_t n = task.first_query + std::min<int64_t>(q * W + i, count - 1);
          added[i] = base2(bias[n * p.bias_query + j * p.bias_key]);
        }
        float* at = vec(s.scores, j, q);
        store(at, fma(load(at), splat(scale), added));
      }
    return 1.f;
  }

  // Sum over the channels of a head in eight chains: D is a multiple of 8, a multiply-add takes 4
  // cycles, and chains keep the rounding of long sums down.
  template <class Term>
  FN_INLINE F over_channels(Term term) {
    F part[8] = {};
    for (int64_t d = 0; d < p.dim; d += 8)
#pragma GCC unroll 8
      for (int64_t i = 0; i < 8; ++i) part[i] = term(d + i, part[i]);
    return tree(part);
  }

  static FN_INLINE F tree(const F (&x)[8]) {
    return ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
  }

  F dot(const float* a, const float* b, int q) {
    return over_channels([&](int64_t d, F part) {
      return fma(load(a + (d * NQ + q) * W), load(b + (d * NQ + q) * W), part);
    });
  }

  // <a, b> and <b, b> in one pass, rounded as by dot().
  FN_INLINE void dots(const float* a, const float* b, int q, F* ab, F* bb) {
    F left[8] = {}, right[8] = {};
    for (int64_t d = 0; d < p.dim; d += 8)
#pragma GCC unroll 8
      for (int64_t i = 0; i < 8; ++i) {
        const F x = load(b + ((d + i) * NQ + q) * W);
        left[i] = fma(load(a + ((d + i) * NQ + q) * W), x, left[i]);
        right[i] = fma(x, x, right[i]);
      }
    *ab = tree(left), *bb = tree(right);
  }

  // sum |x|^p over the channels of a head.
  F power(const float* x, int q) {
    if (rule.norm_order == 2) return dot(x, x, q);
    return over_channels([&](int64_t d, F part) { return part + abs(load(x + (d * NQ + q) * W)); });
  }

  // Feature of entry e in head g, and what it adds to the inner products over the scope.
  void measure(int64_t g, int64_t e) {
    const int64_t h = task.first_head + g;
    const bool f_is_x = rule.direction != Direction::retrieve && rule.direction != Direction::fixed;
    float* f = f_is_x ? x(g, e) : s.feature;
    if (p.slots) {
      take(p.slots[live[e].concept_index], g, 1 + e, f);
      for (int q = 0; q < NQ; ++q) add(entry(e, kThere, q), load(mass(g, 1 + e, q)));
    }
    if (plan.reads.tokens) {
      const Pack* pack = p.slots ? nullptr : &plan.concepts[live[e].slot * p.heads + h];
      if (pack) attend(*pack, g, 1 + e, [&](float scale) { return add_token_bias(*pack, scale); }, f);
      if (p.shared.out.data) {
        for (int q = 0; plan.entry_partials && q < NQ; ++q) {
          const Mass first = shared(g, q), m = mass_of_segment(g, 1 + e, q);
          add(entry(e, kShare, q), share_of(first, m));
        }
        if (rule.shared == Shared::inside) merge_shared(g, 1 + e, f);
      }
      for (int q = 0; plan.reads.products && q < NQ; ++q) {
        F zf, ff;
        dots(z(g), f, q, &zf, &ff);
        add(entry(e, kZf, q), zf);
        add(entry(e, kFf, q), ff);
      }
      if (rule.direction == Direction::retrieve) recall(*pack, g, x(g, e));
    }
    if (plan.reads.direction) {
      const float* u = p.direction + (live[e].concept_index * p.heads + h) * p.dim;
      for (int q = 0; q < NQ; ++q)
        add(entry(e, kAlong, q), over_channels([&](int64_t d, F part) {
              return fma(splat(u[d]), load(vec(z(g), d, q)), part);
            }));
    }
  }

  Mass biased(const Mass& m, int64_t e) { return {m.top - live[e].numbers.logit_bias * kLog2e, m.low, m.mass}; }

  // The entries' shares of mass, all in one loop: each is one long chain of latencies.
  void weigh(int64_t g) {
    for (int64_t e = 0; e < entries; ++e)
      for (int q = 0; q < NQ; ++q)
        add(entry(e, kMass, q), share_of(mass_of_segment(g, 0, q), biased(mass_of_segment(g, 1 + e, q), e)));
  }

  Moments moments(int64_t e, int q) {
    const float offset = p.offset ? p.offset[live[e].concept_index] : 0.f;
    return {load(vec(s.zz, 0, q)), load(entry(e, kZf, q)), load(entry(e, kFf, q)),
            load(entry(e, kAlong, q)) + offset,
            load(entry(e, kMass, q)) * (1.f / static_cast<float>(plan.group))};
  }

  void open_gates() {
    for (int64_t e = 0; e < entries; ++e)
      for (int q = 0; q < NQ; ++q) {
        const F r = similarity(rule, moments(e, q));
        store(entry(e, kR, q), r);
        store(entry(e, kG, q), gate(rule, live[e].numbers, r));
        if (p.slots) {  // without keys there is no entry, for this query
          const I absent = load(entry(e, kThere, q)) == 0.f;
          store(entry(e, kR, q), select(absent, F{}, r));
          store(entry(e, kG, q), select(absent, F{}, load(entry(e, kG, q))));
        }
      }
    if (rule.select == Select::max)
      for (int q = 0; q < NQ; ++q) keep_largest(q);
    for (int64_t i = 0; i < entries * NQ; ++i) {
      float* g = entry(i / NQ, kG, i % NQ);
      store(g, shown(load(g), load(entry(i / NQ, kR, i % NQ))));
    }
  }

  // Zero every gate but the largest; ties: larger r, then lower concept, then lower entry.
  void keep_largest(int q) {
    F best_g = splat(-1.f), best_r = F{}, best_concept = F{}, best = F{};
    for (int64_t e = 0; e < entries; ++e) {
      const F g = load(entry(e, kG, q)), r = load(entry(e, kR, q));
      const F concept_index = splat(static_cast<float>(live[e].concept_index));
      const I wins = better(g, r, concept_index, best_g, best_r, best_concept);  // an earlier entry keeps a tie
      best_g = select(wins, g, best_g);
      best_r = select(wins, r, best_r);
      best_concept = select(wins, concept_index, best_concept);
      best = select(wins, splat(static_cast<float>(e)), best);
    }
    for (int64_t e = 0; e < entries; ++e) {
      float* g = entry(e, kG, q);
      store(g, select(best == static_cast<float>(e), load(g), F{}));
    }
  }

  // O = blend * factor * Y + (1 - blend) * Z with Y = a Z + sum b X over the scope.
  void mix() {
    const bool root = rule.norm_order == 2;
    const bool known = root && plan.reads.products && !outside();  // |Z|^2 is <Z,Z>
    F a[NQ], norm_y[NQ] = {}, norm_z[NQ] = {};
    if (rule.combine == Combine::separate) subtract(a);
    for (int64_t g = 0; g < plan.group; ++g) {
      if (rule.combine == Combine::joint) share(g, a);
      combine(g, a);
      if (outside()) {
        merge_shared(g, 0, y(g));
        merge_shared(g, 0, z(g));
      }
      if (rule.norm == Norm::none) continue;
      for (int q = 0; q < NQ; ++q) {
        norm_y[q] = norm_y[q] + power(y(g), q);
        norm_z[q] = known ? load(vec(s.zz, 0, q)) : norm_z[q] + power(z(g), q);
      }
    }
    F factor[NQ], limited[NQ];
    for (int q = 0; q < NQ; ++q)
      factor[q] = norm_factor(rule, root ? sqrt(norm_y[q]) : norm_y[q],
                              root ? sqrt(norm_z[q]) : norm_z[q], &limited[q]);
    const float rest = 1.f - rule.blend;
    const auto output = [&](int64_t g, int64_t d, int q) {
      const F full = load(vec(y(g), d, q)) * factor[q];
      return rest == 0.f ? full : fma(splat(rule.blend), full, rest * load(vec(z(g), d, q)));
    };
    if (!p.slots && !outside()) {
      for (int64_t g = 0; g < plan.group; ++g) write(g, [&](int64_t d, int q) { return output(g, d, q); });
    } else {
      I some[NQ];  // queries that have an entry: the others are left as they are
      for (int q = 0; q < NQ; ++q) {
        some[q] = p.slots ? I{} : I{} - 1;
        for (int64_t e = 0; p.slots && e < entries; ++e) some[q] |= load(entry(e, kThere, q)) != 0.f;
        limited[q] = select(some[q], limited[q], F{});
      }
      for (int64_t g = 0; g < plan.group; ++g) {
        I acts[NQ];  // and, outside, a prompt to remove something from
        for (int q = 0; q < NQ; ++q) {
          const I text = load(mass(g, 0, q)) != 0.f;
          acts[q] = outside() ? some[q] & (text | (shared(g, q).mass == 0.f)) : some[q];
        }
        write(g, [&](int64_t d, int q) { return select(acts[q], output(g, d, q), load(vec(z(g), d, q))); });
      }
    }
    if (plan.row_partials)
      for (int q = 0; q < NQ; ++q)
        plan.row_partials[task.index * kRowColumns + 2] += sum(present(q, limited[q]));
  }

  // `separate`: Y = Z - sum strength g (x X + z Z).
  void subtract(F* a) {
    for (int q = 0; q < NQ; ++q) a[q] = splat(1.f);
    for (int64_t e = 0; e < entries; ++e)
      for (int q = 0; q < NQ; ++q) {
        const Pull d = pull(rule, moments(e, q));
        const F amount = load(entry(e, kG, q)) * live[e].numbers.strength;
        a[q] = fma(-amount, d.z, a[q]);
        store(entry(e, kB, q), -amount * d.x);
      }
  }

  // `joint`: one softmax over segments with logits L and L_e - logit_bias + log g.
  void share(int64_t g, F* a) {
    for (int q = 0; q < NQ; ++q) {
      const auto w = [&](int64_t i) {
        const F m = load(mass(g, i, q));
        return i ? m * load(entry(i - 1, kG, q)) : m;
      };
      const auto t = [&](int64_t i) {
        return load(top(g, i, q)) - (i ? live[i - 1].numbers.logit_bias * kLog2e : 0.f);
      };
      F highest = splat(kLowest);
      for (int64_t i = 0; i <= entries; ++i)
        highest = max(highest, joint_level(w(i), t(i)));
      F total = F{};
      const auto part = [&](int64_t i) { return joint_part(w(i), (t(i) - highest) + load(low(g, i, q))); };
      for (int64_t i = 0; i <= entries; ++i) total = total + part(i);
      const F inverse = select(total == 0.f, F{}, 1.f / total);
      a[q] = part(0) * inverse;
      for (int64_t e = 0; e < entries; ++e)
        store(entry(e, kB, q), part(1 + e) * inverse * -live[e].numbers.strength);
    }
  }

  // y = a z + sum b x for one head, up to four entries in a pass.
  void combine(int64_t g, const F* a) {
    for (int q = 0; q < NQ; ++q) {
      add_entries(g, 0, q, z(g), a[q]);
      for (int64_t e = 4; e < entries; e += 4) add_entries(g, e, q, y(g), splat(1.f));
    }
  }
  void add_entries(int64_t g, int64_t e, int q, const float* from, F a) {
    switch (std::min<int64_t>(entries - e, 4)) {
      case 1: return add_entries<1>(g, e, q, from, a);
      case 2: return add_entries<2>(g, e, q, from, a);
      case 3: return add_entries<3>(g, e, q, from, a);
      case 4: return add_entries<4>(g, e, q, from, a);
    }
  }
  template <int E>
  void add_entries(int64_t g, int64_t e, int q, const float* from, F a) {
    const bool fixed = rule.direction == Direction::fixed;
    const float* updates = p.update ? p.update : p.direction;
    F b[E];
    const float* from_entry[E];
    for (int i = 0; i < E; ++i) {
      b[i] = load(entry(e + i, kB, q));
      from_entry[i] = fixed ? updates + (live[e + i].concept_index * p.heads + task.first_head + g) * p.dim
                            : x(g, e + i);
    }
    for (int64_t d = 0; d < p.dim; ++d) {
      F sum = a * load(from + (d * NQ + q) * W);
      for (int i = 0; i < E; ++i)
        sum = fma(b[i], fixed ? splat(from_entry[i][d]) : load(from_entry[i] + (d * NQ + q) * W), sum);
      store(vec(y(g), d, q), sum);
    }
  }

  // Stores output(d, q) as O and, with statistics, sums on the way what it is and how it differs from Z.
  template <class Output>
  void write(int64_t g, Output output) {
    const int64_t h = task.first_head + g;
    if (!plan.row_partials) {
      for (int q = 0; q < NQ; ++q)
        store_outputs<Storage>(p, task, h, count, q, [&](int64_t d, int) { return output(d, q); });
      return;
    }
    const float limit = overflow(p.dtype);
    F change = {}, energy = {}, nonfinite = {};
    for (int q = 0; q < NQ; ++q) {
      F moved[8] = {}, held[8] = {};
      I finite = {};
      store_outputs<Storage>(p, task, h, count, q, [&](int64_t d, int j) {
        const F o = output(d, q), zd = load(vec(z(g), d, q)), by = o - zd;
        moved[j] = fma(by, by, moved[j]);
        held[j] = fma(zd, zd, held[j]);
        finite -= abs(o) < limit;  // true is -1
        return o;
      });
      change = change + present(q, tree(moved));
      energy = energy + present(q, tree(held));
      nonfinite = nonfinite + present(q, static_cast<float>(p.dim) - __builtin_convertvector(finite, F));
    }
    double* row = plan.row_partials + task.index * kRowColumns;
    row[0] += sum(change);
    row[1] += sum(energy);
    row[3] += sum(nonfinite);
  }

  // x where lanes are queries, else 0: the copies of the last query do not count.
  F present(int q, F x, float absent = 0.f) {
    return select(lane_numbers() < static_cast<float>(count - q * W), x, splat(absent));
  }

  void report_gates() {
    const int64_t groups = p.heads / plan.group, group = task.first_head / plan.group;
    for (int64_t e = 0; e < entries; ++e) {
      double* out = plan.entry_partials + (task.index * plan.most_live + e) * kEntryColumns;
      float* heat = plan.gates + (live[e].entry * groups + group) * p.queries + task.first_query;
      const bool of_shares = p.shared.out.data && rule.similarity == Similarity::one;  // what heat says
      F top_g = splat(-INFINITY), top_r = top_g, total = {}, counted = {}, share = {}, mass = {};
      for (int q = 0; q < NQ; ++q) {
        const F g = load(entry(e, kG, q)), r = load(entry(e, kR, q));
        top_g = max(present(q, g, -INFINITY), top_g);
        top_r = max(present(q, r, -INFINITY), top_r);
        total = total + present(q, g);
        counted = counted + present(q, select(g > p.report_level, splat(1.f), F{}));
        const F part = load(entry(e, kShare, q)) * (1.f / static_cast<float>(plan.group));
        mass = mass + present(q, load(entry(e, kMass, q)));
        share = share + present(q, part);
        const F shown = of_shares ? g * part : g;
        if (count >= (q + 1) * W)
          store(heat + q * W, shown);
        else
          std::memcpy(heat + q * W, &shown, (count - q * W) * sizeof(float));
      }
      out[0] = largest(top_g);
      out[1] = sum(total);
      out[2] = sum(counted);
      out[3] = sum(mass) / static_cast<double>(plan.group);
      out[4] = largest(top_r);
      out[5] = sum(share);
    }
  }
};

void run(const Plan& plan, const Task& task, const Task* next, float* memory) {
  const int64_t count = std::min<int64_t>(plan.problem->queries - task.first_query, kTile);
  with_storage(plan.problem->dtype, [&](auto storage) {
    using Storage = decltype(storage);
    [[maybe_unused]] const TilesInUse<Scored<Storage>::tiled> tiles;
    if (count > W)
      Tile<Storage, 2>(plan, task, next, count, memory).run();
    else
      Tile<Storage, 1>(plan, task, next, count, memory).run();
  });
}

// What the hardware can do at most, for the benchmarks: multiply-adds on registers only, 12 chains
// (two a cycle times a latency of four, and some). Returns their number of floating-point operations.
int64_t multiply_adds(int64_t steps) {
  F x[12];
  for (int i = 0; i < 12; ++i) x[i] = splat(static_cast<float>(i));
  for (int64_t step = 0; step < steps; ++step)
#pragma GCC unroll 12
    for (int i = 0; i < 12; ++i) x[i] = fma(x[i], splat(0.5f), splat(1.f));
  for (int i = 1; i < 12; ++i) x[0] = x[0] + x[i];
  volatile float used = x[0][0];
  (void)used;
  return steps * 12 * 2 * W;
}

}  // namespace

extern const Isa isa;
const Isa isa = {FASTNEGATE_ISA_NAME, W, scratch, pack_prompt, pack_concept, run, multiply_adds};

}  // namespace fastnegate::FASTNEGATE_ISA
