// The online softmax of two rows of logits at once, with the sums their Kullback-Leibler divergences need, and how two
// such summaries become one. Shared by every device, like online_softmax.h.
#pragma once

#include "irlfast/online_softmax.h"

namespace irlfast {

// Over the same tokens v of two rows, with x_v = (l_v - p.max) / T and y_v = (r_v - q.max) / T:
//   p_over_q = sum_v exp(x_v) (x_v - y_v)            q_over_p = sum_v exp(y_v) (y_v - x_v)
// each argmax included. Differences are summed, not the two logits apart: for models that agree they are small, and
// what the maxima had in common is out of them already. A token of p that q lacks makes p_over_q infinite, or NaN where
// it adds 0 times infinity, which is the same: online_divergence_kl tells it from a NaN among the logits.
template <typename Real>
struct OnlineDivergence {
  OnlineSoftmax<Real> p;
  OnlineSoftmax<Real> q;
  Real p_over_q;
  Real q_over_p;
};

template <typename Real>
IRLFAST_INLINE OnlineDivergence<Real> online_divergence_empty() {
  return {online_softmax_empty<Real>(), online_softmax_empty<Real>(), Real(0), Real(0)};
}

// The sums of `s` relative to maxima that have risen to p_max and q_max. p_mass and q_mass say how much of exp(x) and
// exp(y) is in them.
template <typename Real>
IRLFAST_INLINE void online_divergence_rebase(OnlineDivergence<Real>& s, Real p_mass, Real q_mass, Real p_max,
                                             Real q_max, Real inverse_temperature) {
  const bool both = s.p.max != -Real(INFINITY) && s.q.max != -Real(INFINITY);
  const Real p_shift = (s.p.max - p_max) * inverse_temperature;
  const Real q_shift = (s.q.max - q_max) * inverse_temperature;
  const Real p_factor = s.p.max == -Real(INFINITY) ? Real(0) : exp(p_shift);
  const Real q_factor = s.q.max == -Real(INFINITY) ? Real(0) : exp(q_shift);
  // Where one side has nothing finite yet, the other's sum is 0 or infinite and stays so.
  const Real drift = both ? p_shift - q_shift : Real(0);
  s.p_over_q = p_factor * (p_factor == 0 ? s.p_over_q : s.p_over_q + drift * p_mass);
  s.q_over_p = q_factor * (q_factor == 0 ? s.q_over_p : s.q_over_p - drift * q_mass);
}

// Summary of both parts.
template <typename Real>
IRLFAST_INLINE OnlineDivergence<Real> online_divergence_merge(OnlineDivergence<Real> a, OnlineDivergence<Real> b,
                                                              Real inverse_temperature) {
  const Real p_max = a.p.max < b.p.max ? b.p.max : a.p.max;
  const Real q_max = a.q.max < b.q.max ? b.q.max : a.q.max;
  online_divergence_rebase(a, 1 + a.p.others, 1 + a.q.others, p_max, q_max, inverse_temperature);
  online_divergence_rebase(b, 1 + b.p.others, 1 + b.q.others, p_max, q_max, inverse_temperature);
  return {online_softmax_merge(a.p, b.p, inverse_temperature), online_softmax_merge(a.q, b.q, inverse_temperature),
          a.p_over_q + b.p_over_q, a.q_over_p + b.q_over_p};
}

// KL(p || q) = sum_v p_v (log p_v - log q_v). Infinite where p has a token that q lacks; NaN where either row has no
// finite maximum or holds a NaN. Exactly 0 for equal rows.
template <typename Real>
IRLFAST_INLINE Real online_divergence_kl(const OnlineSoftmax<Real>& p, const OnlineSoftmax<Real>& q, Real p_over_q) {
  const Real log_ratio = online_softmax_log_sum(p) - online_softmax_log_sum(q);
  if (log_ratio == log_ratio && p_over_q != p_over_q) return Real(INFINITY);
  return p_over_q / (Real(1) + p.others) - log_ratio;
}

}  // namespace irlfast
