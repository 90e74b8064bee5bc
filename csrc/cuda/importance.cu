// Self-normalised importance weights within groups, and their gradient: one block a group, one launch a pass. In double
// throughout. Rows are read again for each sum: a group's fit the cache.
#include "common/block.cuh"
#include "common/numbers.cuh"

namespace irlfast::cuda {
namespace {

// Groups are small; all rows as one group are shared out among more threads.
constexpr unsigned kGroupThreads = 64, kOneGroupThreads = 512;

// The rows of one group.
struct Members {
  const int64_t* order = nullptr;
  int64_t begin = 0, end = 0;

  IRLFAST_DEVICE int64_t row(int64_t place) const { return order == nullptr ? place : order[place]; }
};

IRLFAST_DEVICE Members members_of(const GroupLists& groups, int64_t rows, int64_t group) {
  if (groups.order == nullptr) return {nullptr, 0, rows};
  return {groups.order, groups.offsets[group], groups.offsets[group + 1]};
}

template <typename Real>
struct LogRatios {
  const Real *target = nullptr, *proposal = nullptr;

  IRLFAST_DEVICE double operator()(int64_t row) const { return double(target[row]) - double(proposal[row]); }
};

// exp(log_ratio - highest), 0 for -inf; a finite highest is at least every log_ratio.
IRLFAST_DEVICE double exponential_below(double log_ratio, double highest) {
  return log_ratio == minus_infinity<double>() ? 0.0 : exp(log_ratio - highest);
}

// x clipped, then tempered; a NaN stays, and so does -inf: what cannot occur under the target.
struct Reshape {
  double low = 0, high = 0, temper = 1, log_normalizer = 0;
  bool changes = false;

  IRLFAST_DEVICE bool holds(double log_ratio) const {
    const double relative = log_ratio - log_normalizer;
    return changes && log_ratio != minus_infinity<double>() && (relative < low || relative > high);
  }
  IRLFAST_DEVICE double operator()(double log_ratio) const {
    if (!changes || log_ratio == minus_infinity<double>()) return log_ratio;
    const double relative = log_ratio - log_normalizer;
    return temper * (relative > high ? high : relative < low ? low : relative);
  }
};

// What a group's weights need: the highest log ratio and the sum of exp(l - peak); of the log weights that clip and
// temper leave, the same, and the sum of the squares. All NaN where a ratio is NaN or +inf.
struct Weighing {
  bool empty = false;
  double peak = 0, total = 0, highest = 0, mass = 0, squares = 0;
  Reshape reshape;

  IRLFAST_DEVICE double share(double log_ratio) const { return exponential_below(log_ratio, peak) / total; }
  IRLFAST_DEVICE double weight(double log_ratio) const { return exponential_below(reshape(log_ratio), highest) / mass; }
  IRLFAST_DEVICE double ess() const { return empty ? 0.0 : mass * mass / squares; }
};

template <typename Real>
IRLFAST_DEVICE Weighing weigh(const ImportanceInput& input, const LogRatios<Real>& log_ratio, const Members& members) {
  double top = minus_infinity<double>();
  int invalid = 0;
  for (int64_t i = members.begin + threadIdx.x; i < members.end; i += blockDim.x) {
    const double x = log_ratio(members.row(i));
    invalid |= !(x < -minus_infinity<double>());
    top = larger(top, x);
  }
  top = block_max(top);
  invalid = __syncthreads_or(invalid);
  Weighing w;
  w.empty = !invalid && top == minus_infinity<double>();
  w.peak = invalid ? not_a_number<double>() : w.empty ? 0.0 : top;  // of nothing, any finite number will do
  double sum = 0, squares = 0;
  for (int64_t i = members.begin + threadIdx.x; i < members.end; i += blockDim.x) {
    const double e = exponential_below(log_ratio(members.row(i)), w.peak);
    sum += e;
    squares += e * e;
  }
  w.total = block_sum(sum);
  w.squares = block_sum(squares);
  w.reshape = {input.clip_low, input.clip_high, input.temper,
               w.peak + std::log(w.total) - std::log(double(members.end - members.begin)), input.reshapes()};
  w.highest = w.peak;
  w.mass = w.total;
  if (input.reshapes()) {
    w.highest = w.empty ? 0.0 : w.reshape(w.peak);
    sum = squares = 0;
    for (int64_t i = members.begin + threadIdx.x; i < members.end; i += blockDim.x) {
      const double e = exponential_below(w.reshape(log_ratio(members.row(i))), w.highest);
      sum += e;
      squares += e * e;
    }
    w.mass = block_sum(sum);
    w.squares = block_sum(squares);
  }
  if (w.empty) {
    w.total = w.mass = 1;  // quotients of nothing are 0
    w.reshape.log_normalizer = minus_infinity<double>();
  }
  return w;
}

template <typename Real>
IRLFAST_DEVICE LogRatios<Real> ratios_of(const ImportanceInput& input) {
  return {static_cast<const Real*>(input.log_target), static_cast<const Real*>(input.log_proposal)};
}

template <typename Real>
__global__ void __launch_bounds__(kOneGroupThreads, 1)
    importance_forward(ImportanceInput input, GroupLists groups, ImportanceOutput output) {
  const LogRatios<Real> log_ratio = ratios_of<Real>(input);
  IRLFAST_FOR_BLOCKS(group, groups.count) {
    const Members members = members_of(groups, input.rows, group);
    if (members.begin == members.end) continue;
    const Weighing w = weigh(input, log_ratio, members);
    for (int64_t i = members.begin + threadIdx.x; i < members.end; i += blockDim.x) {
      const int64_t row = members.row(i);
      static_cast<Real*>(output.weights)[row] = Real(w.weight(log_ratio(row)));
    }
    if (threadIdx.x != 0) continue;
    static_cast<Real*>(output.log_normalizer)[group] = Real(w.reshape.log_normalizer);
    static_cast<Real*>(output.ess)[group] = Real(w.ess());
  }
}

// With g_k the gradient to weight k, through ess = 1 / sum w^2 too, s the shares and h that to log Z, the softmax gives
// b_k = temper w_k (g_k - sum_j w_j g_j), 0 where the clip holds; then b_k + (h - sum_j b_j) s_k.
template <typename Real>
__global__ void __launch_bounds__(kOneGroupThreads, 1)
    importance_backward(ImportanceInput input, GroupLists groups, const void* grad_weights,
                        const void* grad_log_normalizer, const void* grad_ess, void* gradient) {
  const LogRatios<Real> log_ratio = ratios_of<Real>(input);
  Real* out = static_cast<Real*>(gradient);
  IRLFAST_FOR_BLOCKS(group, groups.count) {
    const Members members = members_of(groups, input.rows, group);
    if (members.begin == members.end) continue;
    const Weighing w = weigh(input, log_ratio, members);
    if (w.empty) {
      // A group of impossible samples has no gradient, whatever comes from above.
      for (int64_t i = members.begin + threadIdx.x; i < members.end; i += blockDim.x) out[members.row(i)] = Real(0);
      continue;
    }
    double to_squares = 0;
    if (grad_ess != nullptr) {
      to_squares = -2 * double(static_cast<const Real*>(grad_ess)[group]) * w.ess() * w.ess();
    }
    const auto to_weight = [&](int64_t row, double weight) {
      const double own = grad_weights == nullptr ? 0.0 : double(static_cast<const Real*>(grad_weights)[row]);
      return own + to_squares * weight;
    };
    double sum = 0;
    for (int64_t i = members.begin + threadIdx.x; i < members.end; i += blockDim.x) {
      const int64_t row = members.row(i);
      const double weight = w.weight(log_ratio(row));
      sum += weight * to_weight(row, weight);
    }
    const double mean = block_sum(sum);
    const double temper = input.reshapes() ? input.temper : 1.0;
    const auto to_relative = [&](int64_t row, double x) {
      const double weight = w.weight(x);
      return w.reshape.holds(x) ? 0.0 : temper * weight * (to_weight(row, weight) - mean);
    };
    sum = 0;
    for (int64_t i = members.begin + threadIdx.x; i < members.end; i += blockDim.x) {
      const int64_t row = members.row(i);
      sum += to_relative(row, log_ratio(row));
    }
    double to_normalizer = -block_sum(sum);
    if (grad_log_normalizer != nullptr) {
      to_normalizer += double(static_cast<const Real*>(grad_log_normalizer)[group]);
    }
    for (int64_t i = members.begin + threadIdx.x; i < members.end; i += blockDim.x) {
      const int64_t row = members.row(i);
      const double x = log_ratio(row);
      out[row] = Real(to_relative(row, x) + to_normalizer * w.share(x));
    }
  }
}

}  // namespace

void importance_weights_forward(const ImportanceInput& input, const GroupLists& groups, const ImportanceOutput& output,
                                const Queue& queue) {
  const auto kernel = input.dtype == DType::kFloat64 ? importance_forward<double> : importance_forward<float>;
  const unsigned threads = groups.order == nullptr ? kOneGroupThreads : kGroupThreads;
  launch(kernel, blocks_for(groups.count, threads, false, queue.device), threads, queue, input, groups, output);
}

void importance_weights_backward(const ImportanceInput& input, const GroupLists& groups, const void* grad_weights,
                                 const void* grad_log_normalizer, const void* grad_ess, void* gradient,
                                 const Queue& queue) {
  const auto kernel = input.dtype == DType::kFloat64 ? importance_backward<double> : importance_backward<float>;
  const unsigned threads = groups.order == nullptr ? kOneGroupThreads : kGroupThreads;
  launch(kernel, blocks_for(groups.count, threads, false, queue.device), threads, queue, input, groups, grad_weights,
         grad_log_normalizer, grad_ess, gradient);
}

}  // namespace irlfast::cuda
