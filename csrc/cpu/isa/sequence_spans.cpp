#include "isa/sequence_spans.h"

#include <string.h>

#include "isa/segment_vec.h"

#define IRLFAST_JOIN_(a, b) a##b
#define IRLFAST_JOIN(a, b) IRLFAST_JOIN_(a, b)

namespace irlfast {
namespace {

// Enough sums side by side to hide the latency of an addition.
constexpr int kSums = 4;

struct Totals {
  VecD sum[kSums]{};

  void add(int at, VecD x) { sum[at % kSums] += x; }
  void add(int at, VecF x) {
    VecD low, high;
    widen(x, low, high);
    sum[2 * at % kSums] += low;
    sum[(2 * at + 1) % kSums] += high;
  }
  double result() const { return lanes_sum((sum[0] + sum[1]) + (sum[2] + sum[3])); }
};

template <typename T>
MaskedSum sum(const void* data, const TokenMask& mask, int64_t begin, int64_t end) {
  using Real = typename Compute<T>::Real;
  constexpr int kLanes = Traits<Real>::kLanes;
  constexpr int kBlock = kBlockTokens<Real>;
  const T* values = static_cast<const T*>(data);
  uint8_t buffer[kBlock];
  Totals totals;
  MaskedSum result;
  for (int64_t i = begin; i < end; i += kBlock) {
    const int count = int(end - i < kBlock ? end - i : kBlock);
    const uint8_t* bytes = mask_bytes(mask, i, count, buffer);
    result.count += count_nonzero(bytes, count);
    int k = 0;
    // The position within the sequence decides which sum a token enters, so that padding after it changes nothing.
    for (int at = 0; k + kLanes <= count; k += kLanes, ++at) {
      totals.add(at, load_mask<Real>(bytes + k) ? load(values + i + k) : typename Traits<Real>::V{});
    }
    if (k < count) {
      T rest[kLanes] = {};
      uint8_t rest_mask[kLanes] = {};
      memcpy(rest, values + i + k, size_t(count - k) * sizeof(T));
      memcpy(rest_mask, bytes + k, size_t(count - k));
      totals.add(k / kLanes, load_mask<Real>(rest_mask) ? load(rest) : typename Traits<Real>::V{});
    }
  }
  result.sum = totals.result();
  return result;
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
