// Policy-gradient losses over the log-probs of sampled tokens: slopes, sums and metrics in one launch; formulas in
// irlfast/ops/policy_terms.py. One block a sequence writes the slopes of all terms, but for the one factor that the
// whole batch alone can tell, 1 / denominator, and the sums of its sequence. The block that ends last adds those up, in
// the order of the sequences whichever it is, and writes loss, metrics and that factor.
//
// Within a sequence the tokens are read once. Terms on the ratio of the sequence as a whole, and corrections of it as a
// whole, read two arrays before; the former go over their gradient once more after, for only then is its sum known.
#include "common/policy_sums.cuh"
#include "common/segments.cuh"

namespace irlfast::cuda {
namespace {

// Unlike fmin and fmax, both let a NaN stay.
template <typename Real>
IRLFAST_DEVICE Real at_most(Real x, Real limit) {
  return x > limit ? limit : x;
}
template <typename Real>
IRLFAST_DEVICE Real at_least(Real x, Real limit) {
  return x < limit ? limit : x;
}

template <typename Real>
IRLFAST_DEVICE Real token(const void* values, int64_t i) {
  return static_cast<const Real*>(values)[i];
}

// Sum of a - b over the tokens that count, the same for every thread.
template <typename Real>
IRLFAST_DEVICE double sum_of_differences(const void* a, const void* b, const TokenMask& mask, const Span& span) {
  double own = 0;
  for (int64_t i = span.begin + threadIdx.x; i < span.end; i += blockDim.x) {
    if (counts(mask, i)) own += double(token<Real>(a, i)) - double(token<Real>(b, i));
  }
  return block_sum(own);
}

// What holds for a whole sequence.
template <typename Real>
struct Sequence {
  double weight = 1;        // of its terms, but for the denominator
  Real advantage = 0;       // where there is one for all its tokens
  Real ratio = 1;           // where the term takes one for all its tokens
  bool ratio_moves = true;  // its logarithm is within the limits
  Real sampled = 1;         // where corrections do
  Real clip_floor = 0, clip_ceiling = 0;
};

// A token's term, its slope by the log-prob (or for a ratio of the whole sequence, by that ratio's logarithm).
template <typename Real>
struct Term {
  Real value = 0, slope = 0;
};

template <typename Real>
IRLFAST_DEVICE Term<Real> clipped_term(const PolicyTermsOptions& options, const Sequence<Real>& sequence,
                                       Real advantage, Real ratio, bool moves, double (&sums)[kPolicySums]) {
  const Real plain = -ratio * advantage;
  const Real clipped = -at_least(at_most(ratio, sequence.clip_ceiling), sequence.clip_floor) * advantage;
  bool stopped = clipped > plain;
  Real value = stopped ? clipped : plain;
  if (options.dual_clip > 0) {
    const Real bound = -Real(options.dual_clip) * advantage;
    const bool beyond = advantage < Real(0) && value > bound;
    value = beyond ? bound : value;
    stopped |= beyond;
  }
  sums[kClipLow] += stopped && ratio < Real(1) ? 1.0 : 0.0;
  sums[kClipHigh] += stopped && ratio > Real(1) ? 1.0 : 0.0;
  return {value, stopped || !moves ? Real(0) : plain};
}

// Adds the penalty's sums; its slope, d being logp - ref.
template <typename Real>
IRLFAST_DEVICE Real add_kl(const PolicyTermsOptions& options, Real d, Real ratio, bool moves,
                           double (&sums)[kPolicySums]) {
  Real kl = d, penalty = d, slope = 0;
  if (options.kl_estimator == KlEstimator::kK2) {
    kl = penalty = Real(0.5) * d * d;
    slope = d;
  } else if (options.kl_estimator == KlEstimator::kK3) {
    const Real held = at_least(d, Real(-kMaxLogRatio)), less_one = std::expm1(-held);
    kl = less_one + held;
    penalty = ratio * kl;
    // Where both move, kl - less_one is d: written so, the large parts of a small sum do not cancel.
    slope = ratio * (held == d ? (moves ? d : -less_one) : (moves ? kl : Real(0)));
  }
  sums[kKl] += double(kl);
  sums[kPenalty] += double(penalty);
  return slope;
}

// A token that counts: adds to the sums, returns the slope by its log-prob.
template <typename Real>
IRLFAST_DEVICE Real add_token(const PolicyTermsInput& in, const PolicyTermsOptions& options,
                              const Sequence<Real>& sequence, int64_t i, double (&sums)[kPolicySums],
                              double& sequence_slope) {
  const Real logprob = token<Real>(in.logprobs, i);
  const Real advantage = in.advantage_per_token ? token<Real>(in.advantages, i) : sequence.advantage;
  Real old = logprob, ratio = 1;
  bool moves = true;
  if (in.old_logprobs != nullptr) {
    old = token<Real>(in.old_logprobs, i);
    const Real difference = logprob - old, below = at_most(difference, Real(kMaxLogRatio));
    const Real held = at_least(below, Real(-kMaxLogRatio));
    moves = held == difference;
    ratio = exp(held);
    sums[kApproxKl] += double(std::expm1(held) - below);
    sums[kRatio] += double(ratio);
    sums[kRatioSquared] += double(ratio) * double(ratio);
    sums[kRatioMin] = merge_policy_sum(kRatioMin, sums[kRatioMin], double(ratio));
    sums[kRatioMax] = merge_policy_sum(kRatioMax, sums[kRatioMax], double(ratio));
  }
  Term<Real> term;
  switch (options.term) {
    case PolicyTerm::kPpo:
      term = clipped_term(options, sequence, advantage, ratio, moves, sums);
      break;
    case PolicyTerm::kGspo:
      term = clipped_term(options, sequence, advantage, sequence.ratio, sequence.ratio_moves, sums);
      break;
    case PolicyTerm::kCispo:
      sums[kClipHigh] += ratio > sequence.clip_ceiling ? 1.0 : 0.0;
      term.slope = -at_most(ratio, sequence.clip_ceiling) * advantage;
      term.value = term.slope * logprob;
      break;
    default:
      term = {-advantage * logprob, -advantage};
  }
  if (in.rollout_logprobs != nullptr) {
    const Real gap = old - token<Real>(in.rollout_logprobs, i), held = at_most(gap, Real(kMaxLogRatio));
    sums[kGap] += double(std::fabs(gap));
    sums[kGapMax] = merge_policy_sum(kGapMax, sums[kGapMax], double(std::fabs(gap)));
    sums[kRolloutKl] += double(std::expm1(held) - held);
    if (options.corrects()) {
      const Real sampled = options.sequence_correction ? sequence.sampled : exp(held);
      const Real cap = Real(options.tis_cap);
      const bool capped = options.tis_cap > 0 && sampled > cap;
      const bool outside =
          options.icepop_high > 0 && (sampled < Real(options.icepop_low) || sampled > Real(options.icepop_high));
      sums[kTis] += capped ? 1.0 : 0.0;
      sums[kIcepop] += outside ? 1.0 : 0.0;
      // Alone, the band lets the ratio itself stand.
      const Real factor = capped ? cap : sampled;
      term.value = outside ? Real(0) : term.value * factor;
      term.slope = outside ? Real(0) : term.slope * factor;
    }
  }
  sums[kPolicy] += double(term.value);
  if (options.term == PolicyTerm::kGspo) {
    sequence_slope += double(term.slope);
    term.slope = 0;
  }
  if (in.ref_logprobs != nullptr) {
    const Real slope = add_kl(options, logprob - token<Real>(in.ref_logprobs, i), ratio, moves, sums);
    term.slope += slope * Real(options.kl_coef);
  }
  if (in.entropy != nullptr) sums[kEntropy] += double(token<Real>(in.entropy, i));
  return term.slope;
}

// The sums of a sequence, for the first thread, and the slopes of its tokens.
template <typename Real>
IRLFAST_DEVICE void sweep_sequence(const PolicyTermsInput& in, const PolicyTermsOptions& options, int64_t tokens,
                                   Real* slopes, Real* entropy_slopes, int64_t i, double (&sums)[kPolicySums]) {
  const Span whole = span_of(in.segments, tokens, i);
  Span span = whole;
  if (in.keep != nullptr && in.keep[i] == 0) span.end = span.begin;  // a sequence that is dropped has no token
  const double count = count_tokens(in.mask, span), inverse = 1 / larger(count, 1.0);
  Sequence<Real> sequence;
  if (options.aggregation == Aggregation::kSeqMeanTokenMean) sequence.weight = inverse;
  if (!in.advantage_per_token) sequence.advantage = token<Real>(in.advantages, i);
  sequence.clip_floor = Real(1 - options.clip_low);
  sequence.clip_ceiling = Real(1 + options.clip_high);
  double sequence_ratio = 1;
  if (options.term == PolicyTerm::kGspo) {
    const double mean = sum_of_differences<Real>(in.logprobs, in.old_logprobs, in.mask, span) * inverse;
    const double held = at_least(at_most(mean, kMaxLogRatio), -kMaxLogRatio);
    sequence_ratio = exp(held);
    sequence.ratio = Real(sequence_ratio);
    sequence.ratio_moves = held == mean;
  }
  if (options.corrects() && options.sequence_correction) {
    const void* old = in.old_logprobs == nullptr ? in.logprobs : in.old_logprobs;
    const double gap = sum_of_differences<Real>(old, in.rollout_logprobs, in.mask, span);
    sequence.sampled = exp(Real(at_most(gap, kMaxLogRatio)));
  }

  double sequence_slope = 0;
#pragma unroll
  for (int k = 0; k < kPolicySums; ++k) sums[k] = empty_policy_sum(k);
  const Real weight = Real(sequence.weight), bonus = Real(-options.entropy_coef * sequence.weight);
  for (int64_t t = span.begin + threadIdx.x; t < span.end; t += blockDim.x) {
    const bool counted = counts(in.mask, t);
    Real slope = 0;
    if (counted) slope = add_token(in, options, sequence, t, sums, sequence_slope);
    if (slopes != nullptr) slopes[t] = slope * weight;
    if (entropy_slopes != nullptr) entropy_slopes[t] = counted ? bonus : Real(0);
  }
  if (slopes != nullptr) fill_zero(slopes, span.end, whole.end);
  if (entropy_slopes != nullptr) fill_zero(entropy_slopes, span.end, whole.end);
  if (options.term == PolicyTerm::kGspo && slopes != nullptr) {
    // The ratio is that of a mean over the tokens: each has the same share in it. A thread adds to what it wrote
    // itself.
    const Real share = Real(sequence.weight * block_sum(sequence_slope) * inverse);
    for (int64_t t = span.begin + threadIdx.x; t < span.end; t += blockDim.x) {
      if (counts(in.mask, t)) slopes[t] += share;
    }
  }
  reduce_policy_sums(sums);
  sums[kTokens] = count;
  if (options.term == PolicyTerm::kGspo) {
    sums[kRatio] = sums[kRatioMin] = sums[kRatioMax] = sequence_ratio;
    sums[kRatioSquared] = sequence_ratio * sequence_ratio;
  }
}

template <typename Real>
__global__ void __launch_bounds__(kSequenceThreads)
    policy_terms_sweep(PolicyTermsInput in, int64_t tokens, PolicyTermsOptions options, PolicyTermsOutput out,
                       PolicyTermsWorkspace workspace) {
  Real* slopes = static_cast<Real*>(out.grad_logprobs);
  Real* entropy_slopes = static_cast<Real*>(out.grad_entropy);
  IRLFAST_FOR_BLOCKS(i, in.segments.count) {
    if (slopes != nullptr) zero_outside(slopes, in.segments, tokens, i);
    if (entropy_slopes != nullptr) zero_outside(entropy_slopes, in.segments, tokens, i);
    double sums[kPolicySums];
    sweep_sequence(in, options, tokens, slopes, entropy_slopes, i, sums);
    if (threadIdx.x != 0) continue;
#pragma unroll
    for (int k = 0; k < kPolicySums; ++k) workspace.partials[i * kPolicySums + k] = sums[k];
  }
  // An integer, and the only atomic: which block is last changes nothing but who adds up.
  __shared__ bool last;
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(workspace.finished, 1) == int(gridDim.x) - 1;
    if (last) *workspace.finished = 0;
    __threadfence();
  }
  __syncthreads();
  if (last) report_policy_terms<Real>(in.segments.count, in.old_logprobs != nullptr, options, out, workspace);
}

}  // namespace

void policy_terms(const PolicyTermsInput& input, int64_t tokens, const PolicyTermsOptions& options,
                  const PolicyTermsOutput& output, const PolicyTermsWorkspace& workspace, const Queue& queue) {
  const auto kernel = input.dtype == DType::kFloat64 ? policy_terms_sweep<double> : policy_terms_sweep<float>;
  // Without a sequence there is still a loss to be written.
  const int64_t blocks = std::max<int64_t>(1, blocks_for(input.segments.count, kSequenceThreads, false, queue.device));
  launch(kernel, blocks, kSequenceThreads, queue, input, tokens, options, output, workspace);
}

}  // namespace irlfast::cuda
