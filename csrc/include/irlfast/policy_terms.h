// Policy-gradient losses over the log-probs of sampled tokens: loss, gradient and metrics in one sweep.
#pragma once

#include <cstdint>

#include "irlfast/dtype.h"
#include "irlfast/host_device.h"
#include "irlfast/isa.h"
#include "irlfast/segments.h"

namespace irlfast {

// The numbers are those of irlfast/ops/policy_terms.py.
enum class PolicyTerm : int { kReinforce = 0, kPpo = 1, kGspo = 2, kCispo = 3 };
enum class KlEstimator : int { kK1 = 0, kK2 = 1, kK3 = 2 };
enum class Aggregation : int { kTokenMean = 0, kSeqMeanTokenMean = 1, kSeqMeanTokenSum = 2, kTokenSum = 3 };
enum class PolicyMetric : int {
  kPolicy,
  kTokens,
  kSequences,
  kApproxKl,
  kRatioMean,
  kRatioMin,
  kRatioMax,
  kEss,
  kClipFraction,
  kClipFractionLow,
  kClipFractionHigh,
  kKl,
  kEntropy,
  kRolloutGap,
  kRolloutGapMax,
  kRolloutKl,
  kTisFraction,
  kIcepopFraction,
  kCount
};

// Logarithms of ratios are held within +-this before exp.
constexpr double kMaxLogRatio = 20.0;

// Arrays over tokens are float or double, all as `dtype` says; null where they are not given.
struct PolicyTermsInput {
  Segments segments;
  DType dtype = DType::kFloat32;
  const void* logprobs = nullptr;
  const void* old_logprobs = nullptr;  // null: the current ones, detached
  const void* ref_logprobs = nullptr;
  const void* rollout_logprobs = nullptr;
  const void* entropy = nullptr;
  const void* advantages = nullptr;
  bool advantage_per_token = false;  // else one a sequence
  TokenMask mask;
  const uint8_t* keep = nullptr;  // one a sequence; 0 masks the whole of it
};

struct PolicyTermsOptions {
  PolicyTerm term = PolicyTerm::kReinforce;
  double clip_low = 0;
  double clip_high = 0;
  double dual_clip = 0;  // 0 for none
  double kl_coef = 0;
  KlEstimator kl_estimator = KlEstimator::kK2;
  double entropy_coef = 0;
  double tis_cap = 0;  // 0 for none
  double icepop_low = 0;
  double icepop_high = 0;  // 0 for none
  bool sequence_correction = false;
  Aggregation aggregation = Aggregation::kTokenMean;
  double denominator = 0;  // 0 for this batch's own count

  IRLFAST_HOST_DEVICE bool corrects() const { return tis_cap > 0 || icepop_high > 0; }
};

// In the input's type. The gradients may be null where they are not wanted.
struct PolicyTermsOutput {
  void* loss = nullptr;           // 1
  void* metrics = nullptr;        // PolicyMetric::kCount
  void* grad_logprobs = nullptr;  // [tokens]
  void* grad_entropy = nullptr;
};

// Sums run in a fixed order: the thread count shows nowhere.
void policy_terms(const PolicyTermsInput& input, const PolicyTermsOptions& options, const PolicyTermsOutput& output,
                  int threads, Isa isa);

}  // namespace irlfast
