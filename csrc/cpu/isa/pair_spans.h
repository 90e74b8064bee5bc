// Passes over contiguous logits of one row and of the same row of a reference, compiled once for each instruction set.
#pragma once

#include <cstdint>

#include "irlfast/dtype.h"
#include "irlfast/isa.h"
#include "irlfast/online_divergence.h"

namespace irlfast {

// Which of a pair's gradients, with respect to the logits of p. In the last M = w p + (1 - w) q.
enum class PairForm {
  kRatio,          // exp(x) (constant + ratio (l - p_max - r + q_max))
  kDifference,     // exp(x) constant + other exp(y)
  kAll,            // exp(x) (constant + linear x + ratio (l - p_max - r + q_max)) + other exp(y)
  kJensenShannon,  // exp(x) (constant + ratio log(p / M))
};

// x = (l - p_max) / T for logits l of p, y = (r - q_max) / T for logits r of q, after softcap.
struct PairParameters {
  PairForm form;
  double p_max, q_max;
  double inverse_temperature;
  double softcap;
  double p_argmax, q_argmax;  // exp(x) p_argmax = p. For Jensen-Shannon alone, as is weight.
  double weight;
  double constant, linear, ratio, other;  // of the gradient
  bool stream;                            // write past the caches; never where the gradient overwrites the logits
};

// sum_v p_v log(p_v / M_v) and sum_v q_v log(q_v / M_v).
struct MixtureDivergence {
  double p;
  double q;
};

// One function for each DType; both rows have it.
struct PairSpans {
  // Adds logits to a summary of those before them. Unless `full`, p.weighted and q_over_p are left alone.
  using Summarise = OnlineDivergence<double> (*)(const void* p, const void* q, int64_t count,
                                                 double inverse_temperature, double softcap, bool full,
                                                 const OnlineDivergence<double>& before);
  using Mixture = MixtureDivergence (*)(const void* p, const void* q, int64_t count, const PairParameters&);
  using Differentiate = void (*)(const void* p, const void* q, void* gradient, int64_t count, const PairParameters&);

  Summarise summarise[kDTypes];
  Mixture mixture[kDTypes];
  Differentiate differentiate[kDTypes];     // the gradient may be either's logits, and may not overlap them otherwise
  Differentiate differentiate_to_bfloat16;  // float logits, bfloat16 gradient, form kAll
};

const PairSpans& pair_spans_baseline();
const PairSpans& pair_spans_avx2();
const PairSpans& pair_spans_avx512();
const PairSpans& pair_spans_avx512_bf16();

const PairSpans& pair_spans(Isa isa);

}  // namespace irlfast
