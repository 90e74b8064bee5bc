// The kernels of csrc/cuda, on the caller's stream: nothing here waits for the device or allocates on it, so that a
// CUDA graph can capture a call. What only the data can tell is not checked: a row with a label outside the vocabulary,
// which is not read, or with a temperature that is no positive number, is NaN. Throws std::runtime_error where a launch
// fails.
#pragma once

#include <cstdint>
#include <string>

#include "irlfast/importance.h"
#include "irlfast/policy_terms.h"
#include "irlfast/segments.h"
#include "irlfast/token_kl.h"
#include "irlfast/token_stats.h"

namespace irlfast::cuda {

// Compiled by the host's compiler, to run on the CPU thread by thread in tests.
bool emulated();

// 0 too where there is no driver, or one too old for the runtime that was linked.
int device_count();

// Why the kernels cannot run on a device, or nothing.
std::string unavailable(int device);

// Where a call goes: a device's number and a cudaStream_t.
struct Queue {
  int device = 0;
  uintptr_t stream = 0;
};

// Of each row at most this many labels.
constexpr int64_t kMaxLabels = 1024;

// The statistics' type is float, or double for double logits. The state is [3, rows] in it.
void token_stats_forward(const TokenStatsInput& input, const TokenStatsOutput& output, const Queue& queue);
void token_stats_backward(const TokenStatsInput& input, const void* state, const TokenStatsUpstream& upstream,
                          const TokenStatsGradient& gradient, const Queue& queue);

// The state is [kTokenKlState, rows] of double.
void token_kl_forward(const TokenKlInput& input, void* kl, double* state, const Queue& queue);
void token_kl_backward(const TokenKlInput& input, const double* state, const void* upstream,
                       const TokenKlGradient& gradient, const TokenKlGradient& ref_gradient, const Queue& queue);

// Offsets are not looked at beforehand but held within [0, tokens]. Tokens in no sequence have gradient 0.
void sequence_logprobs_forward(const Segments& segments, int64_t tokens, const void* logprobs, DType dtype,
                               const TokenMask& mask, bool mean, void* result, const Queue& queue);
void sequence_logprobs_backward(const Segments& segments, int64_t tokens, const void* upstream, DType dtype,
                                const TokenMask& mask, bool mean, void* gradient, const Queue& queue);

// Groups as lists of rows: group i has rows order[offsets[i]] to order[offsets[i + 1] - 1]. Null `order`: all rows in
// one group. A group without rows writes nothing; one with a log ratio that is NaN or +inf is NaN.
struct GroupLists {
  const int64_t* order = nullptr;
  const int64_t* offsets = nullptr;
  int64_t count = 1;
};

// input.groups is not used.
void importance_weights_forward(const ImportanceInput& input, const GroupLists& groups, const ImportanceOutput& output,
                                const Queue& queue);
void importance_weights_backward(const ImportanceInput& input, const GroupLists& groups, const void* grad_weights,
                                 const void* grad_log_normalizer, const void* grad_ess, void* gradient,
                                 const Queue& queue);

// Of each sequence this many sums are kept between the blocks that make them and the one that adds them up.
constexpr int64_t kPolicyPartials = 17;

struct PolicyTermsWorkspace {
  double* partials = nullptr;         // [sequences, kPolicyPartials]
  int32_t* finished = nullptr;        // 0 before the call and after it
  const void* denominator = nullptr;  // on the device, in the input's type; else options.denominator
  void* scale = nullptr;              // 1 / denominator, which the gradients written lack
};

void policy_terms(const PolicyTermsInput& input, int64_t tokens, const PolicyTermsOptions& options,
                  const PolicyTermsOutput& output, const PolicyTermsWorkspace& workspace, const Queue& queue);

}  // namespace irlfast::cuda
