#include "irlfast/linear_token_stats.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "rows.h"

namespace irlfast {

void linear_token_stats_merge(const TokenStatsInput& input, bool weighted, const RunningStats& running, int threads,
                              Isa isa) {
  const Rows rows(input, isa);
  parallel_for(rows.count(), task_grain(input.vocab), threads, [&](int64_t row) {
    OnlineSoftmax<double> state{running.max[row], running.others[row], running.weighted[row]};
    for (int64_t begin = 0; begin < input.vocab; begin += kChunkPiece) {
      state = rows.summarise(row, begin, std::min(begin + kChunkPiece, input.vocab), weighted, state);
    }
    running.max[row] = state.max;
    running.others[row] = state.others;
    if (weighted) running.weighted[row] = state.weighted;
    const int64_t column = rows.label_column(row, 0);
    if (column >= 0 && column < input.vocab) running.label_logit[row] = rows.element(row, column).value;
  });
}

void linear_token_stats_exponentials(const TokenStatsInput& input, const double* max, const TokenStatsGradient& result,
                                     int threads, Isa isa) {
  const Rows rows(input, isa);
  const SoftmaxSpans::Differentiate differentiate =
      result.dtype == input.dtype ? rows.spans().differentiate[rows.dtype()] : rows.spans().differentiate_to_bfloat16;
  const int64_t bytes = dtype_size(result.dtype);
  parallel_for(rows.count(), task_grain(input.vocab), threads, [&](int64_t row) {
    char* destination = static_cast<char*>(result.data) + result.layout.offset(row) * bytes;
    if (max[row] == -INFINITY) {
      // Nothing finite yet, and -inf less -inf would be NaN.
      std::memset(destination, 0, size_t(input.vocab * bytes));
      return;
    }
    SoftmaxGradient parameters;
    parameters.max = max[row];
    parameters.inverse_temperature = rows.inverse_temperature(row);
    parameters.softcap = input.softcap;
    parameters.constant = 1.0;
    parameters.linear = 0.0;
    parameters.stream = false;
    differentiate(rows.logit(row, 0), destination, input.vocab, parameters);
    const int64_t column = rows.label_column(row, 0);
    if (column >= 0 && column < input.vocab) {
      rows.spans().store[int(result.dtype)](destination + column * bytes, 0.0);
    }
  });
}

}  // namespace irlfast
