// SPDX-License-Identifier: Apache-2.0
// Host side of the CPU kernel: which entries exist, memory, threads, statistics. Compiled for the
// plain architecture; only what stands behind an Isa table uses more.
#include "run.h"

#include <omp.h>
#include <pthread.h>
#if defined(FASTNEGATE_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <new>
#include <numeric>
#include <stdexcept>
#include <utility>

#include "kernel.h"

namespace fastnegate {

#define FASTNEGATE_DECLARE(name) \
  namespace name {               \
  extern const Isa isa;          \
  }
#if defined(FASTNEGATE_NEON)
FASTNEGATE_DECLARE(neon)
#else
FASTNEGATE_DECLARE(portable)
#endif
#if defined(FASTNEGATE_X86)
FASTNEGATE_DECLARE(avx2)
FASTNEGATE_DECLARE(avx512)
#endif
#if defined(FASTNEGATE_AVX512BF16)
FASTNEGATE_DECLARE(avx512bf16)
#endif
#if defined(FASTNEGATE_AMX)
FASTNEGATE_DECLARE(amx)
#endif

namespace {

struct Level {
  const Isa* isa;
  bool usable;
};

#if defined(FASTNEGATE_AMX)
// Tile registers: the processor multiplies bfloat16 in them, the system saves them, and Linux, which must be asked
// because they do not fit into the signal stacks of old programs, grants them to this process. Children inherit that.
bool have_tiles() {
  unsigned a, b, c, d;
  constexpr unsigned kXgetbv = 1u << 27, kProducts = 1u << 22, kTiles = 1u << 24;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & kXgetbv)) return false;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kProducts) || !(d & kTiles)) return false;
  constexpr unsigned kTileState = 3u << 17;  // configuration and data
  __asm__ volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
  if ((a & kTileState) != kTileState) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

std::vector<Level> find_levels() {
  std::vector<Level> all;
#if defined(FASTNEGATE_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#if defined(FASTNEGATE_AVX512BF16)
  const bool avx512bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
#if defined(FASTNEGATE_AMX)
  all.push_back({&amx::isa, avx512bf16 && have_tiles()});
#endif
  all.push_back({&avx512bf16::isa, avx512bf16});
#endif
  all.push_back({&avx512::isa, avx512});
  all.push_back({&avx2::isa, avx2});
#endif
#if defined(FASTNEGATE_NEON)
  all.push_back({&neon::isa, true});  // part of every AArch64
#else
  all.push_back({&portable::isa, true});
#endif
  return all;
}

const std::vector<Level>& levels() {
  static const std::vector<Level> all = find_levels();
  return all;
}

const Isa& find(const std::string& name) {
  for (const Level& level : levels())
    if (name == level.isa->name && level.usable) return *level.isa;
  throw std::invalid_argument("instruction set '" + name + "' is not usable on this machine");
}

// libgomp's threads do not survive fork(), and a parallel region in the child would wait for them
// forever. A child therefore works on the calling thread alone; the bits are the same.
std::atomic<bool> forked{false};
[[maybe_unused]] const int at_fork = pthread_atfork(nullptr, nullptr, [] { forked = true; });

// Calls work(i, thread) for i in [0, count). Exceptions must not leave `work`. The team is always
// `threads` strong: libgomp ends and restarts threads when its size changes (torch's ParallelOpenMP.h).
template <class Work>
void parallel(int64_t count, int threads, const Work& work) {
  if (threads <= 1 || count <= 1 || forked) {
    for (int64_t i = 0; i < count; ++i) work(i, 0);
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t i = 0; i < count; ++i) work(i, omp_get_thread_num());
}

struct Free {
  void operator()(float* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<float[], Free>;

Buffer allocate(int64_t floats) {  // aligned to a cache line, not initialized
  const size_t bytes = (static_cast<size_t>(std::max<int64_t>(floats, 1)) * 4 + 63) / 64 * 64;
  auto* p = static_cast<float*>(std::aligned_alloc(64, bytes));
  if (!p) throw std::bad_alloc();
  return Buffer(p);
}

int64_t clamp(int64_t x, int64_t high) { return std::max<int64_t>(0, std::min(x, high)); }

// Everything a Plan points to.
struct Workspace {
  Plan plan{};
  std::vector<Live> live;
  std::vector<int64_t> live_begin;
  std::vector<Span> spans;
  std::vector<Pack> prompts, concepts;
  std::unique_ptr<double[]> entry_partials;
  std::vector<double> row_partials;
  Buffer gates, packed;
};

Span span_of(const Problem& p, int64_t concept_index) {
  const int32_t* begins = p.index + p.entries;
  const int32_t* lengths = begins + p.concepts;
  const int64_t begin = clamp(begins[concept_index], p.tokens);
  return {concept_index, begin, clamp(lengths[concept_index], std::min(p.tokens - begin, p.longest)), 0};
}

bool has_tokens(const Problem& p, const Span& span) {
  for (int64_t j = span.begin; j < span.begin + span.length; ++j)
    if (!p.token_bias || p.token_bias[j] != -INFINITY) return true;
  return false;
}

void find_live(const Problem& p, Workspace& w) {
  const int32_t* rows = p.index ? p.index + p.entries + 2 * p.concepts : nullptr;
  std::vector<int64_t> slot(p.concepts, -1);
  const bool of_rows = p.concept_key.batch != 0 || p.concept_value.batch != 0;
  w.live_begin.push_back(0);
  for (int64_t b = 0; b < p.batch; ++b) {
    if (of_rows) std::fill(slot.begin(), slot.end(), -1);
    const bool any = rows && p.concepts > 0;
    const int64_t begin = any ? clamp(rows[b], p.entries) : 0;
    const int64_t end = any ? clamp(rows[b + 1], p.entries) : 0;
    for (int64_t e = begin; e < end; ++e) {
      const int64_t c = clamp(p.index[e], p.concepts - 1);
      const Numbers numbers = numbers_of(p.numbers + e * kNumberColumns, p.rule.defaults);
      Span span = span_of(p, c);
      if (of_rows) span.batch = b;
      if (!(numbers.active > 0.f) || (w.plan.reads.direction && !p.direction) ||
          (w.plan.reads.tokens && !p.slots && !has_tokens(p, span)))
        continue;
      if (slot[c] < 0) {
        slot[c] = static_cast<int64_t>(w.spans.size());
        w.spans.push_back(span);
      }
      w.live.push_back({e, c, slot[c], numbers});
    }
    w.live_begin.push_back(static_cast<int64_t>(w.live.size()));
    w.plan.most_live = std::max(w.plan.most_live, w.live_begin[b + 1] - w.live_begin[b]);
  }
}

void lay_out_packs(const Problem& p, Workspace& w) {
  const bool shared = p.key.batch == 0 && p.value.batch == 0 && (!p.key_bias || p.bias_batch == 0);
  w.plan.prompt_batch_stride = shared ? 0 : p.heads;
  const int64_t rows = p.prompt.out.data ? 0 : shared ? std::min<int64_t>(p.batch, 1) : p.batch;
  w.prompts.resize(rows * p.heads);
  w.concepts.resize(w.plan.reads.tokens && !p.slots ? w.spans.size() * p.heads : 0);
  // Room for any layout of n keys or values, and each array at the begin of a cache line.
  const auto blocks = [&](int64_t n) { return whole_blocks(n) * whole_blocks(p.dim); };
  const bool bias = p.key_bias && p.bias_query == 0;
  const bool retrieve = p.rule.direction == Direction::retrieve;
  const int64_t m = p.keys, t = p.longest;
  const int64_t prompt = 2 * blocks(m) + (bias ? whole_blocks(m) : 0);
  const int64_t concept_size = blocks(t) * (retrieve ? 3 : 2) + (p.token_bias ? whole_blocks(t) : 0);
  w.packed = allocate(static_cast<int64_t>(w.prompts.size()) * prompt +
                      static_cast<int64_t>(w.concepts.size()) * concept_size);
  float* at = w.packed.get();
  const auto take = [&](int64_t n) { return std::exchange(at, at + n); };
  for (Pack& pack : w.prompts) {
    pack.key = take(blocks(m));
    pack.value = take(blocks(m));
    pack.bias = bias ? take(whole_blocks(m)) : nullptr;
    pack.memory = nullptr;
  }
  for (Pack& pack : w.concepts) {
    pack.key = take(blocks(t));
    pack.value = take(blocks(t));
    pack.bias = p.token_bias ? take(whole_blocks(t)) : nullptr;
    pack.memory = retrieve ? take(blocks(t)) : nullptr;
  }
}

// Sums of the partial results of tasks, which are numbered row by row, in their order.
void reduce_entry(const Problem& p, const Workspace& w, int64_t groups, int64_t tiles, int64_t i) {
  const Plan& plan = w.plan;
  const int64_t b = std::upper_bound(w.live_begin.begin(), w.live_begin.end(), i) - w.live_begin.begin() - 1;
  const int64_t tasks = groups * tiles;
  const double* part = &w.entry_partials[(b * tasks * plan.most_live + i - w.live_begin[b]) * kEntryColumns];
  double total[kEntryColumns] = {part[0], 0, 0, 0, part[4], 0};
  for (int64_t t = 0; t < tasks; ++t, part += plan.most_live * kEntryColumns) {
    total[0] = std::max(total[0], part[0]);
    total[4] = std::max(total[4], part[4]);
    for (int c : {1, 2, 3, 5}) total[c] += part[c];
  }
  const int64_t entry = w.live[i].entry;
  float* out = p.entry_table + entry * kEntryColumns;
  const double gates = static_cast<double>(groups * p.queries);
  for (int c = 0; c < kEntryColumns; ++c)
    out[c] = static_cast<float>(c == 0 || c == 4 ? total[c] : total[c] / gates);
  float* heat = p.heat + entry * p.queries;
  for (int64_t g = 0; g < groups; ++g) {
    const float* gate = w.gates.get() + (entry * groups + g) * p.queries;
    for (int64_t n = 0; n < p.queries; ++n) heat[n] += gate[n];
  }
  for (int64_t n = 0; n < p.queries; ++n) heat[n] *= 1.f / static_cast<float>(groups);
}

void reduce_row(const Problem& p, const Workspace& w, int64_t groups, int64_t tiles, int64_t b) {
  double total[kRowColumns] = {};
  for (int64_t t = b * groups * tiles; t < (b + 1) * groups * tiles; ++t)
    for (int c = 0; c < kRowColumns; ++c) total[c] += w.row_partials[t * kRowColumns + c];
  const double gates = static_cast<double>(groups * p.queries);
  float* row = p.row_table + b * 4;
  row[0] = static_cast<float>(total[1] < 1e-30 ? 0. : total[0] / total[1]);
  row[1] = static_cast<float>(gates > 0 ? total[2] / gates : 0.);
  row[2] = static_cast<float>(total[3]);
  row[3] = static_cast<float>(gates > 0 ? total[4] / gates : 0.);
}

}  // namespace

bool is_forked() { return forked; }

std::vector<std::string> usable_isas() {
  std::vector<std::string> names;
  for (const Level& level : levels())
    if (level.usable) names.push_back(level.isa->name);
  return names;
}

std::vector<std::string> built_isas() {
  std::vector<std::string> names;
  for (const Level& level : levels()) names.push_back(level.isa->name);
  return names;
}

void run_cpu(const Problem& p, const std::string& isa_name, int threads) {
  const Isa& isa = find(isa_name);
  if (p.dim % 8 != 0 || p.keys > kMostKeys || p.longest > kMostKeys)
    throw std::invalid_argument("head_dim must be a multiple of 8, and at most 1024 keys or tokens");
  Workspace w;
  Plan& plan = w.plan;
  const bool with_statistics = p.row_table != nullptr;
  plan.problem = &p;
  plan.reads = p.rule.reads;
  plan.reads.mass = plan.reads.mass || with_statistics;
  find_live(p, w);
  lay_out_packs(p, w);
  plan.spans = w.spans.data();
  plan.prompts = w.prompts.data();
  plan.concepts = w.concepts.data();
  plan.live = w.live.data();
  plan.live_begin = w.live_begin.data();
  plan.group = p.rule.scope == Scope::feature ? p.heads : 1;

  const int64_t groups = plan.group ? p.heads / plan.group : 0;
  const CpuTiling tiling = cpu_tiling({p.batch, p.heads, p.queries, p.keys, p.tokens, p.dim, isa.lanes, threads});
  const int64_t tiles = ceil_div(p.queries, tiling.queries);
  const int64_t tasks = p.batch * groups * tiles;
  if (with_statistics) {
    w.entry_partials.reset(new double[tasks * plan.most_live * kEntryColumns]);  // written before read
    w.row_partials.resize(tasks * kRowColumns);
    w.gates = allocate(p.entries * groups * p.queries);
    plan.entry_partials = w.entry_partials.get();
    plan.row_partials = w.row_partials.data();
    plan.gates = w.gates.get();
  }

  const auto prompts = static_cast<int64_t>(w.prompts.size());
  const auto concepts = static_cast<int64_t>(w.concepts.size());
  if (tasks > 0) {
    parallel(prompts + concepts, threads, [&](int64_t i, int) {
      if (i < prompts)
        isa.pack_prompt(plan, i / p.heads, i % p.heads);
      else
        isa.pack_concept(plan, (i - prompts) / p.heads, (i - prompts) % p.heads);
    });
    const int64_t per_thread = (isa.scratch(plan) + 15) / 16 * 16;
    // Groups of heads that a thread takes together, over the same queries; tiles of queries vary
    // fastest, so that the keys and values of these heads stay in its cache.
    const int64_t together = std::max<int64_t>(1, tiling.heads / plan.group);
    const int64_t units_per_row = ceil_div(groups, together) * tiles;
    const int64_t units = p.batch * units_per_row;
    const Buffer scratch = allocate(per_thread * std::max(threads, 1));  // idle threads touch none of theirs
    parallel(units, threads, [&](int64_t i, int thread) {
      const int64_t b = i / units_per_row, first = i % units_per_row / tiles * together, tile = i % tiles;
      const int64_t last = std::min(first + together, groups) - 1;
      const auto task = [&](int64_t g, int64_t t) {
        return Task{b, g * plan.group, t * tiling.queries, (b * groups + g) * tiles + t};
      };
      for (int64_t g = first; g <= last; ++g) {
        const bool more = g < last || tile + 1 < tiles;
        const Task next = g < last ? task(g + 1, tile) : task(first, tile + 1);
        isa.run(plan, task(g, tile), more ? &next : nullptr, scratch.get() + thread * per_thread);
      }
    });
  }
  if (with_statistics) {
    const auto entries = tasks > 0 ? static_cast<int64_t>(w.live.size()) : 0;
    parallel(entries + p.batch, threads, [&](int64_t i, int) {
      i < entries ? reduce_entry(p, w, groups, tiles, i) : reduce_row(p, w, groups, tiles, i - entries);
    });
  }
}

CpuTiling tiling(const std::string& isa_name, const std::array<int64_t, 6>& s, int threads) {
  return cpu_tiling({s[0], s[1], s[2], s[3], s[4], s[5], find(isa_name).lanes, threads});
}

double fma_peak(const std::string& isa_name, int threads, double seconds) {
  if (threads < 1 || !(seconds > 0)) throw std::invalid_argument("threads and seconds must be positive");
  const Isa& isa = find(isa_name);
  const auto now = [] {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
  };
  std::vector<int64_t> done(threads);
  double best = 0;
  for (const double end = now() + seconds; now() < end;) {
    const double start = now();
    parallel(threads, threads, [&](int64_t i, int) { done[i] = isa.multiply_adds(1 << 20); });
    best = std::max(best, static_cast<double>(std::accumulate(done.begin(), done.end(), int64_t{0})) / (now() - start));
  }
  return best;
}

}  // namespace fastnegate
