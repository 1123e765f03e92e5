// SPDX-License-Identifier: Apache-2.0
// `negated_attention` in CUDA: a block keeps the keys and values of a head in shared memory; each of its
// warps takes 16 queries at a time, on its own.
//
// For its queries a warp attends to the prompt (Z), then to all concepts of its batch row at once: softmaxes, inner
// products, the rule, one product more (entries.cuh). Q is read and O is written once. Text that does not fit in
// shared memory is read piece by piece, by all warps together.
//
// Scope `feature` needs sums over heads before an output exists. The same kernel is then launched once per
// sum: to write the inner products of each head (Goal::moments), to write the norms of Y and Z of each head
// (Goal::norms), and for the output, which adds up over the heads what it needs. Q is read again, Z and F are
// never stored.
#pragma once

#include "cuda/kernel/epilogue.cuh"

namespace fastnegate::cuda {

template <class T, int D, CudaKind kKind>
class Block {
 public:
  FN_INLINE explicit Block(const Launch& launch) : l(launch), p(launch.problem), text(launch) {}

  FN_INLINE void run() {
    for (begin(); turn().first < turn().last; next()) {
      fetch(turn().first + warp(), 0);
      load_text();
      int stage = 0;
      // Where no text is read piece by piece, no warp waits for another one.
      const bool alone = prompt_stays() && blocks_of_row() != kTakeTurns;
      for (int tile = turn().first + warp(); (alone ? tile : tile - warp()) < turn().last; tile += warps()) {
        if (l.tiling.stages == 2) {
          fetch(tile + warps(), stage ^ 1);
          ptx::wait<1>();
        } else {
          ptx::wait<0>();
        }
        __syncwarp();
        work(tile, buffer(stage));
        __syncwarp();
        if (l.tiling.stages == 2)
          stage ^= 1;
        else
          fetch(tile + warps(), 0);
      }
      ptx::wait<0>();
    }
  }

 private:
  static constexpr int kRow = cuda_row(D), kUnits = D / 8;  // units of 16 bytes

  const Launch& l;
  const Problem& p;
  const Text<T, D> text;

  // Asked for again wherever they are wanted: registers are for the tiles.
  FN_INLINE static int thread() { return ptx::opaque(static_cast<int>(threadIdx.x)); }
  FN_INLINE static int warps() { return ptx::opaque(static_cast<int>(blockDim.x)) / kWarp; }
  FN_INLINE static int lane() { return thread() % kWarp; }
  FN_INLINE static int warp() { return uniform(thread() / kWarp); }
  FN_INLINE Turn& turn() const { return *reinterpret_cast<Turn*>(ptx::shared_memory() + l.tiling.turn); }

  // The tiles of all heads, one head after the other, in equal shares: few blocks see two heads.
  FN_INLINE void begin() const {
    const int blocks = gridDim.x, block = blockIdx.x, all = static_cast<int>(p.batch * p.heads) * tiles_of_head();
    const int each = all / blocks, more = all % blocks, before = each * block + ::min(block, more);
    const int head = before / tiles_of_head(), heads = static_cast<int>(p.heads);
    if (threadIdx.x == 0) take(head / heads, head % heads, before % tiles_of_head(), each + (block < more));
    __syncthreads();
  }
  FN_INLINE void next() const {
    __syncthreads();  // the text of this head is not needed any more
    if (threadIdx.x == 0) {
      const Turn now = turn();
      const bool of_row = now.h + 1 < p.heads;
      take(of_row ? now.b : now.b + 1, of_row ? now.h + 1 : 0, 0, now.left);
    }
    __syncthreads();
  }
  FN_INLINE void take(int b, int h, int first, int count) const {
    const int last = ::min(first + count, tiles_of_head());
    turn() = {b, h, first, last, ::min(last * kCudaQueries, static_cast<int>(p.queries)), count - (last - first), 0};
  }
  FN_INLINE int tiles_of_head() const { return static_cast<int>(ceil_div(p.queries, kCudaQueries)); }

  FN_INLINE int blocks_of_row() const { return kKind == CudaKind::plain ? 0 : uniform(turn().blocks); }

  FN_INLINE bool prompt_stays() const { return l.tiling.prompt_slots > 0 || p.keys == 0; }
  FN_INLINE const T* head_of(const Strided& s) const {
    return reinterpret_cast<const T*>(s.data) + turn().b * s.batch + turn().h * s.head;
  }
  FN_INLINE T* buffer(int stage) const {
    char* mine = ptx::shared_memory() + l.tiling.queries + thread() / kWarp * cuda_warp_bytes(D, l.tiling.stages);
    return reinterpret_cast<T*>(mine) + stage * kCudaQueries * kRow;
  }

  // Asks for the queries of a tile, but for rows beyond the end. Four lanes have the rows g and g + 8.
  FN_INLINE void fetch(int tile, int stage) const {
    const int mine = lane(), first = mine / 4, t = mine % 4;
    const ptx::Address to = ptx::address(buffer(stage) + first * kRow + t * 8);
    const T* from = head_of(p.query) + t * 8;
    const int end = turn().end;
    repeat<2>([&](auto half) {
      const int n = tile * kCudaQueries + first + 8 * half.value;
      const T* row = from + (n < end ? n : 0) * p.query.row;
      repeat<(kUnits + 3) / 4>([&](auto k) {
        if (4 * k.value + 3 < kUnits || 4 * k.value + t < kUnits)
          ptx::copy_16(to + (half.value * 8 * kRow + k.value * 32) * 2, row + k.value * 32, n < end);
      });
    });
    ptx::commit();
  }

  // Keys of the prompt from `first` on.
  FN_INLINE void load_prompt(int slot, int first, int count) const {
    const float* bias = p.key_bias ? p.key_bias + turn().b * p.bias_batch + turn().h * p.bias_head : nullptr;
    const T *key = head_of(p.key), *value = head_of(p.value);
    text.load(slot, count, [&](int place) {
      const int64_t at = first + (place < count ? place : 0);
      const float more = place >= count ? -kInfinity : bias ? __ldg(bias + at * p.bias_key) : 0.f;
      return Token<T>{key + at * p.key.row, value + at * p.value.row, more};
    });
  }

  FN_INLINE void load_text() {
    if (l.tiling.prompt_slots > 0) load_prompt(0, 0, static_cast<int>(p.keys));
    if constexpr (kKind != CudaKind::plain) {
      if (warp() == 0) {
        const int blocks = gather_all(p, l.tiling, text, cuda::row_of(p, turn().b), lane());
        if (lane() == 0) turn().blocks = blocks;
      }
      __syncthreads();
      for (int i = 0; i < blocks_of_row(); ++i) {
        const Roster& roster = text.roster(i);
        if (p.rule.reads.tokens) load_block(p, text, roster, turn().h, 0, roster.header.count);
      }
    }
    ptx::commit();
    ptx::wait<0>();
    __syncthreads();
    if constexpr (kKind != CudaKind::plain) make_grams(blocks_of_row());
  }

  // Of blocks whose text is in shared memory.
  FN_INLINE void make_grams(int blocks) const {
    if (blocks <= 0 || !p.rule.reads.products || (l.moments && l.goal != Goal::moments)) return;
    for (int i = warp(); i < blocks; i += warps())
      if (text.roster(i).header.count == 0) make_gram(text, text.roster(i), text.gram(i), lane());
    __syncthreads();
  }

  // Where blocks take turns in shared memory: the one of the entries from e on.
  FN_INLINE void bring_block(int e) const {
    __syncthreads();  // the block before is not needed any more
    if (warp() == 0) gather(p, cuda::row_of(p, turn().b), e, l.tiling.concepts, &text.roster(0), lane());
    __syncthreads();
    const Header& header = text.roster(0).header;
    if (header.count > 0 || header.tiles == 0 || !p.rule.reads.tokens) return;
    bring_tokens(0, 0);
    make_grams(1);
  }
  FN_INLINE void bring_tokens(int first, int count) const {
    load_block(p, text, text.roster(0), turn().h, first, count);
    ptx::commit();
    ptx::wait<0>();
    __syncthreads();
  }

  // The piece of the prompt that begins with key `first`, if there is one, to its place in turn.
  FN_INLINE void bring_prompt(int first) const {
    constexpr int kStep = cuda_prompt_tokens(D);
    const int count = ::min(static_cast<int>(p.keys) - first, kStep);
    if (count > 0) load_prompt(l.tiling.pieces == 2 ? first / kStep % 2 * kStep : 0, first, count);
    ptx::commit();
  }

  FN_INLINE void attend_to_prompt(const Queries<T, D>& q, int lane, Segment<T, D>& z) {
    constexpr int kStep = cuda_prompt_tokens(D);
    const int keys = static_cast<int>(p.keys);
    z.empty();
    const bool stays = prompt_stays();
    // In shared memory: with two, one is read while the other is worked on. Of narrow heads few prompts do not stay.
    const int pieces = cuda_most_pieces(D) == 2 ? l.tiling.pieces : 1;
    if (!stays && pieces == 2) bring_prompt(0);
    int done = 0;
    do {  // once for no keys: nothing is added
      const int count = ::min(keys - done, kStep);
      if (!stays) {
        bring_prompt(pieces == 2 ? done + kStep : done);
        pieces == 2 ? ptx::wait<1>() : ptx::wait<0>();
        __syncthreads();
      }
      const int slot = stays ? done : pieces == 2 ? done / kStep % 2 * kStep : 0;
      z.template add<kStep / 16>(q, text.piece(slot, lane), count, p.key_bias, l.factor, done == 0);
      if (!stays) __syncthreads();  // this piece is not needed any more
      done += kStep;
    } while (done < keys);
    z.finish(l.factor);
  }

  // f(block) of every block of the row.
  template <class Body>
  FN_INLINE void for_blocks(const Body& f) const {
    const bool turns = blocks_of_row() == kTakeTurns;
    const int end = turns ? cuda::row_of(p, turn().b).end : blocks_of_row();
#pragma unroll 1
    for (int i = turns ? cuda::row_of(p, turn().b).begin : 0; i < end;) {
      if (turns) bring_block(i);
      if (!turns || uniform(text.roster(0).header.tiles) > 0) f(turns ? 0 : i);
      i = turns ? uniform(text.roster(0).header.next) : i + 1;
    }
  }

  // Slots of the pieces of an entry that is longer than a block.
  FN_INLINE auto bring(int block) const {
    return [this, block](int i) {
      const Header& header = text.roster(block).header;
      if (blocks_of_row() != kTakeTurns) return header.slot + i * kCudaBlockTokens;
      __syncthreads();  // the piece before is not needed any more
      bring_tokens(i * kCudaBlockTokens, ::min(header.count - i * kCudaBlockTokens, kCudaBlockTokens));
      return header.slot;
    };
  }

  FN_INLINE void measure(Entries<T, D>& entries, int block, const Queries<T, D>& q) const {
    if (uniform(text.roster(block).header.count) > 0)
      entries.measure_long(block, q, bring(block));
    else
      entries.measure(block, q);
  }
  FN_INLINE void apply(Entries<T, D>& entries, int block, const Queries<T, D>& q, Rows<D>& y) const {
    if (uniform(text.roster(block).header.count) > 0)
      entries.apply_long(block, q, bring(block), y);
    else
      entries.apply(block, y);
  }

  FN_INLINE void work(int tile, T* queries) {
    // What is made of these is made here: registers are for the tile, not for addresses known since before the loop.
    const Place place{turn(), tile * kCudaQueries, lane()};
    Queries<T, D> q;
    q.load(ptx::address(queries), place.lane);
    Segment<T, D> z;
    attend_to_prompt(q, place.lane, z);
    float limited[2] = {0.f, 0.f};
    if constexpr (kKind != CudaKind::plain) {
      if (blocks_of_row() != 0) {
        Entries<T, D> entries(l, text, place, z);
        Rows<D> y;
        if constexpr (kKind == CudaKind::one) {
          entries.measure(0, q);
          if (l.goal == Goal::moments) return;
          entries.tally();
          entries.settle();
          entries.begin(y);
          entries.apply(0, y);
        } else {
          y = z.out;
          const bool once = blocks_of_row() == 1;
#pragma unroll 1
          for (int pass = 0; pass < 2; ++pass) {
            if (pass == 1) entries.settle(), entries.begin(y);
            for_blocks([&](int block) {
              if (pass == 0 || !once) measure(entries, block, q);
              if (pass == 0)
                entries.tally();
              else
                apply(entries, block, q, y);
            });
            if (l.goal == Goal::moments) return;
          }
        }
        finish(l, place, entries, z.out, y, limited);
        if (l.goal == Goal::norms) return;
        if (l.trace_rows) trace<T>(l, place, y, z.out, limited);
        write(p, place, y, queries);
        return;
      }
    }
    if (l.goal != Goal::output) return;
    if (l.trace_rows) trace<T>(l, place, z.out, z.out, limited);
    write(p, place, z.out, queries);
  }
};

template <class T, int D, CudaKind kKind>
__global__ void __launch_bounds__(kWarp * cuda_most_warps(kKind, D)) attention(const __grid_constant__ Launch launch) {
  Block<T, D, kKind>(launch).run();
}

template <class T, int D>
Kernel kernel_of(CudaKind kind) {
  switch (kind) {
    case CudaKind::plain: return &attention<T, D, CudaKind::plain>;
    case CudaKind::one: return &attention<T, D, CudaKind::one>;
    case CudaKind::many: return &attention<T, D, CudaKind::many>;
  }
  return nullptr;
}

}  // namespace fastnegate::cuda
