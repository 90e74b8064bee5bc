#include "isa/softmax_spans.h"

#include <math.h>
#include <string.h>

#include "isa/span.h"

namespace irlfast {
namespace {

// Vectors worked on together: enough to hide the latency of the polynomial, few enough to stay in registers, of which
// the sums take some and SSE has no fused multiply-add.
constexpr int kUnroll = kVectorBytes == 16 ? 4 : 2;
constexpr int kGradientUnroll = kVectorBytes == 64 ? 2 : 4;

// After this many additions to it a partial sum moves into a second level: the rounding error of a sum grows with the
// number of its terms, and a row has thousands for each lane.
constexpr int kAdditions = 64;

// Blocks at the beginning that are looked over for their maximum.
constexpr int64_t kLookedOver = 64;

// Online softmax with one running maximum and kUnroll vectors of partial sums of 2^t.
//
// t = (logit - maximum) scale takes two operations a vector. Fused, it is one: logit scale - offset, where offset is
// maximum scale rounded to Real. What the rounding took from it, `residual_`, is the t of the maximum itself and the
// same for all logits, and is put right at the end; so large logits lose nothing. Only where the residual is more than
// a fraction, as in a row that is masked with the lowest finite number throughout, must it be the two operations.
template <typename Real, bool kWeighted, bool kFused>
class Accumulator {
  using V = typename Traits<Real>::V;
  static constexpr int kLanes = Traits<Real>::kLanes;

 public:
  static constexpr int kBlock = kUnroll * kLanes;

  Accumulator(double inverse_temperature, const OnlineSoftmax<double>& before)
      : before_(before),
        inverse_temperature_(inverse_temperature),
        scale_(Real(inverse_temperature * kLog2E)),
        maximum_(broadcast<Real>(-INFINITY)) {
    if (before.max != -INFINITY) set_maximum(broadcast(Real(before.max)));
  }

  // Adds `count` blocks, at most kAdditions. Everything that changes in the loop is local, and what seldom happens
  // (about log(blocks) times a row) is outside: otherwise the compiler stores the sums in every iteration.
  template <typename T, typename C>
  void add(const T* logits, int64_t count, const C& cap) {
    const T* const end = logits + count * kBlock;
    while (logits < end) {
      Sums sums = recent_;
      const V maximum = maximum_, offset = offset_;
      V block[kUnroll], top{};
      for (; logits < end; logits += kBlock) {
        load_capped(logits, cap, block);
        top = highest(block);
        if (__builtin_expect(any_greater(top, maximum), 0)) break;
        sums.add(block, offset, scale_);
      }
      recent_ = sums;
      if (logits < end) {
        add_raising(block);
        logits += kBlock;
      }
      if (too_large_) return;
    }
    move_up();
  }

  // Of the first blocks the one with their maximum: added before the others, it spares the sums most of the times that
  // the maximum would rise.
  template <typename T>
  static int64_t highest_block(const T* logits, int64_t blocks) {
    V top = broadcast<Real>(-INFINITY), block[kUnroll];
    for (int64_t i = 0; i < blocks; ++i) {
      load_block(logits + i * kBlock, block);
      top = max(highest(block), top);
    }
    Real lanes[kLanes];
    store(lanes, top);
    Real highest_lane = -INFINITY;
    for (int lane = 0; lane < kLanes; ++lane) highest_lane = lanes[lane] > highest_lane ? lanes[lane] : highest_lane;
    for (int64_t i = 0; i < blocks; ++i) {
      load_block(logits + i * kBlock, block);
      if (any_equal(highest(block), broadcast(highest_lane))) return i;
    }
    return 0;  // where there are but -inf and NaN
  }

  // A last block, padded with -inf.
  void add(const V (&block)[kUnroll]) {
    if (any_greater(highest(block), maximum_)) {
      add_raising(block);
    } else {
      recent_.add(block, offset_, scale_);
    }
    move_up();
  }

  // Whether the sums are void, because the two operations were needed.
  bool too_large() const { return too_large_; }

  // Lanes are added in a fixed order, in double. Where the maximum has risen, the one of before, exp(0) = 1, is in the
  // sums already.
  OnlineSoftmax<double> result() const {
    OnlineSoftmax<double> state{double(maximum_[0]), 0.0, 0.0};
    for (int i = 0; i < kUnroll; ++i) {
      Real sum[kLanes], weighted[kLanes];
      store(sum, earlier_.plain[i]);
      store(weighted, earlier_.weighted[i]);
      for (int lane = 0; lane < kLanes; ++lane) {
        state.others += double(sum[lane]);
        if (kWeighted) state.weighted += double(weighted[lane]);
      }
    }
    const double residual = double(residual_), adjustment = ::exp(-residual * kLn2);
    if (kWeighted) state.weighted = (state.weighted - residual * state.others) * adjustment * kLn2;
    state.others *= adjustment;
    if (before_.max != -INFINITY) {
      const double shift = (before_.max - state.max) * inverse_temperature_;
      const double factor = shift == 0 ? 1.0 : ::exp(shift);
      state.others += factor * before_.others;
      // Where the factor is 0, the product beside it may have overflowed.
      if (kWeighted && factor != 0) state.weighted += factor * (before_.weighted + shift * before_.others);
    } else {
      state.others += before_.others;  // 0, or a NaN that must reach the result
    }
    return state;
  }

 private:
  // Sums of 2^t, and of 2^t t.
  struct Sums {
    V plain[kUnroll]{}, weighted[kUnroll]{};

    inline __attribute__((always_inline)) void add(const V (&logit)[kUnroll], V offset, Real scale) {
      V t[kUnroll], e[kUnroll];
      for (int u = 0; u < kUnroll; ++u) {
        t[u] = kFused ? fma(logit[u], broadcast(scale), -offset) : (logit[u] - offset) * scale;
      }
      if (kWeighted) {
        exp2_limited<Real>(t, e);
      } else {
        exp2_alone<Real>(t, e);
      }
      for (int u = 0; u < kUnroll; ++u) plain[u] += e[u];
      if (kWeighted) {
        for (int u = 0; u < kUnroll; ++u) weighted[u] = fma(e[u], t[u], weighted[u]);
      }
    }

    // Adds `shift` to every t; factor = 2^shift.
    void rescale(V shift, V factor) {
      for (int u = 0; u < kUnroll; ++u) {
        if (kWeighted) weighted[u] = factor * fma(shift, plain[u], weighted[u]);
        plain[u] *= factor;
      }
    }
  };

  static V highest(const V (&block)[kUnroll]) {
    V top = block[0];
    for (int u = 1; u < kUnroll; ++u) top = max(top, block[u]);
    return top;
  }

  // A block with a new maximum: what was the argmax joins the others, the new one is struck from its block.
  __attribute__((noinline, cold)) void add_raising(const V (&logit)[kUnroll]) {
    V block[kUnroll];
    for (int u = 0; u < kUnroll; ++u) block[u] = logit[u];
    const V maximum_before = maximum_, offset_before = offset_;
    const V joining = broadcast(residual_);
    set_maximum(broadcast(strike_maximum(block)));
    if (maximum_before[0] != -INFINITY) {
      V t[2] = {joining, kFused ? offset_before - offset_ : (maximum_before - maximum_) * scale_};
      V e[2];
      exp2_limited<Real>(t, e);
      recent_.plain[0] += e[0] * one_in_first_lane();
      if (kWeighted) recent_.weighted[0] += e[0] * t[0] * one_in_first_lane();
      recent_.rescale(t[1], e[1]);
      earlier_.rescale(t[1], e[1]);
    }
    recent_.add(block, offset_, scale_);
  }

  // The highest element, whichever lane it is in; its first occurrence becomes -inf.
  static Real strike_maximum(V (&block)[kUnroll]) {
    Real lanes[kLanes];
    store(lanes, highest(block));
    Real top = -INFINITY;
    for (int lane = 0; lane < kLanes; ++lane) top = lanes[lane] > top ? lanes[lane] : top;
    for (int u = 0; u < kUnroll; ++u) {
      store(lanes, block[u]);
      for (int lane = 0; lane < kLanes; ++lane) {
        if (lanes[lane] == top) {
          lanes[lane] = -INFINITY;
          block[u] = load(lanes);
          return top;
        }
      }
    }
    return top;
  }

  static V one_in_first_lane() {
    V one{};
    one[0] = 1;
    return one;
  }

  void move_up() {
    for (int u = 0; u < kUnroll; ++u) {
      earlier_.plain[u] += recent_.plain[u];
      if (kWeighted) earlier_.weighted[u] += recent_.weighted[u];
    }
    recent_ = Sums();
  }

  void set_maximum(V maximum) {
    maximum_ = maximum;
    offset_ = kFused ? maximum * scale_ : maximum;
    if (kFused) {
      residual_ = fma(maximum, broadcast(scale_), -offset_)[0];
      too_large_ |= !(fabs(residual_) <= 1);
    }
  }

  OnlineSoftmax<double> before_;
  double inverse_temperature_;
  Real scale_;
  V maximum_;   // -inf until something finite is met
  V offset_{};  // the maximum (scaled if fused), or 0 while there is none: -inf less -inf would be NaN
  Real residual_ = 0;
  bool too_large_ = false;
  Sums recent_, earlier_;  // the latest kAdditions blocks, and those before
};

template <typename T, bool kSoftcap, bool kWeighted, bool kFused = kHasFma>
OnlineSoftmax<double> summarise_span(const T* logits, int64_t count, double inverse_temperature, double softcap,
                                     const OnlineSoftmax<double>& before) {
  using Real = typename Compute<T>::Real;
  using V = typename Traits<Real>::V;
  constexpr int kBlock = Accumulator<Real, kWeighted, kFused>::kBlock;

  const Cap<Real, kSoftcap> cap(softcap);
  Accumulator<Real, kWeighted, kFused> accumulator(inverse_temperature, before);
  const int64_t blocks = count / kBlock;
  const auto add = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end && !accumulator.too_large(); i += kAdditions) {
      accumulator.add(logits + i * kBlock, end - i < kAdditions ? end - i : kAdditions, cap);
    }
  };
  if (blocks > 0) {
    const int64_t first = accumulator.highest_block(logits, blocks < kLookedOver ? blocks : kLookedOver);
    add(first, first + 1);
    add(0, first);
    add(first + 1, blocks);
  }
  if (const int64_t left = count % kBlock) {
    V block[kUnroll];
    load_rest(logits + blocks * kBlock, left, cap, block);
    accumulator.add(block);
  }
  if (kFused && accumulator.too_large()) {
    return summarise_span<T, kSoftcap, kWeighted, false>(logits, count, inverse_temperature, softcap, before);
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
    V x[1] = {load_few<T, kLanes>(logits, count)};
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

template <typename T, typename Out, bool kSoftcap, bool kStream>
void differentiate_span(const T* logits, Out* gradient, int64_t count, const SoftmaxGradient& parameters) {
  using Real = typename Compute<T>::Real;
  constexpr int kLanes = Traits<Real>::kLanes;
  const Gradient<T, kSoftcap> gradient_of(parameters);

  int64_t i = 0;
  if (kStream) {
    const int64_t aligned = unaligned_head(gradient), head = aligned < count ? aligned : count;
    for (; i < head; i += kLanes) gradient_of.few(logits + i, gradient + i, head - i < kLanes ? head - i : kLanes);
    i = head;
  }
  typename Traits<Real>::V x[kGradientUnroll];
  for (; i + kGradientUnroll * kLanes <= count; i += kGradientUnroll * kLanes) {
    load_block(logits + i, x);
    prefetch_ahead<kGradientUnroll>(logits + i);
    gradient_of.apply(x);
    store_block<kStream, T>(gradient + i, x);
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
