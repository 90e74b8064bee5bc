#include "irlfast/importance.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "rows.h"

namespace irlfast {
namespace {

// One group's samples: log ratios, and what follows from them, in double throughout.
struct Group {
  std::vector<double> log_ratio, relative, weights;
  double log_normalizer = 0;
  double ess = 0;

  // w = softmax(temper clip(l - log Z)). -inf stays what cannot occur, clipped or not.
  void weigh(const ImportanceInput& input) {
    const size_t n = log_ratio.size();
    weights.resize(n);
    relative.resize(n);
    const double peak = *std::max_element(log_ratio.begin(), log_ratio.end());
    if (peak == -INFINITY) {
      std::fill(weights.begin(), weights.end(), 0.0);
      log_normalizer = -INFINITY;
      ess = 0;
      return;
    }
    double total = 0;
    for (size_t k = 0; k < n; ++k) total += weights[k] = std::exp(log_ratio[k] - peak);
    log_normalizer = peak + std::log(total) - std::log(double(n));
    for (size_t k = 0; k < n; ++k) relative[k] = log_ratio[k] - log_normalizer;
    if (input.temper != 1 || input.clip_low != -INFINITY || input.clip_high != INFINITY) {
      const auto tempered = [&](size_t k) {
        return input.temper * std::min(std::max(relative[k], input.clip_low), input.clip_high);
      };
      double highest = -INFINITY;
      for (size_t k = 0; k < n; ++k) {
        if (log_ratio[k] != -INFINITY) highest = std::max(highest, tempered(k));
      }
      total = 0;
      for (size_t k = 0; k < n; ++k) {
        total += weights[k] = log_ratio[k] == -INFINITY ? 0.0 : std::exp(tempered(k) - highest);
      }
    }
    double squares = 0;
    for (double& w : weights) {
      w /= total;
      squares += w * w;
    }
    ess = 1 / squares;
  }
};

// Calls visit(number, rows, count) for each group by rising id, its rows in their own order wherever others' stand.
template <typename Visit>
int64_t for_each_group(const ImportanceInput& input, const Visit& visit) {
  if (input.rows == 0) return 0;
  std::vector<int64_t> order(static_cast<size_t>(input.rows));
  std::iota(order.begin(), order.end(), int64_t(0));
  const int64_t* ids = input.groups;
  if (ids == nullptr) {
    visit(int64_t(0), order.data(), input.rows);
    return 1;
  }
  if (!std::is_sorted(ids, ids + input.rows)) {
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return ids[a] < ids[b]; });
  }
  int64_t number = 0;
  for (int64_t begin = 0; begin < input.rows; ++number) {
    int64_t end = begin + 1;
    while (end < input.rows && ids[order[size_t(end)]] == ids[order[size_t(begin)]]) ++end;
    visit(number, order.data() + begin, end - begin);
    begin = end;
  }
  return number;
}

}  // namespace

int64_t importance_weights_forward(const ImportanceInput& input, const ImportanceOutput& output) {
  const Statistic target(input.log_target, input.dtype), proposal(input.log_proposal, input.dtype);
  for (int64_t i = 0; i < input.rows; ++i) {
    const double log_ratio = target.get(i) - proposal.get(i);
    if (std::isnan(log_ratio) || log_ratio == INFINITY) return -(i + 1);
  }
  const Statistic weights(output.weights, input.dtype), normalizers(output.log_normalizer, input.dtype),
      ess(output.ess, input.dtype);
  Group group;
  return for_each_group(input, [&](int64_t number, const int64_t* rows, int64_t count) {
    group.log_ratio.resize(size_t(count));
    for (int64_t k = 0; k < count; ++k) group.log_ratio[size_t(k)] = target.get(rows[k]) - proposal.get(rows[k]);
    group.weigh(input);
    for (int64_t k = 0; k < count; ++k) weights.set(rows[k], group.weights[size_t(k)]);
    normalizers.set(number, group.log_normalizer);
    ess.set(number, group.ess);
  });
}

void importance_weights_backward(const ImportanceInput& input, const void* grad_weights,
                                 const void* grad_log_normalizer, const void* grad_ess, void* gradient) {
  const Statistic target(input.log_target, input.dtype), proposal(input.log_proposal, input.dtype);
  const Statistic upstream_weights(grad_weights, input.dtype), upstream_normalizer(grad_log_normalizer, input.dtype),
      upstream_ess(grad_ess, input.dtype), result(gradient, input.dtype);
  Group group;
  for_each_group(input, [&](int64_t number, const int64_t* rows, int64_t count) {
    group.log_ratio.resize(size_t(count));
    for (int64_t k = 0; k < count; ++k) group.log_ratio[size_t(k)] = target.get(rows[k]) - proposal.get(rows[k]);
    group.weigh(input);
    if (group.log_normalizer == -INFINITY) {
      for (int64_t k = 0; k < count; ++k) result.set(rows[k], 0.0);
      return;
    }
    // To the weights, through the effective sample size 1 / sum w^2 too; through the softmax; through the clip.
    const double squares = upstream_ess ? -2 * upstream_ess.get(number) * group.ess * group.ess : 0.0;
    const auto to_weight = [&](int64_t k) {
      return (upstream_weights ? upstream_weights.get(rows[k]) : 0.0) + squares * group.weights[size_t(k)];
    };
    double mean = 0;
    for (int64_t k = 0; k < count; ++k) mean += group.weights[size_t(k)] * to_weight(k);
    const auto to_relative = [&](int64_t k) {
      const double x = group.relative[size_t(k)];
      const bool free = x >= input.clip_low && x <= input.clip_high;
      return free ? input.temper * group.weights[size_t(k)] * (to_weight(k) - mean) : 0.0;
    };
    double to_normalizer = upstream_normalizer ? upstream_normalizer.get(number) : 0.0;
    for (int64_t k = 0; k < count; ++k) to_normalizer -= to_relative(k);
    for (int64_t k = 0; k < count; ++k) {
      const double share = std::exp(group.relative[size_t(k)]) / double(count);  // d log Z / d l_k
      result.set(rows[k], to_relative(k) + to_normalizer * share);
    }
  });
}

}  // namespace irlfast
