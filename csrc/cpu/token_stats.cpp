#include "isa/softmax_spans.h"
