#include "isa/softmax_spans.h"

#include <math.h>
#include <string.h>

#include "isa/vec_math.h"

#define IRLFAST_JOIN_(a, b) a##b
#define IRLFAST_JOIN(a, b) IRLFAST_JOIN_(a, b)

namespace irlfast {
namespace {

// Vectors worked on together: enough to hide the latency of the polynomial, few enough to stay in registers.
constexpr int kUnroll = kVectorBytes == 64 ? 2 : 4;

// After this many additions to it a partial sum moves into a second level: the rounding error of a sum grows with the
// number of its terms, and a row has thousands for each lane.
constexpr int kAdditions = 64;

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

// Online softmax with one running maximum and kUnroll vectors of partial sums.
template <typename Real, bool kWeighted>
class Accumulator {
  using V = typename Traits<Real>::V;
  static constexpr int kLanes = Traits<Real>::kLanes;

 public:
  static constexpr int kBlock = kUnroll * kLanes;

  Accumulator(double inverse_temperature, const OnlineSoftmax<double>& before)
      : before_(before),
        inverse_temperature_(inverse_temperature),
        scale_(Real(inverse_temperature * kLog2E)),
        maximum_(broadcast(Real(before.max))),
        offset_(before.max == -INFINITY ? V{} : maximum_) {}

  inline __attribute__((always_inline)) void add(V (&logit)[kUnroll]) {
    V top = logit[0];
    for (int u = 1; u < kUnroll; ++u) top = max(top, logit[u]);
    if (__builtin_expect(any_greater(top, maximum_), 0)) raise_maximum(logit, top);
    V t[kUnroll], e[kUnroll];
    for (int u = 0; u < kUnroll; ++u) t[u] = (logit[u] - offset_) * scale_;
    exp2_limited<Real>(t, e);
    for (int u = 0; u < kUnroll; ++u) sum_[u] += e[u];
    if (kWeighted) {
      for (int u = 0; u < kUnroll; ++u) weighted_[u] = fma(e[u], t[u], weighted_[u]);
    }
  }

  // To be called every kAdditions blocks.
  void move_up() {
    for (int u = 0; u < kUnroll; ++u) {
      sums_[u] += sum_[u];
      sum_[u] = V{};
      if (kWeighted) weighteds_[u] += weighted_[u];
      weighted_[u] = V{};
    }
  }

  // Lanes are added in a fixed order, in double. Where the maximum has risen, the one of before, exp(0) = 1, is in the
  // sums already.
  OnlineSoftmax<double> result() {
    move_up();
    OnlineSoftmax<double> state{double(maximum_[0]), 0.0, 0.0};
    for (int i = 0; i < kUnroll; ++i) {
      Real sum[kLanes], weighted[kLanes];
      store(sum, sums_[i]);
      store(weighted, weighteds_[i]);
      for (int lane = 0; lane < kLanes; ++lane) {
        state.others += double(sum[lane]);
        if (kWeighted) state.weighted += double(weighted[lane]);
      }
    }
    state.weighted *= kLn2;
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
  // Rare: about log(blocks) times a row. What was the argmax joins the others; the new one is struck from its block.
  inline __attribute__((always_inline)) void raise_maximum(V (&logit)[kUnroll], V top) {
    // By way of a copy: were the address of `logit` itself to leave this function, it would live in memory all along.
    V block[kUnroll];
    for (int u = 0; u < kUnroll; ++u) block[u] = logit[u];
    const Real before = maximum_[0];
    const Real highest = strike_maximum(block, top);
    for (int u = 0; u < kUnroll; ++u) logit[u] = block[u];
    maximum_ = broadcast(highest);
    offset_ = maximum_;
    if (before == -INFINITY) return;
    V shift[1] = {broadcast((before - highest) * scale_)};
    V factor[1];
    exp2_limited<Real>(shift, factor);
    sum_[0] += one_in_first_lane();
    for (int i = 0; i < kUnroll; ++i) {
      if (kWeighted) {
        weighted_[i] = factor[0] * fma(shift[0], sum_[i], weighted_[i]);
        weighteds_[i] = factor[0] * fma(shift[0], sums_[i], weighteds_[i]);
      }
      sum_[i] *= factor[0];
      sums_[i] *= factor[0];
    }
  }

  // The highest element, whichever lane of `top` it is in; its first occurrence becomes -inf.
  static __attribute__((noinline, cold)) Real strike_maximum(V (&block)[kUnroll], V top) {
    Real lanes[kLanes];
    store(lanes, top);
    Real highest = -INFINITY;
    for (int lane = 0; lane < kLanes; ++lane) highest = lanes[lane] > highest ? lanes[lane] : highest;
    for (int u = 0; u < kUnroll; ++u) {
      store(lanes, block[u]);
      for (int lane = 0; lane < kLanes; ++lane) {
        if (lanes[lane] == highest) {
          lanes[lane] = -INFINITY;
          block[u] = load(lanes);
          return highest;
        }
      }
    }
    return highest;
  }

  static V one_in_first_lane() {
    V one{};
    one[0] = 1;
    return one;
  }

  OnlineSoftmax<double> before_;
  double inverse_temperature_;
  Real scale_;
  V maximum_;  // -inf until something finite is met
  V offset_;   // the maximum, or 0 while there is none: -inf less -inf would be NaN
  // Sums of 2^t, and of 2^t t: those of the latest blocks, and those before.
  V sum_[kUnroll]{}, weighted_[kUnroll]{};
  V sums_[kUnroll]{}, weighteds_[kUnroll]{};
};

template <typename T, bool kSoftcap, bool kWeighted>
OnlineSoftmax<double> summarise_span(const T* logits, int64_t count, double inverse_temperature, double softcap,
                                     const OnlineSoftmax<double>& before) {
  using Real = typename Compute<T>::Real;
  using V = typename Traits<Real>::V;
  constexpr int kLanes = Traits<Real>::kLanes;
  constexpr int kBlock = Accumulator<Real, kWeighted>::kBlock;

  const Cap<Real, kSoftcap> cap(softcap);
  Accumulator<Real, kWeighted> accumulator(inverse_temperature, before);
  V block[kUnroll];
  int64_t i = 0;
  while (i + kBlock <= count) {
    const int64_t whole = (count - i) / kBlock;
    const int64_t end = i + (whole < kAdditions ? whole : kAdditions) * kBlock;
    for (; i < end; i += kBlock) {
      for (int u = 0; u < kUnroll; ++u) block[u] = cap.value(load(logits + i + u * kLanes));
      accumulator.add(block);
    }
    accumulator.move_up();
  }
  if (i < count) {
    T rest[kBlock] = {};
    memcpy(rest, logits + i, size_t(count - i) * sizeof(T));
    for (int u = 0; u < kUnroll; ++u) {
      block[u] = cap.value(load(rest + u * kLanes));
      const auto past = lane_numbers<Real>() >= decltype(+lane_numbers<Real>()[0])(count - i - u * kLanes);
      block[u] = past ? broadcast<Real>(-INFINITY) : block[u];
    }
    accumulator.add(block);
  }
  return accumulator.result();
}

template <typename T>
OnlineSoftmax<double> summarise(const void* data, int64_t count, double inverse_temperature, double softcap,
                                bool weighted, const OnlineSoftmax<double>& before) {
  const T* logits = static_cast<const T*>(data);
  if (softcap != 0) {
    return weighted ? summarise_span<T, true, true>(logits, count, inverse_temperature, softcap, before)
                    : summarise_span<T, true, false>(logits, count, inverse_temperature, softcap, before);
  }
  return weighted ? summarise_span<T, false, true>(logits, count, inverse_temperature, softcap, before)
                  : summarise_span<T, false, false>(logits, count, inverse_temperature, softcap, before);
}

template <typename T, bool kSoftcap>
class Gradient {
  using Real = typename Compute<T>::Real;
  using V = typename Traits<Real>::V;

 public:
  explicit Gradient(const SoftmaxGradient& g)
      : cap_(g.softcap),
        max_(broadcast(Real(g.max))),
        scale_(Real(g.inverse_temperature * kLog2E)),
        constant_(broadcast(Real(g.constant))),
        linear_(broadcast(Real(g.linear * kLn2))) {}

  // The gradient of each logit, in place.
  template <int kVectors>
  inline __attribute__((always_inline)) void apply(V (&x)[kVectors]) const {
    V slope[kVectors], t[kVectors], e[kVectors];
    for (int u = 0; u < kVectors; ++u) t[u] = (cap_.value(x[u], slope[u]) - max_) * scale_;
    exp2_limited<Real>(t, e);
    for (int u = 0; u < kVectors; ++u) x[u] = e[u] * fma(linear_, t[u], constant_);
    if (kSoftcap) {
      for (int u = 0; u < kVectors; ++u) x[u] *= slope[u];
    }
  }

  template <typename Out>
  void few(const T* logits, Out* gradient, int64_t count) const {
    constexpr int kLanes = Traits<Real>::kLanes;
    T buffer[kLanes] = {};
    memcpy(buffer, logits, size_t(count) * sizeof(T));
    V x[1] = {load(buffer)};
    apply(x);
    Out result[kLanes];
    store(result, x[0]);
    memcpy(gradient, result, size_t(count) * sizeof(Out));
  }

 private:
  Cap<Real, kSoftcap> cap_;
  V max_;
  Real scale_;
  V constant_, linear_;
};

template <bool kStream, typename T, typename V>
IRLFAST_VEC void put(T* destination, V value) {
  kStream ? stream(destination, value) : store(destination, value);
}

template <typename T, typename Out, bool kSoftcap, bool kStream>
void differentiate_span(const T* logits, Out* gradient, int64_t count, const SoftmaxGradient& parameters) {
  using Real = typename Compute<T>::Real;
  constexpr int kLanes = Traits<Real>::kLanes;
  const Gradient<T, kSoftcap> gradient_of(parameters);

  int64_t i = 0;
  if (kStream) {
    constexpr uintptr_t kBytes = kLanes * sizeof(Out);
    const uintptr_t past = reinterpret_cast<uintptr_t>(gradient) % kBytes;
    if (past != 0) {
      const int64_t head = int64_t((kBytes - past) / sizeof(Out));
      i = head < count ? head : count;
      gradient_of.few(logits, gradient, i);
    }
  }
  typename Traits<Real>::V x[kUnroll];
  for (; i + kUnroll * kLanes <= count; i += kUnroll * kLanes) {
    for (int u = 0; u < kUnroll; ++u) x[u] = load(logits + i + u * kLanes);
    gradient_of.apply(x);
    for (int u = 0; u < kUnroll; ++u) put<kStream>(gradient + i + u * kLanes, x[u]);
  }
  for (; i < count; i += kLanes) gradient_of.few(logits + i, gradient + i, count - i < kLanes ? count - i : kLanes);
  if (kStream) stream_fence();
}

template <typename T, typename Out = T>
void differentiate(const void* data, void* result, int64_t count, const SoftmaxGradient& parameters) {
  const T* logits = static_cast<const T*>(data);
  Out* gradient = static_cast<Out*>(result);
  if (parameters.softcap != 0) {
    parameters.stream ? differentiate_span<T, Out, true, true>(logits, gradient, count, parameters)
                      : differentiate_span<T, Out, true, false>(logits, gradient, count, parameters);
  } else {
    parameters.stream ? differentiate_span<T, Out, false, true>(logits, gradient, count, parameters)
                      : differentiate_span<T, Out, false, false>(logits, gradient, count, parameters);
  }
}

template <typename T>
LogitElement element(const void* data, double softcap) {
  using Real = typename Compute<T>::Real;
  using V = typename Traits<Real>::V;
  T buffer[Traits<Real>::kLanes] = {};
  memcpy(buffer, data, sizeof(T));
  V slope;
  const V value = softcap != 0 ? Cap<Real, true>(softcap).value(load(buffer), slope)
                               : Cap<Real, false>(softcap).value(load(buffer), slope);
  return {double(value[0]), double(slope[0])};
}

template <typename T>
void store_element(void* destination, double value) {
  using Real = typename Compute<T>::Real;
  T buffer[Traits<Real>::kLanes];
  store(buffer, broadcast(Real(value)));
  memcpy(destination, buffer, sizeof(T));
}

}  // namespace

const SoftmaxSpans& IRLFAST_JOIN(softmax_spans_, IRLFAST_ISA)() {
  static constexpr SoftmaxSpans spans{
      {summarise<float>, summarise<double>, summarise<BFloat16>, summarise<Float16>},
      {differentiate<float>, differentiate<double>, differentiate<BFloat16>, differentiate<Float16>},
      differentiate<float, BFloat16>,
      {element<float>, element<double>, element<BFloat16>, element<Float16>},
      {store_element<float>, store_element<double>, store_element<BFloat16>, store_element<Float16>},
  };
  return spans;
}

}  // namespace irlfast
