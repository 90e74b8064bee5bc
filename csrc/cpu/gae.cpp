#include "irlfast/gae.h"

#include "isa/segment_vec.h"
#include "rows.h"

namespace irlfast {
namespace {

template <typename Real>
void scan(const GaeInput& input, int64_t sequence, Real* advantages, Real* returns) {
  constexpr int kBlock = 256;
  const Real* rewards = static_cast<const Real*>(input.rewards);
  const Real* values = static_cast<const Real*>(input.values);
  uint8_t buffer[kBlock];
  double advantage = 0;
  double next_value =
      input.last_values == nullptr ? 0.0 : double(static_cast<const Real*>(input.last_values)[sequence]);
  const int64_t begin = input.segments.begin(sequence);
  for (int64_t end = input.segments.end(sequence); end > begin;) {
    const int64_t first = std::max(begin, end - kBlock);
    const uint8_t* counts = mask_bytes(input.mask, first, end - first, buffer);
    for (int64_t t = end - 1; t >= first; --t) {
      if (counts[t - first] == 0) {
        advantages[t] = returns[t] = 0;
        continue;
      }
      const double value = values[t];
      advantage = rewards[t] + input.gamma * next_value - value + input.gamma * input.lam * advantage;
      next_value = value;
      advantages[t] = Real(advantage);
      returns[t] = Real(advantage + value);
    }
    end = first;
  }
}

}  // namespace

void gae(const GaeInput& input, void* advantages, void* returns, int threads) {
  const int64_t width = input.segments.tokens() / std::max<int64_t>(1, input.segments.count);
  // A token here waits for the one after it: as long as a few logits.
  parallel_for(input.segments.count, task_grain(4 * width), threads, [&](int64_t i) {
    if (input.dtype == DType::kFloat64) {
      scan(input, i, static_cast<double*>(advantages), static_cast<double*>(returns));
    } else {
      scan(input, i, static_cast<float*>(advantages), static_cast<float*>(returns));
    }
  });
}

}  // namespace irlfast
