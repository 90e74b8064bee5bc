#include "isa/bf16_tiles.h"

#include <immintrin.h>

namespace irlfast {
namespace {

constexpr int kLanes = 16;
constexpr int kVectors = int(kTileColumns) / kLanes;

#define IRLFAST_INLINE inline __attribute__((always_inline))

IRLFAST_INLINE __mmask16 first_lanes(int64_t n) {
  return n >= kLanes ? __mmask16(0xffff) : n <= 0 ? __mmask16(0) : __mmask16((1u << n) - 1);
}

// `n` bfloat16 values, and zeros after them.
IRLFAST_INLINE __m512i load_halves(const uint16_t* data, int64_t n) {
  if (n >= 32) return _mm512_loadu_si512(data);
  return _mm512_maskz_loadu_epi16(n <= 0 ? __mmask32(0) : __mmask32((1u << n) - 1), data);
}

// Words [i][j] become [j][i].
IRLFAST_INLINE void transpose(__m512i (&x)[16]) {
  __m512i t[16];
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    const __m512i ab_low = _mm512_unpacklo_epi32(x[i], x[i + 1]), ab_high = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    const __m512i cd_low = _mm512_unpacklo_epi32(x[i + 2], x[i + 3]);
    const __m512i cd_high = _mm512_unpackhi_epi32(x[i + 2], x[i + 3]);
    // t[i + j]: in each quarter q, column 4 q + j of rows i to i + 3.
    t[i] = _mm512_unpacklo_epi64(ab_low, cd_low);
    t[i + 1] = _mm512_unpackhi_epi64(ab_low, cd_low);
    t[i + 2] = _mm512_unpacklo_epi64(ab_high, cd_high);
    t[i + 3] = _mm512_unpackhi_epi64(ab_high, cd_high);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512i even_top = _mm512_shuffle_i32x4(t[j], t[j + 4], 0x88);
    const __m512i odd_top = _mm512_shuffle_i32x4(t[j], t[j + 4], 0xdd);
    const __m512i even_bottom = _mm512_shuffle_i32x4(t[j + 8], t[j + 12], 0x88);
    const __m512i odd_bottom = _mm512_shuffle_i32x4(t[j + 8], t[j + 12], 0xdd);
    x[j] = _mm512_shuffle_i32x4(even_top, even_bottom, 0x88);
    x[j + 4] = _mm512_shuffle_i32x4(odd_top, odd_bottom, 0x88);
    x[j + 8] = _mm512_shuffle_i32x4(even_top, even_bottom, 0xdd);
    x[j + 12] = _mm512_shuffle_i32x4(odd_top, odd_bottom, 0xdd);
  }
}

// 32 values at k and the 32 below them at k + 1 as pairs: the first 16 pairs in `low`, the others in `high`.
IRLFAST_INLINE void interleave(__m512i first, __m512i second, __m512i& low, __m512i& high) {
  const __m512i lower = _mm512_unpacklo_epi16(first, second), upper = _mm512_unpackhi_epi16(first, second);
  const __m512i order = _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0);
  const __m512i order_high = _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4);
  low = _mm512_permutex2var_epi64(lower, order, upper);
  high = _mm512_permutex2var_epi64(lower, order_high, upper);
}

// How far ahead operands are fetched: their rows are too short for the processor to foresee the next one.
constexpr int64_t kRowsAhead = 4, kPairsAhead = 16, kDepthsAhead = 128;

// May point outside the matrix, which does no harm.
IRLFAST_INLINE void prefetch(const uint16_t* data, int64_t offset) {
  _mm_prefetch(reinterpret_cast<const char*>(uintptr_t(data) + uintptr_t(offset) * sizeof *data), _MM_HINT_T0);
}

// The pairs of up to 32 neighbours for the pair of depths at k, where neighbours are adjacent in memory.
IRLFAST_INLINE void load_pairs(const Bf16Operand& x, int64_t i, int64_t n, int64_t k, int64_t depth, __m512i& low,
                               __m512i& high) {
  if (k >= depth) {
    low = high = _mm512_setzero_si512();
    return;
  }
  const uint16_t* first = x.data + k * x.depth_stride + i;
  const __m512i second = k + 1 < depth ? load_halves(first + x.depth_stride, n) : _mm512_setzero_si512();
  interleave(load_halves(first, n), second, low, high);
}

template <bool kMasked>
IRLFAST_INLINE __m512 load_result(const TileMatrix& x, int64_t row, int64_t column, __mmask16 lanes) {
  const int64_t at = row * x.stride + column;
  if (x.bf16) {
    const auto* data = static_cast<const uint16_t*>(x.data) + at;
    const __m256i halves =
        kMasked ? _mm256_maskz_loadu_epi16(lanes, data) : _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
  }
  const auto* data = static_cast<const float*>(x.data) + at;
  return kMasked ? _mm512_maskz_loadu_ps(lanes, data) : _mm512_loadu_ps(data);
}

template <bool kMasked>
IRLFAST_INLINE void store_result(const TileMatrix& x, int64_t row, int64_t column, __mmask16 lanes, __m512 value) {
  const int64_t at = row * x.stride + column;
  if (x.bf16) {
    auto* data = static_cast<uint16_t*>(x.data) + at;
    const __m256i halves = (__m256i)_mm512_cvtneps_pbh(value);
    if (kMasked) {
      _mm256_mask_storeu_epi16(data, lanes, halves);
    } else {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(data), halves);
    }
    return;
  }
  auto* data = static_cast<float*>(x.data) + at;
  if (kMasked) {
    _mm512_mask_storeu_ps(data, lanes, value);
  } else {
    _mm512_storeu_ps(data, value);
  }
}

template <int kRows, bool kMasked>
IRLFAST_INLINE void write_tile(const __m512 (&sums)[kRows][kVectors], int64_t columns, const TileMatrix& addend,
                               const TileMatrix& result) {
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const __mmask16 lanes = first_lanes(columns - v * kLanes);
      __m512 sum = sums[r][v];
      if (addend.data) sum = _mm512_add_ps(load_result<kMasked>(addend, r, v * kLanes, lanes), sum);
      store_result<kMasked>(result, r, v * kLanes, lanes, sum);
    }
  }
}

template <int kRows>
void tile(const uint32_t* a, const uint32_t* b, int64_t depth, int64_t columns, const TileMatrix& addend,
          const TileMatrix& result) {
  const int element = result.bf16 ? 2 : 4;
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    const char* line = static_cast<const char*>(result.data) + r * result.stride * element;
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) _mm_prefetch(line + v * kLanes * element, _MM_HINT_T0);
  }
  __m512 sums[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sums[r][v] = _mm512_setzero_ps();
  }
  int64_t left = packed_pairs(depth);
  while (left > 0) {
    const int64_t pairs = left < kLinePairs ? left : kLinePairs;
    for (int64_t p = 0; p < pairs; ++p) {
      __m512bh columns_of_b[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) columns_of_b[v] = (__m512bh)_mm512_load_si512(b + v * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const __m512bh row_of_a = (__m512bh)_mm512_set1_epi32(int(a[r * kLinePairs + p]));
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], row_of_a, columns_of_b[v]);
      }
      b += kTileColumns;
    }
    a += kTileRows * kLinePairs;
    left -= pairs;
  }
  if (columns == kTileColumns) {
    write_tile<kRows, false>(sums, columns, addend, result);
  } else {
    write_tile<kRows, true>(sums, columns, addend, result);
  }
}

}  // namespace

void pack_bf16_rows(const Bf16Operand& a, int64_t count, int64_t depth, uint32_t* packed) {
  const int64_t panel_words = kTileRows * packed_row_words(depth);
  const int64_t padded = (count + kTileRows - 1) / kTileRows * kTileRows;
  const auto line = [&](int64_t row, int64_t k) {
    return packed + row / kTileRows * panel_words + (k / 32 * kTileRows + row % kTileRows) * kLinePairs;
  };
  if (a.depth_stride == 1) {
    for (int64_t row = 0; row < padded; ++row) {
      for (int64_t k = 0; k < depth; k += 32) {
        prefetch(a.data, (row + kRowsAhead) * a.stride + k);
        _mm512_store_si512(line(row, k),
                           row < count ? load_halves(a.data + row * a.stride + k, depth - k) : _mm512_setzero_si512());
      }
    }
    return;
  }
  // 32 rows of A lie in one cache line, so they are read together.
  for (int64_t k = 0; k < depth; k += 32) {
    for (int64_t row = 0; row < padded; row += 32) {
      __m512i low[16], high[16];
#pragma GCC unroll 16
      for (int p = 0; p < 16; ++p) load_pairs(a, row, count - row, k + 2 * p, depth, low[p], high[p]);
      transpose(low);
      transpose(high);
      for (int r = 0; r < 16; ++r) {
        if (row + r < padded) _mm512_store_si512(line(row + r, k), low[r]);
        if (row + 16 + r < padded) _mm512_store_si512(line(row + 16 + r, k), high[r]);
      }
    }
  }
}

void pack_bf16_columns(const Bf16Operand& b, int64_t count, int64_t depth, uint32_t* packed) {
  const int64_t panel_words = kTileColumns * packed_pairs(depth);
  const int64_t padded = (count + kTileColumns - 1) / kTileColumns * kTileColumns;
  const auto line = [&](int64_t column, int64_t k) {
    return packed + column / kTileColumns * panel_words + k / 2 * kTileColumns + column % kTileColumns;
  };
  if (b.depth_stride != 1) {
    for (int64_t k = 0; k < depth; k += 2) {
      for (int64_t column = 0; column < padded; column += 32) {
        prefetch(b.data, column + (k + 2 * kPairsAhead) * b.depth_stride);
        prefetch(b.data, column + (k + 2 * kPairsAhead + 1) * b.depth_stride);
        __m512i low, high;
        load_pairs(b, column, count - column, k, depth, low, high);
        _mm512_store_si512(line(column, k), low);
        _mm512_store_si512(line(column + kLanes, k), high);
      }
    }
    return;
  }
  for (int64_t column = 0; column < padded; column += kLanes) {
    for (int64_t k = 0; k < depth; k += 32) {
      __m512i words[16];
#pragma GCC unroll 16
      for (int j = 0; j < 16; ++j) {
        const int64_t at = (column + j) * b.stride + k;
        prefetch(b.data, at + kDepthsAhead);
        words[j] = column + j < count ? load_halves(b.data + at, depth - k) : _mm512_setzero_si512();
      }
      transpose(words);
      for (int p = 0; p < 16; ++p) {
        if (k + 2 * p < depth) _mm512_store_si512(line(column, k + 2 * p), words[p]);
      }
    }
  }
}

void bf16_tile(const uint32_t* packed_rows, const uint32_t* packed_columns, int64_t depth, int64_t rows,
               int64_t columns, const TileMatrix& addend, const TileMatrix& result) {
  using Tile = void (*)(const uint32_t*, const uint32_t*, int64_t, int64_t, const TileMatrix&, const TileMatrix&);
  static constexpr Tile tiles[kTileRows] = {tile<1>, tile<2>, tile<3>, tile<4>, tile<5>, tile<6>};
  tiles[rows - 1](packed_rows, packed_columns, depth, columns, addend, result);
}

}  // namespace irlfast
