#include "isa/policy_spans.h"

#include <math.h>
#include <string.h>

#include "isa/segment_vec.h"

#define IRLFAST_JOIN_(a, b) a##b
#define IRLFAST_JOIN(a, b) IRLFAST_JOIN_(a, b)

namespace irlfast {
namespace {

// A NaN stays.
template <typename V, typename Real>
IRLFAST_VEC V at_most(V x, Real limit) {
  return min(broadcast(limit), x);
}
template <typename V, typename Real>
IRLFAST_VEC V at_least(V x, Real limit) {
  return max(broadcast(limit), x);
}

// A vector's worth of every array, at one token.
template <typename Real>
struct Tokens {
  const Real *logprobs, *old, *ref, *rollout, *entropy, *advantages;
  const uint8_t* mask;
  Real *grad_logprobs, *grad_entropy;

  IRLFAST_VEC void advance(int count) {
    logprobs += count;
    if (old != nullptr) old += count;
    if (ref != nullptr) ref += count;
    if (rollout != nullptr) rollout += count;
    if (entropy != nullptr) entropy += count;
    if (advantages != nullptr) advantages += count;
    mask += count;
    if (grad_logprobs != nullptr) grad_logprobs += count;
    if (grad_entropy != nullptr) grad_entropy += count;
  }
};

template <typename Real>
class Pass {
  using V = typename Traits<Real>::V;
  using I = typename Traits<Real>::I;
  static constexpr int kLanes = Traits<Real>::kLanes;

 public:
  Pass(const PolicyTermsOptions& options, const PolicySequence& sequence, Real advantage)
      : o_(options),
        weight_(Real(sequence.weight)),
        advantage_(advantage),
        sequence_ratio_(Real(sequence.ratio)),
        sequence_moves_(sequence.ratio_moves),
        clip_floor_(Real(1 - options.clip_low)),
        clip_ceiling_(Real(1 + options.clip_high)),
        ratio_min_(broadcast(Real(INFINITY))),
        ratio_max_(broadcast(Real(-INFINITY))) {
    if (options.sequence_correction) {
      const V gap = broadcast(Real(sequence.gap));
      const V held[1] = {at_most(gap, Real(kMaxLogRatio))};
      Exp<V> e[1];
      exp_accurate<Real>(held, e);
      sequence_correction_ = correct(e[0].value);
    }
  }

  // The terms, their slopes and all sums of kVectors * kLanes tokens. One vector's operations wait for each other, so
  // two go through them side by side; into the sums they go one after the other.
  template <int kVectors>
  IRLFAST_VEC void add(const Tokens<Real>& at) {
    if (!any_nonzero<kVectors * kLanes>(at.mask)) {
      for (int u = 0; u < kVectors; ++u) {
        if (at.grad_logprobs != nullptr) store(at.grad_logprobs + u * kLanes, V{});
        if (at.grad_entropy != nullptr) store(at.grad_entropy + u * kLanes, V{});
      }
      return;
    }
    I mask[kVectors], moves[kVectors];
    V ones[kVectors], logprob[kVectors], advantage[kVectors], old[kVectors], ratio[kVectors];
    // Selected before anything is computed: whatever stands outside the mask takes no part.
    for (int u = 0; u < kVectors; ++u) {
      mask[u] = load_mask<Real>(at.mask + u * kLanes);
      ones[u] = mask[u] ? broadcast<Real>(1) : V{};
      logprob[u] = masked(mask[u], at.logprobs + u * kLanes);
      advantage[u] = at.advantages != nullptr ? masked(mask[u], at.advantages + u * kLanes)
                     : mask[u]                ? broadcast(advantage_)
                                              : V{};
      old[u] = at.old != nullptr ? masked(mask[u], at.old + u * kLanes) : logprob[u];
      ratio[u] = broadcast<Real>(1);
      moves[u] = mask[u];
    }

    if (at.old != nullptr) {
      V below[kVectors], held[kVectors];
      for (int u = 0; u < kVectors; ++u) {
        const V difference = logprob[u] - old[u];
        below[u] = at_most(difference, Real(kMaxLogRatio));
        held[u] = at_least(below[u], Real(-kMaxLogRatio));
        moves[u] = held[u] == difference;
      }
      Exp<V> e[kVectors];
      exp_accurate<Real>(held, e);
      for (int u = 0; u < kVectors; ++u) {
        ratio[u] = e[u].value;
        sum_[kSumApproxKl] += e[u].less_one - below[u];
        const V seen = mask[u] ? ratio[u] : V{};
        sum_[kSumRatio] += seen;
        sum_[kSumRatioSquared] += seen * seen;
        ratio_min_ = min(ratio_min_, mask[u] ? ratio[u] : ratio_min_);
        ratio_max_ = max(ratio_max_, mask[u] ? ratio[u] : ratio_max_);
      }
    }

    V slope[kVectors], term[kVectors];
    for (int u = 0; u < kVectors; ++u) {
      term[u] = policy_term(logprob[u], advantage[u], ratio[u], moves[u], ones[u], slope[u]);
    }
    if (at.rollout != nullptr) {
      V held[kVectors];
      Exp<V> sampled[kVectors];
      for (int u = 0; u < kVectors; ++u) {
        const V gap = old[u] - masked(mask[u], at.rollout + u * kLanes);
        const V size = gap < Real(0) ? -gap : gap;
        sum_[kSumGap] += size;
        gap_max_ = max(gap_max_, size);
        held[u] = at_most(gap, Real(kMaxLogRatio));
      }
      exp_accurate<Real>(held, sampled);
      for (int u = 0; u < kVectors; ++u) sum_[kSumRolloutKl] += sampled[u].less_one - held[u];
      if (o_.corrects()) {
        for (int u = 0; u < kVectors; ++u) {
          const Correction c = o_.sequence_correction ? sequence_correction_ : correct(sampled[u].value);
          sum_[kSumTis] += c.capped ? ones[u] : V{};
          sum_[kSumIcepop] += c.outside ? ones[u] : V{};
          term[u] = c.outside ? V{} : term[u] * c.factor;
          slope[u] = c.outside ? V{} : slope[u] * c.factor;
        }
      }
    }
    for (int u = 0; u < kVectors; ++u) sum_[kSumPolicy] += term[u];
    if (o_.term == PolicyTerm::kGspo) {
      for (int u = 0; u < kVectors; ++u) {
        sum_[kSumTermSlope] += slope[u];
        slope[u] = V{};
      }
    }

    if (at.ref != nullptr) {
      V d[kVectors];
      for (int u = 0; u < kVectors; ++u) d[u] = logprob[u] - masked(mask[u], at.ref + u * kLanes);
      add_kl_slope(d, ratio, moves, slope);
    }
    for (int u = 0; u < kVectors; ++u) {
      if (at.entropy != nullptr) sum_[kSumEntropy] += masked(mask[u], at.entropy + u * kLanes);
      if (at.grad_logprobs != nullptr) store(at.grad_logprobs + u * kLanes, mask[u] ? slope[u] * weight_ : V{});
      if (at.grad_entropy != nullptr) {
        store(at.grad_entropy + u * kLanes, mask[u] ? broadcast(Real(-o_.entropy_coef) * weight_) : V{});
      }
    }
  }

  // To be called after every kBlockTokens: the error of a sum grows with its terms.
  IRLFAST_VEC void move_up(const Tokens<Real>& given, PolicySums& sums) {
    move_up(sums, kSumPolicy, true);
    move_up(sums, kSumTermSlope, o_.term == PolicyTerm::kGspo);
    for (int k : {kSumApproxKl, kSumRatio, kSumRatioSquared}) move_up(sums, k, given.old != nullptr);
    for (int k : {kSumClipLow, kSumClipHigh}) move_up(sums, k, o_.term != PolicyTerm::kReinforce);
    for (int k : {kSumKl, kSumPenalty}) move_up(sums, k, given.ref != nullptr);
    move_up(sums, kSumEntropy, given.entropy != nullptr);
    for (int k : {kSumGap, kSumRolloutKl}) move_up(sums, k, given.rollout != nullptr);
    for (int k : {kSumTis, kSumIcepop}) move_up(sums, k, given.rollout != nullptr && o_.corrects());
  }

  IRLFAST_VEC void finish(const PolicyTermsInput& input, PolicySums& sums) const {
    // An extreme forgets a NaN, a sum does not.
    if (input.old_logprobs != nullptr) {
      const bool number = !isnan(sums.sum[kSumRatio]);
      sums.ratio_min = number ? -lanes_max(-ratio_min_) : NAN;
      sums.ratio_max = number ? lanes_max(ratio_max_) : NAN;
    }
    if (input.rollout_logprobs != nullptr) sums.gap_max = isnan(sums.sum[kSumGap]) ? NAN : lanes_max(gap_max_);
  }

 private:
  struct Correction {
    V factor;
    I capped, outside;
  };

  IRLFAST_VEC void move_up(PolicySums& sums, int k, bool used) {
    if (!used) return;
    sums.sum[k] += lanes_sum(sum_[k]);
    sum_[k] = V{};
  }

  static IRLFAST_VEC double lanes_max(V x) {
    Real lane[kLanes];
    store(lane, x);
    for (int half = kLanes / 2; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) lane[i] = lane[i] > lane[i + half] ? lane[i] : lane[i + half];
    }
    return lane[0];
  }

  static IRLFAST_VEC V masked(I mask, const Real* values) { return mask ? load(values) : V{}; }

  // For the ratio of the policy that the step started from to the sampler.
  IRLFAST_VEC Correction correct(V sampled) const {
    Correction c{sampled, I{}, I{}};
    if (o_.icepop_high > 0) c.outside = (sampled < Real(o_.icepop_low)) | (sampled > Real(o_.icepop_high));
    if (o_.tis_cap > 0) {
      c.capped = sampled > Real(o_.tis_cap);
      c.factor = at_most(sampled, Real(o_.tis_cap));
    }
    return c;
  }

  IRLFAST_VEC V policy_term(V logprob, V advantage, V ratio, I moves, V ones, V& slope) {
    switch (o_.term) {
      case PolicyTerm::kPpo:
        return clipped_term(advantage, ratio, moves, ones, slope);
      case PolicyTerm::kGspo:
        return clipped_term(advantage, broadcast(sequence_ratio_), sequence_moves_ ? ~I{} : I{}, ones, slope);
      case PolicyTerm::kCispo: {
        const I above = ratio > clip_ceiling_;
        sum_[kSumClipHigh] += above ? ones : V{};
        slope = -at_most(ratio, clip_ceiling_) * advantage;
        return slope * logprob;
      }
      default:
        slope = -advantage;
        return slope * logprob;
    }
  }

  IRLFAST_VEC V clipped_term(V advantage, V ratio, I moves, V ones, V& slope) {
    const V plain = -ratio * advantage;
    const V clipped = -at_least(at_most(ratio, clip_ceiling_), clip_floor_) * advantage;
    I stopped = clipped > plain;
    V term = stopped ? clipped : plain;
    if (o_.dual_clip > 0) {
      const V bound = Real(-o_.dual_clip) * advantage;
      const I beyond = (advantage < Real(0)) & (term > bound);
      term = beyond ? bound : term;
      stopped |= beyond;
    }
    sum_[kSumClipLow] += stopped & (ratio < Real(1)) ? ones : V{};
    sum_[kSumClipHigh] += stopped & (ratio > Real(1)) ? ones : V{};
    slope = ~stopped & moves ? plain : V{};
    return term;
  }

  // Adds kl_coef times the slope of the penalty, d being logp - ref.
  template <int kVectors>
  IRLFAST_VEC void add_kl_slope(const V (&d)[kVectors], const V (&ratio)[kVectors], const I (&moves)[kVectors],
                                V (&slope)[kVectors]) {
    if (o_.kl_estimator == KlEstimator::kK3) {
      V held[kVectors], negative[kVectors];
      for (int u = 0; u < kVectors; ++u) {
        held[u] = at_least(d[u], Real(-kMaxLogRatio));
        negative[u] = -held[u];
      }
      Exp<V> e[kVectors];
      exp_accurate<Real>(negative, e);
      for (int u = 0; u < kVectors; ++u) {
        const V kl = e[u].less_one + held[u];
        sum_[kSumKl] += kl;
        sum_[kSumPenalty] += ratio[u] * kl;
        // Where both move, kl - less_one is d: written so, the large parts of a small sum do not cancel.
        const V moving = held[u] == d[u] ? (moves[u] ? d[u] : -e[u].less_one) : (moves[u] ? kl : V{});
        slope[u] += ratio[u] * moving * Real(o_.kl_coef);
      }
      return;
    }
    const bool square = o_.kl_estimator == KlEstimator::kK2;
    for (int u = 0; u < kVectors; ++u) {
      const V kl = square ? Real(0.5) * d[u] * d[u] : d[u];
      sum_[kSumKl] += kl;
      sum_[kSumPenalty] += kl;
      if (square) slope[u] += d[u] * Real(o_.kl_coef);
    }
  }

  const PolicyTermsOptions o_;  // a copy: nothing written can be part of it
  Real weight_, advantage_, sequence_ratio_;
  bool sequence_moves_;
  Real clip_floor_, clip_ceiling_;
  Correction sequence_correction_{};
  V sum_[kPolicySums]{};
  V ratio_min_, ratio_max_, gap_max_{};
};

template <typename Real>
const Real* from(const void* data, int64_t i) {
  return data == nullptr ? nullptr : static_cast<const Real*>(data) + i;
}

template <typename Real>
void copy_in(const Real*& source, Real* buffer, int count) {
  if (source == nullptr) return;
  memcpy(buffer, source, size_t(count) * sizeof(Real));
  source = buffer;
}

template <typename Real>
PolicySums accumulate(const PolicyTermsInput& in, const PolicyTermsOptions& options, const PolicyTermsOutput& out,
                      const PolicySequence& sequence) {
  constexpr int kLanes = Traits<Real>::kLanes;
  constexpr int kBlock = kBlockTokens<Real>;
  const bool per_token = in.advantage_per_token;
  Pass<Real> pass(options, sequence, per_token ? Real(0) : static_cast<const Real*>(in.advantages)[sequence.index]);
  uint8_t buffer[kBlock];
  PolicySums sums;
  const int64_t end = in.segments.end(sequence.index);
  for (int64_t i = in.segments.begin(sequence.index); i < end; i += kBlock) {
    const int count = int(end - i < kBlock ? end - i : kBlock);
    Tokens<Real> at{from<Real>(in.logprobs, i),
                    from<Real>(in.old_logprobs, i),
                    from<Real>(in.ref_logprobs, i),
                    from<Real>(in.rollout_logprobs, i),
                    from<Real>(in.entropy, i),
                    per_token ? from<Real>(in.advantages, i) : nullptr,
                    mask_bytes(in.mask, i, count, buffer),
                    const_cast<Real*>(from<Real>(out.grad_logprobs, i)),
                    const_cast<Real*>(from<Real>(out.grad_entropy, i))};
    int k = 0;
    for (; k + 2 * kLanes <= count; k += 2 * kLanes) {
      pass.template add<2>(at);
      at.advance(2 * kLanes);
    }
    if (k + kLanes <= count) {
      pass.template add<1>(at);
      at.advance(kLanes);
      k += kLanes;
    }
    if (k < count) {
      const int left = count - k;
      Real values[6][kLanes] = {}, gradients[2][kLanes];
      uint8_t mask[kLanes] = {};
      Tokens<Real> rest = at;
      copy_in(rest.logprobs, values[0], left);
      copy_in(rest.old, values[1], left);
      copy_in(rest.ref, values[2], left);
      copy_in(rest.rollout, values[3], left);
      copy_in(rest.entropy, values[4], left);
      copy_in(rest.advantages, values[5], left);
      memcpy(mask, at.mask, size_t(left));
      rest.mask = mask;
      if (rest.grad_logprobs != nullptr) rest.grad_logprobs = gradients[0];
      if (rest.grad_entropy != nullptr) rest.grad_entropy = gradients[1];
      pass.template add<1>(rest);
      if (at.grad_logprobs != nullptr) memcpy(at.grad_logprobs, gradients[0], size_t(left) * sizeof(Real));
      if (at.grad_entropy != nullptr) memcpy(at.grad_entropy, gradients[1], size_t(left) * sizeof(Real));
    }
    pass.move_up(at, sums);
  }
  pass.finish(in, sums);
  return sums;
}

template <typename Real>
double difference(const void* a, const void* b, const TokenMask& mask, int64_t begin, int64_t end) {
  constexpr int kBlock = kBlockTokens<Real>;
  constexpr int kSums = 8;
  uint8_t buffer[kBlock];
  double sum[kSums] = {};
  for (int64_t i = begin; i < end; i += kBlock) {
    const int64_t count = end - i < kBlock ? end - i : kBlock;
    const uint8_t* bytes = mask_bytes(mask, i, count, buffer);
    const Real *x = static_cast<const Real*>(a) + i, *y = static_cast<const Real*>(b) + i;
    int64_t k = 0;
    for (; k + kSums <= count; k += kSums) {
      for (int j = 0; j < kSums; ++j) sum[j] += bytes[k + j] ? double(x[k + j]) - double(y[k + j]) : 0.0;
    }
    for (int j = 0; k < count; ++j, ++k) sum[j] += bytes[k] ? double(x[k]) - double(y[k]) : 0.0;
  }
  return ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
}

template <typename Real>
void add(void* gradient, const TokenMask& mask, int64_t begin, int64_t end, double value) {
  constexpr int kBlock = kBlockTokens<Real>;
  uint8_t buffer[kBlock];
  for (int64_t i = begin; i < end; i += kBlock) {
    const int64_t count = end - i < kBlock ? end - i : kBlock;
    const uint8_t* bytes = mask_bytes(mask, i, count, buffer);
    Real* values = static_cast<Real*>(gradient) + i;
    for (int64_t k = 0; k < count; ++k) values[k] += bytes[k] ? Real(value) : Real(0);
  }
}

}  // namespace

const PolicySpans& IRLFAST_JOIN(policy_spans_, IRLFAST_ISA)() {
  static constexpr PolicySpans spans{
      {accumulate<float>, accumulate<double>}, {difference<float>, difference<double>}, {add<float>, add<double>}};
  return spans;
}

}  // namespace irlfast
