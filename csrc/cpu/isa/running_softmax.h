// The online softmax in vector registers: one running maximum, and partial sums of what is below it. Everything is
// inlined: sums that a rarely taken function could reach by address would live in memory all along.
#pragma once

#include <cmath>

#include "irlfast/online_softmax.h"
#include "isa/span.h"

namespace irlfast {
namespace {

template <typename Real, int kVectors, bool kWeighted>
class RunningSoftmax {
  using V = typename Traits<Real>::V;
  using I = typename Traits<Real>::I;
  static constexpr int kLanes = Traits<Real>::kLanes;

 public:
  static constexpr int kBlock = kVectors * kLanes;

  // Goes on from a summary of earlier logits.
  RunningSoftmax(double inverse_temperature, const OnlineSoftmax<double>& before)
      : before_(before),
        inverse_temperature_(inverse_temperature),
        scale_(inverse_temperature),
        maximum_(broadcast(Real(before.max))),
        offset_(before.max == -INFINITY ? V{} : maximum_) {}

  // A new maximum, found at `position` of a block. `joins`: there was one before, which becomes one of the others.
  struct Rise {
    V shift{};  // old maximum less the new one, before the temperature
    V factor = broadcast<Real>(1);
    bool joins = false;
    int position = -1;
  };

  IRLFAST_VEC bool exceeded_by(const V (&logit)[kVectors]) const {
    V top = logit[0];
    for (int u = 1; u < kVectors; ++u) top = max(top, logit[u]);
    return any_greater(top, maximum_);
  }

  // Rare: about log(blocks) times a row. Only for a block that exceeds the maximum; the sums wait for rescale().
  IRLFAST_VEC Rise raise(const V (&logit)[kVectors]) {
    V block[kVectors];
    for (int u = 0; u < kVectors; ++u) block[u] = logit[u];
    Rise rise;
    const Real highest = find_maximum(block, rise.position);
    const Real before = maximum_[0];
    maximum_ = broadcast(highest);
    offset_ = maximum_;
    if (before == -INFINITY) return rise;
    rise.joins = true;
    rise.shift = broadcast(before - highest);
    V limited[1] = {rise.shift}, factor[1];
    exp_limited<Real>(limited, scale_, factor);
    rise.factor = factor[0];
    return rise;
  }

  IRLFAST_VEC void rescale(const Rise& rise) {
    if (!rise.joins) return;
    // So that 0 times a shift is 0 even where the shift times a sum would overflow.
    const V shift = rise.factor == 0 ? V{} : rise.shift;
    sum_[0] += one_in_first_lane();
    for (int i = 0; i < kVectors; ++i) {
      if (kWeighted) {
        weighted_[i] = rise.factor * fma(shift, sum_[i], weighted_[i]);
        weighteds_[i] = rise.factor * fma(shift, sums_[i], weighteds_[i]);
      }
      sum_[i] *= rise.factor;
      sums_[i] *= rise.factor;
    }
  }

  // The argmax is no summand: -inf for its logit, or 0 for its exponential.
  static IRLFAST_VEC void strike(V (&block)[kVectors], const Rise& rise, Real with) {
    for (int u = 0; u < kVectors; ++u) {
      const I here = I{} + decltype(+I{}[0])(rise.position - u * kLanes);
      block[u] = lane_numbers<Real>() == here ? broadcast(with) : block[u];
    }
  }

  IRLFAST_VEC V below_maximum(V logit) const { return logit - offset_; }
  const Scale<Real>& scale() const { return scale_; }

  // e[u] = exp(below[u] / T).
  IRLFAST_VEC void add(const V* e, const V* below) {
    for (int u = 0; u < kVectors; ++u) sum_[u] += e[u];
    if (kWeighted) {
      for (int u = 0; u < kVectors; ++u) weighted_[u] = fma(e[u], below[u], weighted_[u]);
    }
  }

  // To be called every kAdditions blocks.
  IRLFAST_VEC void move_up() {
    for (int u = 0; u < kVectors; ++u) {
      sums_[u] += sum_[u];
      sum_[u] = V{};
      if (kWeighted) weighteds_[u] += weighted_[u];
      weighted_[u] = V{};
    }
  }

  // What the latest blocks, and those before, sum to in vector i; the argmax is not in them.
  IRLFAST_VEC V latest(int i) const { return sum_[i]; }
  IRLFAST_VEC V earlier(int i) const { return sums_[i]; }
  bool has_maximum() const { return maximum_[0] != -INFINITY; }

  static IRLFAST_VEC V one_in_first_lane() {
    V one{};
    one[0] = 1;
    return one;
  }

  // Lanes are added in a fixed order, in double.
  static double add_lanes(const V (&sums)[kVectors]) {
    double total = 0.0;
    for (int i = 0; i < kVectors; ++i) {
      Real lanes[kLanes];
      store(lanes, sums[i]);
      for (int lane = 0; lane < kLanes; ++lane) total += double(lanes[lane]);
    }
    return total;
  }

  // Where the maximum has risen, the one of before, exp(0) = 1, is in the sums already.
  OnlineSoftmax<double> result() {
    move_up();
    OnlineSoftmax<double> state{double(maximum_[0]), add_lanes(sums_), 0.0};
    if (kWeighted) state.weighted = add_lanes(weighteds_) * inverse_temperature_;
    if (before_.max != -INFINITY) {
      const double shift = (before_.max - state.max) * inverse_temperature_;
      const double factor = shift == 0 ? 1.0 : ::exp(shift);
      state.others += factor * before_.others;
      if (kWeighted) state.weighted += factor * (before_.weighted + shift * before_.others);
    } else {
      state.others += before_.others;  // 0, or a NaN that must reach the result
    }
    return state;
  }

 private:
  // The highest element and its first place.
  static __attribute__((noinline, cold)) Real find_maximum(const V (&block)[kVectors], int& position) {
    Real highest = -INFINITY;
    for (int u = 0; u < kVectors; ++u) {
      Real lanes[kLanes];
      store(lanes, block[u]);
      for (int lane = 0; lane < kLanes; ++lane) {
        if (lanes[lane] > highest) {
          highest = lanes[lane];
          position = u * kLanes + lane;
        }
      }
    }
    return highest;
  }

  OnlineSoftmax<double> before_;
  double inverse_temperature_;
  Scale<Real> scale_;
  V maximum_;  // -inf until something finite is met
  V offset_;   // the maximum, or 0 while there is none: -inf less -inf would be NaN
  // Sums of exponentials, and of them times what is below the maximum: those of the latest blocks, and those before.
  V sum_[kVectors]{}, weighted_[kVectors]{};
  V sums_[kVectors]{}, weighteds_[kVectors]{};
};

}  // namespace
}  // namespace irlfast
