// What linear_policy_ref_stats does with the logits of some columns of a policy and of its reference, between the
// matrix products that make and consume them.
#pragma once

#include <cstdint>

#include "irlfast/isa.h"
#include "irlfast/linear_token_stats.h"
#include "irlfast/token_stats.h"

namespace irlfast {

// Of the columns seen so far, kPairRunning arrays of `rows` doubles, `stride` apart: OnlineDivergence of policy and
// reference (without what only the reference's entropy would need), and the label's logit of both after softcap.
constexpr int64_t kPairRunning = 9;
enum PairRunning : int64_t {
  kPolicyMax,
  kPolicyOthers,
  kPolicyWeighted,
  kPolicyLabel,
  kRefMax,
  kRefOthers,
  kRefLabel,
  kPolicyOverRef,
  kRefOverPolicy,
};

// The logits at hand: the same rows, columns and labels, temperature and softcap; one label a row, none of them
// ignored.
struct PairChunk {
  TokenStatsInput policy;
  TokenStatsInput reference;
};

// Adds columns [first_column, first_column + vocab) to the running sums; chunks come in the order of their columns, and
// their size, a multiple of kChunkPiece, never shows in the result.
void linear_policy_ref_stats_merge(const PairChunk& chunk, double* running, int64_t stride, int threads, Isa isa);

// Upstream gradients of the policy's statistics, one a row in the statistics' type, null for zero.
struct PairUpstream {
  const void* logprob = nullptr;
  const void* entropy = nullptr;
  const void* lse = nullptr;
  const void* reverse_kl = nullptr;
  const void* forward_kl = nullptr;
};

// The gradient of the policy's logits, over either of them or elsewhere. An infinite divergence passes none.
void linear_policy_ref_stats_differentiate(const PairChunk& chunk, const double* running, int64_t stride,
                                           const PairUpstream& upstream, const TokenStatsGradient& gradient,
                                           int threads, Isa isa);

}  // namespace irlfast
