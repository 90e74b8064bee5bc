// What the sweep of policy_terms leaves of every sequence, and how it becomes loss and metrics.
#pragma once

#include "common/block.cuh"
#include "common/numbers.cuh"
#include "irlfast/policy_terms.h"

namespace irlfast::cuda {

// The sums of a sequence, but for the last three, which are extremes. A sum that is not asked for is 0.
enum PolicySum : int {
  kTokens,
  kPolicy,
  kPenalty,  // the KL term as it enters the loss: for k3 times the ratio
  kApproxKl,
  kRatio,
  kRatioSquared,
  kClipLow,
  kClipHigh,
  kKl,
  kEntropy,
  kGap,
  kRolloutKl,
  kTis,
  kIcepop,
  kRatioMin,
  kRatioMax,
  kGapMax,
  kPolicySums
};
static_assert(kPolicySums == kPolicyPartials, "the workspace has space for all of them");

IRLFAST_DEVICE double merge_policy_sum(int which, double a, double b) {
  if (which == kRatioMin) return b < a ? b : a;
  if (which == kRatioMax || which == kGapMax) return b > a ? b : a;
  return a + b;
}

IRLFAST_DEVICE double empty_policy_sum(int which) {
  return which == kRatioMin ? -minus_infinity<double>() : which == kRatioMax ? minus_infinity<double>() : 0.0;
}

// Every thread's sums made those of the block, for the first thread.
IRLFAST_DEVICE void reduce_policy_sums(double (&sums)[kPolicySums]) {
  __shared__ double of_warp[kPolicySums][kMostWarps];
  const unsigned lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, warps = blockDim.x / kWarpSize;
  __syncthreads();  // nobody still reads what was here before
#pragma unroll
  for (int k = 0; k < kPolicySums; ++k) {
    sums[k] = warp_reduce(sums[k], [&](double a, double b) { return merge_policy_sum(k, a, b); });
    if (lane == 0) of_warp[k][warp] = sums[k];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kPolicySums; ++k) {
    sums[k] = lane < warps ? of_warp[k][lane] : empty_policy_sum(k);
    sums[k] = warp_reduce(sums[k], [&](double a, double b) { return merge_policy_sum(k, a, b); });
  }
}

// One block: adds up the sequences' sums, each thread every blockDim.x-th, and writes loss, metrics and scale.
template <typename Real>
IRLFAST_DEVICE void report_policy_terms(int64_t sequences, bool has_old, const PolicyTermsOptions& options,
                                        const PolicyTermsOutput& output, const PolicyTermsWorkspace& workspace) {
  const bool by_sequence = options.term == PolicyTerm::kGspo;  // whose ratio is one number
  const bool mean_of_tokens = options.aggregation == Aggregation::kSeqMeanTokenMean;
  const volatile double* partials = workspace.partials;  // written by other blocks of this launch
  double sums[kPolicySums], policy = 0, penalty = 0, bonus = 0, answers = 0;
#pragma unroll
  for (int k = 0; k < kPolicySums; ++k) sums[k] = empty_policy_sum(k);
  for (int64_t i = threadIdx.x; i < sequences; i += blockDim.x) {
    const volatile double* own = partials + i * kPolicySums;
    const double tokens = own[kTokens];
    if (tokens == 0) continue;
    const double share = mean_of_tokens ? tokens : 1.0;
#pragma unroll
    for (int k = 0; k < kPolicySums; ++k) sums[k] = merge_policy_sum(k, sums[k], own[k]);
    policy += own[kPolicy] / share;
    penalty += own[kPenalty] / share;
    bonus += own[kEntropy] / share;
    answers += 1;
  }
  reduce_policy_sums(sums);
  policy = block_sum(policy);
  penalty = block_sum(penalty);
  bonus = block_sum(bonus);
  answers = block_sum(answers);
  if (threadIdx.x != 0) return;

  const bool any = sums[kTokens] > 0;
  const double tokens = larger(sums[kTokens], 1.0), sequences_with = larger(answers, 1.0);
  double denominator = options.denominator;
  if (workspace.denominator != nullptr) {
    denominator = double(*static_cast<const Real*>(workspace.denominator));
    if (!(denominator > 0)) denominator = not_a_number<double>();
  } else if (denominator == 0) {
    denominator = options.aggregation == Aggregation::kTokenSum    ? 1.0
                  : options.aggregation == Aggregation::kTokenMean ? tokens
                                                                   : sequences_with;
  }
  const double mean_policy = any ? policy / denominator : 0.0;
  double loss = mean_policy;
  if (any && options.kl_coef != 0) loss += options.kl_coef * penalty / denominator;
  if (any && options.entropy_coef != 0) loss -= options.entropy_coef * bonus / denominator;
  *static_cast<Real*>(output.loss) = Real(loss);
  *static_cast<Real*>(workspace.scale) = Real(1 / denominator);

  const bool has_ratio = any && has_old;
  const double ratios = by_sequence ? sequences_with : tokens, ratio = sums[kRatio];
  // An extreme forgets a NaN, a sum does not.
  const auto extreme = [](double value, double sum) { return sum != sum ? sum : value; };
  Real* metrics = static_cast<Real*>(output.metrics);
  const auto put = [&](PolicyMetric metric, double value) { metrics[int(metric)] = Real(value); };
  put(PolicyMetric::kPolicy, mean_policy);
  put(PolicyMetric::kTokens, sums[kTokens]);
  put(PolicyMetric::kSequences, answers);
  put(PolicyMetric::kApproxKl, sums[kApproxKl] / tokens);
  put(PolicyMetric::kRatioMean, has_ratio ? ratio / ratios : 1.0);
  put(PolicyMetric::kRatioMin, has_ratio ? extreme(sums[kRatioMin], ratio) : 1.0);
  put(PolicyMetric::kRatioMax, has_ratio ? extreme(sums[kRatioMax], ratio) : 1.0);
  put(PolicyMetric::kEss, has_ratio ? ratio * ratio / (ratios * sums[kRatioSquared]) : 1.0);
  put(PolicyMetric::kClipFraction, (sums[kClipLow] + sums[kClipHigh]) / tokens);
  put(PolicyMetric::kClipFractionLow, sums[kClipLow] / tokens);
  put(PolicyMetric::kClipFractionHigh, sums[kClipHigh] / tokens);
  put(PolicyMetric::kKl, sums[kKl] / tokens);
  put(PolicyMetric::kEntropy, sums[kEntropy] / tokens);
  put(PolicyMetric::kRolloutGap, sums[kGap] / tokens);
  put(PolicyMetric::kRolloutGapMax, extreme(sums[kGapMax], sums[kGap]));
  put(PolicyMetric::kRolloutKl, sums[kRolloutKl] / tokens);
  put(PolicyMetric::kTisFraction, sums[kTis] / tokens);
  put(PolicyMetric::kIcepopFraction, sums[kIcepop] / tokens);
}

}  // namespace irlfast::cuda
