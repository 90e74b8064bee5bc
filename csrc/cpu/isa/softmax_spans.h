// Passes over contiguous logits of one row, compiled once for each instruction set.
#pragma once

#include <cstdint>

#include "irlfast/dtype.h"
#include "irlfast/isa.h"
#include "irlfast/online_softmax.h"

namespace irlfast {

// How a stored logit becomes l: softcap * tanh(logit / softcap), or the logit itself where softcap is 0.
struct LogitElement {
  double value;
  double slope;  // dl / dlogit
};

// gradient = exp(x) (constant + linear x) dl/dlogit with x = (l - max) * inverse_temperature.
struct SoftmaxGradient {
  double max;
  double inverse_temperature;
  double softcap;
  double constant;
  double linear;
  bool stream;  // write past the caches; never where the gradient overwrites the logits
};

// One function for each DType.
struct SoftmaxSpans {
  // Adds logits to a summary of those before them. What comes out depends on where the spans are cut, as any sum does
  // on its order; a summary that goes on does not have to find its maximum anew.
  using Summarise = OnlineSoftmax<double> (*)(const void* logits, int64_t count, double inverse_temperature,
                                              double softcap, bool weighted, const OnlineSoftmax<double>& before);
  using Differentiate = void (*)(const void* logits, void* gradient, int64_t count, const SoftmaxGradient&);
  using Element = LogitElement (*)(const void* logit, double softcap);
  using Store = void (*)(void* destination, double value);

  Summarise summarise[kDTypes];  // `weighted` is left 0 where it is not asked for
  Differentiate
      differentiate[kDTypes];  // the gradient may be the logits themselves, and may not overlap them otherwise
  Differentiate differentiate_to_bfloat16;  // float logits, bfloat16 gradient
  Element element[kDTypes];                 // the very value the passes saw
  Store store[kDTypes];
};

const SoftmaxSpans& softmax_spans_baseline();
const SoftmaxSpans& softmax_spans_avx2();
const SoftmaxSpans& softmax_spans_avx512();
const SoftmaxSpans& softmax_spans_avx512_bf16();

const SoftmaxSpans& softmax_spans(Isa isa);

}  // namespace irlfast
