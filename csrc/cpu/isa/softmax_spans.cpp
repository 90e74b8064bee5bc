#include "isa/softmax_spans.h"

#include <math.h>
#include <string.h>

#include "isa/running_softmax.h"
#include "isa/span.h"

namespace irlfast {
namespace {

// Vectors worked on together: enough to hide the latency of the polynomial, few enough to stay in registers.
constexpr int kUnroll = kVectorBytes == 64 ? 2 : 4;

template <typename Running, typename V>
IRLFAST_VEC void add_block(Running& running, V (&logit)[kUnroll]) {
  if (__builtin_expect(running.exceeded_by(logit), 0)) {
    const auto rise = running.raise(logit);
    running.rescale(rise);
    running.strike(logit, rise, -INFINITY);
  }
  V e[kUnroll];
  for (int u = 0; u < kUnroll; ++u) logit[u] = running.below_maximum(logit[u]);
  exp_limited(logit, running.scale(), e);
  running.add(e, logit);
}

template <typename T, bool kSoftcap, bool kWeighted>
OnlineSoftmax<double> summarise_span(const T* logits, int64_t count, double inverse_temperature, double softcap,
                                     const OnlineSoftmax<double>& before) {
  using Real = typename Compute<T>::Real;
  using Running = RunningSoftmax<Real, kUnroll, kWeighted>;
  constexpr int kBlock = Running::kBlock;

  const Cap<Real, kSoftcap> cap(softcap);
  Running running(inverse_temperature, before);
  typename Traits<Real>::V block[kUnroll];
  int64_t i = 0;
  while (i + kBlock <= count) {
    const int64_t whole = (count - i) / kBlock;
    const int64_t end = i + (whole < kAdditions ? whole : kAdditions) * kBlock;
    for (; i < end; i += kBlock) {
      load_block(logits + i, cap, block);
      add_block(running, block);
    }
    running.move_up();
  }
  if (i < count) {
    load_rest(logits + i, count - i, cap, block);
    add_block(running, block);
  }
  return running.result();
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
        scale_(g.inverse_temperature),
        constant_(broadcast(Real(g.constant))),
        linear_(broadcast(Real(g.linear * g.inverse_temperature))) {}

  // The gradient of each logit, in place.
  template <int kVectors>
  inline __attribute__((always_inline)) void apply(V (&x)[kVectors]) const {
    V slope[kVectors], e[kVectors];
    for (int u = 0; u < kVectors; ++u) x[u] = cap_.value(x[u], slope[u]) - max_;
    exp_limited(x, scale_, e);
    for (int u = 0; u < kVectors; ++u) x[u] = e[u] * fma(linear_, x[u], constant_);
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
  Scale<Real> scale_;
  V constant_, linear_;
};

template <typename T, typename Out, bool kSoftcap, bool kStream>
void differentiate_span(const T* logits, Out* gradient, int64_t count, const SoftmaxGradient& parameters) {
  using Real = typename Compute<T>::Real;
  constexpr int kLanes = Traits<Real>::kLanes;
  const Gradient<T, kSoftcap> gradient_of(parameters);

  int64_t i = 0;
  if (kStream) {
    const int64_t head = unaligned_head<Out, kLanes>(gradient);
    i = head < count ? head : count;
    if (i > 0) gradient_of.few(logits, gradient, i);
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
