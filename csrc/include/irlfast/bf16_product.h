// The product of two bfloat16 matrices with sums in float32, for processors with AVX512_BF16.
#pragma once

#include <cstdint>

namespace irlfast {

// Element (i, j) at data[i * row_stride + j * column_stride], in elements; one of the strides is 1.
struct Bf16Matrix {
  const void* data = nullptr;
  int64_t row_stride = 1;
  int64_t column_stride = 1;
};

// Compiled in, and supported by both the processor and the operating system's saved register state.
bool bf16_product_available();

struct Bf16Product {
  int64_t rows = 0, columns = 0, depth = 0;
  Bf16Matrix a;             // [rows, depth]
  Bf16Matrix b;             // [depth, columns]
  void* out = nullptr;      // [rows, columns], columns adjacent; overlaps neither a nor b
  int64_t out_stride = 0;   // elements from one row to the next
  bool out_bf16 = false;    // bfloat16, rounded once from the float32 sum, or else float32
  bool accumulate = false;  // add to what out holds
};

// out = a b, or out + a b.
//
// Each element is summed in an order that depends on `depth` alone: equal blocks of at most 1024 terms, each a chain of
// vdpbf16ps from 0, added one after another. So neither the thread count nor how rows or columns are shared out between
// calls shows in the bits. The instruction takes the pair of depths 2 i and 2 i + 1, adds the second product, then the
// first, each exact and each addition rounded to nearest; subnormal operands and results count as 0, subnormal sums in
// `out` and in the blocks' sum do not. With u = 2^-24, blocks of b terms and n of them, an element is off by at most
// (b + n) u sum |a||b| to first order, and by less than 8 u sum |a||b| in practice; a bfloat16 result is then rounded
// once. NaN and infinity spread as in any sum of products.
//
// Needs bf16_product_available(). Scratch: about 6 MiB at most, kept by the calling thread for its next call.
void bf16_product(const Bf16Product& product, int threads);

}  // namespace irlfast
