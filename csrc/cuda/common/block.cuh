// Sums and summaries over a block's threads, in an order that the block's size alone fixes. No atomics.
#pragma once

#include "common/launch.h"
#include "irlfast/online_divergence.h"
#include "irlfast/online_softmax.h"

namespace irlfast::cuda {

constexpr unsigned kWarpSize = 32, kMostWarps = 32, kWholeWarp = 0xffffffffu;

// from_lane(x, move): x of another lane, where move(y) is that lane's y for each number y of x.
template <typename Move>
IRLFAST_DEVICE float from_lane(float x, const Move& move) {
  return move(x);
}
template <typename Move>
IRLFAST_DEVICE double from_lane(double x, const Move& move) {
  return move(x);
}
template <typename Real, typename Move>
IRLFAST_DEVICE OnlineSoftmax<Real> from_lane(const OnlineSoftmax<Real>& x, const Move& move) {
  return {move(x.max), move(x.others), move(x.weighted)};
}
template <typename Real, typename Move>
IRLFAST_DEVICE OnlineDivergence<Real> from_lane(const OnlineDivergence<Real>& x, const Move& move) {
  return {from_lane(x.p, move), from_lane(x.q, move), move(x.p_over_q), move(x.q_over_p)};
}

struct Down {
  unsigned by;
  template <typename Real>
  IRLFAST_DEVICE Real operator()(Real x) const {
    return __shfl_down_sync(kWholeWarp, x, by);
  }
};

struct FirstLane {
  template <typename Real>
  IRLFAST_DEVICE Real operator()(Real x) const {
    return __shfl_sync(kWholeWarp, x, 0);
  }
};

// The first lane has the result, the others what is left over.
template <typename T, typename Merge>
IRLFAST_DEVICE T warp_reduce(T value, const Merge& merge) {
#pragma unroll
  for (unsigned by = kWarpSize / 2; by > 0; by /= 2) value = merge(value, from_lane(value, Down{by}));
  return value;
}

// merge(...) of all threads' values, the same for every thread; `empty` changes nothing. Meets the whole block twice.
template <typename T, typename Merge>
IRLFAST_DEVICE T block_reduce(T value, const T& empty, const Merge& merge) {
  __shared__ T of_warp[kMostWarps];
  const unsigned lane = threadIdx.x % kWarpSize, warps = blockDim.x / kWarpSize;
  value = warp_reduce(value, merge);
  __syncthreads();  // nobody still reads what was here before
  if (lane == 0) of_warp[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  // Each warp for itself, so that nobody has to wait for one of them.
  value = lane < warps ? of_warp[lane] : empty;
  return from_lane(warp_reduce(value, merge), FirstLane{});
}

template <typename Real>
IRLFAST_DEVICE Real block_sum(Real value) {
  return block_reduce(value, Real(0), [](Real a, Real b) { return a + b; });
}

template <typename Real>
IRLFAST_DEVICE Real block_max(Real value) {
  return block_reduce(value, Real(-INFINITY), [](Real a, Real b) { return a < b ? b : a; });
}

}  // namespace irlfast::cuda
