#include "irlfast/importance.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>
#include <vector>

#include "isa/importance_spans.h"
#include "rows.h"

namespace irlfast {
namespace {

// The rows of each group, in their own order wherever others' stand; groups by rising id.
class Groups {
 public:
  Groups(const int64_t* ids, int64_t rows) : starts_{0} {
    if (ids == nullptr) {
      starts_.push_back(rows);
      return;
    }
    int64_t first = 1;
    for (; first < rows && ids[first] >= ids[first - 1]; ++first) {
      if (ids[first] != ids[first - 1]) starts_.push_back(first);
    }
    if (first < rows) {
      sort(ids, rows);
      starts_.resize(1);
      for (int64_t i = 1; i < rows; ++i) {
        if (ids[row(i)] != ids[row(i - 1)]) starts_.push_back(i);
      }
    }
    starts_.push_back(rows);
  }

  int64_t count() const { return int64_t(starts_.size()) - 1; }
  int64_t begin(int64_t group) const { return starts_[size_t(group)]; }
  int64_t end(int64_t group) const { return starts_[size_t(group) + 1]; }
  int64_t row(int64_t place) const { return order_.empty() ? place : order_[size_t(place)]; }

 private:
  void sort(const int64_t* ids, int64_t rows) {
    order_.resize(size_t(rows));
    int64_t lowest = ids[0], highest = ids[0];
    for (int64_t i = 1; i < rows; ++i) {
      lowest = std::min(lowest, ids[i]);
      highest = std::max(highest, ids[i]);
    }
    const uint64_t range = uint64_t(highest) - uint64_t(lowest);
    if (range >= 4 * uint64_t(rows)) {
      std::iota(order_.begin(), order_.end(), int64_t(0));
      std::stable_sort(order_.begin(), order_.end(), [&](int64_t a, int64_t b) { return ids[a] < ids[b]; });
      return;
    }
    std::vector<int64_t> places(size_t(range) + 2);
    for (int64_t i = 0; i < rows; ++i) ++places[size_t(ids[i] - lowest) + 1];
    std::partial_sum(places.begin(), places.end(), places.begin());
    for (int64_t i = 0; i < rows; ++i) order_[size_t(places[size_t(ids[i] - lowest)]++)] = i;
  }

  std::vector<int64_t> starts_, order_;
};

// One group's samples, in double throughout.
struct Samples {
  int64_t number;
  int64_t count;
  const double* shares;
  const double* weights;
  const double* log_ratio;
  GroupWeights total;
};

// visit(samples, row) for every group, shared out over the threads; row(k): where its k-th sample stands.
template <typename Visit>
int64_t for_each_group(const ImportanceInput& input, int threads, Isa isa, const Visit& visit) {
  if (input.rows == 0) return 0;
  const Statistic target(input.log_target, input.dtype), proposal(input.log_proposal, input.dtype);
  const auto weigh = importance_spans(isa).weigh;
  const Groups groups(input.groups, input.rows);
  // A sample takes as long as some sixteen logits do.
  const int64_t grain = task_grain(16 * input.rows / groups.count());
  parallel_for(groups.count(), grain, threads, [&](int64_t number) {
    const int64_t begin = groups.begin(number), count = groups.end(number) - begin;
    const auto row = [&](int64_t k) { return groups.row(begin + k); };
    const int64_t padded = (count + kGroupPadding - 1) / kGroupPadding * kGroupPadding;
    const std::unique_ptr<double[]> memory(new double[size_t((input.reshapes() ? 3 : 2) * padded)]);
    double *log_ratio = memory.get(), *shares = log_ratio + padded;
    double* weights = input.reshapes() ? shares + padded : shares;
    for (int64_t k = 0; k < count; ++k) log_ratio[k] = target.get(row(k)) - proposal.get(row(k));
    const GroupWeights total = weigh(input, log_ratio, count, shares, weights);
    visit(Samples{number, count, shares, weights, log_ratio, total}, row);
  });
  return groups.count();
}

}  // namespace

int64_t importance_weights_forward(const ImportanceInput& input, const ImportanceOutput& output, int threads, Isa isa) {
  const auto first_invalid = importance_spans(isa).first_invalid[input.dtype == DType::kFloat64 ? 1 : 0];
  const int64_t invalid = first_invalid(input.log_target, input.log_proposal, input.rows);
  if (invalid < input.rows) return -(invalid + 1);
  const Statistic weights(output.weights, input.dtype), normalizers(output.log_normalizer, input.dtype),
      ess(output.ess, input.dtype);
  return for_each_group(input, threads, isa, [&](const Samples& samples, const auto& row) {
    for (int64_t k = 0; k < samples.count; ++k) weights.set(row(k), samples.weights[k]);
    normalizers.set(samples.number, samples.total.log_normalizer);
    ess.set(samples.number, samples.total.ess);
  });
}

void importance_weights_backward(const ImportanceInput& input, const void* grad_weights,
                                 const void* grad_log_normalizer, const void* grad_ess, void* gradient, int threads,
                                 Isa isa) {
  const Statistic upstream_weights(grad_weights, input.dtype), upstream_normalizer(grad_log_normalizer, input.dtype),
      upstream_ess(grad_ess, input.dtype), result(gradient, input.dtype);
  for_each_group(input, threads, isa, [&](const Samples& samples, const auto& row) {
    const double log_normalizer = samples.total.log_normalizer, ess = samples.total.ess;
    if (log_normalizer == -INFINITY) {
      for (int64_t k = 0; k < samples.count; ++k) result.set(row(k), 0.0);
      return;
    }
    // To the weights, through the effective sample size 1 / sum w^2 too; through the softmax; through the clip.
    const double squares = upstream_ess ? -2 * upstream_ess.get(samples.number) * ess * ess : 0.0;
    const auto to_weight = [&](int64_t k) {
      return (upstream_weights ? upstream_weights.get(row(k)) : 0.0) + squares * samples.weights[k];
    };
    double mean = 0;
    for (int64_t k = 0; k < samples.count; ++k) mean += samples.weights[k] * to_weight(k);
    const auto to_relative = [&](int64_t k) {
      const double x = samples.log_ratio[k] - log_normalizer;
      const bool free = x >= input.clip_low && x <= input.clip_high;
      return free ? input.temper * samples.weights[k] * (to_weight(k) - mean) : 0.0;
    };
    double to_normalizer = upstream_normalizer ? upstream_normalizer.get(samples.number) : 0.0;
    for (int64_t k = 0; k < samples.count; ++k) to_normalizer -= to_relative(k);
    // The share is d log Z / d l_k.
    for (int64_t k = 0; k < samples.count; ++k) result.set(row(k), to_relative(k) + to_normalizer * samples.shares[k]);
  });
}

}  // namespace irlfast
