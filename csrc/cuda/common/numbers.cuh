// Numbers as kernels take them: storage types, 16 bytes of them at once, and functions that GPUs have instructions for.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>

#include "common/launch.h"
#include "irlfast/dtype.h"
#include "irlfast/online_softmax.h"

namespace irlfast::cuda {

// What a kernel computes with, and the statistics' type.
template <typename T>
struct Computes {
  using Real = float;
};
template <>
struct Computes<double> {
  using Real = double;
};
template <typename T>
using RealOf = typename Computes<T>::Real;

// kWidth adjacent elements. 16 bytes of them are one load or store.
template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Pack {
  T at[kWidth];
};

template <typename T>
constexpr int kPackWidth = int(16 / sizeof(T));

template <typename To, typename From>
IRLFAST_DEVICE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "one value's bits are another's");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

IRLFAST_DEVICE float to_real(float x) {
  return x;
}
IRLFAST_DEVICE double to_real(double x) {
  return x;
}
IRLFAST_DEVICE float to_real(BFloat16 x) {
  return bits_as<float>(uint32_t(x.bits) << 16);
}
IRLFAST_DEVICE float to_real(Float16 x) {
#if defined(__CUDACC__)
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(x.bits));
  return result;
#else
  return float(bits_as<_Float16>(x.bits));
#endif
}

// To nearest, ties to even. Two at once are one instruction for the 16-bit types.
template <typename T>
IRLFAST_DEVICE void round_pair(RealOf<T> a, RealOf<T> b, T* to) {
  to[0] = a;
  to[1] = b;
}
#if defined(__CUDACC__)
template <>
IRLFAST_DEVICE void round_pair<BFloat16>(float a, float b, BFloat16* to) {
  uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(b), "f"(a));
  to[0].bits = uint16_t(both);
  to[1].bits = uint16_t(both >> 16);
}
template <>
IRLFAST_DEVICE void round_pair<Float16>(float a, float b, Float16* to) {
  uint32_t both;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(b), "f"(a));
  to[0].bits = uint16_t(both);
  to[1].bits = uint16_t(both >> 16);
}
#else
inline BFloat16 round_to_bfloat16(float x) {
  const uint32_t bits = bits_as<uint32_t>(x);
  if (x != x) return {0x7fff};
  return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
template <>
inline void round_pair<BFloat16>(float a, float b, BFloat16* to) {
  to[0] = round_to_bfloat16(a);
  to[1] = round_to_bfloat16(b);
}
template <>
inline void round_pair<Float16>(float a, float b, Float16* to) {
  to[0].bits = bits_as<uint16_t>(_Float16(a));
  to[1].bits = bits_as<uint16_t>(_Float16(b));
}
#endif

template <typename T>
IRLFAST_DEVICE T rounded(RealOf<T> x) {
  T pair[2];
  round_pair<T>(x, RealOf<T>(0), pair);
  return pair[0];
}

// The temperature as exponentials take it: exponential(x, scale) = exp(x / T). Below about 2^-126 the float's is 0.
IRLFAST_DEVICE float exponent_scale(float temperature) {
  return 1.4426950408889634f / temperature;
}
IRLFAST_DEVICE double exponent_scale(double temperature) {
  return 1.0 / temperature;
}
IRLFAST_DEVICE float exponential(float x, float scale) {
#if defined(__CUDACC__)
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x * scale));
  return result;
#else
  return std::exp2(x * scale);
#endif
}
IRLFAST_DEVICE double exponential(double x, double scale) {
  return exp(x * scale);
}

// The larger; where one is NaN, the other.
IRLFAST_DEVICE float larger(float a, float b) {
  return fmaxf(a, b);
}
IRLFAST_DEVICE double larger(double a, double b) {
  return fmax(a, b);
}

// A finite number that stands in for -inf beside an exponential that is 0 there, far enough from the largest for a
// factor.
template <typename Real>
IRLFAST_DEVICE Real lowest() {
  return Real(sizeof(Real) == 8 ? -1e150 : -1e18);
}

template <typename Real>
IRLFAST_DEVICE Real minus_infinity() {
  return -std::numeric_limits<Real>::infinity();
}

template <typename Real>
IRLFAST_DEVICE Real not_a_number() {
  return std::numeric_limits<Real>::quiet_NaN();
}

// c tanh(l / c), or the logit where there is no cap.
template <typename Real>
IRLFAST_DEVICE Real capped(Real logit, Real softcap) {
  return softcap == Real(0) ? logit : softcap * std::tanh(logit / softcap);
}

// Its derivative 1 - tanh^2 = 1 / cosh^2, in which nothing cancels.
template <typename Real>
IRLFAST_DEVICE Real softcap_slope(Real logit, Real softcap) {
  if (softcap == Real(0)) return Real(1);
  const Real e = exp(-std::fabs(logit / softcap));
  const Real over_cosh = Real(2) * e / (Real(1) + e * e);
  return over_cosh * over_cosh;
}

}  // namespace irlfast::cuda
