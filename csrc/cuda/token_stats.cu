// Log-prob of given labels, entropy and log-sum-exp of rows of logits, and their gradient; formulas in
// irlfast/ops/token_stats.py. One block a row at a time: forward reads each logit once, backward reads it once and
// writes it once. Each thread keeps a summary of its own, so the loop over the row has no barrier; they are merged at
// its end.
#include <type_traits>

#include "common/logits.cuh"

namespace irlfast::cuda {
namespace {

// Adds logits to a thread's summary. The sums of each call are made apart: they are short, so their errors are small.
template <bool kWeighted, typename Real, int kCount>
IRLFAST_DEVICE void add_logits(OnlineSoftmax<Real>& s, Real (&x)[kCount], Real scale, Real inverse_temperature) {
  Real top = x[0];
#pragma unroll
  for (int k = 1; k < kCount; ++k) top = larger(top, x[k]);
  if (top > s.max) {
    online_softmax_raise(s, top, inverse_temperature);
    // The argmax is none of the others.
    bool struck = false;
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const bool here = !struck && x[k] == top;
      x[k] = here ? minus_infinity<Real>() : x[k];
      struck |= here;
    }
  }
  const Real offset = s.max == minus_infinity<Real>() ? Real(0) : s.max;
  Real others[2] = {0, 0}, weighted[2] = {0, 0};
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    const Real below = x[k] - offset;
    const Real e = exponential(below, scale);
    others[k % 2] += e;
    if (kWeighted) weighted[k % 2] = fma(e, larger(below, lowest<Real>()), weighted[k % 2]);
  }
  s.others += others[0] + others[1];
  if (kWeighted) s.weighted += (weighted[0] + weighted[1]) * inverse_temperature;
}

struct Labels {
  bool kept = false, outside = false;  // of the row's labels any
};

// The same for every thread of the block.
IRLFAST_DEVICE Labels look_at_labels(const TokenStatsInput& input, const int64_t* labels) {
  Labels found;
  for (int64_t k = input.labels_per_row == 1 ? 0 : threadIdx.x; k < input.labels_per_row; k += blockDim.x) {
    const int64_t label = labels[k];
    found.kept |= label != input.ignore_index;
    found.outside |= label != input.ignore_index && (label < 0 || label >= input.vocab);
  }
  if (input.labels_per_row != 1) {
    found.kept = __syncthreads_or(found.kept);
    found.outside = __syncthreads_or(found.outside);
  }
  return found;
}

template <bool kWeighted, typename T, typename Real>
IRLFAST_DEVICE OnlineSoftmax<Real> summarise_row(const T* row, int vocab, Real temperature, Real softcap) {
  const Real scale = exponent_scale(temperature), inverse_temperature = Real(1) / temperature;
  constexpr int kWidth = kPackWidth<T>;
  const Split split = split_row<T>(row, vocab, true);
  OnlineSoftmax<Real> s = online_softmax_empty<Real>();
  for_places(split.packs, [&](unsigned i) {
    Real x[kLoadsInFlight * kWidth];
    load_capped<T, kWidth>(row, i, split.packs, [&](int place) { return split.head + place * kWidth; }, softcap, x);
    add_logits<kWeighted>(s, x, scale, inverse_temperature);
  });
  for_places(split.singles, [&](unsigned i) {
    Real x[kLoadsInFlight];
    load_capped<T, 1>(row, i, split.singles, [&](int place) { return split.single<kWidth>(place); }, softcap, x);
    add_logits<kWeighted>(s, x, scale, inverse_temperature);
  });
  return block_reduce(s, online_softmax_empty<Real>(), [&](const OnlineSoftmax<Real>& a, const OnlineSoftmax<Real>& b) {
    return online_softmax_merge(a, b, inverse_temperature);
  });
}

template <typename T, bool kWeighted>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks<T>)
    token_stats_forward(TokenStatsInput input, TokenStatsOutput output) {
  using Real = RealOf<T>;
  const int64_t rows = input.layout.rows();
  const Real softcap = Real(input.softcap);
  IRLFAST_FOR_BLOCKS(row, rows) {
    const T* logits = row_of<T>(input.logits, input.layout, row);
    const int64_t* labels = input.labels + row * input.labels_per_row;
    const Labels found = look_at_labels(input, labels);
    const Real temperature = temperature_of<Real>(input.row_temperature, input.temperature, row);
    OnlineSoftmax<Real> s = online_softmax_empty<Real>();
    if (found.kept) s = summarise_row<kWeighted>(logits, int(input.vocab), temperature, softcap);

    const Real log_sum = online_softmax_log_sum(s);
    Real* logprobs = static_cast<Real*>(output.logprob) + row * input.labels_per_row;
    for (int64_t k = threadIdx.x; k < input.labels_per_row; k += blockDim.x) {
      const int64_t label = labels[k];
      Real logprob = 0;
      if (label != input.ignore_index) {
        const bool inside = label >= 0 && label < input.vocab;
        const Real logit = inside ? capped(to_real(logits[label]), softcap) : not_a_number<Real>();
        // The maximum is taken from the logit before the logarithm is: both are exact, their sum would not be.
        logprob = (logit - s.max) / temperature - log_sum;
      }
      logprobs[k] = logprob;
    }
    if (threadIdx.x != 0) continue;
    const Real max = found.outside ? not_a_number<Real>() : found.kept ? s.max : Real(0);
    const Real entropy = (max - max) + (kWeighted && found.kept ? online_softmax_entropy(s) : Real(0));
    if (output.entropy != nullptr) static_cast<Real*>(output.entropy)[row] = entropy;
    if (output.lse != nullptr) {
      static_cast<Real*>(output.lse)[row] = found.kept ? max / temperature + log_sum : Real(0);
    }
    if (output.state != nullptr) {
      Real* state = static_cast<Real*>(output.state);
      state[row] = max;
      state[rows + row] = s.others;
      state[2 * rows + row] = entropy;
    }
  }
}

// What a row's gradient takes besides its logits:
//   dz_v = p_v (u - g + h (lse - H) - h z_v) + g [v = y], with z_v = max / T + x_v: the maximum cancels out of lse -
//   z_v.
template <typename Real>
struct RowGradient {
  Real max, log_sum, temperature, softcap, scale;
  Real total, h, constant;        // of the labels' g; of the entropy; u + h (lse - H)
  Real row_constant, row_linear;  // of p_v without its normaliser, by l_v - max

  IRLFAST_DEVICE Real of_logit(Real logit) const {
    const Real below = capped(logit, softcap) - max;
    const Real e = exponential(below, scale);
    return e * fma(row_linear, larger(below, lowest<Real>()), row_constant) * softcap_slope(logit, softcap);
  }

  // `upstream`: what this label's log-prob receives of the total.
  IRLFAST_DEVICE Real of_label(Real logit, Real upstream) const {
    const Real x = (capped(logit, softcap) - max) / temperature;
    const Real logprob = x - log_sum;
    const Real p = exp(logprob);
    const Real spread = p == Real(0) ? Real(0) : p * (constant - (total - upstream) - h * x);
    // g (1 - p) by expm1: for a confident token 1 - p is below float32's spacing at 1.
    return (spread - upstream * std::expm1(logprob)) / temperature * softcap_slope(logit, softcap);
  }
};

// Packs, or single elements, of a row: all loads of a thread before its first store, which may go to the same place.
template <typename T, int kWidth, typename Column>
IRLFAST_DEVICE void differentiate_places(const T* from, T* to, unsigned i, int count, const Column& column,
                                         const RowGradient<RealOf<T>>& gradient) {
  using Real = RealOf<T>;
  Pack<T, kWidth> pack[kLoadsInFlight];
#pragma unroll
  for (int u = 0; u < kLoadsInFlight; ++u) {
    const unsigned place = i + u * blockDim.x;
    if (place < unsigned(count)) pack[u] = *reinterpret_cast<const Pack<T, kWidth>*>(from + column(int(place)));
  }
#pragma unroll
  for (int u = 0; u < kLoadsInFlight; ++u) {
    const unsigned place = i + u * blockDim.x;
    if (place >= unsigned(count)) continue;
    Real value[kWidth];
#pragma unroll
    for (int e = 0; e < kWidth; ++e) value[e] = gradient.of_logit(to_real(pack[u].at[e]));
    store<T, kWidth>(to + column(int(place)), value);
  }
}

template <typename T>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks<T> - 1)
    token_stats_backward(TokenStatsInput input, const void* saved, TokenStatsUpstream upstream,
                         TokenStatsGradient result) {
  using Real = RealOf<T>;
  constexpr int kWidth = kPackWidth<T>;
  const int64_t rows = input.layout.rows(), per_row = input.labels_per_row;
  const int vocab = int(input.vocab);
  const Real* state = static_cast<const Real*>(saved);
  IRLFAST_FOR_BLOCKS(row, rows) {
    const T* logits = row_of<T>(input.logits, input.layout, row);
    T* out = row_of<T>(result.data, result.layout, row);
    const int64_t* labels = input.labels + row * per_row;
    const auto received = [&](int64_t k) {
      if (upstream.logprob == nullptr || labels[k] == input.ignore_index) return Real(0);
      return static_cast<const Real*>(upstream.logprob)[row * per_row + k];
    };
    RowGradient<Real> gradient;
    gradient.h = upstream.entropy == nullptr ? Real(0) : static_cast<const Real*>(upstream.entropy)[row];
    const Real u = upstream.lse == nullptr ? Real(0) : static_cast<const Real*>(upstream.lse)[row];
    bool wanted = gradient.h != Real(0) || u != Real(0);
    if (per_row == 1) {
      gradient.total = received(0);
      wanted |= gradient.total != Real(0);
    } else {
      Real own = 0;
      bool any = false;
      for (int64_t k = threadIdx.x; k < per_row; k += blockDim.x) {
        own += received(k);
        any |= received(k) != Real(0);
      }
      gradient.total = block_sum(own);
      wanted |= __syncthreads_or(any) != 0;
    }
    if (!wanted || !look_at_labels(input, labels).kept) {
      clear_row(out, vocab);
      continue;
    }

    gradient.temperature = temperature_of<Real>(input.row_temperature, input.temperature, row);
    gradient.softcap = Real(input.softcap);
    gradient.scale = exponent_scale(gradient.temperature);
    gradient.max = state[row];
    const Real others = state[rows + row], entropy = state[2 * rows + row];
    gradient.log_sum = online_softmax_log_sum(OnlineSoftmax<Real>{gradient.max, others, Real(0)});
    gradient.constant = u + gradient.h * (gradient.log_sum - (upstream.entropy == nullptr ? Real(0) : entropy));
    const Real to_logits = Real(1) / ((Real(1) + others) * gradient.temperature);
    gradient.row_constant = (gradient.constant - gradient.total) * to_logits + (gradient.max - gradient.max);
    gradient.row_linear = -gradient.h * to_logits / gradient.temperature;

    // The labels' own gradients: their logits are read before any is overwritten, and written after all else is. One
    // that is repeated in its row receives all that its repeats do.
    __shared__ Real of_label[kMaxLabels];
    for (int64_t k = threadIdx.x; k < per_row; k += blockDim.x) {
      if (labels[k] < 0 || labels[k] >= vocab) continue;
      Real here = 0;
      for (int64_t other = 0; other < per_row; ++other) here += labels[other] == labels[k] ? received(other) : Real(0);
      of_label[k] = gradient.of_label(to_real(logits[labels[k]]), here);
    }
    __syncthreads();
    const Split split = split_row<T>(logits, vocab, aligned_alike(logits, out));
    for_places(split.packs, [&](unsigned i) {
      const auto column = [&](int place) { return split.head + place * kWidth; };
      differentiate_places<T, kWidth>(logits, out, i, split.packs, column, gradient);
    });
    for_places(split.singles, [&](unsigned i) {
      const auto column = [&](int place) { return split.single<kWidth>(place); };
      differentiate_places<T, 1>(logits, out, i, split.singles, column, gradient);
    });
    __syncthreads();
    for (int64_t k = threadIdx.x; k < per_row; k += blockDim.x) {
      if (labels[k] == input.ignore_index || labels[k] < 0 || labels[k] >= vocab) continue;
      out[labels[k]] = rounded<T>(of_label[k]);
    }
  }
}

unsigned threads_for(const TokenStatsInput& input) {
  check_vocabulary(input.vocab);
  if (input.labels_per_row > kMaxLabels) {
    throw std::runtime_error("the CUDA kernels take at most " + std::to_string(kMaxLabels) + " labels a row, not " +
                             std::to_string(input.labels_per_row));
  }
  return threads_for_row(input.vocab * dtype_size(input.dtype));
}

template <typename T>
void forward(const TokenStatsInput& input, const TokenStatsOutput& output, const Queue& queue) {
  const unsigned threads = threads_for(input);
  const int64_t blocks = blocks_for(input.layout.rows(), threads, threads < kRowThreads, queue.device);
  const bool weighted = output.entropy != nullptr;
  launch(weighted ? token_stats_forward<T, true> : token_stats_forward<T, false>, blocks, threads, queue, input,
         output);
}

template <typename T>
void backward(const TokenStatsInput& input, const void* state, const TokenStatsUpstream& upstream,
              const TokenStatsGradient& gradient, const Queue& queue) {
  const unsigned threads = threads_for(input);
  const int64_t blocks = blocks_for(input.layout.rows(), threads, threads < kRowThreads, queue.device);
  launch(token_stats_backward<T>, blocks, threads, queue, input, state, upstream, gradient);
}

}  // namespace

void token_stats_forward(const TokenStatsInput& input, const TokenStatsOutput& output, const Queue& queue) {
  switch (input.dtype) {
    case DType::kFloat32:
      return forward<float>(input, output, queue);
    case DType::kFloat64:
      return forward<double>(input, output, queue);
    case DType::kBFloat16:
      return forward<BFloat16>(input, output, queue);
    case DType::kFloat16:
      return forward<Float16>(input, output, queue);
  }
}

void token_stats_backward(const TokenStatsInput& input, const void* state, const TokenStatsUpstream& upstream,
                          const TokenStatsGradient& gradient, const Queue& queue) {
  switch (input.dtype) {
    case DType::kFloat32:
      return backward<float>(input, state, upstream, gradient, queue);
    case DType::kFloat64:
      return backward<double>(input, state, upstream, gradient, queue);
    case DType::kBFloat16:
      return backward<BFloat16>(input, state, upstream, gradient, queue);
    case DType::kFloat16:
      return backward<Float16>(input, state, upstream, gradient, queue);
  }
}

}  // namespace irlfast::cuda
