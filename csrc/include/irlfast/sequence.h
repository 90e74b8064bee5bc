// Sums or means of token log-probs over the unmasked tokens of each sequence, and their gradient.
#pragma once

#include <cstdint>

#include "irlfast/dtype.h"
#include "irlfast/isa.h"
#include "irlfast/segments.h"

namespace irlfast {

// One number a sequence, float, or double where the log-probs are. A sequence without an unmasked token has 0. The
// numbers of a sequence depend neither on the other sequences nor on padding after it nor on the thread count.
void sequence_logprobs_forward(const Segments& segments, const void* logprobs, DType dtype, const TokenMask& mask,
                               bool mean, void* result, int threads, Isa isa);

// `upstream` is as `result` above, `gradient` as the log-probs.
void sequence_logprobs_backward(const Segments& segments, const void* upstream, DType dtype, const TokenMask& mask,
                                bool mean, void* gradient, int threads, Isa isa);

}  // namespace irlfast
