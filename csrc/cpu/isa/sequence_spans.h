// Passes over the tokens of one sequence, compiled once for each instruction set.
#pragma once

#include <cstdint>

#include "irlfast/dtype.h"
#include "irlfast/isa.h"
#include "irlfast/segments.h"

namespace irlfast {

struct MaskedSum {
  double sum = 0;
  int64_t count = 0;
};

struct SequenceSpans {
  // Over tokens [begin, end) of the array and the mask.
  using Sum = MaskedSum (*)(const void* values, const TokenMask& mask, int64_t begin, int64_t end);
  using Count = int64_t (*)(const TokenMask& mask, int64_t begin, int64_t end);
  // values[t] = value where the mask is not zero, else 0.
  using Spread = void (*)(void* values, const TokenMask& mask, int64_t begin, int64_t end, double value);

  Sum sum[kDTypes];
  Count count;
  Spread spread[kDTypes];
};

const SequenceSpans& sequence_spans_baseline();
const SequenceSpans& sequence_spans_avx2();
const SequenceSpans& sequence_spans_avx512();
const SequenceSpans& sequence_spans_avx512_bf16();

const SequenceSpans& sequence_spans(Isa isa);

}  // namespace irlfast
