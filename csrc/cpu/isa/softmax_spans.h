#pragma once
#include "irlfast/isa.h"
namespace irlfast {
struct SoftmaxSpans { int dummy; };
const SoftmaxSpans& softmax_spans_baseline();
const SoftmaxSpans& softmax_spans_avx2();
const SoftmaxSpans& softmax_spans_avx512();
const SoftmaxSpans& softmax_spans(Isa isa);
}
