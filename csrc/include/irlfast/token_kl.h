// Exact divergences between the token distributions of two models on the CPU, and their gradients.
#pragma once

#include <cstdint>

#include "irlfast/dtype.h"
#include "irlfast/isa.h"
#include "irlfast/token_stats.h"

namespace irlfast {

// With p the policy's distribution and q the reference's.
enum class Divergence : int {
  kReverse = 0,        // KL(p || q)
  kForward = 1,        // KL(q || p)
  kJensenShannon = 2,  // w KL(p || M) + (1 - w) KL(q || M), M = w p + (1 - w) q
};
constexpr int kDivergences = 3;

struct TokenKlInput {
  const void* logits = nullptr;
  const void* ref_logits = nullptr;
  DType dtype = DType::kFloat32;  // of both
  RowLayout layout, ref_layout;   // as many rows
  int64_t vocab = 0;
  Divergence kind = Divergence::kReverse;
  double weight = 0.5;
  double temperature = 1.0;
  const void* row_temperature = nullptr;  // one a row, in the statistics' type; replaces `temperature`
  double softcap = 0.0;                   // 0 means none
};

// What the gradient needs of each row: two maxima, two sums of the others' exponentials, and the divergence, which for
// Jensen-Shannon is two numbers, KL(p || M) and KL(q || M).
constexpr int64_t kTokenKlState = 6;

// kl: one a row, float, or double where the logits are. state: kTokenKlState x rows. The same numbers for a row
// whatever the number of threads and whichever other rows there are.
void token_kl_forward(const TokenKlInput& input, void* kl, double* state, int threads, Isa isa);

struct TokenKlGradient {
  void* data = nullptr;  // null where it is not wanted; in the logits' type
  RowLayout layout;
};

// upstream: one a row, in the statistics' type. The gradient of the logits may be the logits themselves and may overlap
// neither input in any other way. A row with upstream gradient 0 gets zeros, and so does one whose KL is infinite.
void token_kl_backward(const TokenKlInput& input, const double* state, const void* upstream,
                       const TokenKlGradient& gradient, const TokenKlGradient& ref_gradient, int threads, Isa isa);

}  // namespace irlfast
