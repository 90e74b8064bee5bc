#include "irlfast/policy_terms.h"

#include <cmath>
#include <cstring>
#include <vector>

#include "isa/policy_spans.h"
#include "isa/sequence_spans.h"
#include "rows.h"

namespace irlfast {
namespace {

struct Sequence {
  int64_t tokens = 0;  // unmasked ones; 0 where the whole is dropped
  double ratio = 1;    // of the sequence, where the term takes it
  PolicySums sums;
};

class Batch {
 public:
  Batch(const PolicyTermsInput& input, const PolicyTermsOptions& options, const PolicyTermsOutput& output, Isa isa)
      : in_(input),
        options_(options),
        out_(output),
        counts_(sequence_spans(isa).count),
        spans_(policy_spans(isa)),
        which_(input.dtype == DType::kFloat64 ? 1 : 0),
        sequences_(size_t(input.segments.count)) {}

  void run(int threads) {
    const Segments& segments = in_.segments;
    const int64_t width = segments.tokens() / std::max<int64_t>(1, segments.count);
    for (int64_t i = 0; i < segments.count; ++i) {
      const bool kept = in_.keep == nullptr || in_.keep[i] != 0;
      const int64_t n = kept ? counts_(in_.mask, segments.begin(i), segments.end(i)) : 0;
      sequences_[size_t(i)].tokens = n;
      tokens_ += n;
      answers_ += n > 0;
    }
    const bool by_token = options_.aggregation == Aggregation::kTokenMean;
    const double own = options_.aggregation == Aggregation::kTokenSum
                           ? 1.0
                           : double(std::max<int64_t>(1, by_token ? tokens_ : answers_));
    denominator_ = options_.denominator != 0 ? options_.denominator : own;
    // A token costs four logits. In a loop the other threads are still awake from the operation before.
    parallel_for(segments.count, task_grain(4 * width), threads, [&](int64_t i) { accumulate(i); });
    report();
  }

 private:
  bool mean_of_tokens() const { return options_.aggregation == Aggregation::kSeqMeanTokenMean; }

  void accumulate(int64_t i) {
    Sequence& sequence = sequences_[size_t(i)];
    const int64_t begin = in_.segments.begin(i), end = in_.segments.end(i);
    if (sequence.tokens == 0) {
      const size_t bytes = size_t(end - begin) * size_t(dtype_size(in_.dtype));
      for (void* gradient : {out_.grad_logprobs, out_.grad_entropy}) {
        if (gradient != nullptr && bytes > 0) {
          std::memset(static_cast<char*>(gradient) + begin * dtype_size(in_.dtype), 0, bytes);
        }
      }
      return;
    }
    PolicySequence constants;
    constants.index = i;
    constants.weight = 1 / (mean_of_tokens() ? denominator_ * double(sequence.tokens) : denominator_);
    const auto difference = spans_.difference[which_];
    if (options_.term == PolicyTerm::kGspo) {
      const double mean = difference(in_.logprobs, in_.old_logprobs, in_.mask, begin, end) / double(sequence.tokens);
      sequence.ratio = std::exp(std::min(std::max(mean, -kMaxLogRatio), kMaxLogRatio));
      constants.ratio = sequence.ratio;
      constants.ratio_moves = std::fabs(mean) <= kMaxLogRatio;
    }
    if (options_.corrects() && options_.sequence_correction) {
      const void* old = in_.old_logprobs != nullptr ? in_.old_logprobs : in_.logprobs;
      constants.gap = difference(old, in_.rollout_logprobs, in_.mask, begin, end);
    }
    sequence.sums = spans_.accumulate[which_](in_, options_, out_, constants);
    if (options_.term == PolicyTerm::kGspo && out_.grad_logprobs != nullptr) {
      // The ratio is that of a mean over the tokens: each has the same share in it.
      const double share = constants.weight * sequence.sums.sum[kSumTermSlope] / double(sequence.tokens);
      spans_.add[which_](out_.grad_logprobs, in_.mask, begin, end, share);
    }
  }

  // In the order of the sequences, whichever thread had them.
  void report() const {
    double sum[kPolicySums] = {}, policy = 0, penalty = 0, entropy = 0;
    double ratio_sum = 0, ratio_squares = 0, ratio_min = INFINITY, ratio_max = -INFINITY, gap_max = 0;
    const bool sequence_ratio = options_.term == PolicyTerm::kGspo;
    for (const Sequence& s : sequences_) {
      if (s.tokens == 0) continue;
      const double divisor = mean_of_tokens() ? double(s.tokens) : 1.0;
      for (int k = 0; k < kPolicySums; ++k) sum[k] += s.sums.sum[k];
      policy += s.sums.sum[kSumPolicy] / divisor;
      penalty += s.sums.sum[kSumPenalty] / divisor;
      entropy += s.sums.sum[kSumEntropy] / divisor;
      const double low = sequence_ratio ? s.ratio : s.sums.ratio_min;
      const double high = sequence_ratio ? low : s.sums.ratio_max;
      ratio_sum += sequence_ratio ? low : s.sums.sum[kSumRatio];
      ratio_squares += sequence_ratio ? low * low : s.sums.sum[kSumRatioSquared];
      if (low < ratio_min || std::isnan(low)) ratio_min = low;
      if (high > ratio_max || std::isnan(high)) ratio_max = high;
      if (s.sums.gap_max > gap_max || std::isnan(s.sums.gap_max)) gap_max = s.sums.gap_max;
    }
    const double tokens = double(std::max<int64_t>(1, tokens_));
    const double ratios = sequence_ratio ? double(answers_) : double(tokens_);
    const bool any = tokens_ > 0, has_ratio = any && in_.old_logprobs != nullptr;
    policy = any ? policy / denominator_ : 0.0;
    double loss = policy;
    if (any && options_.kl_coef != 0) loss += options_.kl_coef * penalty / denominator_;
    if (any && options_.entropy_coef != 0) loss -= options_.entropy_coef * entropy / denominator_;
    Statistic(out_.loss, in_.dtype).set(0, loss);

    const Statistic metrics(out_.metrics, in_.dtype);
    const auto set = [&](PolicyMetric metric, double value) { metrics.set(int64_t(metric), value); };
    set(PolicyMetric::kPolicy, policy);
    set(PolicyMetric::kTokens, double(tokens_));
    set(PolicyMetric::kSequences, double(answers_));
    set(PolicyMetric::kApproxKl, sum[kSumApproxKl] / tokens);
    set(PolicyMetric::kRatioMean, has_ratio ? ratio_sum / ratios : 1.0);
    set(PolicyMetric::kRatioMin, has_ratio ? ratio_min : 1.0);
    set(PolicyMetric::kRatioMax, has_ratio ? ratio_max : 1.0);
    set(PolicyMetric::kEss, has_ratio ? ratio_sum * ratio_sum / (ratios * ratio_squares) : 1.0);
    set(PolicyMetric::kClipFraction, (sum[kSumClipLow] + sum[kSumClipHigh]) / tokens);
    set(PolicyMetric::kClipFractionLow, sum[kSumClipLow] / tokens);
    set(PolicyMetric::kClipFractionHigh, sum[kSumClipHigh] / tokens);
    set(PolicyMetric::kKl, sum[kSumKl] / tokens);
    set(PolicyMetric::kEntropy, sum[kSumEntropy] / tokens);
    set(PolicyMetric::kRolloutGap, sum[kSumGap] / tokens);
    set(PolicyMetric::kRolloutGapMax, gap_max);
    set(PolicyMetric::kRolloutKl, sum[kSumRolloutKl] / tokens);
    set(PolicyMetric::kTisFraction, sum[kSumTis] / tokens);
    set(PolicyMetric::kIcepopFraction, sum[kSumIcepop] / tokens);
  }

  const PolicyTermsInput& in_;
  const PolicyTermsOptions& options_;
  const PolicyTermsOutput& out_;
  SequenceSpans::Count counts_;
  const PolicySpans& spans_;
  int which_;
  std::vector<Sequence> sequences_;
  int64_t tokens_ = 0, answers_ = 0;
  double denominator_ = 1;
};

}  // namespace

void policy_terms(const PolicyTermsInput& input, const PolicyTermsOptions& options, const PolicyTermsOutput& output,
                  int threads, Isa isa) {
  Batch(input, options, output, isa).run(threads);
}

}  // namespace irlfast
