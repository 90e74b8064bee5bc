// Packing and register tiles of the bfloat16 matrix product, for processors with AVX512_BF16.
#pragma once

#include <cstdint>

namespace irlfast {

// One register tile is kTileRows x kTileColumns results: 24 vectors of sums, 4 of B and one of A in 32 registers, and
// 10 loads for 24 multiplications, so that loads are not the limit.
constexpr int64_t kTileRows = 6;
constexpr int64_t kTileColumns = 64;

// A packed row is cut into lines of this many pairs along k, one cache line.
constexpr int64_t kLinePairs = 16;

// Pairs along k that `depth` values make, and words that a packed row of them takes. Internal to the including file, as
// what vec.h has is.
namespace {

constexpr int64_t packed_pairs(int64_t depth) {
  return (depth + 1) / 2;
}
constexpr int64_t packed_row_words(int64_t depth) {
  return (packed_pairs(depth) + kLinePairs - 1) / kLinePairs * kLinePairs;
}

}  // namespace

// Where a matrix lies: element (i, k) of A, or (k, i) of B, at data[i * stride + k * depth_stride]; one of both is 1.
struct Bf16Operand {
  const uint16_t* data;
  int64_t stride;
  int64_t depth_stride;
};

// Packs `depth` values of `count` rows or columns, in tiles one after another, as pairs along k (the second of the last
// pair 0 where depth is odd). A tile's rows of A: [depth / 32 lines][kTileRows][kLinePairs]; its columns of B: [depth /
// 2 pairs][kTileColumns]. The last tile is filled up with zeros. `packed` begins at a multiple of 64 bytes.
void pack_bf16_rows(const Bf16Operand& a, int64_t count, int64_t depth, uint32_t* packed);
void pack_bf16_columns(const Bf16Operand& b, int64_t count, int64_t depth, uint32_t* packed);

// float32 or bfloat16, rows `stride` elements apart; data is null where there is nothing.
struct TileMatrix {
  void* data;
  int64_t stride;
  bool bf16;
};

// result = A B + addend for the upper left rows x columns of a tile. result may be addend.
void bf16_tile(const uint32_t* packed_rows, const uint32_t* packed_columns, int64_t depth, int64_t rows,
               int64_t columns, const TileMatrix& addend, const TileMatrix& result);

}  // namespace irlfast
