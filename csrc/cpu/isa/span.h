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

// The arithmetic on a block fills the processor's window, so that it does not come to the loads far ahead by itself,
// and the hardware's prefetchers stop at the end of a page. Asking for what stands beyond that page costs one
// instruction a line.
template <int kVectors, typename T>
IRLFAST_VEC void prefetch_ahead(const T* block) {
  constexpr int kLine = 64, kAhead = 6144;
  constexpr int kBytes = kVectors * Traits<typename Compute<T>::Real>::kLanes * int(sizeof(T));
  // An address only, which may lie past the array.
  const uintptr_t address = reinterpret_cast<uintptr_t>(block) + kAhead;
  for (int i = 0; i < kBytes; i += kLine) __builtin_prefetch(reinterpret_cast<const void*>(address + i));
}

// A whole block of logits after softcap.
template <typename T, typename C, typename V, int kVectors>
IRLFAST_VEC void load_capped(const T* logits, const C& cap, V (&block)[kVectors]) {
  load_block(logits, block);
  prefetch_ahead<kVectors>(logits);
  for (int u = 0; u < kVectors; ++u) block[u] = cap.value(block[u]);
}

// The last block, of fewer logits; -inf past them.
template <typename T, typename C, typename V, int kVectors>
IRLFAST_VEC void load_rest(const T* logits, int64_t count, const C& cap, V (&block)[kVectors]) {
  using Real = typename Compute<T>::Real;
  T rest[kVectors * Traits<Real>::kLanes] = {};
  memcpy(rest, logits, size_t(count) * sizeof(T));
  load_block(rest, block);
  for (int u = 0; u < kVectors; ++u) {
    const auto position = block_position<T>(u);
    const auto past = position >= decltype(+position[0])(count);
    block[u] = past ? broadcast<Real>(-INFINITY) : cap.value(block[u]);
  }
}

// Fewer elements than a vector has lanes, the first one in those that are left: what stands there is thrown away, and
// must not overflow on the way.
template <typename T, int kLanes>
IRLFAST_VEC auto load_few(const T* logits, int64_t count) {
  T buffer[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) buffer[lane] = logits[lane < count ? lane : 0];
  return load(buffer);
}

// How many elements come before the first address that streamed blocks can begin at.
template <typename T>
IRLFAST_VEC int64_t unaligned_head(const T* destination) {
  const uintptr_t past = reinterpret_cast<uintptr_t>(destination) % kVectorBytes;
  return past == 0 ? 0 : int64_t((kVectorBytes - past) / sizeof(T));
}

}  // namespace
}  // namespace irlfast
