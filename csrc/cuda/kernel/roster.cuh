// SPDX-License-Identifier: Apache-2.0
// The entries of a row as blocks of concept tokens: who they are, and their text in shared memory.
// Made once a head, so that a tile of queries looks nothing up.
#pragma once

#include "cuda/kernel/text.cuh"

namespace fastnegate::cuda {

// A tile. 48 bytes.
struct alignas(16) Slot {
  Numbers numbers;
  float offset;               // c0
  float scale;                // of the norms of the entry's values: a power of two
  int entry, place;           // -1: nobody's; which it is among the entries of the row, by concept and number
  int begin;                  // its first token
  short count, tiles;         // its tokens; tiles of the entry, which begins at a multiple of them
};
static_assert(sizeof(Slot) == kCudaSlotBytes);

struct alignas(16) Header {
  int slot;    // of its first token in shared memory
  int tiles;   // with tokens, or of entries that have none; 0: no entry
  int joined;  // bits, as in Joined
  int count;   // of an entry longer than a block, its tokens, else 0
  int next;    // the first entry of the row that is not in it
  int unused[3];
};
static_assert(sizeof(Header) == kCudaHeaderBytes);
// Tiles 0 and 1, 2 and 3, or all four are of one entry; something is added to logits.
enum Joined { kFirstTwo = 1, kLastTwo = 2, kFour = 4, kMore = 8 };

struct Roster {
  Header header;
  Slot slots[kCudaBlockTiles];

  // What a warp asks of the header.
  FN_INLINE Header known() const {
    return {uniform(header.slot), uniform(header.tiles), uniform(header.joined), uniform(header.count), 0, {}};
  }
};
static_assert(sizeof(Roster) == kCudaRosterBytes);

// Where the tokens of a concept are.
struct Span {
  int begin, length;
};
FN_INLINE Span span_of(const Problem& p, int concept_index) {
  // The index is data: whatever it holds, nothing outside the arrays is read.
  const int tokens = static_cast<int>(p.tokens), at = static_cast<int>(p.entries) + concept_index;
  const int begin = ::min(::max(__ldg(p.index + at), 0), tokens);
  const int longest = ::min(static_cast<int>(p.longest), tokens - begin);
  return {begin, ::max(::min(__ldg(p.index + at + static_cast<int>(p.concepts)), longest), 0)};
}

FN_INLINE int concept_of(const Problem& p, int entry) {
  return ::min(::max(__ldg(p.index + entry), 0), static_cast<int>(p.concepts) - 1);
}

// The entries of a row.
struct Row {
  int begin, end;
};
FN_INLINE Row row_of(const Problem& p, int b) {
  if (!p.index) return {0, 0};
  const int32_t* rows = p.index + p.entries + 2 * p.concepts + b;
  return {::max(__ldg(rows), 0), ::min(__ldg(rows + 1), static_cast<int>(p.entries))};
}

// A warp: the entries of a row from e on that fit into a block, or one that is longer, to `roster`, which is for text
// at `slot`.
FN_INLINE void gather(const Problem& p, const Row& row, int e, int slot, Roster* roster, int lane) {
  const bool reads_tokens = p.rule.reads.tokens;
  int tiles = 0, joined = 0, count = 0;
  if (lane < kCudaBlockTiles) roster->slots[lane] = {{}, 0.f, 1.f, -1, -1, 0, 0, 1};
  __syncwarp();
  for (; e < row.end && count == 0; ++e) {
    const Numbers numbers = numbers_of(p.numbers + int64_t{e} * kNumberColumns, p.rule.defaults);
    const int c = concept_of(p, e);
    const Span span = span_of(p, c);
    const int length = reads_tokens ? span.length : 0;
    bool some = !reads_tokens, masked = false;
    for (int i = lane; i < length; i += kWarp) {
      const float bias = p.token_bias ? __ldg(p.token_bias + span.begin + i) : 0.f;
      some |= bias != -kInfinity, masked |= bias != 0.f;
    }
    if (!__any_sync(~0u, some) || !(numbers.active > 0.f)) continue;  // it does not exist
    const int needed = ::max((length + 7) / 8, 1);
    const bool whole = needed > kCudaBlockTiles;
    const int size = whole || needed == 3 ? kCudaBlockTiles : needed, first = (tiles + size - 1) / size * size;
    if (first + size > kCudaBlockTiles || (whole && tiles > 0)) break;
    int place = 0;
    for (int i = row.begin + lane; i - lane < row.end; i += kWarp) {
      const int other = i < row.end ? concept_of(p, i) : c;
      place += __popc(__ballot_sync(~0u, other < c || (other == c && i < e)));
    }
    if (lane >= first && lane < first + size) {
      const int done = (lane - first) * 8;
      roster->slots[lane] = {numbers, p.offset ? __ldg(p.offset + c) : 0.f, 1.f, e, place, span.begin + done,
                             static_cast<short>(::max(::min(length - done, 8), 0)), static_cast<short>(size)};
    }
    joined |= size == 4 ? kFour : size == 2 ? (first == 0 ? kFirstTwo : kLastTwo) : 0;
    if (length % 8 != 0 || __any_sync(~0u, masked) || first != tiles) joined |= kMore;
    tiles = first + needed, count = whole ? length : 0;
  }
  if (tiles % 2 != 0) joined |= kMore;  // the other tile of the pair is empty
  if (lane == 0) roster->header = {slot, ::min(tiles, kCudaBlockTiles), joined, count, e, {}};
  __syncwarp();
}

// Slots that the tokens of a block take.
FN_INLINE int slots_of(const Header& header) {
  return header.count > 0 ? (header.count + 15) / 16 * 16 : (header.tiles + 1) / 2 * 16;
}

// A warp: the blocks of a row, and how many they are; kTakeTurns: there is no room for all.
constexpr int kTakeTurns = -1;
template <class T, int D>
FN_INLINE int gather_all(const Problem& p, const CudaTiling& tiling, const Text<T, D>& text, const Row& row,
                          int lane) {
  int blocks = 0, slot = tiling.concepts;
  for (int e = row.begin; blocks != kTakeTurns;) {
    if (blocks == tiling.rosters) {
      blocks = e < row.end ? kTakeTurns : blocks;
      break;
    }
    Roster& roster = text.roster(blocks);
    gather(p, row, e, slot, &roster, lane);
    if (roster.header.tiles == 0) break;
    e = roster.header.next, slot += slots_of(roster.header), ++blocks;
    if (slot > tiling.concepts + tiling.concept_slots) blocks = kTakeTurns;
  }
  return blocks;
}

// All threads: the text of a block; of an entry that is longer than a block `count` tokens from `first` on.
template <class T, int D>
FN_INLINE void load_block(const Problem& p, const Text<T, D>& text, const Roster& roster, int head, int first,
                          int count) {
  const Header& header = roster.header;
  const T* key = reinterpret_cast<const T*>(p.concept_key.data) + head * p.concept_key.head;
  const T* value = reinterpret_cast<const T*>(p.concept_value.data) + head * p.concept_value.head;
  // The token at a place, or -1.
  const auto token_at = [&](int place) {
    if (header.count > 0) return place < count ? roster.slots[0].begin + first + place : -1;
    const Slot& slot = roster.slots[place / 8];
    return place % 8 < slot.count ? slot.begin + place % 8 : -1;
  };
  const int places = header.count > 0 ? count : header.tiles * 8;
  text.load(header.slot, places, [&](int place) {
    const int token = place < places ? token_at(place) : -1;
    const int64_t at = ::max(token, 0);
    const float bias = token < 0 ? -kInfinity : p.token_bias ? __ldg(p.token_bias + at) : 0.f;
    return Token<T>{key + at * p.concept_key.row, value + at * p.concept_value.row, bias};
  });
  if (!p.token_weight) return;
  for (int place = threadIdx.x; place < (places + 15) / 16 * 16; place += blockDim.x) {
    const int token = place < places ? token_at(place) : -1;
    text.weights(header.slot)[place] = token < 0 ? 0.f : __ldg(p.token_weight + token);
  }
}

}  // namespace fastnegate::cuda
