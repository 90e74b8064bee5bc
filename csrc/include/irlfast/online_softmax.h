// The online softmax: what is kept of the logits seen so far, and how two such summaries become one.
// Shared by every device. Inlined without exception, so that no instruction set's copy can stand in for another's.
#pragma once

#include <cmath>

#include "irlfast/host_device.h"

namespace irlfast {

// Of each type its own: a global exp may know double alone.
using std::exp;
using std::log1p;

// Over logits l (after softcap, before the temperature T), with x_v = (l_v - max) / T:
//   others   = sum over v != argmax of exp(x_v)
//   weighted = sum over v of exp(x_v) x_v            (the argmax adds 0)
// The argmax's own exp(0) = 1 is left out of `others`: beside 1, a sum below 6e-8 would be lost in float32, and with it
// the log-prob -log1p(others) of a confident token.
template <typename Real>
struct OnlineSoftmax {
  Real max;
  Real others;
  Real weighted;
};

template <typename Real>
IRLFAST_INLINE OnlineSoftmax<Real> online_softmax_empty() {
  return {-Real(INFINITY), Real(0), Real(0)};
}

// The sums of `s` relative to a maximum that has risen to `max`: the argmax so far becomes one of the others.
template <typename Real>
IRLFAST_INLINE void online_softmax_raise(OnlineSoftmax<Real>& s, Real max, Real inverse_temperature) {
  if (s.max != -Real(INFINITY)) {
    const Real shift = (s.max - max) * inverse_temperature;
    const Real factor = exp(shift);
    const Real mass = Real(1) + s.others;
    s.others = factor * mass;
    s.weighted = factor == Real(0) ? Real(0) : factor * (s.weighted + shift * mass);  // the product may have overflowed
  }
  // Else nothing finite was met; a NaN that was must still reach the result.
  s.max = max;
}

// Summary of both parts. Where the maxima tie, the second argmax becomes one of the others.
template <typename Real>
IRLFAST_INLINE OnlineSoftmax<Real> online_softmax_merge(OnlineSoftmax<Real> a, OnlineSoftmax<Real> b,
                                                        Real inverse_temperature) {
  if (a.max < b.max) {
    const OnlineSoftmax<Real> swapped = a;
    a = b;
    b = swapped;
  }
  online_softmax_raise(b, a.max, inverse_temperature);
  a.others += b.others;
  a.weighted += b.weighted;
  return a;
}

// log sum_v exp(x_v), the maximum taken out. NaN for a row without a finite maximum: it defines no distribution.
template <typename Real>
IRLFAST_INLINE Real online_softmax_log_sum(const OnlineSoftmax<Real>& s) {
  const Real defined = s.max - s.max;
  return defined + log1p(s.others);
}

// H = log sum exp(x) - sum p x.
template <typename Real>
IRLFAST_INLINE Real online_softmax_entropy(const OnlineSoftmax<Real>& s) {
  return online_softmax_log_sum(s) - s.weighted / (Real(1) + s.others);
}

}  // namespace irlfast
