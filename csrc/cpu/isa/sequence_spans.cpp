#include "isa/sequence_spans.h"

#include <string.h>

#include "isa/segment_vec.h"

#define IRLFAST_JOIN_(a, b) a##b
#define IRLFAST_JOIN(a, b) IRLFAST_JOIN_(a, b)

namespace irlfast {
namespace {

// Enough sums side by side to hide the latency of an addition. The position within the sequence alone decides which of
// them a token enters, so that neither padding after it nor another sequence shows in the result.
template <typename Real>
class Summation {
  using V = typename Traits<Real>::V;
  using I = typename Traits<Real>::I;
  static constexpr int kLanes = Traits<Real>::kLanes;
  static constexpr int kVectors = 4;

 public:
  static constexpr int kStep = kVectors * kLanes;

  template <typename T>
  IRLFAST_VEC void add(const T* values, const uint8_t* bytes) {
    for (int u = 0; u < kVectors; ++u) {
      const I mask = load_mask<Real>(bytes + u * kLanes);
      count_[u] -= mask;
      enter(u, mask ? load(values + u * kLanes) : V{});
    }
  }

  MaskedSum result() const {
    MaskedSum result;
    result.sum = lanes_sum((sum_[0] + sum_[1]) + (sum_[2] + sum_[3]));
    const I counts = (count_[0] + count_[1]) + (count_[2] + count_[3]);
    for (int lane = 0; lane < kLanes; ++lane) result.count += counts[lane];
    return result;
  }

 private:
  IRLFAST_VEC void enter(int u, VecD x) { sum_[u] += x; }
  IRLFAST_VEC void enter(int u, VecF x) {
    VecD low, high;
    widen(x, low, high);
    sum_[2 * u % kVectors] += low;
    sum_[(2 * u + 1) % kVectors] += high;
  }

  VecD sum_[kVectors]{};
  I count_[kVectors]{};
};

template <typename T>
MaskedSum sum(const void* data, const TokenMask& mask, int64_t begin, int64_t end) {
  using Real = typename Compute<T>::Real;
  constexpr int kStep = Summation<Real>::kStep;
  constexpr int kBlock = kBlockTokens<Real>;
  static_assert(kBlock % kStep == 0, "each block begins with the first of the sums");
  const T* values = static_cast<const T*>(data);
  uint8_t buffer[kBlock];
  Summation<Real> summation;
  for (int64_t i = begin; i < end; i += kBlock) {
    const int count = int(end - i < kBlock ? end - i : kBlock);
    const uint8_t* bytes = mask_bytes(mask, i, count, buffer);
    int k = 0;
    for (; k + kStep <= count; k += kStep) summation.add(values + i + k, bytes + k);
    if (k < count) {
      T rest[kStep] = {};
      uint8_t rest_mask[kStep] = {};
      memcpy(rest, values + i + k, size_t(count - k) * sizeof(T));
      memcpy(rest_mask, bytes + k, size_t(count - k));
      summation.add(rest, rest_mask);
    }
  }
  return summation.result();
}

int64_t count(const TokenMask& mask, int64_t begin, int64_t end) {
  constexpr int kBlock = kBlockTokens<float>;
  uint8_t buffer[kBlock];
  if (mask.data == nullptr) return end - begin;
  int64_t total = 0;
  for (int64_t i = begin; i < end; i += kBlock) {
    const int64_t n = end - i < kBlock ? end - i : kBlock;
    total += count_nonzero(mask_bytes(mask, i, n, buffer), n);
  }
  return total;
}

template <typename T>
void spread(void* data, const TokenMask& mask, int64_t begin, int64_t end, double value) {
  using Real = typename Compute<T>::Real;
  using V = typename Traits<Real>::V;
  constexpr int kLanes = Traits<Real>::kLanes;
  constexpr int kBlock = kBlockTokens<Real>;
  T* values = static_cast<T*>(data);
  const V all = broadcast(Real(value));
  uint8_t buffer[kBlock];
  for (int64_t i = begin; i < end; i += kBlock) {
    const int count = int(end - i < kBlock ? end - i : kBlock);
    const uint8_t* bytes = mask_bytes(mask, i, count, buffer);
    int k = 0;
    for (; k + kLanes <= count; k += kLanes) store(values + i + k, load_mask<Real>(bytes + k) ? all : V{});
    if (k < count) {
      T rest[kLanes];
      uint8_t rest_mask[kLanes] = {};
      memcpy(rest_mask, bytes + k, size_t(count - k));
      store(rest, load_mask<Real>(rest_mask) ? all : V{});
      memcpy(values + i + k, rest, size_t(count - k) * sizeof(T));
    }
  }
}

}  // namespace

const SequenceSpans& IRLFAST_JOIN(sequence_spans_, IRLFAST_ISA)() {
  static constexpr SequenceSpans spans{
      {sum<float>, sum<double>, sum<BFloat16>, sum<Float16>},
      count,
      {spread<float>, spread<double>, spread<BFloat16>, spread<Float16>},
  };
  return spans;
}

}  // namespace irlfast
