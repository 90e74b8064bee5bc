// Elementary functions on the vectors of vec.h. NaN in gives NaN out.
#pragma once

#include "isa/vec.h"

namespace irlfast {
namespace {

constexpr double kLog2E = 1.4426950408889634074;
constexpr double kLn2 = 0.6931471805599453094;

// 2^t = 2^n 2^f with n the nearest integer and |f| <= 1/2: adding 1.5 * 2^(mantissa bits) rounds t and leaves n in the
// low bits. 2^f = 1 + f q(f); the leading 1 is exact, so that 2^0 is.
template <typename Real>
struct Exp2;

template <>
struct Exp2<float> {
  static constexpr float kRound = 0x1.8p23f;
  static constexpr float kLowest = -126.0f;  // below, the result would be subnormal and is 0
  static constexpr int kMantissaBits = 23;
  static constexpr int32_t kOne = 0x3f800000;

  // Minimax in relative error over [-1/2, 1/2] with the constant term held at 1: 9.2e-8.
  static IRLFAST_VEC VecF q(VecF f) {
    VecF r = broadcast(0x1.5bba14p-10f);
    r = fma(r, f, broadcast(0x1.3cea88p-7f));
    r = fma(r, f, broadcast(0x1.c6b752p-5f));
    r = fma(r, f, broadcast(0x1.ebf9bcp-3f));
    return fma(r, f, broadcast(0x1.62e42ap-1f));
  }

  // One degree more (2.0e-9), where q itself and not 1 + f q has to be accurate.
  static IRLFAST_VEC VecF q_accurate(VecF f) {
    VecF r = broadcast(0x1.41fbbcp-13f);
    r = fma(r, f, broadcast(0x1.5f3e52p-10f));
    r = fma(r, f, broadcast(0x1.3b2d4cp-7f));
    r = fma(r, f, broadcast(0x1.c6aee8p-5f));
    r = fma(r, f, broadcast(0x1.ebfbdcp-3f));
    return fma(r, f, broadcast(0x1.62e430p-1f));
  }
};

// Of (2^f - 1) / f: ln2^k / k! from k = 1 to 13. The next term is below 4e-18 of 2^f.
struct Taylor {
  double coefficient[13];
  constexpr Taylor() : coefficient{} {
    double term = kLn2;
    for (int k = 0; k < 13; ++k) {
      coefficient[k] = term;
      term *= kLn2 / (k + 2);
    }
  }
};
constexpr Taylor kTaylor;

template <>
struct Exp2<double> {
  static constexpr double kRound = 0x1.8p52;
  static constexpr double kLowest = -1022.0;
  static constexpr int kMantissaBits = 52;
  static constexpr int64_t kOne = 0x3ff0000000000000;

  static IRLFAST_VEC VecD q(VecD f) {
    VecD r = broadcast(kTaylor.coefficient[12]);
    for (int k = 11; k >= 0; --k) r = fma(r, f, broadcast(kTaylor.coefficient[k]));
    return r;
  }
  static IRLFAST_VEC VecD q_accurate(VecD f) { return q(f); }
};

// 2^n from t + kRound.
template <typename Real, typename V>
IRLFAST_VEC V power_of_two(V rounded) {
  return from_bits((bits(rounded) << Exp2<Real>::kMantissaBits) + Exp2<Real>::kOne);
}

// 2^t for t <= 127 (float) or 1023 (double); exactly 0 at and below kLowest, -inf included. `t` comes back limited to
// kLowest, so that its product with the result is never 0 * inf.
template <typename Real, typename V>
IRLFAST_VEC V exp2_limited(V& t) {
  using E = Exp2<Real>;
  t = max(broadcast<Real>(E::kLowest), t);
  const V rounded = t + E::kRound;
  const V f = t - (rounded - E::kRound);
  const V mantissa = fma(E::q(f), f, broadcast<Real>(1));
  const V result = mantissa * power_of_two<Real>(rounded);
  return t == E::kLowest ? V{} : result;
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
  const V rounded = t + E::kRound;
  const V f = t - (rounded - E::kRound);
  const V scale = power_of_two<Real>(rounded);
  const V y = fma(scale, E::q_accurate(f) * f, scale - Real(1));
  const V inverse = Real(1) / (y + Real(2));
  const V value = y * inverse;
  const V slope = Real(2) * inverse * (Real(1) + value);
  return {x < Real(0) ? -value : value, slope};
}

}  // namespace
}  // namespace irlfast
