#include "isa/softmax_spans.h"
#define CAT_(a, b) a##b
#define CAT(a, b) CAT_(a, b)
namespace irlfast {
const SoftmaxSpans& CAT(softmax_spans_, IRLFAST_ISA)() { static const SoftmaxSpans s{0}; return s; }
}
