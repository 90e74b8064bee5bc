// Vectors of float and double as wide as the instruction set this file is compiled for, and loads and stores that
// convert from and to the storage types. Everything is internal to the including file and inlined: an out-of-line copy
// compiled for a wide instruction set could be the one the linker keeps for every caller.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "irlfast/dtype.h"

#define IRLFAST_VEC inline __attribute__((always_inline))

namespace irlfast {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

#if defined(__AVX512F__) || defined(__FMA__)
constexpr bool kHasFma = true;
#else
constexpr bool kHasFma = false;
#endif

template <typename Real>
struct Traits;

template <>
struct Traits<float> {
  typedef float V __attribute__((vector_size(kVectorBytes)));
  typedef int32_t I __attribute__((vector_size(kVectorBytes)));
  typedef uint16_t H __attribute__((vector_size(kVectorBytes / 2)));  // as many 16-bit values as V has lanes
  static constexpr int kLanes = kVectorBytes / 4;
};

template <>
struct Traits<double> {
  typedef double V __attribute__((vector_size(kVectorBytes)));
  typedef int64_t I __attribute__((vector_size(kVectorBytes)));
  static constexpr int kLanes = kVectorBytes / 8;
};

using VecF = Traits<float>::V;
using IntF = Traits<float>::I;
using HalfF = Traits<float>::H;
using VecD = Traits<double>::V;
using IntD = Traits<double>::I;

// The type a storage type is computed in.
template <typename T>
struct Compute {
  using Real = float;
};
template <>
struct Compute<double> {
  using Real = double;
};

template <typename Real>
IRLFAST_VEC typename Traits<Real>::V broadcast(Real x) {
  return x - typename Traits<Real>::V{};
}

// The second operand where either is NaN, as the maxps instruction has it.
#if defined(__AVX512F__)
IRLFAST_VEC VecF max(VecF a, VecF b) {
  return _mm512_max_ps(a, b);
}
IRLFAST_VEC VecD max(VecD a, VecD b) {
  return _mm512_max_pd(a, b);
}
IRLFAST_VEC VecF fma(VecF a, VecF b, VecF c) {
  return _mm512_fmadd_ps(a, b, c);
}
IRLFAST_VEC VecD fma(VecD a, VecD b, VecD c) {
  return _mm512_fmadd_pd(a, b, c);
}
IRLFAST_VEC bool any_greater(VecF a, VecF b) {
  return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0;
}
IRLFAST_VEC bool any_greater(VecD a, VecD b) {
  return _mm512_cmp_pd_mask(a, b, _CMP_GT_OQ) != 0;
}
IRLFAST_VEC bool any_equal(VecF a, VecF b) {
  return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ) != 0;
}
IRLFAST_VEC bool any_equal(VecD a, VecD b) {
  return _mm512_cmp_pd_mask(a, b, _CMP_EQ_OQ) != 0;
}
#elif defined(__AVX2__)
IRLFAST_VEC VecF max(VecF a, VecF b) {
  return _mm256_max_ps(a, b);
}
IRLFAST_VEC VecD max(VecD a, VecD b) {
  return _mm256_max_pd(a, b);
}
IRLFAST_VEC VecF fma(VecF a, VecF b, VecF c) {
  return _mm256_fmadd_ps(a, b, c);
}
IRLFAST_VEC VecD fma(VecD a, VecD b, VecD c) {
  return _mm256_fmadd_pd(a, b, c);
}
IRLFAST_VEC bool any_greater(VecF a, VecF b) {
  return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)) != 0;
}
IRLFAST_VEC bool any_greater(VecD a, VecD b) {
  return _mm256_movemask_pd(_mm256_cmp_pd(a, b, _CMP_GT_OQ)) != 0;
}
IRLFAST_VEC bool any_equal(VecF a, VecF b) {
  return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_EQ_OQ)) != 0;
}
IRLFAST_VEC bool any_equal(VecD a, VecD b) {
  return _mm256_movemask_pd(_mm256_cmp_pd(a, b, _CMP_EQ_OQ)) != 0;
}
#else
template <typename V>
IRLFAST_VEC V max(V a, V b) {
  return a > b ? a : b;
}
template <typename V>
IRLFAST_VEC V fma(V a, V b, V c) {
  return a * b + c;
}
template <typename V>
IRLFAST_VEC bool any_greater(V a, V b) {
  const auto greater = a > b;
  bool any = false;
  for (unsigned i = 0; i < sizeof(V) / sizeof(greater[0]); ++i) any |= greater[i] != 0;
  return any;
}
template <typename V>
IRLFAST_VEC bool any_equal(V a, V b) {
  const auto equal = a == b;
  bool any = false;
  for (unsigned i = 0; i < sizeof(V) / sizeof(equal[0]); ++i) any |= equal[i] != 0;
  return any;
}
#endif

// Lane i + lane i + half of them, in double. Of doubles: themselves.
IRLFAST_VEC VecD fold_to_double(VecD x) {
  return x;
}
IRLFAST_VEC VecD fold_to_double(VecF x) {
#if defined(__AVX512F__)
  return _mm512_cvtps_pd(_mm512_castps512_ps256(x)) + _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1));
#elif defined(__AVX2__)
  return _mm256_cvtps_pd(_mm256_castps256_ps128(x)) + _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1));
#else
  VecD folded;
  constexpr int kHalf = Traits<double>::kLanes;
  for (int lane = 0; lane < kHalf; ++lane) folded[lane] = double(x[lane]) + double(x[lane + kHalf]);
  return folded;
#endif
}

// Lane numbers 0, 1, 2, ...
template <typename Real>
IRLFAST_VEC typename Traits<Real>::I lane_numbers() {
  typename Traits<Real>::I numbers{};
  for (int lane = 0; lane < Traits<Real>::kLanes; ++lane) numbers[lane] = lane;
  return numbers;
}

IRLFAST_VEC IntF bits(VecF x) {
  return reinterpret_cast<IntF>(x);
}
IRLFAST_VEC IntD bits(VecD x) {
  return reinterpret_cast<IntD>(x);
}
IRLFAST_VEC VecF from_bits(IntF x) {
  return reinterpret_cast<VecF>(x);
}
IRLFAST_VEC VecD from_bits(IntD x) {
  return reinterpret_cast<VecD>(x);
}

IRLFAST_VEC VecF load(const float* p) {
  VecF x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
IRLFAST_VEC VecD load(const double* p) {
  VecD x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
IRLFAST_VEC VecF load(const BFloat16* p) {
  HalfF half;
  std::memcpy(&half, p, sizeof half);
  return from_bits(__builtin_convertvector(half, IntF) << 16);
}
IRLFAST_VEC VecF load(const Float16* p) {
  HalfF half;
  std::memcpy(&half, p, sizeof half);
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(reinterpret_cast<__m256i>(half));
#elif defined(__AVX2__)
  return _mm256_cvtph_ps(reinterpret_cast<__m128i>(half));
#else
  const IntF wide = __builtin_convertvector(half, IntF);
  const IntF magnitude = wide & 0x7fff;
  // A float16's exponent and mantissa, moved into a float's, read 2^112 too small; subnormals come out right too.
  IntF value = bits(from_bits(magnitude << 13) * 0x1p112f);
  value = magnitude >= 0x7c00 ? (value | 0x7f800000) : value;
  return from_bits(value | ((wide & 0x8000) << 16));
#endif
}

// The upper half of each lane is x rounded to nearest, ties to even; a NaN stays a (quiet) NaN.
IRLFAST_VEC IntF round_to_bfloat16(VecF x) {
  const IntF b = bits(x);
  const IntF rounded = b + 0x7fff + ((b >> 16) & 1);
  return x != x ? (b | 0x400000) : rounded;
}

IRLFAST_VEC HalfF to_bfloat16(VecF x) {
  return __builtin_convertvector(round_to_bfloat16(x) >> 16, HalfF);
}

IRLFAST_VEC HalfF to_float16(VecF x) {
#if defined(__AVX512F__)
  return reinterpret_cast<HalfF>(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__AVX2__)
  return reinterpret_cast<HalfF>(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  const IntF magnitude = bits(x) & 0x7fffffff;
  const IntF sign = (bits(x) >> 16) & 0x8000;
  // Normal: rebias the exponent by 127 - 15 and round at bit 13.
  const IntF normal = (magnitude - (112 << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Subnormal, below 2^-14: adding 0.5 leaves the wanted ten bits, rounded, at the end of the mantissa.
  const IntF subnormal = bits(from_bits(magnitude) + 0.5f) - 0x3f000000;
  IntF half = magnitude < 0x38800000 ? subnormal : normal;
  half = magnitude >= 0x477ff000 ? IntF{} + 0x7c00 : half;  // 65520 and more round to infinity
  half = magnitude > 0x7f800000 ? IntF{} + 0x7e00 : half;
  return __builtin_convertvector(half | sign, HalfF);
#endif
}

IRLFAST_VEC void store(float* p, VecF x) {
  std::memcpy(p, &x, sizeof x);
}
IRLFAST_VEC void store(double* p, VecD x) {
  std::memcpy(p, &x, sizeof x);
}
IRLFAST_VEC void store(BFloat16* p, VecF x) {
  const HalfF half = to_bfloat16(x);
  std::memcpy(p, &half, sizeof half);
}
IRLFAST_VEC void store(Float16* p, VecF x) {
  const HalfF half = to_float16(x);
  std::memcpy(p, &half, sizeof half);
}

// Blocks: kVectors vectors of adjacent elements. Lane i of vector u holds element block_position<T>(u)[i]. For bfloat16
// neighbours go to the same lane of two vectors: taking the halves of a 32-bit word apart is one instruction for each
// vector, and widening it in order three.
template <typename T>
IRLFAST_VEC typename Traits<typename Compute<T>::Real>::I block_position(int u) {
  using Real = typename Compute<T>::Real;
  return lane_numbers<Real>() + u * Traits<Real>::kLanes;
}
template <>
IRLFAST_VEC IntF block_position<BFloat16>(int u) {
  return lane_numbers<float>() * 2 + (u / 2 * 2 * Traits<float>::kLanes + u % 2);
}

template <typename T, typename V, int kVectors>
IRLFAST_VEC void load_block(const T* p, V (&x)[kVectors]) {
  for (int u = 0; u < kVectors; ++u) x[u] = load(p + u * int(sizeof(V) / sizeof(x[0][0])));
}
template <int kVectors>
IRLFAST_VEC void load_block(const BFloat16* p, VecF (&x)[kVectors]) {
  static_assert(kVectors % 2 == 0, "neighbours are in two vectors");
  for (int u = 0; u < kVectors; u += 2) {
    IntF pairs;
    std::memcpy(&pairs, p + u * Traits<float>::kLanes, sizeof pairs);
    x[u] = from_bits(pairs << 16);
    x[u + 1] = from_bits(pairs & int32_t(0xffff0000));
  }
}

IRLFAST_VEC IntF joined(HalfF first, HalfF second) {
  const HalfF halves[2] = {first, second};
  IntF both;
  std::memcpy(&both, halves, sizeof both);
  return both;
}

// Two vectors as load_block reads them from bfloat16.
IRLFAST_VEC IntF to_bfloat16_pairs(VecF even, VecF odd) {
#if defined(__AVX512BF16__)
  IntF order{};
  for (int i = 0; i < Traits<float>::kLanes; ++i) order[i] = (Traits<float>::kLanes + i) << 16 | i;
  const __m512bh halves = _mm512_cvtne2ps_pbh(odd, even);
  return reinterpret_cast<IntF>(
      _mm512_permutexvar_epi16(reinterpret_cast<__m512i>(order), reinterpret_cast<__m512i>(halves)));
#else
  typedef uint32_t Word __attribute__((vector_size(kVectorBytes)));
  const IntF low = reinterpret_cast<IntF>(reinterpret_cast<Word>(round_to_bfloat16(even)) >> 16);
  return low | (round_to_bfloat16(odd) & int32_t(0xffff0000));
#endif
}

// Past the caches, for results too large to be read back from them. The address is aligned to the vector.
#if defined(__AVX512F__)
template <typename V>
IRLFAST_VEC void stream_vector(void* p, V x) {
  _mm512_stream_si512(static_cast<__m512i*>(p), reinterpret_cast<__m512i>(x));
}
#elif defined(__AVX2__)
template <typename V>
IRLFAST_VEC void stream_vector(void* p, V x) {
  _mm256_stream_si256(static_cast<__m256i*>(p), reinterpret_cast<__m256i>(x));
}
#else
template <typename V>
IRLFAST_VEC void stream_vector(void* p, V x) {
  std::memcpy(p, &x, sizeof x);
}
#endif

template <bool kStream, typename V>
IRLFAST_VEC void put_vector(void* p, V x) {
  if (kStream) {
    stream_vector(p, x);
  } else {
    std::memcpy(p, &x, sizeof x);
  }
}

// A block that load_block has read from a T*, written. A streamed block starts at a multiple of kVectorBytes.
template <bool kStream, typename T, typename Real, typename V, int kVectors>
IRLFAST_VEC void store_block(Real* p, const V (&x)[kVectors]) {
  for (int u = 0; u < kVectors; ++u) put_vector<kStream>(p + u * Traits<Real>::kLanes, x[u]);
}
template <bool kStream, typename T, int kVectors>
IRLFAST_VEC void store_block(BFloat16* p, const VecF (&x)[kVectors]) {
  for (int u = 0; u < kVectors; u += 2) {
    put_vector<kStream>(p + u * Traits<float>::kLanes, std::is_same<T, BFloat16>::value
                                                           ? to_bfloat16_pairs(x[u], x[u + 1])
                                                           : joined(to_bfloat16(x[u]), to_bfloat16(x[u + 1])));
  }
}
template <bool kStream, typename T, int kVectors>
IRLFAST_VEC void store_block(Float16* p, const VecF (&x)[kVectors]) {
  for (int u = 0; u < kVectors; u += 2) {
    put_vector<kStream>(p + u * Traits<float>::kLanes, joined(to_float16(x[u]), to_float16(x[u + 1])));
  }
}

// Orders streamed stores before whatever the caller does next.
IRLFAST_VEC void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace
}  // namespace irlfast
