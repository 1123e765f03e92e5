// SPDX-License-Identifier: Apache-2.0
// Executes the blocks of a launch one after the other, each CUDA thread a fiber of its own. A fiber runs
// until its thread waits for others; the last thread to arrive does for all what they meet for.
//
// ThreadSanitizer: this file is compiled without it, with FASTNEGATE_SHIM_TSAN. So it sees what kernels
// access, each CUDA thread as a thread, ordered by __syncthreads and __syncwarp only: shuffles, votes,
// ldmatrix and mma order nothing on a GPU either, and blocks of a launch have no order.
#include "shim.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <random>
#include <stdexcept>
#include <utility>

#include "cuda/ptx.cuh"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(FASTNEGATE_SHIM_TSAN)
#include <sanitizer/tsan_interface.h>
extern "C" void AnnotateIgnoreWritesBegin(const char* file, int line);  // reads, too; in no header
extern "C" void AnnotateIgnoreWritesEnd(const char* file, int line);
#endif
#if !defined(__x86_64__)
#define FASTNEGATE_SHIM_UCONTEXT
#endif
#if defined(FASTNEGATE_SHIM_UCONTEXT)
#include <ucontext.h>
#endif

#if !defined(FASTNEGATE_SHIM_UCONTEXT)
// Saves what a called function must keep on the stack, whose pointer goes to *from, and goes on where `to`
// was saved. swapcontext() would ask the kernel for the signal mask each time.
extern "C" void fastnegate_shim_switch(void** from, void* to);
asm(R"(
.text
.hidden fastnegate_shim_switch
.globl fastnegate_shim_switch
.type fastnegate_shim_switch, @function
fastnegate_shim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fastnegate_shim_switch, . - fastnegate_shim_switch
)");
#endif

namespace fastnegate::shim {

const Coordinates* coordinates = nullptr;

// Exact; the subnormal numbers of half precision are normal in single precision.
float from_half(uint16_t x) {
  const uint32_t sign = (x & 0x8000u) << 16, magnitude = x & 0x7fffu;
  const float scaled = bits<float>(magnitude << 13) * 0x1p112f;
  const uint32_t infinite = magnitude >= 0x7c00 ? 0x7f800000u : 0;
  return bits<float>(sign | infinite | bits<uint32_t>(scaled));
}

namespace {

// ---- fibers -----------------------------------------------------------------------------------------

constexpr size_t stack_bytes = 256 << 10;
constexpr size_t stack_shift = 320;  // from lane to lane: the same place of all stacks would be one cache set

// Stacks of equal size, below each a page that must not be touched.
class Stacks {
 public:
  Stacks() = default;
  explicit Stacks(size_t count) : count_(count) {
    void* base = mmap(nullptr, count * each(), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED) throw std::bad_alloc();
    base_ = static_cast<char*>(base);
    for (size_t i = 0; i < count; ++i) mprotect(base_ + i * each(), guard(), PROT_NONE);
  }
  Stacks(const Stacks&) = delete;
  Stacks& operator=(Stacks&& other) noexcept {
    std::swap(base_, other.base_), std::swap(count_, other.count_);
    return *this;
  }
  ~Stacks() {
    if (base_) munmap(base_, count_ * each());
  }

  size_t count() const { return count_; }
  char* operator[](size_t i) const { return base_ + i * each() + guard(); }

 private:
  static size_t guard() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }
  static size_t each() { return stack_bytes + guard(); }

  char* base_ = nullptr;
  size_t count_ = 0;
};

struct Fiber {
#if defined(FASTNEGATE_SHIM_UCONTEXT)
  ucontext_t context;
#else
  void* saved;
#endif
  const void* stack = nullptr;  // of the calling thread: unknown until a fiber of the launch ran
  size_t bytes = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
  void* tsan = nullptr;

  void prepare(char* bottom, size_t size, void (*entry)()) {
    stack = bottom, bytes = size;
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(bottom, size);  // frames of a thread that never returned
#endif
#if defined(FASTNEGATE_SHIM_UCONTEXT)
    getcontext(&context);
    context.uc_stack.ss_sp = bottom;
    context.uc_stack.ss_size = size;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
#else
    // As if `entry` had been called: a return address of null above what fastnegate_shim_switch saves.
    auto** top = reinterpret_cast<void**>(bottom + size);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(entry);
    saved = std::fill_n(top - 6, 6, nullptr) - 6;
#endif
  }
};

Fiber* previous;  // that the running one was switched to from

// The first thing a fiber does whenever it begins or goes on.
void arrive([[maybe_unused]] Fiber& fiber) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fiber.fake_stack, &previous->stack, &previous->bytes);
#endif
}

void switch_fiber(Fiber& from, Fiber& to, [[maybe_unused]] bool for_good) {
  previous = &from;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &from.fake_stack, to.stack, to.bytes);
#endif
#if defined(FASTNEGATE_SHIM_TSAN)
  __tsan_switch_to_fiber(to.tsan, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(FASTNEGATE_SHIM_UCONTEXT)
  swapcontext(&from.context, &to.context);
#else
  fastnegate_shim_switch(&from.saved, to.saved);
#endif
  arrive(from);
}

void release([[maybe_unused]] void* clock) {
#if defined(FASTNEGATE_SHIM_TSAN)
  __tsan_release(clock);
#endif
}

void acquire([[maybe_unused]] void* clock) {
#if defined(FASTNEGATE_SHIM_TSAN)
  __tsan_acquire(clock);
#endif
}

// In its scope nothing is an access by the kernel: ThreadSanitizer sees all calls of new, delete and memmove.
class Unseen {
 public:
#if defined(FASTNEGATE_SHIM_TSAN)
  Unseen() { AnnotateIgnoreWritesBegin(__FILE__, __LINE__); }
  ~Unseen() { AnnotateIgnoreWritesEnd(__FILE__, __LINE__); }
#else
  Unseen() {}
#endif
  Unseen(const Unseen&) = delete;
};

// ---- threads, warps, blocks -------------------------------------------------------------------------

constexpr unsigned warp_size = 32;
constexpr unsigned all_lanes = ~0u;
constexpr size_t default_shared = 48 << 10;  // what a block gets without asking
constexpr const char* running = "running";
constexpr const char* exited = "exited";

// Where threads wait for each other. Rounds take turns with the clocks: a thread that is in the next round
// already must not pass on what it did in between to one that still has to leave this round.
struct Meeting {
  unsigned arrived = 0, round = 0;
  char clocks[2];
};

// A copy instruction of a warp: which lanes made it, and to where in shared memory.
struct CopyInstruction {
  const void* site;
  int64_t group;
  uint32_t lanes;
  std::array<uint32_t, warp_size> to;
};

struct Warp {
  struct Thread* threads;
  unsigned number;
  uint32_t ready = all_lanes;  // lanes that could run
  Meeting meeting;
  const char* operation = nullptr;  // of the meeting
  uint32_t in[warp_size][10], out[warp_size][4];
  std::vector<CopyInstruction> copies;
};

struct Thread {
  Coordinates where;
  unsigned number, lane;
  Warp* warp;
  const char* at = running;
  Fiber fiber;
  std::vector<Copy> copies;  // not made yet
  int64_t groups = 0;        // committed
  size_t next_copy = 0;      // position in warp->copies
};

struct Shared {
  explicit Shared(size_t bytes) : size(bytes), data(static_cast<char*>(::operator new(bytes, alignment))) {
    std::memset(data, 0xff, size);
  }
  Shared(const Shared&) = delete;
  ~Shared() { ::operator delete(data, alignment); }

  static constexpr std::align_val_t alignment{128};  // bank 0 comes first
  size_t size;
  char* data;
};

struct Block {
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Shared shared;
  Meeting meeting;
  size_t alive;
  std::string error;

  Block(size_t count, size_t shared_bytes)
      : threads(count), warps(count / warp_size), shared(shared_bytes), alive(count) {}
};

// Of the launch, of which there is one at a time.
Block* block;
Thread* current;
Fiber caller;
Counts counts;
std::unique_ptr<std::mt19937> random_order;
struct {
  const void* kernel;
  Start start;
  const void* parameters;
} program;

std::string block_name(const Thread& thread) {
  const uint3& at = thread.where.block;
  return "block (" + std::to_string(at.x) + ", " + std::to_string(at.y) + ", " + std::to_string(at.z) + ")";
}

[[noreturn]] void fail(const std::string& message) { throw std::runtime_error(message); }

// "threads 0-31, 40": those of `count` from `first` on that are `at` this place.
std::string who(const Thread* first, size_t count, const char* at) {
  std::string list;
  for (size_t i = 0; i < count; ++i) {
    if (std::strcmp(first[i].at, at) != 0) continue;
    size_t last = i;
    while (last + 1 < count && std::strcmp(first[last + 1].at, at) == 0) ++last;
    list += (list.empty() ? "" : ", ") + std::to_string(first[i].number);
    if (last > i) list += "-" + std::to_string(first[last].number);
    i = last;
  }
  return "threads " + list;
}

std::string deadlock() {
  std::string message = "deadlock in " + block_name(block->threads[0]) + ":";
  std::vector<const char*> places;
  for (const Thread& thread : block->threads) {
    const auto same = [&](const char* at) { return std::strcmp(at, thread.at) == 0; };
    if (std::any_of(places.begin(), places.end(), same)) continue;
    message += (places.empty() ? " " : "; ") + who(block->threads.data(), block->threads.size(), thread.at) +
               (thread.at == exited ? " " : " at ") + thread.at;
    places.push_back(thread.at);
  }
  return message;
}

// The thread to run next, null if all wait. In order, a warp goes on as long as it can, lane after lane.
Thread* choose() {
  std::vector<Warp>& warps = block->warps;
  const auto lane_from = [](uint32_t ready, unsigned first) {  // the first that is ready, cyclically
    const uint32_t later = ready & (all_lanes << first);
    return static_cast<unsigned>(__builtin_ctz(later ? later : ready));
  };
  size_t first = current ? current->warp->number : 0;
  if (random_order) first = (*random_order)() % warps.size();
  for (size_t i = 0; i < warps.size(); ++i) {
    Warp& warp = warps[(first + i) % warps.size()];
    if (!warp.ready) continue;
    unsigned lane = i == 0 && current ? current->lane : 0;
    if (random_order) lane = (*random_order)() % warp_size;
    return &warp.threads[lane_from(warp.ready, lane)];
  }
  return nullptr;
}

// From the calling fiber to this thread, or back to the caller of the launch.
void go_to(Thread* thread, Fiber& from, bool for_good = false) {
  if (thread) {
    current = thread;
    coordinates = &thread->where;
    thread->warp->ready &= ~(1u << thread->lane);
    if (&thread->fiber == &from) return;
    ++counts.switches;
  }
  switch_fiber(from, thread ? thread->fiber : caller, for_good);
}

void pause(const char* at) {
  Thread& self = *current;
  self.at = at;
  go_to(choose(), self.fiber);
  self.at = running;
}

// Waits for `expected` threads; the last to arrive does `complete`, which makes the others ready.
template <class Complete>
void meet(Meeting& meeting, size_t expected, const char* at, bool orders_memory, const Complete& complete) {
  char* clock = &meeting.clocks[meeting.round % 2];
  if (orders_memory) release(clock);
  if (++meeting.arrived < expected) {
    pause(at);
  } else {
    meeting.arrived = 0;
    ++meeting.round;
    complete();
    if (random_order) {  // the last need not be the first to go on
      current->warp->ready |= 1u << current->lane;
      pause(running);
    }
  }
  if (orders_memory) acquire(clock);
}

// All lanes of the warp meet at one operation.
template <class Perform>
void meet_warp(const char* operation, bool orders_memory, const Perform& perform) {
  Warp& warp = *current->warp;
  const bool same = warp.operation == operation || !warp.meeting.arrived ||
                    std::strcmp(warp.operation, operation) == 0;
  if (!same)
    fail(std::string("at ") + operation + ", while " + who(warp.threads, warp_size, warp.operation) +
         " of its warp are at " + warp.operation);
  warp.operation = operation;
  meet(warp.meeting, warp_size, operation, orders_memory, [&] {
    perform(warp);
    warp.ready = all_lanes & ~(1u << current->lane);
  });
}

void require_all_lanes(unsigned mask) {
  if (mask != all_lanes) fail("the shim knows operations of whole warps only, mask 0xffffffff");
}

void thread_entry() {
  Thread& self = *current;
  arrive(self.fiber);
  try {
    program.start(program.kernel, program.parameters);
    if (!self.copies.empty())
      fail("ends while " + std::to_string(self.copies.size()) + " of its copies are not waited for");
  } catch (const std::exception& error) {
    const Unseen unseen;
    block->error = "thread " + std::to_string(self.number) + " of " + block_name(self) + ": " + error.what();
  }
  self.at = exited;
  --block->alive;
  go_to(block->error.empty() ? choose() : nullptr, self.fiber, true);
}

// Wavefronts that 8 rows of 16 bytes take beyond the one they need: how often the busiest bank is asked.
uint64_t conflicts(const uint32_t* rows, uint32_t present) {
  unsigned groups_of_banks[8] = {};  // of 4: rows are aligned to 16 bytes
  unsigned most = 1;
  for (unsigned i = 0; i < 8; ++i)
    if (present >> i & 1) most = std::max(most, ++groups_of_banks[rows[i] / 16 % 8]);
  return most - 1;
}

void run_block(uint3 where, dim3 grid, dim3 size, const Stacks& stacks, char* end) {
  caller = Fiber();
#if defined(FASTNEGATE_SHIM_TSAN)
  caller.tsan = __tsan_get_current_fiber();
#endif
  std::vector<Thread>& threads = block->threads;
  for (unsigned i = 0; i < block->warps.size(); ++i) {
    block->warps[i].threads = &threads[i * warp_size];
    block->warps[i].number = i;
  }
  for (unsigned i = 0; i < threads.size(); ++i) {
    Thread& thread = threads[i];
    thread.where = {{i % size.x, i / size.x % size.y, i / size.x / size.y}, where, size, grid};
    thread.number = i;
    thread.lane = i % warp_size;
    thread.warp = &block->warps[i / warp_size];
    thread.fiber.prepare(stacks[i], stack_bytes - thread.lane * stack_shift, thread_entry);
#if defined(FASTNEGATE_SHIM_TSAN)
    thread.fiber.tsan = __tsan_create_fiber(0);  // after everything the caller did
#endif
  }
  current = nullptr;
  go_to(choose(), caller);
  if (block->error.empty() && block->alive) block->error = deadlock();
#if defined(FASTNEGATE_SHIM_TSAN)
  for (Thread& thread : threads) {  // all that they did comes before the end of the launch
    __tsan_switch_to_fiber(thread.fiber.tsan, __tsan_switch_to_fiber_no_sync);
    __tsan_release(end);
    __tsan_switch_to_fiber(caller.tsan, __tsan_switch_to_fiber_no_sync);
    __tsan_destroy_fiber(thread.fiber.tsan);
  }
#else
  (void)end;
#endif
  for (const Warp& warp : block->warps)
    for (const CopyInstruction& copy : warp.copies)
      for (unsigned i = 0; i < warp_size; i += 8)  // 16 bytes of 8 lanes are a wavefront
        counts.copy_conflicts += conflicts(&copy.to[i], copy.lanes >> i);
}

void run_blocks(dim3 grid, dim3 size, size_t shared, int64_t seed) {
  counts = {};
  random_order = seed ? std::make_unique<std::mt19937>(static_cast<unsigned>(seed)) : nullptr;
  std::vector<uint3> places;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) places.push_back({x, y, z});
  if (random_order) std::shuffle(places.begin(), places.end(), *random_order);

  const size_t threads = size_t{size.x} * size.y * size.z;
  static Stacks stacks;
  std::vector<std::unique_ptr<Block>> blocks;
  [[maybe_unused]] char end;
  for (const uint3& place : places) {
#if defined(FASTNEGATE_SHIM_TSAN)
    // Blocks are not ordered, so they may share no memory: each has its own until all are done.
    stacks = Stacks(threads);
#else
    blocks.clear();
    if (stacks.count() < threads) stacks = Stacks(threads);
#endif
    block = blocks.emplace_back(std::make_unique<Block>(threads, shared)).get();
    run_block(place, grid, size, stacks, &end);
    if (!block->error.empty()) break;
  }
  acquire(&end);
  coordinates = nullptr;
  if (!block->error.empty()) throw std::runtime_error(block->error);
}

// ---- numbers ----------------------------------------------------------------------------------------

float from_brain(uint16_t x) { return bits<float>(static_cast<uint32_t>(x) << 16); }

using Row [[gnu::vector_size(32)]] = float;  // 8 columns

// D += A B of a warp whose lanes handed in the registers of A, B and D, in this order. Half of A's registers
// are rows + 8; those after, and those of B after the first, are columns (of B, rows) + 8. Each sum is made
// in the order of the products, each of which float32 holds exactly.
template <int K, class Convert>
void multiply_matrices(Warp& warp, const Convert& convert) {
  constexpr int a_registers = K / 4, b_registers = K / 8;
  const auto number = [&](uint32_t both, int half) {
    return convert(static_cast<uint16_t>(both >> 16 * half));
  };
  float a[16][K];
  Row b[K], d[16];
  for (unsigned lane = 0; lane < warp_size; ++lane) {
    const uint32_t* in = warp.in[lane];
    const unsigned g = lane / 4, t = lane % 4;
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < a_registers; ++i)
        a[g + i % 2 * 8][2 * t + half + i / 2 * 8] = number(in[i], half);
      for (int i = 0; i < b_registers; ++i) b[2 * t + half + i * 8][g] = number(in[a_registers + i], half);
      for (int i = 0; i < 2; ++i)
        d[g + 8 * i][2 * t + half] = bits<float>(in[a_registers + b_registers + 2 * i + half]);
    }
  }
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < K; ++k) d[row] += a[row][k] * b[k];
  for (unsigned lane = 0; lane < warp_size; ++lane)
    for (int i = 0; i < 4; ++i)
      warp.out[lane][i] = bits<uint32_t>(d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2]);
}

template <int K>
void multiply_registers(bool brain, float* d, const uint32_t* a, const uint32_t* b, const char* operation,
                        uint64_t& count) {
  uint32_t* in = current->warp->in[current->lane];
  for (int i = 0; i < K / 4; ++i) *in++ = a[i];
  for (int i = 0; i < K / 8; ++i) *in++ = b[i];
  for (int i = 0; i < 4; ++i) *in++ = bits<uint32_t>(d[i]);
  meet_warp(operation, false, [&](Warp& warp) {
    if (brain)
      multiply_matrices<K>(warp, [](uint16_t x) { return from_brain(x); });
    else
      multiply_matrices<K>(warp, [](uint16_t x) { return from_half(x); });
    ++count;
  });
  for (int i = 0; i < 4; ++i) d[i] = bits<float>(current->warp->out[current->lane][i]);
}

// Offset of 16 bytes in shared memory.
size_t shared_offset(const char* operation, const void* p) {
  const auto offset = static_cast<size_t>(static_cast<const char*>(p) - block->shared.data);
  if (offset >= block->shared.size || block->shared.size - offset < 16)
    fail(std::string(operation) + ": byte " + std::to_string(static_cast<ptrdiff_t>(offset)) + " of " +
         std::to_string(block->shared.size) + " bytes of shared memory");
  if (offset % 16) fail(std::string(operation) + ": shared memory address not aligned to 16 bytes");
  return offset;
}

}  // namespace

// ---- what kernels call ------------------------------------------------------------------------------

int lane() { return static_cast<int>(current->lane); }

char* shared_memory() { return block->shared.data; }

void sync_block() {
  meet(block->meeting, block->threads.size(), "__syncthreads", true, [] {
    for (Warp& warp : block->warps) warp.ready = all_lanes;
    current->warp->ready &= ~(1u << current->lane);
    ++counts.barriers;
  });
}

void sync_warp(unsigned mask) {
  require_all_lanes(mask);
  meet_warp("__syncwarp", true, [](Warp&) {});
}

uint32_t shuffle(const char* name, unsigned mask, uint32_t value, int source) {
  require_all_lanes(mask);
  Warp& warp = *current->warp;
  const unsigned self = current->lane;
  warp.in[self][0] = value;
  warp.in[self][1] = static_cast<uint32_t>(source);
  meet_warp(name, false, [&](Warp&) {
    for (unsigned lane = 0; lane < warp_size; ++lane) warp.out[lane][0] = warp.in[warp.in[lane][1]][0];
    ++counts.shuffles;
  });
  return warp.out[self][0];
}

uint32_t reduce(const char* name, unsigned mask, uint32_t value, Join join) {
  require_all_lanes(mask);
  Warp& warp = *current->warp;
  const unsigned self = current->lane;
  warp.in[self][0] = value;
  meet_warp(name, false, [&](Warp&) {
    uint32_t result = warp.in[0][0];
    for (unsigned lane = 1; lane < warp_size; ++lane) result = join(result, warp.in[lane][0]);
    for (unsigned lane = 0; lane < warp_size; ++lane) warp.out[lane][0] = result;
    ++counts.reductions;
  });
  return warp.out[self][0];
}

void begin_copy(void* to, const void* from) {
  const auto offset = static_cast<uint32_t>(shared_offset("cp.async", to));
  if (reinterpret_cast<uintptr_t>(from) % 16) fail("cp.async: global memory address not aligned to 16 bytes");
  const Unseen unseen;
  Thread& self = *current;
  self.copies.push_back({static_cast<uint4*>(to), static_cast<const uint4*>(from), self.groups});
  (from ? counts.copied : counts.zeroed) += 16;

  // The first lane lists the instructions, the others find theirs: the next that looks the same.
  const void* site = __builtin_return_address(0);
  std::vector<CopyInstruction>& list = self.warp->copies;
  const auto same = [&](const CopyInstruction& copy) {
    return copy.site == site && copy.group == self.groups;
  };
  const auto at = list.begin() + static_cast<ptrdiff_t>(self.next_copy);
  auto found = std::find_if(at, list.end(), same);
  if (found == list.end()) found = list.insert(at, {site, self.groups, 0, {}});
  found->lanes |= 1u << self.lane;
  found->to[self.lane] = offset;
  self.next_copy = static_cast<size_t>(found - list.begin()) + 1;
}

void commit_copies() { ++current->groups; }

bool finish_copy(int groups, Copy& copy) {
  Thread& self = *current;
  if (self.copies.empty() || self.copies.front().group >= self.groups - groups) return false;
  const Unseen unseen;
  copy = self.copies.front();
  self.copies.erase(self.copies.begin());
  return true;
}

const uint4* matrix_row(const void* row) {
  shared_offset("ldmatrix", row);
  return static_cast<const uint4*>(row);
}

void exchange_rows(int count, bool transposed, const uint4* address, const uint4& row, uint32_t* registers) {
  static const char* const names[2][3] = {
      {"ldmatrix.x1", "ldmatrix.x2", "ldmatrix.x4"},
      {"ldmatrix.x1.trans", "ldmatrix.x2.trans", "ldmatrix.x4.trans"},
  };
  Warp& warp = *current->warp;
  const unsigned self = current->lane;
  std::memcpy(warp.in[self], &row, 16);
  if (address)
    warp.in[self][4] = static_cast<uint32_t>(reinterpret_cast<const char*>(address) - block->shared.data);
  meet_warp(names[transposed][count / 2], false, [&](Warp&) {
    const auto element = [&](int matrix, unsigned r, unsigned column) {
      return warp.in[8 * matrix + r][column / 2] >> 16 * (column % 2) & 0xffff;
    };
    for (int matrix = 0; matrix < count; ++matrix) {
      for (unsigned lane = 0; lane < warp_size; ++lane) {
        const unsigned g = lane / 4, t = lane % 4;
        warp.out[lane][matrix] =
            transposed ? element(matrix, 2 * t, g) | element(matrix, 2 * t + 1, g) << 16
                       : element(matrix, g, 2 * t) | element(matrix, g, 2 * t + 1) << 16;
      }
      uint32_t rows[8];
      for (int i = 0; i < 8; ++i) rows[i] = warp.in[8 * matrix + i][4];
      counts.ldmatrix_conflicts += conflicts(rows, 0xff);
    }
    ++counts.ldmatrix;
  });
  for (int i = 0; i < count; ++i) registers[i] = warp.out[self][i];
}

void multiply(bool brain, float* d, const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const char* operation = brain ? "mma.m16n8k16.bf16" : "mma.m16n8k16.f16";
  multiply_registers<16>(brain, d, a, b, operation, counts.mma_k16);
}

void multiply(bool brain, float* d, const uint32_t (&a)[2], uint32_t b) {
  const char* operation = brain ? "mma.m16n8k8.bf16" : "mma.m16n8k8.f16";
  multiply_registers<8>(brain, d, a, &b, operation, counts.mma_k8);
}

void count_exp2() { ++counts.exp2; }

uint16_t round_to_half(float x) {
  const uint32_t word = bits<uint32_t>(x), magnitude = word & 0x7fffffffu;
  const auto sign = static_cast<uint16_t>(word >> 16 & 0x8000u);
  if (magnitude > 0x7f800000u) return 0x7fff;
  uint32_t half;
  if (magnitude < 0x38800000u) {  // below 2^-14: the sum's last place is that of subnormal half precision
    half = bits<uint32_t>(bits<float>(magnitude) + 0.5f) - bits<uint32_t>(0.5f);
  } else {
    const uint32_t rebased = magnitude - (112u << 23);
    half = std::min((rebased + 0xfff + (rebased >> 13 & 1)) >> 13, 0x7c00u);
  }
  return static_cast<uint16_t>(sign | half);
}

uint16_t round_to_brain(float x) {
  const uint32_t word = bits<uint32_t>(x);
  if ((word & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return static_cast<uint16_t>((word + 0x7fff + (word >> 16 & 1)) >> 16);
}

// ---- runtime API ------------------------------------------------------------------------------------

namespace {

std::mutex mutex;
Device facts;
std::map<std::string, cudaError_t> failures;
std::map<std::pair<const void*, int>, size_t> granted;  // shared memory, to a kernel on a device
std::vector<Launch> made;
std::string error_message;
thread_local int current_device = 0;
thread_local cudaError_t last = cudaSuccess;

const struct {
  cudaError_t error;
  const char *name, *text;
} errors[] = {
    {cudaSuccess, "cudaSuccess", "no error"},
    {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
    {cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation", "out of memory"},
    {cudaErrorInitializationError, "cudaErrorInitializationError", "initialization error"},
    {cudaErrorInvalidConfiguration, "cudaErrorInvalidConfiguration", "invalid configuration argument"},
    {cudaErrorInsufficientDriver, "cudaErrorInsufficientDriver",
     "CUDA driver version is insufficient for CUDA runtime version"},
    {cudaErrorNoDevice, "cudaErrorNoDevice", "no CUDA-capable device is detected"},
    {cudaErrorInvalidDevice, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {cudaErrorNoKernelImageForDevice, "cudaErrorNoKernelImageForDevice",
     "no kernel image is available for execution on the device"},
    {cudaErrorUnsupportedPtxVersion, "cudaErrorUnsupportedPtxVersion",
     "the provided PTX was compiled with an unsupported toolchain."},
    {cudaErrorIllegalAddress, "cudaErrorIllegalAddress", "an illegal memory access was encountered"},
    {cudaErrorLaunchOutOfResources, "cudaErrorLaunchOutOfResources",
     "too many resources requested for launch"},
    {cudaErrorMisalignedAddress, "cudaErrorMisalignedAddress", "misaligned address"},
    {cudaErrorLaunchFailure, "cudaErrorLaunchFailure", "unspecified launch failure"},
    {cudaErrorNotSupported, "cudaErrorNotSupported", "operation not supported"},
    {cudaErrorUnknown, "cudaErrorUnknown", "unknown error"},
};

const char* const functions[] = {
    "cudaDriverGetVersion", "cudaRuntimeGetVersion",  "cudaGetDeviceCount",
    "cudaGetDevice",        "cudaSetDevice",          "cudaDeviceGetAttribute",
    "cudaFuncSetAttribute", "cudaFuncGetAttributes",  "cudaLaunchKernel",
    "cudaMalloc",           "cudaFree",               "cudaMemset",
    "cudaMemcpy",           "cudaDeviceSynchronize",
};

// A call of the API: what was arranged for it, else what `work` finds. Remembers errors.
template <class Work>
cudaError_t call(const char* function, const Work& work) {
  const std::lock_guard lock(mutex);
  const auto arranged = failures.find(function);
  cudaError_t error;
  if (arranged != failures.end()) {
    error = arranged->second;
    failures.erase(arranged);
  } else {
    error = work();
  }
  if (error != cudaSuccess) last = error;
  return error;
}

// The same for calls that need a device.
template <class Work>
cudaError_t device_call(const char* function, const Work& work) {
  return call(function, [&] { return facts.count ? work() : cudaErrorNoDevice; });
}

bool is_device(int device) { return device >= 0 && device < facts.count; }

size_t granted_shared(const void* kernel) {
  const auto found = granted.find({kernel, current_device});
  return found == granted.end() ? default_shared : found->second;
}

}  // namespace

cudaError_t launch(const void* kernel, Start start, const void* parameters, dim3 grid, dim3 size,
                   size_t shared, cudaStream_t stream) {
  return device_call("cudaLaunchKernel", [&] {
    const bool grid_fits = grid.x - 1 < 0x7fffffffu && grid.y - 1 < 0xffffu && grid.z - 1 < 0xffffu;
    const bool sizes_fit = size.x - 1 < 1024 && size.y - 1 < 1024 && size.z - 1 < 64;
    if (!grid_fits || !sizes_fit || size.x * size.y * size.z > 1024) return cudaErrorInvalidConfiguration;
    if (shared > granted_shared(kernel)) return cudaErrorInvalidValue;
    try {
      if (size.x * size.y * size.z % warp_size)
        throw std::runtime_error("the shim knows blocks of whole warps only");
      program = {kernel, start, parameters};
      run_blocks(grid, size, shared, facts.seed);
    } catch (const std::exception& error) {
      error_message = error.what();
      throw;
    }
    made.push_back({kernel, grid, size, shared, stream, current_device, counts});
    return cudaSuccess;
  });
}

Device& device() { return facts; }

void fail_next(const std::string& function, cudaError_t error) {
  if (std::find(std::begin(functions), std::end(functions), function) == std::end(functions))
    throw std::invalid_argument("the shim has no function " + function + " that could fail");
  const std::lock_guard lock(mutex);
  failures[function] = error;
}

const std::vector<Launch>& launches() { return made; }

const std::string& last_error() { return error_message; }

void reset() {
  const std::lock_guard lock(mutex);
  facts = {};
  failures.clear();
  made.clear();
  error_message.clear();
  current_device = 0;
  last = cudaSuccess;
}

}  // namespace fastnegate::shim

using namespace fastnegate::shim;

const char* cudaGetErrorName(cudaError_t error) {
  for (const auto& known : errors)
    if (known.error == error) return known.name;
  return "unrecognized error code";
}

const char* cudaGetErrorString(cudaError_t error) {
  for (const auto& known : errors)
    if (known.error == error) return known.text;
  return "unrecognized error code";
}

cudaError_t cudaPeekAtLastError() { return last; }

cudaError_t cudaGetLastError() { return std::exchange(last, cudaSuccess); }

cudaError_t cudaDriverGetVersion(int* version) {
  return call("cudaDriverGetVersion", [&] {
    *version = static_cast<int>(facts.driver);
    return cudaSuccess;
  });
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  return call("cudaRuntimeGetVersion", [&] {
    *version = static_cast<int>(facts.runtime);
    return cudaSuccess;
  });
}

cudaError_t cudaGetDeviceCount(int* count) {
  return call("cudaGetDeviceCount", [&] {
    *count = static_cast<int>(facts.count);
    return facts.count ? cudaSuccess : cudaErrorNoDevice;
  });
}

cudaError_t cudaGetDevice(int* device) {
  return device_call("cudaGetDevice", [&] {
    *device = current_device;
    return cudaSuccess;
  });
}

cudaError_t cudaSetDevice(int device) {
  return device_call("cudaSetDevice", [&] {
    if (!is_device(device)) return cudaErrorInvalidDevice;
    current_device = device;
    return cudaSuccess;
  });
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  return device_call("cudaDeviceGetAttribute", [&] {
    if (!is_device(device)) return cudaErrorInvalidDevice;
    const auto answer = [&](int64_t fact) {
      *value = static_cast<int>(fact);
      return cudaSuccess;
    };
    switch (attribute) {
      case cudaDevAttrMultiProcessorCount: return answer(facts.multiprocessors);
      case cudaDevAttrComputeCapabilityMajor: return answer(facts.major);
      case cudaDevAttrComputeCapabilityMinor: return answer(facts.minor);
      case cudaDevAttrMaxSharedMemoryPerBlockOptin: return answer(facts.shared);
    }
    return cudaErrorInvalidValue;
  });
}

cudaError_t cudaDeviceSynchronize() {
  return device_call("cudaDeviceSynchronize", [] { return cudaSuccess; });  // kernels have run
}

cudaError_t cudaMalloc(void** memory, size_t bytes) {
  return device_call("cudaMalloc", [&] {
    *memory = std::malloc(bytes);
    if (!*memory) return cudaErrorMemoryAllocation;
    std::memset(*memory, 0xff, bytes);  // NaN: what is read before it is written shows
    return cudaSuccess;
  });
}

cudaError_t cudaFree(void* memory) {
  return device_call("cudaFree", [&] {
    std::free(memory);
    return cudaSuccess;
  });
}

cudaError_t cudaMemset(void* memory, int byte, size_t bytes) {
  return device_call("cudaMemset", [&] {
    std::memset(memory, byte, bytes);
    return cudaSuccess;
  });
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  return device_call("cudaMemcpy", [&] {
    if (kind != cudaMemcpyHostToDevice && kind != cudaMemcpyDeviceToHost) return cudaErrorInvalidValue;
    std::memcpy(to, from, bytes);
    return cudaSuccess;
  });
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  return device_call("cudaFuncSetAttribute", [&] {
    const bool known = attribute == cudaFuncAttributeMaxDynamicSharedMemorySize;
    if (!known || value < 0 || value > facts.shared) return cudaErrorInvalidValue;
    granted[{kernel, current_device}] = static_cast<size_t>(value);
    return cudaSuccess;
  });
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel) {
  return device_call("cudaFuncGetAttributes", [&] {
    *attributes = {static_cast<int>(granted_shared(kernel)), 1024};
    return cudaSuccess;
  });
}

// ---- for ctypes -------------------------------------------------------------------------------------

namespace {

const std::map<std::string, int64_t Device::*> device_fields = {
    {"count", &Device::count},   {"major", &Device::major},
    {"minor", &Device::minor},   {"multiprocessors", &Device::multiprocessors},
    {"shared", &Device::shared}, {"driver", &Device::driver},
    {"seed", &Device::seed},     {"runtime", &Device::runtime},
};

const std::map<std::string, uint64_t Counts::*> count_fields = {
    {"mma_k16", &Counts::mma_k16},
    {"mma_k8", &Counts::mma_k8},
    {"ldmatrix", &Counts::ldmatrix},
    {"shuffles", &Counts::shuffles},
    {"reductions", &Counts::reductions},
    {"ldmatrix_conflicts", &Counts::ldmatrix_conflicts},
    {"copy_conflicts", &Counts::copy_conflicts},
    {"copied", &Counts::copied},
    {"zeroed", &Counts::zeroed},
    {"exp2", &Counts::exp2},
    {"barriers", &Counts::barriers},
    {"switches", &Counts::switches},
};

}  // namespace

extern "C" {

int fastnegate_shim_set(const char* field, int64_t value) {
  const auto found = device_fields.find(field);
  if (found == device_fields.end()) return -1;
  device().*(found->second) = value;
  return 0;
}

int fastnegate_shim_fail_next(const char* function, int error) {
  try {
    fail_next(function, static_cast<cudaError_t>(error));
  } catch (const std::invalid_argument&) {
    return -1;
  }
  return 0;
}

int64_t fastnegate_shim_launches() { return static_cast<int64_t>(launches().size()); }

int64_t fastnegate_shim_count(int64_t launch, const char* field) {
  const auto found = count_fields.find(field);
  if (found == count_fields.end() || launch < 0 || launch >= fastnegate_shim_launches()) return -1;
  return static_cast<int64_t>(launches()[static_cast<size_t>(launch)].counts.*(found->second));
}

const char* fastnegate_shim_last_error() { return last_error().c_str(); }

void fastnegate_shim_reset() { reset(); }
}
