#include "isa/pair_spans.h"

#include <math.h>
#include <string.h>

#include "isa/running_softmax.h"
#include "isa/span.h"

namespace irlfast {
namespace {

// Vectors of each row worked on together.
constexpr int kVectors = 2;

// A finite stand-in for the infinities that differences of masked logits make, to be multiplied by a probability of 0.
constexpr double kHuge = 1e18;

// max() on purpose: where both logits are -inf their difference is NaN, of which it makes the stand-in.
template <typename Real, typename V>
IRLFAST_VEC V not_below(V difference) {
  return max(difference, broadcast<Real>(-kHuge));
}

// Two online softmaxes, and the sums of OnlineDivergence.
template <typename Real, bool kFull>
class RunningDivergence {
  using V = typename Traits<Real>::V;
  using P = RunningSoftmax<Real, kVectors, kFull>;
  using Q = RunningSoftmax<Real, kVectors, false>;

 public:
  static constexpr int kBlock = P::kBlock;

  RunningDivergence(double inverse_temperature, const OnlineDivergence<double>& before)
      : before_(before),
        inverse_temperature_(inverse_temperature),
        p_(inverse_temperature, before.p),
        q_(inverse_temperature, before.q) {}

  IRLFAST_VEC void add(const V (&l)[kVectors], const V (&r)[kVectors]) {
    const bool p_rises = p_.exceeded_by(l);
    const bool q_rises = q_.exceeded_by(r);
    typename P::Rise p_rise;
    typename Q::Rise q_rise;
    if (__builtin_expect(p_rises | q_rises, 0)) {
      // As online_divergence_rebase has it.
      const auto p_mass = p_.mass();
      const auto q_mass = q_.mass();
      if (p_rises) p_rise = p_.raise(l);
      if (q_rises) q_rise = q_.raise(r);
      const Real drift = p_rise.shift - q_rise.shift;
      p_over_q_.move(p_mass, p_rise.effective(drift), p_rise.factor);
      if (kFull) q_over_p_.move(q_mass, q_rise.effective(-drift), q_rise.factor);
      p_.rescale(p_rise);
      q_.rescale(q_rise);
      accumulate<true>(l, r, p_rise, q_rise);
    } else {
      accumulate<false>(l, r, p_rise, q_rise);
    }
  }

  // To be called every kAdditions blocks.
  IRLFAST_VEC void move_up() {
    p_.move_up();
    q_.move_up();
    p_over_q_.move_up();
    if (kFull) q_over_p_.move_up();
  }

  OnlineDivergence<double> result() {
    const OnlineSoftmax<double> p = p_.result(), q = q_.result();
    // What the earlier argmaxes drifted by is in the new sums.
    OnlineDivergence<double> s = before_;
    online_divergence_rebase(s, before_.p.others, before_.q.others, p.max, q.max, inverse_temperature_);
    const double q_over_p = kFull ? s.q_over_p + q_over_p_.total() * inverse_temperature_ : before_.q_over_p;
    return {p, q, s.p_over_q + p_over_q_.total() * inverse_temperature_, q_over_p};
  }

 private:
  template <bool kRisen>
  IRLFAST_VEC void accumulate(const V (&l)[kVectors], const V (&r)[kVectors], const typename P::Rise& p_rise,
                              const typename Q::Rise& q_rise) {
    V difference[kVectors], below[2 * kVectors], e[2 * kVectors];
    for (int u = 0; u < kVectors; ++u) {
      below[u] = p_.below_maximum(l[u]);
      below[kVectors + u] = q_.below_maximum(r[u]);
      difference[u] = below[u] - below[kVectors + u];
    }
    exp_limited(below, p_.scale(), e);
    for (int u = 0; u < kVectors; ++u) {
      V& p_over_q = p_over_q_.latest[u];
      V& q_over_p = q_over_p_.latest[u];
      p_over_q = fma(e[u], not_below<Real>(difference[u]), p_over_q);
      if (kFull) q_over_p = fma(e[kVectors + u], not_below<Real>(-difference[u]), q_over_p);
    }
    if (kRisen) {
      V others[kVectors];
      if (p_rise.position >= 0) {
        for (int u = 0; u < kVectors; ++u) others[u] = e[u];
        P::strike(others, p_rise, 0);
        for (int u = 0; u < kVectors; ++u) e[u] = others[u];
      }
      if (q_rise.position >= 0) {
        for (int u = 0; u < kVectors; ++u) others[u] = e[kVectors + u];
        Q::strike(others, q_rise, 0);
        for (int u = 0; u < kVectors; ++u) e[kVectors + u] = others[u];
      }
    }
    p_.add(e, below);
    q_.add(e + kVectors, below + kVectors);
  }

  OnlineDivergence<double> before_;
  double inverse_temperature_;
  P p_;
  Q q_;
  typename P::Sum p_over_q_, q_over_p_;  // before 1 / T
};

// add(l, r) for every block, move_up() every kAdditions blocks.
template <typename T, bool kSoftcap, typename Running>
IRLFAST_VEC void add_span(Running& running, const T* p, const T* q, int64_t count, double softcap) {
  using Real = typename Compute<T>::Real;
  constexpr int kBlock = kVectors * Traits<Real>::kLanes;
  const Cap<Real, kSoftcap> cap(softcap);
  typename Traits<Real>::V l[kVectors], r[kVectors];
  int64_t i = 0;
  while (i + kBlock <= count) {
    const int64_t whole = (count - i) / kBlock;
    const int64_t end = i + (whole < kAdditions ? whole : kAdditions) * kBlock;
    for (; i < end; i += kBlock) {
      load_capped(p + i, cap, l);
      load_capped(q + i, cap, r);
      running.add(l, r);
    }
    running.move_up();
  }
  if (i < count) {
    load_rest(p + i, count - i, cap, l);
    load_rest(q + i, count - i, cap, r);
    running.add(l, r);
  }
}

template <typename T, bool kSoftcap, bool kFull>
OnlineDivergence<double> summarise_span(const T* p, const T* q, int64_t count, double inverse_temperature,
                                        double softcap, const OnlineDivergence<double>& before) {
  RunningDivergence<typename Compute<T>::Real, kFull> running(inverse_temperature, before);
  add_span<T, kSoftcap>(running, p, q, count, softcap);
  return running.result();
}

template <typename T>
OnlineDivergence<double> summarise(const void* p_data, const void* q_data, int64_t count, double inverse_temperature,
                                   double softcap, bool full, const OnlineDivergence<double>& before) {
  const T* p = static_cast<const T*>(p_data);
  const T* q = static_cast<const T*>(q_data);
  if (softcap != 0) {
    return full ? summarise_span<T, true, true>(p, q, count, inverse_temperature, softcap, before)
                : summarise_span<T, true, false>(p, q, count, inverse_temperature, softcap, before);
  }
  return full ? summarise_span<T, false, true>(p, q, count, inverse_temperature, softcap, before)
              : summarise_span<T, false, false>(p, q, count, inverse_temperature, softcap, before);
}

// log(p / M) = log(1 + (1 - w) g) and log(q / M) = log(1 - w g) with g = (p - q) / M. Errors of g, made where p and q
// nearly agree, have no effect to first order: sum_v (w p_v (1 - w) - (1 - w) q_v w) error_v is small with p - q.
template <typename Real>
class Mixture {
  using V = typename Traits<Real>::V;

 public:
  explicit Mixture(const PairParameters& parameters)
      : p_max_(broadcast(Real(parameters.p_max))),
        q_max_(broadcast(Real(parameters.q_max))),
        scale_(parameters.inverse_temperature),
        p_argmax_(broadcast(Real(parameters.p_argmax))),
        q_argmax_(broadcast(Real(parameters.q_argmax))),
        p_weight_(broadcast(Real(parameters.weight))),
        q_weight_(broadcast(Real(1 - parameters.weight))) {}

  // Probabilities of each token, and g.
  template <int kCount>
  IRLFAST_VEC void of(const V (&l)[kCount], const V (&r)[kCount], V (&p)[kCount], V (&q)[kCount],
                      V (&g)[kCount]) const {
    V below[2 * kCount], e[2 * kCount];
    for (int u = 0; u < kCount; ++u) {
      below[u] = l[u] - p_max_;
      below[kCount + u] = r[u] - q_max_;
    }
    exp_limited(below, scale_, e);
    for (int u = 0; u < kCount; ++u) {
      p[u] = e[u] * p_argmax_;
      q[u] = e[kCount + u] * q_argmax_;
      const V mixture = fma(p_weight_, p[u], q_weight_ * q[u]);
      g[u] = (p[u] - q[u]) / max(broadcast<Real>(Log<Real>::kSmallest), mixture);
    }
  }

  IRLFAST_VEC V log_p_over_mixture(V g) const { return log1p_limited<Real>(q_weight_ * g); }
  IRLFAST_VEC V log_q_over_mixture(V g) const { return log1p_limited<Real>(-p_weight_ * g); }

 private:
  V p_max_, q_max_;
  Scale<Real> scale_;
  V p_argmax_, q_argmax_, p_weight_, q_weight_;
};

template <typename Real>
class RunningMixture {
  using V = typename Traits<Real>::V;

 public:
  explicit RunningMixture(const PairParameters& parameters) : mixture_(parameters) {}

  IRLFAST_VEC void add(const V (&l)[kVectors], const V (&r)[kVectors]) {
    V p[kVectors], q[kVectors], g[kVectors];
    mixture_.of(l, r, p, q, g);
    for (int u = 0; u < kVectors; ++u) {
      p_.latest[u] = fma(p[u], mixture_.log_p_over_mixture(g[u]), p_.latest[u]);
      q_.latest[u] = fma(q[u], mixture_.log_q_over_mixture(g[u]), q_.latest[u]);
    }
  }

  IRLFAST_VEC void move_up() {
    p_.move_up();
    q_.move_up();
  }

  MixtureDivergence result() { return {p_.total(), q_.total()}; }

 private:
  Mixture<Real> mixture_;
  TwoLevelSum<Real, kVectors> p_, q_;
};

template <typename T>
MixtureDivergence mixture(const void* p, const void* q, int64_t count, const PairParameters& parameters) {
  RunningMixture<typename Compute<T>::Real> running(parameters);
  const T* l = static_cast<const T*>(p);
  const T* r = static_cast<const T*>(q);
  if (parameters.softcap != 0) {
    add_span<T, true>(running, l, r, count, parameters.softcap);
  } else {
    add_span<T, false>(running, l, r, count, parameters.softcap);
  }
  return running.result();
}

template <typename T, bool kSoftcap, PairForm kForm>
class PairGradient {
  using Real = typename Compute<T>::Real;
  using V = typename Traits<Real>::V;
  static constexpr int kLanes = Traits<Real>::kLanes;
  static constexpr bool kBoth = kForm == PairForm::kDifference || kForm == PairForm::kAll;

 public:
  explicit PairGradient(const PairParameters& g)
      : cap_(g.softcap),
        mixture_(g),
        p_max_(broadcast(Real(g.p_max))),
        q_max_(broadcast(Real(g.q_max))),
        scale_(g.inverse_temperature),
        constant_(broadcast(Real(g.constant))),
        linear_(broadcast(Real(g.linear * g.inverse_temperature))),
        ratio_(broadcast(Real(g.ratio))),
        other_(broadcast(Real(g.other))) {}

  // The gradient of each logit of p, in its place.
  template <int kCount>
  IRLFAST_VEC void apply(V (&l)[kCount], V (&r)[kCount]) const {
    V slope[kCount];
    for (int u = 0; u < kCount; ++u) {
      l[u] = cap_.value(l[u], slope[u]);
      r[u] = cap_.value(r[u]);
    }
    if (kForm == PairForm::kJensenShannon) {
      V p[kCount], q[kCount], g[kCount];
      mixture_.of(l, r, p, q, g);
      for (int u = 0; u < kCount; ++u) l[u] = p[u] * fma(ratio_, mixture_.log_p_over_mixture(g[u]), constant_);
    } else {
      constexpr int kExponents = kBoth ? 2 * kCount : kCount;
      V below[kExponents], e[kExponents], factor[kCount];
      for (int u = 0; u < kCount; ++u) {
        const V b = r[u] - q_max_;
        below[u] = l[u] - p_max_;
        if (kBoth) below[kCount + u] = b;
        factor[u] = below[u] - b;
      }
      exp_limited(below, scale_, e);
      for (int u = 0; u < kCount; ++u) {
        V difference = not_below<Real>(factor[u]);
        // Beside another divergence's gradient, that of an infinite one is left out by ratio 0, not by leaving the row.
        if (kForm == PairForm::kAll) difference = -not_below<Real>(-difference);
        factor[u] = kForm == PairForm::kDifference ? constant_ : fma(ratio_, difference, constant_);
        if (kForm == PairForm::kAll) factor[u] = fma(linear_, below[u], factor[u]);
        l[u] = kBoth ? fma(e[u], factor[u], other_ * e[kExponents - kCount + u]) : e[u] * factor[u];
      }
    }
    if (kSoftcap) {
      for (int u = 0; u < kCount; ++u) l[u] *= slope[u];
    }
  }

  template <typename Out>
  void few(const T* p, const T* q, Out* gradient, int64_t count) const {
    V l[1] = {load_few<T, kLanes>(p, count)}, r[1] = {load_few<T, kLanes>(q, count)};
    apply(l, r);
    Out result[kLanes];
    store(result, l[0]);
    memcpy(gradient, result, size_t(count) * sizeof(Out));
  }

 private:
  Cap<Real, kSoftcap> cap_;
  Mixture<Real> mixture_;
  V p_max_, q_max_;
  Scale<Real> scale_;
  V constant_, linear_, ratio_, other_;
};

template <typename T, typename Out, bool kSoftcap, PairForm kForm, bool kStream>
void differentiate_span(const T* p, const T* q, Out* gradient, int64_t count, const PairParameters& parameters) {
  using Real = typename Compute<T>::Real;
  constexpr int kLanes = Traits<Real>::kLanes;
  const PairGradient<T, kSoftcap, kForm> gradient_of(parameters);

  int64_t i = 0;
  if (kStream) {
    const int64_t aligned = unaligned_head(gradient), head = aligned < count ? aligned : count;
    for (; i < head; i += kLanes) {
      gradient_of.few(p + i, q + i, gradient + i, head - i < kLanes ? head - i : kLanes);
    }
    i = head;
  }
  typename Traits<Real>::V l[kVectors], r[kVectors];
  for (; i + kVectors * kLanes <= count; i += kVectors * kLanes) {
    load_block(p + i, l);
    load_block(q + i, r);
    prefetch_ahead<kVectors>(p + i);
    prefetch_ahead<kVectors>(q + i);
    gradient_of.apply(l, r);
    store_block<kStream, T>(gradient + i, l);
  }
  for (; i < count; i += kLanes) {
    gradient_of.few(p + i, q + i, gradient + i, count - i < kLanes ? count - i : kLanes);
  }
  if (kStream) stream_fence();
}

template <typename T, typename Out, PairForm kForm, bool kMayStream>
void differentiate_form(const void* p_data, const void* q_data, void* result, int64_t count,
                        const PairParameters& parameters) {
  const T* p = static_cast<const T*>(p_data);
  const T* q = static_cast<const T*>(q_data);
  Out* gradient = static_cast<Out*>(result);
  if (kMayStream && parameters.stream) {
    parameters.softcap != 0 ? differentiate_span<T, Out, true, kForm, kMayStream>(p, q, gradient, count, parameters)
                            : differentiate_span<T, Out, false, kForm, kMayStream>(p, q, gradient, count, parameters);
  } else {
    parameters.softcap != 0 ? differentiate_span<T, Out, true, kForm, false>(p, q, gradient, count, parameters)
                            : differentiate_span<T, Out, false, kForm, false>(p, q, gradient, count, parameters);
  }
}

template <typename T>
void differentiate(const void* p, const void* q, void* gradient, int64_t count, const PairParameters& parameters) {
  switch (parameters.form) {
    case PairForm::kRatio:
      return differentiate_form<T, T, PairForm::kRatio, true>(p, q, gradient, count, parameters);
    case PairForm::kDifference:
      return differentiate_form<T, T, PairForm::kDifference, true>(p, q, gradient, count, parameters);
    case PairForm::kAll:
      return differentiate_form<T, T, PairForm::kAll, false>(p, q, gradient, count, parameters);
    case PairForm::kJensenShannon:
      return differentiate_form<T, T, PairForm::kJensenShannon, false>(p, q, gradient, count, parameters);
  }
}

}  // namespace

const PairSpans& IRLFAST_JOIN(pair_spans_, IRLFAST_ISA)() {
  static constexpr PairSpans spans{
      {summarise<float>, summarise<double>, summarise<BFloat16>, summarise<Float16>},
      {mixture<float>, mixture<double>, mixture<BFloat16>, mixture<Float16>},
      {differentiate<float>, differentiate<double>, differentiate<BFloat16>, differentiate<Float16>},
      differentiate_form<float, BFloat16, PairForm::kAll, false>,
  };
  return spans;
}

}  // namespace irlfast
