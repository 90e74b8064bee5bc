// Rows of logits: where they begin, how wide a thread may read, and what becomes of temperature and softcap.
#pragma once

#include <stdexcept>

#include "common/block.cuh"
#include "common/numbers.cuh"
#include "irlfast/token_stats.h"

namespace irlfast::cuda {

constexpr unsigned kRowThreads = 256;

// Of them on a multiprocessor at least, by which the compiler limits registers; float64 is there for checks.
template <typename T>
constexpr unsigned kRowBlocks = sizeof(T) == 8 ? 2 : 4;

// Of 16 bytes, by one thread, before it uses the first of them: 32 KiB in four blocks, which covers a read of 700 ns at
// 45 bytes a ns.
constexpr int kLoadsInFlight = 2;

// How a row is divided among a block: packs of 16 bytes that begin at multiples of 16, and before and after them single
// elements. 32 bits are enough to count in a row.
struct Split {
  int head = 0;   // before the packs
  int packs = 0;  // 16 bytes each
  int singles = 0;

  // The column of a single element.
  template <int kWidth>
  IRLFAST_DEVICE int single(int i) const {
    return i < head ? i : i + packs * kWidth;
  }
};

// `together`: what is read or written beside the row lies as far from a multiple of 16; if not, all are single.
template <typename T>
IRLFAST_DEVICE Split split_row(const void* row, int vocab, bool together) {
  constexpr int kWidth = kPackWidth<T>;
  const int beyond = int(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T));
  Split split;
  split.head = beyond == 0 ? 0 : kWidth - beyond;
  if (!together || split.head > vocab) split.head = vocab;
  split.packs = (vocab - split.head) / kWidth;
  split.singles = vocab - split.packs * kWidth;
  return split;
}

IRLFAST_DEVICE bool aligned_alike(const void* a, const void* b) {
  return (reinterpret_cast<uintptr_t>(a) - reinterpret_cast<uintptr_t>(b)) % 16 == 0;
}

template <typename T>
IRLFAST_DEVICE const T* row_of(const void* data, const RowLayout& layout, int64_t row) {
  // The division, of 64 bits, is left out where it can be.
  return static_cast<const T*>(data) + (layout.outer == 1 ? row * layout.inner_stride : layout.offset(row));
}

template <typename T>
IRLFAST_DEVICE T* row_of(void* data, const RowLayout& layout, int64_t row) {
  return const_cast<T*>(row_of<T>(static_cast<const void*>(data), layout, row));
}

// T of a row, NaN where it is no positive number.
template <typename Real>
IRLFAST_DEVICE Real temperature_of(const void* of_rows, double of_all, int64_t row) {
  const Real t = of_rows == nullptr ? Real(of_all) : static_cast<const Real*>(of_rows)[row];
  return t > Real(0) && t < -minus_infinity<Real>() ? t : not_a_number<Real>();
}

// visit(i) for each group of this thread's places: i, i + blockDim.x, ..., kLoadsInFlight of them.
template <typename Visit>
IRLFAST_DEVICE void for_places(int count, const Visit& visit) {
  for (unsigned i = threadIdx.x; i < unsigned(count); i += kLoadsInFlight * blockDim.x) visit(i);
}

// x = logits after the softcap at the places of i, -inf where one lies beyond the count. column(place): where its pack
// is.
template <typename T, int kWidth, typename Column>
IRLFAST_DEVICE void load_capped(const T* row, unsigned i, int count, const Column& column, RealOf<T> softcap,
                                RealOf<T> (&x)[kLoadsInFlight * kWidth]) {
  using Real = RealOf<T>;
  Pack<T, kWidth> pack[kLoadsInFlight];
#pragma unroll
  for (int u = 0; u < kLoadsInFlight; ++u) {
    pack[u] = Pack<T, kWidth>{};
    const unsigned place = i + u * blockDim.x;
    if (place < unsigned(count)) pack[u] = *reinterpret_cast<const Pack<T, kWidth>*>(row + column(int(place)));
  }
#pragma unroll
  for (int k = 0; k < kLoadsInFlight * kWidth; ++k) x[k] = to_real(pack[k / kWidth].at[k % kWidth]);
  if (softcap != Real(0)) {
#pragma unroll
    for (int k = 0; k < kLoadsInFlight * kWidth; ++k) x[k] = capped(x[k], softcap);
  }
#pragma unroll
  for (int u = 0; u < kLoadsInFlight; ++u) {
    const bool inside = i + u * blockDim.x < unsigned(count);
#pragma unroll
    for (int e = 0; e < kWidth; ++e) x[u * kWidth + e] = inside ? x[u * kWidth + e] : minus_infinity<Real>();
  }
}

template <typename T, int kWidth>
IRLFAST_DEVICE void store(T* to, const RealOf<T> (&x)[kWidth]) {
  Pack<T, kWidth> pack;
  if constexpr (kWidth == 1) {
    pack.at[0] = rounded<T>(x[0]);
  } else {
#pragma unroll
    for (int e = 0; e < kWidth; e += 2) round_pair<T>(x[e], x[e + 1], pack.at + e);
  }
  *reinterpret_cast<Pack<T, kWidth>*>(to) = pack;
}

// Zeros for a whole row.
template <typename T>
IRLFAST_DEVICE void clear_row(T* row, int vocab) {
  constexpr int kWidth = kPackWidth<T>;
  const Split split = split_row<T>(row, vocab, true);
  const Pack<T, kWidth> zeros{};
  for (int i = int(threadIdx.x); i < split.packs; i += int(blockDim.x)) {
    *reinterpret_cast<Pack<T, kWidth>*>(row + split.head + i * kWidth) = zeros;
  }
  for (int i = int(threadIdx.x); i < split.singles; i += int(blockDim.x)) row[split.single<kWidth>(i)] = zeros.at[0];
}

// A block's size for rows of so many bytes: the row's order of sums follows from it, and from nothing else in the
// batch.
inline unsigned threads_for_row(int64_t bytes) {
  const int64_t packs = bytes / 16;
  for (unsigned threads = kRowThreads; threads > kWarpSize; threads /= 2) {
    if (packs >= kLoadsInFlight * int64_t(threads)) return threads;
  }
  return kWarpSize;
}

inline void check_vocabulary(int64_t vocab) {
  if (vocab > 2147483647) throw std::runtime_error("the CUDA kernels take at most 2^31 - 1 logits a row");
}

}  // namespace irlfast::cuda
