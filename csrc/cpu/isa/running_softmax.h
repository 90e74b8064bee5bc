// The online softmax in vector registers: one running maximum, and partial sums of what is below it. Everything is
// inlined: sums that a rarely taken function could reach by address would live in memory all along.
#pragma once

#include <cmath>

#include "irlfast/online_softmax.h"
#include "isa/span.h"

namespace irlfast {
namespace {

// After this many additions to it a partial sum moves into one of doubles: the rounding error of a sum grows with the
// number of its terms, and a row has thousands for each lane.
constexpr int kAdditions = 32;

// A sum in two levels: a vector for each of the block's, and the total of what they held earlier in double.
template <typename Real, int kVectors>
struct TwoLevelSum {
  using V = typename Traits<Real>::V;

  V latest[kVectors]{};
  VecD earlier{};

  // To be called every kAdditions blocks.
  IRLFAST_VEC void move_up() {
    for (int u = 0; u < kVectors; ++u) {
      earlier += fold_to_double(latest[u]);
      latest[u] = V{};
    }
  }

  // factor * (this + shift * mass): for sums of exponentials times distances from a maximum, when the maximum moves.
  IRLFAST_VEC void move(const TwoLevelSum& mass, Real shift, Real factor) {
    for (int u = 0; u < kVectors; ++u) {
      latest[u] = broadcast(factor) * fma(broadcast(shift), mass.latest[u], latest[u]);
    }
    earlier = double(factor) * (earlier + double(shift) * mass.earlier);
  }

  IRLFAST_VEC void multiply(Real factor) {
    for (int u = 0; u < kVectors; ++u) latest[u] *= broadcast(factor);
    earlier *= double(factor);
  }

  // Lanes are added in a fixed order.
  double total() {
    move_up();
    double sum = 0.0;
    for (int lane = 0; lane < Traits<double>::kLanes; ++lane) sum += earlier[lane];
    return sum;
  }
};

template <typename Real, int kVectors, bool kWeighted>
class RunningSoftmax {
  using V = typename Traits<Real>::V;
  using I = typename Traits<Real>::I;
  static constexpr int kLanes = Traits<Real>::kLanes;

 public:
  using Sum = TwoLevelSum<Real, kVectors>;
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
    Real shift = 0;  // old maximum less the new one, before the temperature
    Real factor = 1;
    bool joins = false;
    int position = -1;

    // So that 0 times a shift is 0 even where the shift times a sum would overflow.
    Real effective(Real of) const { return factor == 0 ? 0 : of; }
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
    rise.shift = before - highest;
    V limited[1] = {broadcast(rise.shift)}, factor[1];
    exp_limited<Real>(limited, scale_, factor);
    rise.factor = factor[0][0];
    return rise;
  }

  IRLFAST_VEC void rescale(const Rise& rise) {
    if (!rise.joins) return;
    sum_.latest[0] += one_in_first_lane();
    if (kWeighted) weighted_.move(sum_, rise.effective(rise.shift), rise.factor);
    sum_.multiply(rise.factor);
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
    for (int u = 0; u < kVectors; ++u) sum_.latest[u] += e[u];
    if (kWeighted) {
      for (int u = 0; u < kVectors; ++u) weighted_.latest[u] = fma(e[u], below[u], weighted_.latest[u]);
    }
  }

  // To be called every kAdditions blocks.
  IRLFAST_VEC void move_up() {
    sum_.move_up();
    if (kWeighted) weighted_.move_up();
  }

  // Of all exponentials so far, the argmax's 1 included.
  IRLFAST_VEC Sum mass() const {
    Sum mass = sum_;
    if (maximum_[0] != -INFINITY) mass.latest[0] += one_in_first_lane();
    return mass;
  }

  // Where the maximum has risen, the one of before, exp(0) = 1, is in the sums already.
  OnlineSoftmax<double> result() {
    OnlineSoftmax<double> state{double(maximum_[0]), sum_.total(), 0.0};
    if (kWeighted) state.weighted = weighted_.total() * inverse_temperature_;
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
  static IRLFAST_VEC V one_in_first_lane() {
    V one{};
    one[0] = 1;
    return one;
  }

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
  V maximum_;           // -inf until something finite is met
  V offset_;            // the maximum, or 0 while there is none: -inf less -inf would be NaN
  Sum sum_, weighted_;  // of exponentials, and of them times what is below the maximum
};

}  // namespace
}  // namespace irlfast
