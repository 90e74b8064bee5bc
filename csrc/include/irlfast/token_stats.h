// Per-token statistics of logits: log-prob of given labels, entropy and log-sum-exp, and their gradient.
// Everything is a raw pointer with strides in elements.
#pragma once

#include <cstdint>

#include "irlfast/dtype.h"
#include "irlfast/host_device.h"
#include "irlfast/isa.h"

namespace irlfast {

// rows = outer * inner; row r starts at (r / inner) * outer_stride + (r % inner) * inner_stride, its logits adjacent.
struct RowLayout {
  int64_t outer = 0;
  int64_t inner = 0;
  int64_t outer_stride = 0;
  int64_t inner_stride = 0;

  IRLFAST_HOST_DEVICE int64_t rows() const { return outer * inner; }
  IRLFAST_HOST_DEVICE int64_t offset(int64_t row) const {
    return (row / inner) * outer_stride + (row % inner) * inner_stride;
  }
};

struct TokenStatsInput {
  const void* logits = nullptr;
  DType dtype = DType::kFloat32;
  RowLayout layout;
  int64_t vocab = 0;
  const int64_t* labels = nullptr;  // rows x labels_per_row, contiguous; each in [0, vocab) or ignore_index
  int64_t labels_per_row = 1;
  int64_t ignore_index = -100;
  double temperature = 1.0;
  const void* row_temperature = nullptr;  // one a row, in the statistics' type; replaces `temperature`
  double softcap = 0.0;                   // 0 means none

  // Where the logits at hand are columns [first_column, first_column + vocab) of a wider vocabulary, which labels refer
  // to, and where row r stands at place row_numbers[r] of the layout. For the passes that say so.
  int64_t first_column = 0;
  const int64_t* row_numbers = nullptr;
  int64_t numbered_rows = 0;
};

// Statistics are float, or double where the logits are; all but the log-prob null where they are not wanted. A row
// whose labels are all ignored gives zeros.
struct TokenStatsOutput {
  void* logprob = nullptr;  // rows x labels_per_row
  void* entropy = nullptr;  // rows
  void* lse = nullptr;      // rows
  void* state = nullptr;    // 3 x rows, what the gradient needs: max, sum of the others' exponentials, entropy
};

// Upstream gradients, contiguous, null for zero.
struct TokenStatsUpstream {
  const void* logprob = nullptr;
  const void* entropy = nullptr;
  const void* lse = nullptr;
};

// Position of the first label that is neither in [0, vocab) nor ignore_index, or -1.
int64_t first_invalid_label(const int64_t* labels, int64_t count, int64_t vocab, int64_t ignore_index);

// The same numbers for a row whatever the number of threads and whichever other rows there are.
void token_stats_forward(const TokenStatsInput& input, const TokenStatsOutput& output, int threads, Isa isa);

// In the logits' type, or bfloat16 for float logits.
struct TokenStatsGradient {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  RowLayout layout;
};

// The gradient may be the logits themselves (same address, type and layout) and may not overlap them in any other way.
// A row whose upstream gradients are all zero gets zeros, whatever its logits. Takes columns of a wider vocabulary, and
// numbered rows.
void token_stats_backward(const TokenStatsInput& input, const void* state, const TokenStatsUpstream& upstream,
                          const TokenStatsGradient& gradient, int threads, Isa isa);

}  // namespace irlfast
