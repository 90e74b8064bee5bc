#include "isa/importance_spans.h"

#include <math.h>

#include "isa/segment_vec.h"

#define IRLFAST_JOIN_(a, b) a##b
#define IRLFAST_JOIN(a, b) IRLFAST_JOIN_(a, b)

namespace irlfast {
namespace {

// Enough vectors side by side to hide the latency of an operation.
constexpr int kVectors = 4;
constexpr int kLanes = Traits<double>::kLanes;
constexpr int kStep = kVectors * kLanes;
static_assert(kGroupPadding % kStep == 0, "whole steps reach to the end of the padding");

// A difference may overflow to +inf in float that does not in double, so blocks that look bad are looked at again.
template <typename T>
int64_t first_invalid(const void* log_target, const void* log_proposal, int64_t count) {
  using I = typename Traits<T>::I;
  constexpr int kWidth = Traits<T>::kLanes, kBlock = 16 * kWidth;
  const T* target = static_cast<const T*>(log_target);
  const T* proposal = static_cast<const T*>(log_proposal);
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t end = begin + kBlock < count ? begin + kBlock : count;
    I bad{};
    if (end - begin == kBlock) {
      for (int64_t i = begin; i < end; i += kWidth) bad |= ~(load(target + i) - load(proposal + i) < T(INFINITY));
    } else {
      bad[0] = 1;
    }
    bool any = false;
    for (int lane = 0; lane < kWidth; ++lane) any |= bad[lane] != 0;
    for (int64_t i = begin; any && i < end; ++i) {
      if (!(double(target[i]) - double(proposal[i]) < double(INFINITY))) return i;
    }
  }
  return count;
}

IRLFAST_VEC void load_step(const double* p, VecD (&x)[kVectors]) {
  for (int u = 0; u < kVectors; ++u) x[u] = load(p + u * kLanes);
}

IRLFAST_VEC void store_step(double* p, const VecD (&x)[kVectors]) {
  for (int u = 0; u < kVectors; ++u) store(p + u * kLanes, x[u]);
}

IRLFAST_VEC double lanes_of(const VecD (&x)[kVectors]) {
  return lanes_sum((x[0] + x[1]) + (x[2] + x[3]));
}

double peak_of(const double* values, int64_t padded) {
  VecD peak = broadcast(-double(INFINITY)), x[kVectors];
  for (int64_t k = 0; k < padded; k += kStep) {
    load_step(values + k, x);
    for (int u = 0; u < kVectors; ++u) peak = max(x[u], peak);
  }
  double result = peak[0];
  for (int lane = 1; lane < kLanes; ++lane) result = peak[lane] > result ? peak[lane] : result;
  return result;
}

// result = exp(exponent(values)), whose sum it returns. exponent: at most 0, or -inf.
template <typename Exponent>
IRLFAST_VEC double exponentials(const double* values, int64_t padded, double* result, const Exponent& exponent) {
  const Scale<double> scale(1.0);
  VecD sum[kVectors]{};
  for (int64_t k = 0; k < padded; k += kStep) {
    VecD x[kVectors], y[kVectors];
    load_step(values + k, x);
    for (int u = 0; u < kVectors; ++u) x[u] = exponent(x[u]);
    exp_limited<double>(x, scale, y);
    for (int u = 0; u < kVectors; ++u) sum[u] += y[u];
    store_step(result + k, y);
  }
  return lanes_of(sum);
}

// values / total, and the sum of their squares.
double normalise(double* values, int64_t padded, double total) {
  VecD squares[kVectors]{}, x[kVectors];
  for (int64_t k = 0; k < padded; k += kStep) {
    load_step(values + k, x);
    for (int u = 0; u < kVectors; ++u) {
      x[u] /= total;
      squares[u] = fma(x[u], x[u], squares[u]);
    }
    store_step(values + k, x);
  }
  return lanes_of(squares);
}

GroupWeights weigh(const ImportanceInput& input, double* log_ratio, int64_t count, double* shares, double* weights) {
  const double impossible = -double(INFINITY);
  const int64_t padded = (count + kStep - 1) / kStep * kStep;
  for (int64_t k = count; k < padded; ++k) log_ratio[k] = impossible;
  const double peak = peak_of(log_ratio, padded);
  if (peak == impossible) {
    for (int64_t k = 0; k < padded; ++k) shares[k] = weights[k] = 0;
    return {impossible, 0};
  }
  const double total = exponentials(log_ratio, padded, shares, [&](VecD x) { return x - peak; });
  const double log_normalizer = peak + log(total) - log(double(count));
  double squares = normalise(shares, padded, total);
  if (input.reshapes()) {
    const VecD low = broadcast(input.clip_low), high = broadcast(input.clip_high);
    const auto clipped = [&](VecD x) { return min(max(x - log_normalizer, low), high); };
    const double highest = input.temper * clipped(broadcast(peak))[0];
    const double reshaped = exponentials(log_ratio, padded, weights, [&](VecD x) {
      return x == impossible ? broadcast(impossible) : clipped(x) * input.temper - highest;
    });
    squares = normalise(weights, padded, reshaped);
  }
  return {log_normalizer, 1 / squares};
}

}  // namespace

const ImportanceSpans& IRLFAST_JOIN(importance_spans_, IRLFAST_ISA)() {
  static constexpr ImportanceSpans spans{{first_invalid<float>, first_invalid<double>}, weigh};
  return spans;
}

}  // namespace irlfast
