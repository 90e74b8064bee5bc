// What linear_token_stats does with the logits of some columns, between the matrix products that make and consume them.
// The rest of its gradient is token_stats_backward.
#pragma once

#include <cstdint>

#include "irlfast/isa.h"
#include "irlfast/token_stats.h"

namespace irlfast {

// Rows are summarised in pieces of this many columns, whatever the chunks that they arrive in, so that a chunk's size,
// a multiple of it, never shows in the result.
constexpr int64_t kChunkPiece = 2048;

// Of the columns seen so far, one array of `rows` doubles each: the online softmax, and the label's logit after
// softcap.
struct RunningStats {
  double* max = nullptr;
  double* others = nullptr;
  double* weighted = nullptr;
  double* label_logit = nullptr;
};

// Adds columns [first_column, first_column + vocab) to the running statistics. One label a row, none of them ignored;
// chunks come in the order of their columns. `weighted` is left alone where it is not asked for.
void linear_token_stats_merge(const TokenStatsInput& input, bool weighted, const RunningStats& running, int threads,
                              Isa isa);

// probabilities[r][v] = exp((l_v - max_r) / T) dl_v / dlogit, in place or as bfloat16 elsewhere, and 0 at the row's
// label: with the label left out, (1 - p_y) W_y - sum_{v != y} p_v W_v does not cancel for a confident token.
void linear_token_stats_exponentials(const TokenStatsInput& input, const double* max, const TokenStatsGradient& result,
                                     int threads, Isa isa);

}  // namespace irlfast
