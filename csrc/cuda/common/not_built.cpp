// In place of the kernels where irlfast is built without nvcc: every build has the same functions.
#include <stdexcept>

#include "irlfast/cuda.h"

namespace irlfast::cuda {
namespace {

constexpr const char* kReason =
    "irlfast was built without CUDA kernels: nvcc was not found then, or IRLFAST_CUDA=OFF; install irlfast again where "
    "nvcc is on PATH";

[[noreturn]] void refuse() {
  throw std::runtime_error(kReason);
}

}  // namespace

bool emulated() {
  return false;
}

int device_count() {
  return 0;
}

std::string unavailable(int) {
  return kReason;
}

void token_stats_forward(const TokenStatsInput&, const TokenStatsOutput&, const Queue&) {
  refuse();
}

void token_stats_backward(const TokenStatsInput&, const void*, const TokenStatsUpstream&, const TokenStatsGradient&,
                          const Queue&) {
  refuse();
}

void token_kl_forward(const TokenKlInput&, void*, double*, const Queue&) {
  refuse();
}

void token_kl_backward(const TokenKlInput&, const double*, const void*, const TokenKlGradient&, const TokenKlGradient&,
                       const Queue&) {
  refuse();
}

void sequence_logprobs_forward(const Segments&, int64_t, const void*, DType, const TokenMask&, bool, void*,
                               const Queue&) {
  refuse();
}

void sequence_logprobs_backward(const Segments&, int64_t, const void*, DType, const TokenMask&, bool, void*,
                                const Queue&) {
  refuse();
}

void importance_weights_forward(const ImportanceInput&, const GroupLists&, const ImportanceOutput&, const Queue&) {
  refuse();
}

void importance_weights_backward(const ImportanceInput&, const GroupLists&, const void*, const void*, const void*,
                                 void*, const Queue&) {
  refuse();
}

void policy_terms(const PolicyTermsInput&, int64_t, const PolicyTermsOptions&, const PolicyTermsOutput&,
                  const PolicyTermsWorkspace&, const Queue&) {
  refuse();
}

}  // namespace irlfast::cuda
