#include "irlfast/linear_policy_ref_stats.h"

#include <algorithm>
#include <cmath>

#include "irlfast/online_divergence.h"
#include "isa/pair_spans.h"
#include "rows.h"

namespace irlfast {
namespace {

OnlineDivergence<double> load_running(const double* running, int64_t stride, int64_t row) {
  const auto at = [&](PairRunning which) { return running[which * stride + row]; };
  return {{at(kPolicyMax), at(kPolicyOthers), at(kPolicyWeighted)},
          {at(kRefMax), at(kRefOthers), 0.0},
          at(kPolicyOverRef),
          at(kRefOverPolicy)};
}

void store_running(const OnlineDivergence<double>& state, double* running, int64_t stride, int64_t row) {
  const auto put = [&](PairRunning which, double value) { running[which * stride + row] = value; };
  put(kPolicyMax, state.p.max);
  put(kPolicyOthers, state.p.others);
  put(kPolicyWeighted, state.p.weighted);
  put(kRefMax, state.q.max);
  put(kRefOthers, state.q.others);
  put(kPolicyOverRef, state.p_over_q);
  put(kRefOverPolicy, state.q_over_p);
}

// All that the gradient of a row's logits needs:
//   dz_v = p_v (constant + linear x_v + reverse (log p_v - log q_v)) - forward q_v + logprob [v = y]
struct RowGradient {
  RowGradient(const OnlineDivergence<double>& state, double inverse_temperature, double logprob_, double entropy,
              double lse, double reverse_, double forward_)
      : max(state.p.max),
        ref_max(state.q.max),
        inverse_temperature(inverse_temperature),
        log_sum(online_softmax_log_sum(state.p)),
        ref_log_sum(online_softmax_log_sum(state.q)),
        logprob(logprob_),
        linear(-entropy) {
    const double reverse_kl = online_divergence_kl(state.p, state.q, state.p_over_q);
    const double forward_kl = online_divergence_kl(state.q, state.p, state.q_over_p);
    reverse = std::isinf(reverse_kl) ? 0.0 : reverse_;
    forward = std::isinf(forward_kl) ? 0.0 : forward_;
    constant = lse + entropy * (log_sum - online_softmax_entropy(state.p)) + forward;
    if (reverse != 0.0) constant -= reverse * reverse_kl;
    constant += ref_log_sum - ref_log_sum;  // NaN where the reference has no distribution
  }

  PairParameters parameters(double softcap, const OnlineDivergence<double>& state) const {
    const double p_scale = inverse_temperature / (1.0 + state.p.others);
    PairParameters of_span{};
    of_span.form = PairForm::kAll;
    of_span.p_max = max;
    of_span.q_max = ref_max;
    of_span.inverse_temperature = inverse_temperature;
    of_span.softcap = softcap;
    of_span.constant = (constant - logprob - reverse * (log_sum - ref_log_sum)) * p_scale;
    of_span.linear = linear * p_scale;
    of_span.ratio = reverse * inverse_temperature * p_scale;
    of_span.other = -forward * inverse_temperature / (1.0 + state.q.others);
    of_span.stream = false;
    return of_span;
  }

  // In double, as the span's float32 would round 1 - p away for a confident token.
  double at_label(const LogitElement& logit, const LogitElement& ref_logit) const {
    const double x = (logit.value - max) * inverse_temperature;
    const double log_p = x - log_sum, p = std::exp(log_p);
    const double log_q = (ref_logit.value - ref_max) * inverse_temperature - ref_log_sum;
    double spread = 0.0;
    if (p != 0.0) {
      spread = constant + linear * x;
      if (reverse != 0.0) spread += reverse * (log_p - log_q);
      spread *= p;
    }
    return (spread - forward * std::exp(log_q) - logprob * std::expm1(log_p)) * inverse_temperature * logit.slope;
  }

  double max, ref_max, inverse_temperature, log_sum, ref_log_sum;
  double logprob, linear, reverse, forward, constant;
};

}  // namespace

void linear_policy_ref_stats_merge(const PairChunk& chunk, double* running, int64_t stride, int threads, Isa isa) {
  const Rows policy(chunk.policy, isa), reference(chunk.reference, isa);
  const PairSpans::Summarise summarise = pair_spans(isa).summarise[policy.dtype()];
  const int64_t columns = chunk.policy.vocab;
  parallel_for(policy.count(), task_grain(2 * columns), threads, [&](int64_t row) {
    OnlineDivergence<double> state = load_running(running, stride, row);
    for (int64_t begin = 0; begin < columns; begin += kChunkPiece) {
      state = summarise(policy.logit(row, begin), reference.logit(row, begin), std::min(kChunkPiece, columns - begin),
                        policy.inverse_temperature(row), chunk.policy.softcap, true, state);
    }
    store_running(state, running, stride, row);
    const int64_t column = policy.label_column(row, 0);
    if (column >= 0 && column < columns) {
      running[kPolicyLabel * stride + row] = policy.element(row, column).value;
      running[kRefLabel * stride + row] = reference.element(row, column).value;
    }
  });
}

void linear_policy_ref_stats_differentiate(const PairChunk& chunk, const double* running, int64_t stride,
                                           const PairUpstream& upstream, const TokenStatsGradient& gradient,
                                           int threads, Isa isa) {
  const Rows policy(chunk.policy, isa), reference(chunk.reference, isa);
  const PairSpans& spans = pair_spans(isa);
  const PairSpans::Differentiate differentiate =
      gradient.dtype == chunk.policy.dtype ? spans.differentiate[policy.dtype()] : spans.differentiate_to_bfloat16;
  const int64_t bytes = dtype_size(gradient.dtype), columns = chunk.policy.vocab;
  const auto received = [&](const void* from, int64_t row) {
    return from == nullptr ? 0.0 : Statistic(from, chunk.policy.dtype).get(row);
  };
  parallel_for(policy.count(), task_grain(2 * columns), threads, [&](int64_t row) {
    const OnlineDivergence<double> state = load_running(running, stride, row);
    const RowGradient of_row(state, policy.inverse_temperature(row), received(upstream.logprob, row),
                             received(upstream.entropy, row), received(upstream.lse, row),
                             received(upstream.reverse_kl, row), received(upstream.forward_kl, row));
    char* destination = static_cast<char*>(gradient.data) + gradient.layout.offset(row) * bytes;
    // The label's logits are read now: where the gradient is written over them, they are gone afterwards.
    const int64_t column = policy.label_column(row, 0);
    const bool here = column >= 0 && column < columns;
    const double at_label = here ? of_row.at_label(policy.element(row, column), reference.element(row, column)) : 0.0;
    differentiate(policy.logit(row, 0), reference.logit(row, 0), destination, columns,
                  of_row.parameters(chunk.policy.softcap, state));
    if (here) policy.spans().store[int(gradient.dtype)](destination + column * bytes, at_label);
  });
}

}  // namespace irlfast
