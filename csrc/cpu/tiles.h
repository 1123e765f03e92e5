// SPDX-License-Identifier: Apache-2.0
// Tile registers (Intel AMX): eight of 16 rows of 64 bytes. A product takes 16 rows of 32 bfloat16 and 16 rows of 16
// words of two bfloat16, and adds 16 x 16 sums of 32 products in float32. Like vec.h, included once per instruction
// set, in that set's namespace; only a build with FASTNEGATE_TILES uses them, and only for bfloat16: as operands of
// these products the other types would lose bits that the accuracy budget counts.
//
// Two forms of the same operations: the processor's, and with FASTNEGATE_TILES_EMULATED one in vectors, for tests on
// machines that have no tiles.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "vec.h"

namespace fastnegate::FASTNEGATE_ISA {
namespace {

#if defined(FASTNEGATE_TILES)
constexpr bool kTiles = true;
#else
constexpr bool kTiles = false;
#endif
constexpr int64_t kTileRows = 16;
constexpr int64_t kTileDepth = 32;              // bfloat16 of a row, or two of a word times kTileRows
constexpr int64_t kTileBytes = 64;              // of a row
constexpr int64_t kTileFloats = kTileRows * 16;  // of a tile in memory without gaps

// All eight tiles have full size, whatever is computed: short operands are padded with zeros, which add nothing.
struct TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileShapes) == 64);
alignas(64) constexpr TileShapes kTileShapes;

#if defined(FASTNEGATE_TILES) && !defined(FASTNEGATE_TILES_EMULATED)

// Macros, because the names of registers are part of the instructions' text.
#define tile_configure _tile_loadconfig
#define tile_release _tile_release
#define tile_zero _tile_zero
#define tile_load _tile_loadd
#define tile_store _tile_stored
#define tile_add_product _tile_dpbf16ps

#else

struct TileRegisters {
  bool configured = false;
  uint32_t row[8][kTileRows][16];
};
inline TileRegisters& tile_registers() {
  static thread_local TileRegisters all;
  return all;
}
// Without a configuration the processor would end the program, too.
inline uint32_t (&tile(int t))[kTileRows][16] {
  if (!tile_registers().configured) std::abort();
  return tile_registers().row[t];
}
inline void tile_configure(const TileShapes*) { tile_registers().configured = true; }
inline void tile_release() { tile_registers().configured = false; }
inline void tile_zero(int t) { std::memset(tile(t), 0, sizeof(tile(t))); }
inline void tile_load(int t, const float* from, int64_t stride) {
  for (int64_t m = 0; m < kTileRows; ++m)
    std::memcpy(tile(t)[m], reinterpret_cast<const char*>(from) + m * stride, kTileBytes);
}
inline void tile_store(int t, float* to, int64_t stride) {
  for (int64_t m = 0; m < kTileRows; ++m)
    std::memcpy(reinterpret_cast<char*>(to) + m * stride, tile(t)[m], kTileBytes);
}
// Denormal numbers, given or computed, are zeros.
FN_INLINE F flush(F x) { return select(abs(x) < 0x1p-126f, as_float(as_int(x) & INT32_MIN), x); }
// As Intel's manual has it: both halves of the words apart, each multiply-add rounded, then both sums added to c.
inline void tile_add_product(int c, int a, int b) {
  for (int64_t m = 0; m < kTileRows; ++m)
    for (int64_t n = 0; n < 16; n += W) {
      F sum[2] = {};
      for (int64_t k = 0; k < 16; ++k) {
        U words;
        std::memcpy(&words, &tile(b)[k][n], sizeof(U));
        const U row = U{} + tile(a)[m][k];
        const F low = flush((F)(row << 16)), high = flush((F)(row & 0xffff0000u));
        sum[0] = flush(fma(low, flush((F)(words << 16)), sum[0]));
        sum[1] = flush(fma(high, flush((F)(words & 0xffff0000u)), sum[1]));
      }
      float* at = reinterpret_cast<float*>(&tile(c)[m][n]);
      store(at, flush(load(at) + flush(sum[0] + sum[1])));
    }
}

#endif

// While there is one, and only then, this thread has tile registers: nothing of them is left for whoever runs next.
template <bool kUsed>
struct TilesInUse {
  TilesInUse() { tile_configure(&kTileShapes); }
  ~TilesInUse() { tile_release(); }
  TilesInUse(const TilesInUse&) = delete;
  TilesInUse& operator=(const TilesInUse&) = delete;
};
template <>
struct TilesInUse<false> {};

}  // namespace
}  // namespace fastnegate::FASTNEGATE_ISA
