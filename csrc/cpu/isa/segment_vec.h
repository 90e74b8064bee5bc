// What the passes over tokens share beyond vec.h: masks as vectors, sums of lanes, and exp with the input's own error
// carried along. Internal to the including file, as vec.h.
#pragma once

#include "irlfast/segments.h"
#include "isa/vec_math.h"

namespace irlfast {
namespace {

// Tokens whose mask is brought into bytes at a time; also the additions after which float sums move into doubles.
template <typename Real>
constexpr int kBlockTokens = 64 * Traits<Real>::kLanes;

template <typename Word>
void nonzero_bytes(const void* data, int64_t begin, int64_t count, Word ignored_bits, uint8_t* result) {
  const Word* words = static_cast<const Word*>(data) + begin;
  for (int64_t i = 0; i < count; ++i) result[i] = (words[i] & Word(~ignored_bits)) != 0;
}

// Bytes that are non-zero where tokens [begin, begin + count) count: the mask itself, or `buffer` filled.
inline const uint8_t* mask_bytes(const TokenMask& mask, int64_t begin, int64_t count, uint8_t* buffer) {
  if (mask.data == nullptr) {
    memset(buffer, 1, size_t(count));
    return buffer;
  }
  switch (mask.bytes) {
    case 1:
      return static_cast<const uint8_t*>(mask.data) + begin;
    case 2:
      nonzero_bytes<uint16_t>(mask.data, begin, count, mask.floating ? uint16_t(1) << 15 : 0, buffer);
      return buffer;
    case 4:
      nonzero_bytes<uint32_t>(mask.data, begin, count, mask.floating ? uint32_t(1) << 31 : 0, buffer);
      return buffer;
    default:
      nonzero_bytes<uint64_t>(mask.data, begin, count, mask.floating ? uint64_t(1) << 63 : 0, buffer);
      return buffer;
  }
}

inline int64_t count_nonzero(const uint8_t* bytes, int64_t count) {
  int64_t total = 0;
  for (int64_t i = 0; i < count;) {
    // In runs short enough for a sum of bytes, of which a register holds the most.
    const int64_t end = count - i < 128 ? count : i + 128;
    uint8_t run = 0;
    for (; i < end; ++i) run = uint8_t(run + (bytes[i] != 0));
    total += run;
  }
  return total;
}

// Bytes as the lanes of an integer vector, and the two halves of a vector of floats as doubles. With intrinsics where
// there are some: what GCC makes of __builtin_convertvector takes one lane after the other.
#if defined(__AVX512F__)
IRLFAST_VEC void load_bytes(const uint8_t* p, IntF& lanes) {
  lanes = reinterpret_cast<IntF>(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
IRLFAST_VEC void load_bytes(const uint8_t* p, IntD& lanes) {
  lanes = reinterpret_cast<IntD>(_mm512_cvtepi8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
IRLFAST_VEC void widen(VecF x, VecD& low, VecD& high) {
  low = _mm512_cvtps_pd(_mm512_castps512_ps256(x));
  high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1));
}
#elif defined(__AVX2__)
IRLFAST_VEC void load_bytes(const uint8_t* p, IntF& lanes) {
  lanes = reinterpret_cast<IntF>(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
IRLFAST_VEC void load_bytes(const uint8_t* p, IntD& lanes) {
  int32_t four;
  memcpy(&four, p, sizeof four);
  lanes = reinterpret_cast<IntD>(_mm256_cvtepi8_epi64(_mm_cvtsi32_si128(four)));
}
IRLFAST_VEC void widen(VecF x, VecD& low, VecD& high) {
  low = _mm256_cvtps_pd(_mm256_castps256_ps128(x));
  high = _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1));
}
#else
template <typename I>
IRLFAST_VEC void load_bytes(const uint8_t* p, I& lanes) {
  for (unsigned i = 0; i < sizeof(I) / sizeof(lanes[0]); ++i) lanes[i] = p[i];
}
IRLFAST_VEC void widen(VecF x, VecD& low, VecD& high) {
  low = VecD{double(x[0]), double(x[1])};
  high = VecD{double(x[2]), double(x[3])};
}
#endif

// All ones in the lanes whose byte is not zero.
template <typename Real>
IRLFAST_VEC typename Traits<Real>::I load_mask(const uint8_t* bytes) {
  typename Traits<Real>::I lanes;
  load_bytes(bytes, lanes);
  return lanes != 0;
}

IRLFAST_VEC double lanes_sum(VecD x) {
  double lane[Traits<double>::kLanes];
  store(lane, x);
  for (int half = Traits<double>::kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  }
  return lane[0];
}

IRLFAST_VEC double lanes_sum(VecF x) {
  VecD low, high;
  widen(x, low, high);
  return lanes_sum(low + high);
}

// exp(x) for x <= 88 (float), 700 (double): exactly 1 at 0, and as accurate far from it. x log2(e) is kept in two
// parts.
template <typename Real, typename V>
IRLFAST_VEC V exp_accurate(V x) {
  using E = Exp2<Real>;
  constexpr Real kHigh = Real(kLog2E);
  // log2(e) less its nearest float or double.
  constexpr Real kLow = sizeof(Real) == 4 ? Real(kLog2E - double(kHigh)) : Real(2.0355273740931033e-17);
  const V t = max(broadcast<Real>(E::kLowest), x * kHigh);
  const V rest = fma(x, broadcast(kHigh), -(x * kHigh)) + x * kLow;
  const V n = nearest<Real>(t);
  const V f = t - integer<Real>(n);
  V q = broadcast(E::kAccurateQ[0]);
  for (int k = 1; k < E::kAccurateTerms; ++k) q = fma(q, f, broadcast(E::kAccurateQ[k]));
  // 2^(f + rest) = 2^f (1 + rest ln 2), rest being of the size of a rounding error.
  V r = fma(q, f, broadcast<Real>(1));
  r = t > Real(E::kLowest) ? fma(r, rest * Real(kLn2), r) : r;
  return times_power_of_two<Real>(r, n);
}

// e^x - 1 - x, given e^x: for small x by its series, in which nothing cancels.
template <typename Real, typename V>
IRLFAST_VEC V exp_less_linear(V exp_x, V x) {
  constexpr int kTerms = sizeof(Real) == 4 ? 8 : 15;
  // 1 / (k + 2)!
  constexpr double kInverseFactorial[15] = {
      0.5,
      0.16666666666666666,
      0.041666666666666664,
      0.0083333333333333332,
      0.0013888888888888889,
      0.00019841269841269841,
      2.4801587301587302e-05,
      2.7557319223985893e-06,
      2.7557319223985888e-07,
      2.505210838544172e-08,
      2.08767569878681e-09,
      1.6059043836821613e-10,
      1.1470745597729725e-11,
      7.6471637318198164e-13,
      4.7794773323873853e-14,
  };
  V series = broadcast(Real(kInverseFactorial[kTerms - 1]));
  for (int k = kTerms - 2; k >= 0; --k) series = fma(series, x, broadcast(Real(kInverseFactorial[k])));
  const V magnitude = x < Real(0) ? -x : x;
  return magnitude < Real(0.5) ? series * x * x : (exp_x - Real(1)) - x;
}

}  // namespace
}  // namespace irlfast
