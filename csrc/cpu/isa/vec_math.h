// Elementary functions on the vectors of vec.h. NaN in gives NaN out.
#pragma once

#include "isa/vec.h"

namespace irlfast {
namespace {

constexpr double kLog2E = 1.4426950408889634074;
constexpr double kLn2 = 0.6931471805599453094;

// 2^t = 2^n 2^f with n the nearest integer and |f| <= 1/2. 2^f = 1 + f q(f); the leading 1 is exact, so that 2^0 is.
// The result is 0 at kLowest: below the smallest normal number, or low enough to underflow where the processor has an
// instruction that scales by a power of two and does underflow.
template <typename Real>
struct Exp2;

template <>
struct Exp2<float> {
  static constexpr float kRound = 0x1.8p23f;
#if defined(__AVX512F__)
  static constexpr float kLowest = -160.0f;
#else
  static constexpr float kLowest = -127.0f;
#endif
  static constexpr int kMantissaBits = 23;
  static constexpr int32_t kOne = 0x3f800000;

  // Minimax in relative error over [-1/2, 1/2] with the constant term held at 1: 9.2e-8. Highest power first.
  static constexpr int kTerms = 5;
  static constexpr float kQ[kTerms] = {0x1.5bba14p-10f, 0x1.3cea88p-7f, 0x1.c6b752p-5f, 0x1.ebf9bcp-3f, 0x1.62e42ap-1f};

  // The same over [0, 1): 8.3e-8, and 3e-9 on average.
  static constexpr float kQOfFloor[kTerms] = {0x1.e96c7cp-10f, 0x1.277b38p-7f, 0x1.c91c36p-5f, 0x1.ebdb68p-3f,
                                              0x1.62e4bap-1f};

  // One degree more (2.0e-9), where q itself and not 1 + f q has to be accurate.
  static constexpr int kAccurateTerms = 6;
  static constexpr float kAccurateQ[kAccurateTerms] = {0x1.41fbbcp-13f, 0x1.5f3e52p-10f, 0x1.3b2d4cp-7f,
                                                       0x1.c6aee8p-5f,  0x1.ebfbdcp-3f,  0x1.62e430p-1f};
};

template <>
struct Exp2<double> {
  static constexpr double kRound = 0x1.8p52;
#if defined(__AVX512F__)
  static constexpr double kLowest = -1100.0;
#else
  static constexpr double kLowest = -1023.0;
#endif
  static constexpr int kMantissaBits = 52;
  static constexpr int64_t kOne = 0x3ff0000000000000;

  // Taylor series of (2^f - 1) / f: ln2^k / k! from k = 13 down to 1. The next term is below 4e-18 of 2^f.
  static constexpr int kTerms = 13;
  static constexpr double kQ[kTerms] = {
      0x1.816193166d0f9p-40, 0x1.c3bd650fc2986p-36, 0x1.e8cac7351bb25p-32, 0x1.e4cf5158b8ecap-28, 0x1.b5253d395e7c4p-24,
      0x1.62c0223a5c824p-20, 0x1.ffcbfc588b0c7p-17, 0x1.430912f86c787p-13, 0x1.5d87fe78a6731p-10, 0x1.3b2ab6fba4e77p-7,
      0x1.c6b08d704a0c0p-5,  0x1.ebfbdff82c58fp-3,  0x1.62e42fefa39efp-1};
  static constexpr int kAccurateTerms = kTerms;
  static constexpr const double (&kAccurateQ)[kTerms] = kQ;
};

// The nearest integer n to t, in the form in which 2^n is soonest made from it: n itself where the processor scales by
// powers of two, otherwise n + 1.5 * 2^(mantissa bits), whose low bits are n.
#if defined(__AVX512F__)
template <typename Real>
IRLFAST_VEC VecF nearest(VecF t) {
  return _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
template <typename Real>
IRLFAST_VEC VecD nearest(VecD t) {
  return _mm512_roundscale_pd(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
template <typename Real, typename V>
IRLFAST_VEC V integer(V nearest) {
  return nearest;
}
template <typename Real>
IRLFAST_VEC VecF times_power_of_two(VecF x, VecF nearest) {
  return _mm512_scalef_ps(x, nearest);
}
template <typename Real>
IRLFAST_VEC VecD times_power_of_two(VecD x, VecD nearest) {
  return _mm512_scalef_pd(x, nearest);
}
#else
template <typename Real, typename V>
IRLFAST_VEC V nearest(V t) {
  return t + Exp2<Real>::kRound;
}
template <typename Real, typename V>
IRLFAST_VEC V integer(V nearest) {
  return nearest - Exp2<Real>::kRound;
}
template <typename Real, typename V>
IRLFAST_VEC V times_power_of_two(V x, V nearest) {
  const V power = from_bits((bits(nearest) << Exp2<Real>::kMantissaBits) + Exp2<Real>::kOne);
  return nearest == Exp2<Real>::kRound + Exp2<Real>::kLowest ? V{} : x * power;
}
#endif

// 2^(n + f), step by step for several vectors together: with one chain of dependent operations after the other, the
// processor's scheduler fills up with operations that wait.
template <typename Real, int kVectors, typename V>
IRLFAST_VEC void two_to_the(const V (&n)[kVectors], const V (&f)[kVectors], V (&result)[kVectors]) {
  using E = Exp2<Real>;
  for (int u = 0; u < kVectors; ++u) result[u] = broadcast(E::kQ[0]);
  for (int k = 1; k < E::kTerms; ++k) {
    for (int u = 0; u < kVectors; ++u) result[u] = fma(result[u], f[u], broadcast(E::kQ[k]));
  }
  for (int u = 0; u < kVectors; ++u) result[u] = fma(result[u], f[u], broadcast<Real>(1));
  for (int u = 0; u < kVectors; ++u) result[u] = times_power_of_two<Real>(result[u], n[u]);
}

// 2^t for kLowest <= t <= 127 (float) or 1023 (double), and exactly 0 at kLowest.
template <typename Real, int kVectors, typename V>
IRLFAST_VEC void exp2_within(const V (&t)[kVectors], V (&result)[kVectors]) {
  V f[kVectors], n[kVectors];
  for (int u = 0; u < kVectors; ++u) n[u] = nearest<Real>(t[u]);
  for (int u = 0; u < kVectors; ++u) f[u] = t[u] - integer<Real>(n[u]);
  two_to_the<Real>(n, f, result);
}

#if defined(__AVX512F__)
// 2^t = 2^floor(t) 2^f: one instruction gives f = t - floor(t), and one multiplies by 2^floor(t). At -inf f is 0, and
// the result 0, without help.
template <typename Real, int kVectors>
IRLFAST_VEC void exp2_within(const VecF (&t)[kVectors], VecF (&result)[kVectors]) {
  using E = Exp2<float>;
  VecF f[kVectors];
  for (int u = 0; u < kVectors; ++u) f[u] = _mm512_reduce_ps(t[u], _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  for (int u = 0; u < kVectors; ++u) result[u] = broadcast(E::kQOfFloor[0]);
  for (int k = 1; k < E::kTerms; ++k) {
    for (int u = 0; u < kVectors; ++u) result[u] = fma(result[u], f[u], broadcast(E::kQOfFloor[k]));
  }
  for (int u = 0; u < kVectors; ++u) result[u] = fma(result[u], f[u], broadcast(1.0f));
  for (int u = 0; u < kVectors; ++u) result[u] = _mm512_scalef_ps(result[u], t[u]);
}
#endif

template <typename Real, int kVectors, typename V>
IRLFAST_VEC void limit(V (&t)[kVectors]) {
  for (int u = 0; u < kVectors; ++u) t[u] = max(broadcast<Real>(Exp2<Real>::kLowest), t[u]);
}

// 2^t for t <= 127 (float) or 1023 (double); exactly 0 at and below kLowest, -inf included. The t come back limited to
// kLowest, so that their product with the result is never 0 * inf.
template <typename Real, int kVectors, typename V>
IRLFAST_VEC void exp2_limited(V (&t)[kVectors], V (&result)[kVectors]) {
  limit<Real>(t);
  exp2_within<Real>(t, result);
}

// As exp2_limited, where the t are of no more use.
template <typename Real, int kVectors, typename V>
IRLFAST_VEC void exp2_alone(V (&t)[kVectors], V (&result)[kVectors]) {
#if defined(__AVX512F__)
  if (!std::is_same<Real, float>::value) limit<Real>(t);
#else
  limit<Real>(t);
#endif
  exp2_within<Real>(t, result);
}

// A factor for exp_limited: log2(e) times another one.
template <typename Real>
struct Scale {
  using V = typename Traits<Real>::V;

  explicit Scale(double factor)
      : factor(broadcast(Real(factor * kLog2E))), lowest(broadcast(Real(Exp2<Real>::kLowest / (factor * kLog2E)))) {}

  V factor;
  V lowest;  // where 2^(factor a) becomes 0
};

// exp of a times what the scale was made of, for a at most a little above 0; exactly 0 far below it, -inf included. The
// a come back limited, so that their product with the result is never 0 * inf. The fraction of the exponent of two is
// taken before that exponent is rounded.
template <typename Real, int kVectors, typename V>
IRLFAST_VEC void exp_limited(V (&a)[kVectors], const Scale<Real>& scale, V (&result)[kVectors]) {
  V f[kVectors], n[kVectors];
  for (int u = 0; u < kVectors; ++u) a[u] = max(scale.lowest, a[u]);
  for (int u = 0; u < kVectors; ++u) n[u] = nearest<Real>(a[u] * scale.factor);
  for (int u = 0; u < kVectors; ++u) f[u] = fma(a[u], scale.factor, -integer<Real>(n[u]));
  two_to_the<Real>(n, f, result);
}

template <typename Real>
struct Log;

template <>
struct Log<float> {
  static constexpr int kTerms = 5;
  static constexpr int32_t kSqrtHalf = 0x3f3504f3;
  static constexpr float kSmallest = 0x1p-126f;
  static constexpr float kLn2High = 0x1.62e4p-1f, kLn2Low = 0x1.7f7d1cp-20f;
};

template <>
struct Log<double> {
  static constexpr int kTerms = 11;
  static constexpr int64_t kSqrtHalf = 0x3fe6a09e667f3bcd;
  static constexpr double kSmallest = 0x1p-1022;
  static constexpr double kLn2High = 0x1.62e42fefa38p-1, kLn2Low = 0x1.ef35793c7673p-45;
};

// log(1 + h) for h >= -1, accurate for small h too; finite at -1, so that its product with 0 is 0. From
// log m = 2 atanh(s) = 2 (s + s^3/3 + s^5/5 + ...), s = (m - 1) / (m + 1), m in [sqrt(1/2), sqrt(2)): |s| < 0.172.
template <typename Real, typename V>
IRLFAST_VEC V log1p_limited(V h) {
  using L = Log<Real>;
  const V one = broadcast<Real>(1);
  const V rounded = one + h;
  const V lost = h - (rounded - one);
  const V sum = max(broadcast<Real>(L::kSmallest), rounded);
  const auto power = (bits(sum) - L::kSqrtHalf) >> Exp2<Real>::kMantissaBits;
  const V m = from_bits(bits(sum) - (power << Exp2<Real>::kMantissaBits));
  const V n = __builtin_convertvector(power, V);
  const V s = (m - one) / (m + one);
  const V z = s * s;
  V series = broadcast(Real(2) / Real(2 * L::kTerms + 1));
  for (int k = L::kTerms - 1; k >= 1; --k) series = fma(series, z, broadcast(Real(2) / Real(2 * k + 1)));
  const V tail = fma(s * z, series, fma(n, broadcast<Real>(L::kLn2Low), lost / sum));
  return fma(n, broadcast<Real>(L::kLn2High), s + s + tail);
}

template <typename V>
struct Tanh {
  V value;
  V slope;  // 1 - tanh^2
};

// From y = exp(2|x|) - 1: |tanh| = y / (y + 2), 1 - |tanh| = 2 / (y + 2), so that neither end cancels.
template <typename Real, typename V>
IRLFAST_VEC Tanh<V> tanh(V x) {
  using E = Exp2<Real>;
  const V magnitude = x < Real(0) ? -x : x;
  V t = magnitude * Real(2 * kLog2E);
  t = t > Real(120) ? broadcast<Real>(120) : t;
  const V n = nearest<Real>(t);
  const V f = t - integer<Real>(n);
  const V scale = times_power_of_two<Real>(broadcast<Real>(1), n);
  V q = broadcast(E::kAccurateQ[0]);
  for (int k = 1; k < E::kAccurateTerms; ++k) q = fma(q, f, broadcast(E::kAccurateQ[k]));
  const V y = fma(scale, q * f, scale - Real(1));
  const V inverse = Real(1) / (y + Real(2));
  const V value = y * inverse;
  const V slope = Real(2) * inverse * (Real(1) + value);
  return {x < Real(0) ? -value : value, slope};
}

}  // namespace
}  // namespace irlfast
