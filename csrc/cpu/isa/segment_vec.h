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
  int64_t i = 0;
#if defined(__AVX512F__)
  // Of the others GCC makes something good by itself.
  if constexpr (sizeof(Word) == 4) {
    const __m512i bits = _mm512_set1_epi32(int32_t(~ignored_bits));
    for (; i + 16 <= count; i += 16) {
      const __mmask16 counts = _mm512_test_epi32_mask(_mm512_loadu_si512(words + i), bits);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(result + i), _mm_maskz_set1_epi8(counts, 1));
    }
  }
#endif
  for (; i < count; ++i) result[i] = (words[i] & Word(~ignored_bits)) != 0;
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
  int64_t total = 0, i = 0;
#if defined(__AVX512F__)
  for (; i + 64 <= count; i += 64) {
    const __m512i x = _mm512_loadu_si512(bytes + i);
    total += __builtin_popcountll(_mm512_test_epi8_mask(x, x));
  }
#elif defined(__AVX2__)
  for (; i + 32 <= count; i += 32) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes + i));
    total += 32 - __builtin_popcount(unsigned(_mm256_movemask_epi8(_mm256_cmpeq_epi8(x, _mm256_setzero_si256()))));
  }
#endif
  for (; i < count; ++i) total += bytes[i] != 0;
  return total;
}

template <int kBytes>
IRLFAST_VEC bool any_nonzero(const uint8_t* bytes) {
  uint64_t words[4] = {};
  static_assert(kBytes <= int(sizeof words), "all bytes are looked at");
  memcpy(words, bytes, kBytes);
  return ((words[0] | words[1]) | (words[2] | words[3])) != 0;
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

// Halves onto halves.
#if defined(__AVX2__)
IRLFAST_VEC double lanes_sum(__m256d x) {
  const __m128d pair = _mm_add_pd(_mm256_castpd256_pd128(x), _mm256_extractf128_pd(x, 1));
  return _mm_cvtsd_f64(_mm_add_sd(pair, _mm_unpackhi_pd(pair, pair)));
}
#if defined(__AVX512F__)
IRLFAST_VEC double lanes_sum(VecD x) {
  return lanes_sum(_mm256_add_pd(_mm512_castpd512_pd256(x), _mm512_extractf64x4_pd(x, 1)));
}
#endif
#else
IRLFAST_VEC double lanes_sum(VecD x) {
  return x[0] + x[1];
}
#endif

IRLFAST_VEC double lanes_sum(VecF x) {
  VecD low, high;
  widen(x, low, high);
  return lanes_sum(low + high);
}

// The first operand where it is less, else the second: a NaN there stays, as with max of vec.h.
#if defined(__AVX512F__)
IRLFAST_VEC VecF min(VecF a, VecF b) {
  return _mm512_min_ps(a, b);
}
IRLFAST_VEC VecD min(VecD a, VecD b) {
  return _mm512_min_pd(a, b);
}
#elif defined(__AVX2__)
IRLFAST_VEC VecF min(VecF a, VecF b) {
  return _mm256_min_ps(a, b);
}
IRLFAST_VEC VecD min(VecD a, VecD b) {
  return _mm256_min_pd(a, b);
}
#else
template <typename V>
IRLFAST_VEC V min(V a, V b) {
  return a < b ? a : b;
}
#endif

template <typename V>
struct Exp {
  V value;
  V less_one;  // exp(x) - 1, which does not cancel for small x
};

// exp(x) for x <= 88 (float), 700 (double): exactly 1 at 0, and as accurate far from it, for x log2(e) is kept in two
// parts. At least 1e-38 or so: what would underflow is held there.
template <typename Real, int kVectors, typename V>
IRLFAST_VEC void exp_accurate(const V (&x)[kVectors], Exp<V> (&result)[kVectors]) {
  using E = Exp2<Real>;
  constexpr Real kHigh = Real(kLog2E);
  constexpr Real kLow = sizeof(Real) == 4 ? Real(kLog2E - double(kHigh)) : Real(2.0355273740931033e-17);
  V f[kVectors], n[kVectors], q[kVectors];
  for (int u = 0; u < kVectors; ++u) {
    const V held = max(broadcast(Real(sizeof(Real) == 4 ? -87 : -708)), x[u]);
    const V t = held * kHigh;
    const V rest = fma(held, broadcast(kLow), fma(held, broadcast(kHigh), -t));
    n[u] = nearest<Real>(t);
    f[u] = (t - integer<Real>(n[u])) + rest;
    q[u] = broadcast(E::kAccurateQ[0]);
  }
  for (int k = 1; k < E::kAccurateTerms; ++k) {
    for (int u = 0; u < kVectors; ++u) q[u] = fma(q[u], f[u], broadcast(E::kAccurateQ[k]));
  }
  for (int u = 0; u < kVectors; ++u) {
    const V fraction = q[u] * f[u];
    const V scale = times_power_of_two<Real>(broadcast<Real>(1), n[u]);
    result[u] = {fma(scale, fraction, scale), fma(scale, fraction, scale - Real(1))};
  }
}

}  // namespace
}  // namespace irlfast
