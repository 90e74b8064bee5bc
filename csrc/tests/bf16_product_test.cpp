// The bfloat16 product against plain loops that round as it documents: the same bits, for sizes on both sides of every
// tile, task, panel and block, every layout and thread count. Operands and results are allocations of exactly the size
// used.
#include "irlfast/bf16_product.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>

#include "tests.h"

namespace {

constexpr uint16_t kUntouched = 0x7fc1;  // a NaN that no sum yields

float widen(uint16_t half) {
  const uint32_t wide = uint32_t(half) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

uint16_t round_to_bf16(float value) {
  uint32_t wide;
  std::memcpy(&wide, &value, sizeof wide);
  return uint16_t((wide + 0x7fff + (wide >> 16 & 1)) >> 16);
}

// Blocks of the depth, each a chain from 0 in which the second of a pair comes first.
float expected(const irlfast::Bf16Product& p, int64_t row, int64_t column, float addend) {
  const auto* a = static_cast<const uint16_t*>(p.a.data);
  const auto* b = static_cast<const uint16_t*>(p.b.data);
  const auto term = [&](int64_t k, float sum) {
    if (k >= p.depth) return sum;
    return std::fma(widen(a[row * p.a.row_stride + k * p.a.column_stride]),
                    widen(b[k * p.b.row_stride + column * p.b.column_stride]), sum);
  };
  const int64_t blocks = (p.depth + 1023) / 1024;
  const int64_t length = blocks == 0 ? 1 : ((p.depth + blocks - 1) / blocks + 31) / 32 * 32;
  float total = addend;
  for (int64_t begin = 0; begin < p.depth; begin += length) {
    float sum = 0;
    for (int64_t k = begin; k < begin + length; k += 2) sum = term(k, term(k + 1, sum));
    total += sum;
  }
  return total;
}

struct Case {
  int64_t rows, columns, depth;
  int variant;
};

bool right(const Case& c, int threads, std::mt19937& random) {
  const bool a_transposed = c.variant & 1, b_transposed = c.variant & 2, accumulate = c.variant & 4;
  const bool out_bf16 = c.variant & 8;
  const int64_t gap = c.variant & 16 ? 3 : 0;
  irlfast::Bf16Product p;
  p.rows = c.rows;
  p.columns = c.columns;
  p.depth = c.depth;
  p.accumulate = accumulate;
  p.out_bf16 = out_bf16;
  const int64_t a_lines = a_transposed ? c.depth : c.rows, a_length = a_transposed ? c.rows : c.depth;
  const int64_t b_lines = b_transposed ? c.columns : c.depth, b_length = b_transposed ? c.depth : c.columns;
  const auto fill = [&](int64_t lines, int64_t length) {
    // Nothing after the last line's last element.
    const int64_t size = lines > 0 && length > 0 ? (lines - 1) * (length + gap) + length : 0;
    std::unique_ptr<uint16_t[]> data(new uint16_t[size_t(size)]);
    for (int64_t i = 0; i < size; ++i) data[size_t(i)] = uint16_t((random() & 0x807f) | (124 + random() % 5) << 7);
    return data;
  };
  const auto a = fill(a_lines, a_length), b = fill(b_lines, b_length);
  p.a = {a.get(), a_transposed ? 1 : a_length + gap, a_transposed ? a_length + gap : 1};
  p.b = {b.get(), b_transposed ? 1 : b_length + gap, b_transposed ? b_length + gap : 1};
  p.out_stride = c.columns + gap;

  const int64_t size = (c.rows - 1) * p.out_stride + c.columns;
  std::unique_ptr<uint16_t[]> halves(new uint16_t[size_t(out_bf16 ? size : 0)]);
  std::unique_ptr<float[]> floats(new float[size_t(out_bf16 ? 0 : size)]);
  std::unique_ptr<float[]> before(new float[size_t(size)]);
  for (int64_t i = 0; i < size; ++i) {
    const bool inside = i % p.out_stride < c.columns;
    const auto half = inside ? uint16_t((random() & 0x807f) | 127 << 7) : kUntouched;
    before[size_t(i)] = widen(half);
    if (out_bf16) {
      halves[size_t(i)] = half;
    } else {
      floats[size_t(i)] = before[size_t(i)];
    }
  }
  p.out = out_bf16 ? static_cast<void*>(halves.get()) : floats.get();
  irlfast::bf16_product(p, threads);

  for (int64_t i = 0; i < size; ++i) {
    const int64_t row = i / p.out_stride, column = i % p.out_stride;
    const bool inside = column < c.columns;
    const float value = inside ? expected(p, row, column, accumulate ? before[size_t(i)] : 0) : before[size_t(i)];
    // Compared as bits: the untouched are NaN.
    const bool same = out_bf16 ? halves[size_t(i)] == (inside ? round_to_bf16(value) : kUntouched)
                               : std::memcmp(&floats[size_t(i)], &value, sizeof value) == 0;
    if (same) continue;
    const float found = out_bf16 ? widen(halves[size_t(i)]) : floats[size_t(i)];
    std::fprintf(stderr, "FAILED: bf16_product %ldx%ldx%ld variant %d threads %d: [%ld, %ld] = %.9g, expected %.9g\n",
                 long(c.rows), long(c.columns), long(c.depth), c.variant, threads, long(row), long(column),
                 double(found), double(value));
    return false;
  }
  return true;
}

}  // namespace

int bf16_product_failures(int& cases) {
  if (!irlfast::bf16_product_available()) {
    std::printf("bf16_product: not supported by this machine, skipped\n");
    return 0;
  }
  std::mt19937 random(20241018);
  int failures = 0;
  const auto check = [&](const Case& c, int threads) {
    failures += !right(c, threads, random);
    ++cases;
  };
  // Tiles of 6 x 64 in vectors of 16, pairs and lines of 32 along the depth; every layout, sum and type.
  for (int64_t rows : {1, 6, 7, 17}) {
    for (int64_t columns : {1, 16, 31, 33, 64, 65}) {
      for (int64_t depth : {0, 1, 2, 31, 32, 33, 65}) {
        for (int variant = 0; variant < 32; ++variant) check({rows, columns, depth, variant}, 1);
      }
    }
  }
  // Packing by 192 rows and 128 columns, tasks of 192 x 256, panels of 1024 x 2048 (768 x 768 beside sums in float32),
  // one, two and three blocks of the depth; variants with each layout, each sum and each type.
  for (int variant : {1, 2, 4, 8 + 1, 8 + 4 + 2, 16}) {
    for (int threads : {1, 3}) {
      check({200, 260, 33, variant}, threads);
      check({1030, 3, 40, variant}, threads);
      check({8, 2050, 40, variant}, threads);
      check({7, 70, 1024, variant}, threads);
      check({13, 65, 1025, variant}, threads);
      check({3, 5, 2049, variant}, threads);
    }
  }
  check({770, 2, 1026, 8 + 4}, 2);
  check({2, 770, 1026, 8 + 4 + 3}, 2);
  return failures;
}
