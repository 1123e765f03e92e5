// SPDX-License-Identifier: Apache-2.0
// Inner products of Z and the features F = p V of a block's entries, without F: <Z, F> = p (Z V'), |F|^2 = p G p';
// G = V V' is the Gram matrix of the values, made once a head.
#pragma once

#include "cuda/kernel/weights.cuh"

namespace fastnegate::cuda {

// As in section 10 of the definition: the Gram matrix is used to 2^-16 at least.
constexpr float kCancels = 1e-3f;

// A warp: the Gram matrix of the values of a block whose text is there, in two halves. Values are divided by their
// norms, and norms by a power of two for each entry, so that all is at most 1: float16 would not hold squares.
template <class T, int D>
FN_INLINE void make_gram(const Text<T, D>& text, Roster& roster, T* gram, int lane) {
  const Header header = roster.header;
  const int g = lane / 4, t = lane % 4, halves = (header.tiles + 1) / 2;
  const ptx::Address values = text.values(header.slot);
  float* norms = text.norms(header.slot);
  float s[2][4];
  // Products of the tokens 16 `half` ... with those 16 `other` ...
  const auto multiply = [&](int half, int other) {
    constexpr int kHalf = 16 * cuda_row(D) * 2;
    Stored<T, D> left;
    left.load(values + half * kHalf, lane);
    const ptx::Address right = values + other * kHalf;
    score<T, D, 0>(left, column_of<D>(right, lane), last_column_of<D>(right, lane), s[0], s[1]);
  };
#pragma unroll 1
  for (int half = 0; half < halves; ++half) {
    multiply(half, half);
    if (t == g / 2) {  // the diagonal
      norms[16 * half + g] = sqrt(g % 2 ? s[0][1] : s[0][0]);
      norms[16 * half + g + 8] = sqrt(g % 2 ? s[1][3] : s[1][2]);
    }
  }
  __syncwarp();
  const float norm = lane < 16 * halves ? norms[lane] : 0.f;
  float most = norm;
  most = top_of_row(most);
  most = fmaxf(most, ptx::exchange<4>(most));
  const int tiles = roster.slots[lane / 8].tiles;
  const float pair = fmaxf(most, ptx::exchange<8>(most)), four = fmaxf(pair, ptx::exchange<16>(pair));
  most = tiles == 1 ? most : tiles == 2 ? pair : four;
  const float scale = most > 0.f ? __uint_as_float((__float_as_uint(most) & 0x7f800000u) + 0x800000u) : 1.f;
  const float inverse = divide(1.f, norm);
  if (lane < 16 * halves) norms[lane] = norm * ptx::reciprocal(scale);
  if (lane % 8 == 0) roster.slots[lane / 8].scale = scale;
#pragma unroll 1
  for (int i = 0; i < halves * halves; ++i) {
    const int half = i / halves, other = i % halves;
    if (half != other && !(header.joined & kFour)) continue;
    multiply(half, other);
#pragma unroll
    for (int tile = 0; tile < 2; ++tile)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = 16 * half + g + 8 * r, column = 16 * other + 8 * tile + 2 * t;
        const bool together = row / 8 == column / 8 || (header.joined & (kFour | (half ? kLastTwo : kFirstTwo)));
        const float of_row = __shfl_sync(~0u, inverse, row), first = __shfl_sync(~0u, inverse, column),
                    second = __shfl_sync(~0u, inverse, column + 1);
        const float x = together ? s[tile][2 * r] * of_row * first : 0.f;
        const float y = together ? s[tile][2 * r + 1] * of_row * second : 0.f;
        const uint32_t high = ptx::pack<T>(x, y);
        T* to = gram + row * kCudaGramRow + column;
        *reinterpret_cast<uint32_t*>(to) = high;
        *reinterpret_cast<uint32_t*>(to + kCudaBlockTokens) =
            ptx::pack<T>(x - ptx::low<T>(high), y - ptx::high<T>(high));
      }
  }
}

template <class T, int D>
class Products {
 public:
  // `mine` is the slot of the lane's tile.
  FN_INLINE Products(const Launch& launch, const Text<T, D>& text, const Weights<T, D>& p, const Rows<D>& z,
                     const Slot& mine, int lane)
      : l(launch), text(text), p(p), z(z), mine(mine), lane(lane), t(lane % 4) {}

  // Of the lane's entry, whose mass is known.
  FN_INLINE void measure(int block, const Header& header, const float (&mass)[2], const float (&inverse)[2],
                         float (&zf)[2], float (&ff)[2]) const {
    const Piece<D> piece = text.piece(header.slot, lane);
    const ptx::Address column = piece.column + l.tiling.values, last = piece.last_column + l.tiling.values;
    const float* norms = text.norms(header.slot) + 2 * t;
    Packed<T, D> rounded_z;
    rounded_z.round(z);
    float scaled[4][4], product[4][4];
    uint32_t packed[2][4];
    repeat<2>([&](auto pair) {
      constexpr int j = 2 * pair.value;
      if (j > 0 && j >= header.tiles) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
          scaled[j][i] = scaled[j + 1][i] = product[j][i] = product[j + 1][i] = 0.f, packed[pair.value][i] = 0;
        return;
      }
      score<T, D, pair.value>(rounded_z, column, last, product[j], product[j + 1]);
#pragma unroll
      for (int i = j; i < j + 2; ++i) {
        const float2 n = *reinterpret_cast<const float2*>(norms + i * 8);
        scaled[i][0] = p.at[i][0] * n.x, scaled[i][1] = p.at[i][1] * n.y;
        scaled[i][2] = p.at[i][2] * n.x, scaled[i][3] = p.at[i][3] * n.y;
      }
      pack_pair<T>(scaled[j], scaled[j + 1], packed[pair.value]);
    });
    sum_tiles(mine, header.joined, t, [&](int i, int j) { return p.at[i][j] * product[i][j]; }, zf);
    multiply(block, header, packed, product);
    sum_tiles(mine, header.joined, t, [&](int i, int j) { return scaled[i][j] * product[i][j]; }, ff);
    bool small = l.problem.token_weight;
#pragma unroll
    for (int r = 0; r < 2; ++r) small |= mine.entry >= 0 && ff[r] < kCancels * mass[r] * mass[r];
    const bool cancel = __any_sync(~0u, small) && values_cancel(header, norms, ff);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float unit = mine.scale * inverse[r];
      zf[r] *= inverse[r], ff[r] *= unit * unit;
    }
    if (cancel) measure_features(header, inverse, zf, ff);
  }

 private:
  const Launch& l;
  const Text<T, D>& text;
  const Weights<T, D>& p;
  const Rows<D>& z;
  const Slot& mine;
  const int lane, t;

  // scaled G, tile after tile; G only has what is within entries, so that of a pair, or of all four tiles.
  FN_INLINE void multiply(int block, const Header& header, const uint32_t (&packed)[2][4],
                          float (&product)[4][4]) const {
    const ptx::Address row = ptx::address(text.gram(block)) +
                             (lane % 8 * kCudaGramRow + lane / 16 * kCudaBlockTokens + lane / 8 % 2 * 8) * 2;
    repeat<4>([&](auto tile) {
      constexpr int i = tile.value, kRow = i * 8 * kCudaGramRow * 2, kOwn = i / 2, kOther = 1 - kOwn;
      if (i > 1 && header.tiles <= 2) return;
      uint32_t m[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) product[i][j] = 0.f;
      ptx::load_matrices<kRow + kOwn * 32>(m, row);
      ptx::multiply<T>(product[i], packed[kOwn], m[0], m[1], product[i]);
      ptx::multiply<T>(product[i], packed[kOwn], m[2], m[3], product[i]);
      if (header.joined & kFour) {
        ptx::load_matrices<kRow + kOther * 32>(m, row);
        ptx::multiply<T>(product[i], packed[kOther], m[0], m[1], product[i]);
        ptx::multiply<T>(product[i], packed[kOther], m[2], m[3], product[i]);
      }
    });
  }

  // Whether for some query the values of an entry, so weighted, cancel: |F| is small beside what it would be if they
  // were parallel. That is at most the mass, which is known without this, if weights of values are at most 1.
  FN_INLINE bool values_cancel(const Header& header, const float* norms, const float (&ff)[2]) const {
    float parallel[2];
    sum_tiles(mine, header.joined, t, [&](int i, int j) {
      return i / 2 * 2 < header.tiles ? fabsf(p.at[i][j] * norms[i * 8 + j % 2]) : 0.f;
    }, parallel);
    return __any_sync(~0u, mine.entry >= 0 && (ff[0] < kCancels * parallel[0] * parallel[0] ||
                                               ff[1] < kCancels * parallel[1] * parallel[1]));
  }

  // Then F itself is made, of one entry after the other.
  FN_INLINE void measure_features(const Header& header, const float (&inverse)[2], float (&zf)[2],
                                  float (&ff)[2]) const {
#pragma unroll 1
    for (int i = 0; i < header.tiles; ++i) {
      if (!__any_sync(~0u, mine.entry >= 0 && t == i && t % mine.tiles == 0)) continue;
      const bool own_entry = (t & ~(mine.tiles - 1)) == i;
      const float b[2] = {own_entry ? inverse[0] : 0.f, own_entry ? inverse[1] : 0.f};
      Rows<D> f;
      f.clear();
      p.add(header.slot, header.tiles, b, f);
      float with_z[2], with_f[2];
      inner(z, f, with_z);
      inner(f, f, with_f);
#pragma unroll
      for (int r = 0; r < 2; ++r) zf[r] = own_entry ? with_z[r] : zf[r], ff[r] = own_entry ? with_f[r] : ff[r];
    }
  }
};

}  // namespace fastnegate::cuda
