// The pass of policy_terms over the tokens of one sequence, compiled once for each instruction set.
#pragma once

#include <cmath>
#include <cstdint>

#include "irlfast/isa.h"
#include "irlfast/policy_terms.h"

namespace irlfast {

// Sums over the unmasked tokens of a sequence.
enum PolicySum : int {
  kSumPolicy,
  kSumPenalty,  // the KL term as it enters the loss: for k3 times the ratio
  kSumApproxKl,
  kSumRatio,
  kSumRatioSquared,
  kSumClipLow,
  kSumClipHigh,
  kSumKl,
  kSumEntropy,
  kSumGap,
  kSumRolloutKl,
  kSumTis,
  kSumIcepop,
  kSumTermSlope,  // of the policy terms by the logarithm of the sequence's ratio
  kPolicySums
};

struct PolicySums {
  double sum[kPolicySums] = {};
  double ratio_min = INFINITY;
  double ratio_max = -INFINITY;
  double gap_max = 0;
};

// What is one number for the sequence at hand.
struct PolicySequence {
  int64_t index = 0;
  double weight = 0;        // of a token's term in the loss
  double ratio = 1;         // exp of the mean of logp - old, for terms on the sequence's ratio
  bool ratio_moves = true;  // that mean is within +-kMaxLogRatio
  double gap = 0;           // sum of old - rollout, for corrections of the sequence as a whole
};

// For float and for double.
struct PolicySpans {
  using Accumulate = PolicySums (*)(const PolicyTermsInput&, const PolicyTermsOptions&, const PolicyTermsOutput&,
                                    const PolicySequence&);
  // Sum of a - b over the unmasked tokens [begin, end), in double.
  using Difference = double (*)(const void* a, const void* b, const TokenMask&, int64_t begin, int64_t end);
  // gradient += value on the unmasked tokens.
  using Add = void (*)(void* gradient, const TokenMask&, int64_t begin, int64_t end, double value);

  Accumulate accumulate[2];
  Difference difference[2];
  Add add[2];
};

const PolicySpans& policy_spans_baseline();
const PolicySpans& policy_spans_avx2();
const PolicySpans& policy_spans_avx512();
const PolicySpans& policy_spans_avx512_bf16();

const PolicySpans& policy_spans(Isa isa);

}  // namespace irlfast
