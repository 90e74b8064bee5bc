// What the passes over contiguous logits share: the softcap, whole and ragged blocks, and stores that may bypass the
// caches. Internal to the including file, like vec.h.
#pragma once

#include <cstdint>
#include <cstring>

#include "isa/vec_math.h"

#define IRLFAST_JOIN_(a, b) a##b
#define IRLFAST_JOIN(a, b) IRLFAST_JOIN_(a, b)

namespace irlfast {
namespace {

// After this many additions to it a partial sum moves into one of doubles: the rounding error of a sum grows with the
// number of its terms, and a row has thousands for each lane.
constexpr int kAdditions = 32;

// Logits as the statistics see them: after softcap, before the temperature.
template <typename Real, bool kSoftcap>
class Cap {
  using V = typename Traits<Real>::V;

 public:
  explicit Cap(double softcap) : cap_(Real(softcap)), inverse_(kSoftcap ? Real(1 / softcap) : Real(0)) {}

  V value(V logit) const { return kSoftcap ? tanh<Real>(logit * inverse_).value * cap_ : logit; }

  // The value, and its derivative in `slope`.
  V value(V logit, V& slope) const {
    if (!kSoftcap) {
      slope = broadcast<Real>(1);
      return logit;
    }
    const Tanh<V> t = tanh<Real>(logit * inverse_);
    slope = t.slope;
    return t.value * cap_;
  }

 private:
  Real cap_, inverse_;
};

// A whole block of logits after softcap.
template <typename T, typename C, typename V, int kVectors>
IRLFAST_VEC void load_block(const T* logits, const C& cap, V (&block)[kVectors]) {
  constexpr int kLanes = int(sizeof(V) / sizeof(block[0][0]));
  for (int u = 0; u < kVectors; ++u) block[u] = cap.value(load(logits + u * kLanes));
}

// The last block, of fewer logits; -inf past them.
template <typename T, typename C, typename V, int kVectors>
IRLFAST_VEC void load_rest(const T* logits, int64_t count, const C& cap, V (&block)[kVectors]) {
  using Real = typename Compute<T>::Real;
  constexpr int kLanes = Traits<Real>::kLanes;
  T rest[kVectors * kLanes] = {};
  memcpy(rest, logits, size_t(count) * sizeof(T));
  for (int u = 0; u < kVectors; ++u) {
    block[u] = cap.value(load(rest + u * kLanes));
    const auto past = lane_numbers<Real>() >= decltype(+lane_numbers<Real>()[0])(count - u * kLanes);
    block[u] = past ? broadcast<Real>(-INFINITY) : block[u];
  }
}

template <bool kStream, typename T, typename V>
IRLFAST_VEC void put(T* destination, V value) {
  kStream ? stream(destination, value) : store(destination, value);
}

// How many elements come before the first address that streamed stores can begin at.
template <typename T, int kLanes>
IRLFAST_VEC int64_t unaligned_head(const T* destination) {
  constexpr uintptr_t kBytes = kLanes * sizeof(T);
  const uintptr_t past = reinterpret_cast<uintptr_t>(destination) % kBytes;
  return past == 0 ? 0 : int64_t((kBytes - past) / sizeof(T));
}

}  // namespace
}  // namespace irlfast
