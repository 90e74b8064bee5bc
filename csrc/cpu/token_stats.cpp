#include "irlfast/token_stats.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "irlfast/online_softmax.h"
#include "rows.h"

namespace irlfast {
namespace {

class Forward {
 public:
  Forward(const Rows& rows, const TokenStatsOutput& output)
      : rows_(rows),
        logprob_(output.logprob, rows.input().dtype),
        entropy_(output.entropy, rows.input().dtype),
        lse_(output.lse, rows.input().dtype),
        state_(output.state, rows.input().dtype) {}

  void run(int threads) const {
    reduce_rows(
        rows_.count(), rows_.input().vocab, threads,
        [&](int64_t row, int64_t piece) {
          return rows_.ignored(row) ? online_softmax_empty<double>()
                                    : rows_.summarise_piece(row, piece, bool(entropy_));
        },
        [&](int64_t row, const OnlineSoftmax<double>& a, const OnlineSoftmax<double>& b) {
          return rows_.ignored(row) ? a : online_softmax_merge(a, b, rows_.inverse_temperature(row));
        },
        [&](int64_t row, const OnlineSoftmax<double>& state) {
          rows_.ignored(row) ? write_ignored(row) : write(row, state);
        });
  }

 private:
  void write(int64_t row, const OnlineSoftmax<double>& state) const {
    const TokenStatsInput& input = rows_.input();
    const double inverse_temperature = rows_.inverse_temperature(row);
    const double log_sum = online_softmax_log_sum(state);
    const double entropy = entropy_ ? online_softmax_entropy(state) : 0.0;
    for (int64_t k = 0; k < input.labels_per_row; ++k) {
      const int64_t label = rows_.labels(row)[k];
      // The maximum is taken from the logit before the logarithm is: both are exact, their sum would not be.
      const double logprob = label == input.ignore_index
                                 ? 0.0
                                 : (rows_.element(row, label).value - state.max) * inverse_temperature - log_sum;
      logprob_.set(row * input.labels_per_row + k, logprob);
    }
    if (entropy_) entropy_.set(row, entropy);
    if (lse_) lse_.set(row, state.max * inverse_temperature + log_sum);
    write_state(row, state.max, state.others, entropy);
  }

  void write_ignored(int64_t row) const {
    const int64_t per_row = rows_.input().labels_per_row;
    for (int64_t k = 0; k < per_row; ++k) logprob_.set(row * per_row + k, 0.0);
    if (entropy_) entropy_.set(row, 0.0);
    if (lse_) lse_.set(row, 0.0);
    write_state(row, 0.0, 0.0, 0.0);
  }

  void write_state(int64_t row, double max, double others, double entropy) const {
    if (!state_) return;
    state_.set(row, max);
    state_.set(rows_.count() + row, others);
    state_.set(2 * rows_.count() + row, entropy);
  }

  const Rows& rows_;
  Statistic logprob_, entropy_, lse_, state_;
};

class Backward {
 public:
  Backward(const Rows& rows, const void* state, const TokenStatsUpstream& upstream, const TokenStatsGradient& gradient)
      : rows_(rows),
        state_(state, rows.input().dtype),
        upstream_logprob_(upstream.logprob, rows.input().dtype),
        upstream_entropy_(upstream.entropy, rows.input().dtype),
        upstream_lse_(upstream.lse, rows.input().dtype),
        gradient_(gradient),
        element_bytes_(dtype_size(gradient.dtype)),
        differentiate_(gradient.dtype == rows.input().dtype ? rows.spans().differentiate[rows.dtype()]
                                                            : rows.spans().differentiate_to_bfloat16),
        stream_(gradient.data != rows.input().logits &&
                rows.count() * rows.input().vocab * element_bytes_ >= kStreamBytes) {}

  void run(int threads) const {
    for_spans(rows_.count(), rows_.input().vocab, threads,
              [&](int64_t row, int64_t begin, int64_t end) { differentiate(row, begin, end); });
  }

 private:
  // A label in the piece at hand, and the gradient its log-prob receives.
  struct Target {
    int64_t column;
    double upstream;
    LogitElement logit;
  };

  double upstream(int64_t row, int64_t k) const {
    const int64_t per_row = rows_.input().labels_per_row;
    if (!upstream_logprob_ || rows_.labels(row)[k] == rows_.input().ignore_index) return 0.0;
    return upstream_logprob_.get(row * per_row + k);
  }

  char* gradient(int64_t row, int64_t column) const {
    return static_cast<char*>(gradient_.data) + (gradient_.layout.offset(row) + column) * element_bytes_;
  }

  void differentiate(int64_t row, int64_t begin, int64_t end) const {
    const TokenStatsInput& input = rows_.input();
    double total = 0.0;
    bool any = false;
    for (int64_t k = 0; k < input.labels_per_row; ++k) {
      total += upstream(row, k);
      any |= upstream(row, k) != 0.0;
    }
    const double h = upstream_entropy_ ? upstream_entropy_.get(row) : 0.0;
    const double u = upstream_lse_ ? upstream_lse_.get(row) : 0.0;
    any |= h != 0.0 || u != 0.0;
    if (!any || rows_.ignored(row)) {
      std::memset(gradient(row, begin), 0, size_t((end - begin) * element_bytes_));
      return;
    }

    const double max = state_.get(row);
    const double others = state_.get(rows_.count() + row);
    const double entropy = state_.get(2 * rows_.count() + row);
    const double inverse_temperature = rows_.inverse_temperature(row);
    const double log_sum = std::log1p(others) + (max - max);
    const double p_argmax = 1.0 / (1.0 + others);
    // dz_v = p_v (u - g + h (lse - H) - h z_v) with z_v = max / T + x_v: the maximum cancels out of lse - z_v.
    const double constant = u + h * (log_sum - entropy);

    std::vector<Target> targets;
    Target only{};
    size_t n = 0;
    if (input.labels_per_row == 1) {
      n = gather(row, 0, begin, end, only) ? 1 : 0;
    } else {
      Target target{};
      for (int64_t k = 0; k < input.labels_per_row; ++k) {
        if (gather(row, k, begin, end, target)) targets.push_back(target);
      }
      n = add_up_repeats(targets);
    }
    const Target* target = input.labels_per_row == 1 ? &only : targets.data();

    SoftmaxGradient parameters;
    parameters.max = max;
    parameters.inverse_temperature = inverse_temperature;
    parameters.softcap = input.softcap;
    parameters.constant = (constant - total) * p_argmax * inverse_temperature;
    parameters.linear = -h * p_argmax * inverse_temperature;
    parameters.stream = stream_;
    differentiate_(rows_.logit(row, begin), gradient(row, begin), end - begin, parameters);

    for (size_t i = 0; i < n; ++i) {
      const double x = (target[i].logit.value - max) * inverse_temperature;
      const double logprob = x - log_sum;
      const double p = std::exp(logprob);
      const double spread = p == 0.0 ? 0.0 : p * (constant - (total - target[i].upstream) - h * x);
      // g (1 - p) by expm1: for a confident token 1 - p is below float32's spacing at 1.
      const double value = (spread - target[i].upstream * std::expm1(logprob)) * inverse_temperature;
      rows_.spans().store[int(gradient_.dtype)](gradient(row, target[i].column), value * target[i].logit.slope);
    }
  }

  // Reads the label's logit now: where the gradient is written in place, it is gone afterwards.
  bool gather(int64_t row, int64_t k, int64_t begin, int64_t end, Target& target) const {
    const int64_t column = rows_.label_column(row, k);
    if (rows_.labels(row)[k] == rows_.input().ignore_index || column < begin || column >= end) return false;
    target = {column, upstream(row, k), rows_.element(row, column)};
    return true;
  }

  static size_t add_up_repeats(std::vector<Target>& targets) {
    std::stable_sort(targets.begin(), targets.end(),
                     [](const Target& a, const Target& b) { return a.column < b.column; });
    size_t n = 0;
    for (const Target& target : targets) {
      if (n > 0 && targets[n - 1].column == target.column) {
        targets[n - 1].upstream += target.upstream;
      } else {
        targets[n++] = target;
      }
    }
    return n;
  }

  const Rows& rows_;
  Statistic state_, upstream_logprob_, upstream_entropy_, upstream_lse_;
  TokenStatsGradient gradient_;
  int64_t element_bytes_;
  SoftmaxSpans::Differentiate differentiate_;
  bool stream_;
};

}  // namespace

int64_t first_invalid_label(const int64_t* labels, int64_t count, int64_t vocab, int64_t ignore_index) {
  for (int64_t i = 0; i < count; ++i) {
    if (labels[i] != ignore_index && (labels[i] < 0 || labels[i] >= vocab)) return i;
  }
  return -1;
}

void token_stats_forward(const TokenStatsInput& input, const TokenStatsOutput& output, int threads, Isa isa) {
  Forward(Rows(input, isa), output).run(threads);
}

void token_stats_backward(const TokenStatsInput& input, const void* state, const TokenStatsUpstream& upstream,
                          const TokenStatsGradient& gradient, int threads, Isa isa) {
  Backward(Rows(input, isa), state, upstream, gradient).run(threads);
}

}  // namespace irlfast
