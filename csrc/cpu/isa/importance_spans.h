// Passes over the samples of a group, compiled once for each instruction set.
#pragma once

#include <cstdint>

#include "irlfast/importance.h"
#include "irlfast/isa.h"

namespace irlfast {

// A group's arrays have space for its samples and on to a multiple of this many.
constexpr int64_t kGroupPadding = 32;

struct GroupWeights {
  double log_normalizer;
  double ess;
};

struct ImportanceSpans {
  // The first i with target[i] - proposal[i] NaN or +inf; `count` without one.
  using FirstInvalid = int64_t (*)(const void* target, const void* proposal, int64_t count);
  // From l [count] in log_ratio, whose padding is filled: weights = softmax(temper clip(l - log Z)), and the shares
  // exp(l - log Z) / count, which they are without clip and temper; the two may be one array then. -inf stays what
  // cannot occur, clipped or not. Padding has weight and share 0.
  using Weigh = GroupWeights (*)(const ImportanceInput& input, double* log_ratio, int64_t count, double* shares,
                                 double* weights);

  FirstInvalid first_invalid[2];  // of float, of double
  Weigh weigh;
};

const ImportanceSpans& importance_spans_baseline();
const ImportanceSpans& importance_spans_avx2();
const ImportanceSpans& importance_spans_avx512();
const ImportanceSpans& importance_spans_avx512_bf16();

const ImportanceSpans& importance_spans(Isa isa);

}  // namespace irlfast
