// Divergence between two models' rows of logits over the whole vocabulary, and its gradients; formulas in
// irlfast/ops/token_kl.py. One block a row at a time, as in token_stats.cu. Forward reads both rows once; for
// Jensen-Shannon, whose mixture needs both normalisers, once more. Backward reads both once and writes what is wanted.
//
// p and q are the policy and the reference for KL(policy || reference) and for Jensen-Shannon, and change places for
// KL(reference || policy), which is the same divergence of the other row.
#include <utility>

#include "common/logits.cuh"
#include "irlfast/online_divergence.h"

namespace irlfast::cuda {
namespace {

struct Pair {
  const void *p = nullptr, *q = nullptr;
  RowLayout p_layout, q_layout;
  int64_t vocab = 0;
  double weight = 0, temperature = 1, softcap = 0;  // weight: of p in the mixture
  const void* row_temperature = nullptr;
};

// What a logit lies below the maximum of its row, as far as that is known.
template <typename Real>
IRLFAST_DEVICE Real below_maximum(Real logit, Real max) {
  return logit - (max == minus_infinity<Real>() ? Real(0) : max);
}

// Finite where p has nothing. Where both logits are -inf the difference is NaN; one that is among them is in `others`.
template <typename Real>
IRLFAST_DEVICE Real difference(Real p_below, Real q_below) {
  const Real d = p_below - q_below;
  return d > lowest<Real>() ? d : lowest<Real>();
}

// Adds logits to a thread's summary; of the two sums of differences p_over_q alone.
template <typename Real, int kCount>
IRLFAST_DEVICE void add_pair(OnlineDivergence<Real>& s, const Real (&x)[kCount], const Real (&y)[kCount], Real scale,
                             Real inverse_temperature) {
  Real p_top = x[0], q_top = y[0];
#pragma unroll
  for (int k = 1; k < kCount; ++k) {
    p_top = larger(p_top, x[k]);
    q_top = larger(q_top, y[k]);
  }
  // The argmax is none of the others.
  int p_argmax = -1, q_argmax = -1;
  if (p_top > s.p.max || q_top > s.q.max) {
    const Real p_max = larger(s.p.max, p_top), q_max = larger(s.q.max, q_top);
    online_divergence_rebase(s, Real(1) + s.p.others, Real(1) + s.q.others, p_max, q_max, inverse_temperature);
#pragma unroll
    for (int k = kCount - 1; k >= 0; --k) {
      p_argmax = p_max > s.p.max && x[k] == p_max ? k : p_argmax;
      q_argmax = q_max > s.q.max && y[k] == q_max ? k : q_argmax;
    }
    if (p_max > s.p.max) online_softmax_raise(s.p, p_max, inverse_temperature);
    if (q_max > s.q.max) online_softmax_raise(s.q, q_max, inverse_temperature);
  }
  Real p_others = 0, q_others = 0, sum = 0;
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    const Real p_below = below_maximum(x[k], s.p.max), q_below = below_maximum(y[k], s.q.max);
    const Real e = exponential(p_below, scale);
    p_others += k == p_argmax ? Real(0) : e;
    q_others += k == q_argmax ? Real(0) : exponential(q_below, scale);
    sum = fma(e, difference(p_below, q_below), sum);
  }
  s.p.others += p_others;
  s.q.others += q_others;
  s.p_over_q += sum * inverse_temperature;
}

// Of both rows, as far as the forward pass has come.
template <typename Real>
struct Normalisers {
  Real p_max, q_max, p_share, q_share;  // p_share: of p's argmax, 1 / sum exp(x)

  IRLFAST_DEVICE explicit Normalisers(const OnlineSoftmax<Real>& p, const OnlineSoftmax<Real>& q)
      : p_max(p.max), q_max(q.max), p_share(Real(1) / (Real(1) + p.others)), q_share(Real(1) / (Real(1) + q.others)) {}
};

// log(p / M) and log(q / M) of M = w p + (1 - w) q, finite where a probability is 0: as log(1 + (1 - w) g) and
// log(1 - w g) with g = (p - q) / M. Errors of g, made where p and q nearly agree, show to second order alone.
template <typename Real>
struct MixtureLogs {
  Real of_p, of_q;

  IRLFAST_DEVICE MixtureLogs(Real p, Real q, Real weight) {
    const Real mixture = larger(weight * p + (Real(1) - weight) * q, std::numeric_limits<Real>::min());
    const Real g = (p - q) / mixture;
    of_p = log1p(above_minus_one((Real(1) - weight) * g));
    of_q = log1p(above_minus_one(-weight * g));
  }

 private:
  // Beyond it the probability is 0. A NaN stays one.
  static IRLFAST_DEVICE Real above_minus_one(Real u) {
    const Real least = std::numeric_limits<Real>::epsilon() / 2 - Real(1);
    return u < least ? least : u;
  }
};

// visit(columns' pack width, place group, count, column) for packs and for single elements of two rows.
template <typename T, typename Visit>
IRLFAST_DEVICE void for_both(const Split& split, const Visit& visit) {
  constexpr int kWidth = kPackWidth<T>;
  for_places(split.packs, [&](unsigned i) {
    visit(std::integral_constant<int, kWidth>{}, i, split.packs,
          [&](int place) { return split.head + place * kWidth; });
  });
  for_places(split.singles, [&](unsigned i) {
    visit(std::integral_constant<int, 1>{}, i, split.singles, [&](int place) { return split.single<kWidth>(place); });
  });
}

template <typename T, bool kMixed>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks<T> / 2)
    token_kl_forward(Pair pair, void* result, double* state) {
  using Real = RealOf<T>;
  const int64_t rows = pair.p_layout.rows();
  const int vocab = int(pair.vocab);
  const Real softcap = Real(pair.softcap), weight = Real(pair.weight);
  IRLFAST_FOR_BLOCKS(row, rows) {
    const T* p_row = row_of<T>(pair.p, pair.p_layout, row);
    const T* q_row = row_of<T>(pair.q, pair.q_layout, row);
    const Real temperature = temperature_of<Real>(pair.row_temperature, pair.temperature, row);
    const Real scale = exponent_scale(temperature), inverse_temperature = Real(1) / temperature;
    const Split split = split_row<T>(p_row, vocab, aligned_alike(p_row, q_row));
    OnlineDivergence<Real> s = online_divergence_empty<Real>();
    for_both<T>(split, [&](auto width, unsigned i, int count, const auto& column) {
      Real x[kLoadsInFlight * width.value], y[kLoadsInFlight * width.value];
      load_capped<T, width.value>(p_row, i, count, column, softcap, x);
      load_capped<T, width.value>(q_row, i, count, column, softcap, y);
      add_pair(s, x, y, scale, inverse_temperature);
    });
    s = block_reduce(s, online_divergence_empty<Real>(),
                     [&](const OnlineDivergence<Real>& a, const OnlineDivergence<Real>& b) {
                       return online_divergence_merge(a, b, inverse_temperature);
                     });

    Real divergence, of_p, of_q = 0;
    if constexpr (kMixed) {
      const Normalisers<Real> n(s.p, s.q);
      of_p = 0;
      for_both<T>(split, [&](auto width, unsigned i, int count, const auto& column) {
        Real x[kLoadsInFlight * width.value], y[kLoadsInFlight * width.value];
        load_capped<T, width.value>(p_row, i, count, column, softcap, x);
        load_capped<T, width.value>(q_row, i, count, column, softcap, y);
        Real p_sum = 0, q_sum = 0;
#pragma unroll
        for (int k = 0; k < kLoadsInFlight * width.value; ++k) {
          const Real p = exponential(below_maximum(x[k], n.p_max), scale) * n.p_share;
          const Real q = exponential(below_maximum(y[k], n.q_max), scale) * n.q_share;
          const MixtureLogs<Real> logs(p, q, weight);
          p_sum = fma(p, logs.of_p, p_sum);
          q_sum = fma(q, logs.of_q, q_sum);
        }
        of_p += p_sum;
        of_q += q_sum;
      });
      of_p = block_sum(of_p);
      of_q = block_sum(of_q);
      const Real defined = online_softmax_log_sum(s.p) + online_softmax_log_sum(s.q);
      divergence = weight * of_p + (Real(1) - weight) * of_q + (defined - defined);
    } else {
      divergence = of_p = online_divergence_kl(s.p, s.q, s.p_over_q);
    }
    if (threadIdx.x != 0) continue;
    static_cast<Real*>(result)[row] = divergence;
    const double kept[kTokenKlState] = {s.p.max, s.p.others, s.q.max, s.q.others, of_p, of_q};
#pragma unroll
    for (int k = 0; k < kTokenKlState; ++k) state[k * rows + row] = kept[k];
  }
}

struct PairGradient {
  TokenKlGradient p, q;
};

// The factors of a row's gradients, by p_v and q_v:
//   KL               p_v (ratio (l - r) + constant), with l and r below their maxima;  constant q_v - ratio p_v
//   Jensen-Shannon   w p_v (log(p_v / M_v) - KL(p || M)); of q with the weights exchanged
template <typename Real>
struct Factors {
  Real p_ratio, p_constant, q_ratio, q_constant;
};

template <typename T, bool kMixed>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks<T> / 2)
    token_kl_backward(Pair pair, const double* state, const void* upstream, PairGradient result) {
  using Real = RealOf<T>;
  const int64_t rows = pair.p_layout.rows();
  const int vocab = int(pair.vocab);
  const Real softcap = Real(pair.softcap), weight = Real(pair.weight);
  IRLFAST_FOR_BLOCKS(row, rows) {
    T* p_out = result.p.data == nullptr ? nullptr : row_of<T>(result.p.data, result.p.layout, row);
    T* q_out = result.q.data == nullptr ? nullptr : row_of<T>(result.q.data, result.q.layout, row);
    const Real g = static_cast<const Real*>(upstream)[row];
    const Real of_p = Real(state[4 * rows + row]), of_q = Real(state[5 * rows + row]);
    if (g == Real(0) || (!kMixed && std::fabs(of_p) == -minus_infinity<Real>())) {
      if (p_out != nullptr) clear_row(p_out, vocab);
      if (q_out != nullptr) clear_row(q_out, vocab);
      continue;
    }
    const OnlineSoftmax<Real> p_state{Real(state[row]), Real(state[rows + row]), Real(0)};
    const OnlineSoftmax<Real> q_state{Real(state[2 * rows + row]), Real(state[3 * rows + row]), Real(0)};
    const Normalisers<Real> n(p_state, q_state);
    const Real temperature = temperature_of<Real>(pair.row_temperature, pair.temperature, row);
    const Real scale = exponent_scale(temperature), by_logit = g / temperature;
    const Real log_ratio = online_softmax_log_sum(p_state) - online_softmax_log_sum(q_state);
    const Real defined = log_ratio - log_ratio;  // else NaN
    Factors<Real> factors;
    if constexpr (kMixed) {
      factors.p_ratio = by_logit * weight;
      factors.q_ratio = by_logit * (Real(1) - weight);
      factors.p_constant = defined - factors.p_ratio * of_p;
      factors.q_constant = defined - factors.q_ratio * of_q;
    } else {
      factors.p_ratio = by_logit / temperature;
      factors.q_ratio = by_logit;
      factors.p_constant = defined - by_logit * (log_ratio + of_p);
      factors.q_constant = defined + by_logit;
    }

    const T* p_row = row_of<T>(pair.p, pair.p_layout, row);
    const T* q_row = row_of<T>(pair.q, pair.q_layout, row);
    const bool together = aligned_alike(p_row, q_row) && (p_out == nullptr || aligned_alike(p_row, p_out)) &&
                          (q_out == nullptr || aligned_alike(p_row, q_out));
    for_both<T>(split_row<T>(p_row, vocab, together), [&](auto width, unsigned i, int count, const auto& column) {
      constexpr int kWidth = width.value;
      Pack<T, kWidth> p_pack[kLoadsInFlight], q_pack[kLoadsInFlight];
#pragma unroll
      for (int u = 0; u < kLoadsInFlight; ++u) {
        const unsigned place = i + u * blockDim.x;
        if (place >= unsigned(count)) continue;
        p_pack[u] = *reinterpret_cast<const Pack<T, kWidth>*>(p_row + column(int(place)));
        q_pack[u] = *reinterpret_cast<const Pack<T, kWidth>*>(q_row + column(int(place)));
      }
#pragma unroll
      for (int u = 0; u < kLoadsInFlight; ++u) {
        const unsigned place = i + u * blockDim.x;
        if (place >= unsigned(count)) continue;
        Real p_value[kWidth], q_value[kWidth];
#pragma unroll
        for (int e = 0; e < kWidth; ++e) {
          const Real l = to_real(p_pack[u].at[e]), r = to_real(q_pack[u].at[e]);
          const Real p_below = below_maximum(capped(l, softcap), n.p_max);
          const Real q_below = below_maximum(capped(r, softcap), n.q_max);
          const Real p = exponential(p_below, scale) * n.p_share, q = exponential(q_below, scale) * n.q_share;
          if constexpr (kMixed) {
            const MixtureLogs<Real> logs(p, q, weight);
            p_value[e] = p * fma(factors.p_ratio, logs.of_p, factors.p_constant);
            q_value[e] = q * fma(factors.q_ratio, logs.of_q, factors.q_constant);
          } else {
            p_value[e] = p * fma(factors.p_ratio, difference(p_below, q_below), factors.p_constant);
            q_value[e] = factors.q_constant * q - factors.q_ratio * p;
          }
          if (softcap != Real(0)) {
            p_value[e] *= softcap_slope(l, softcap);
            q_value[e] *= softcap_slope(r, softcap);
          }
        }
        if (p_out != nullptr) store<T, kWidth>(p_out + column(int(place)), p_value);
        if (q_out != nullptr) store<T, kWidth>(q_out + column(int(place)), q_value);
      }
    });
  }
}

Pair pair_of(const TokenKlInput& input) {
  check_vocabulary(input.vocab);
  Pair pair{input.logits, input.ref_logits,  input.layout,  input.ref_layout,     input.vocab,
            input.weight, input.temperature, input.softcap, input.row_temperature};
  if (input.kind == Divergence::kForward) {
    std::swap(pair.p, pair.q);
    std::swap(pair.p_layout, pair.q_layout);
  }
  return pair;
}

template <typename T>
void forward(const TokenKlInput& input, void* kl, double* state, const Queue& queue) {
  const unsigned threads = threads_for_row(input.vocab * int64_t(sizeof(T)));
  const int64_t blocks = blocks_for(input.layout.rows(), threads, threads < kRowThreads, queue.device);
  const bool mixed = input.kind == Divergence::kJensenShannon;
  launch(mixed ? token_kl_forward<T, true> : token_kl_forward<T, false>, blocks, threads, queue, pair_of(input), kl,
         state);
}

template <typename T>
void backward(const TokenKlInput& input, const double* state, const void* upstream, const PairGradient& gradient,
              const Queue& queue) {
  const unsigned threads = threads_for_row(input.vocab * int64_t(sizeof(T)));
  const int64_t blocks = blocks_for(input.layout.rows(), threads, threads < kRowThreads, queue.device);
  const bool mixed = input.kind == Divergence::kJensenShannon;
  launch(mixed ? token_kl_backward<T, true> : token_kl_backward<T, false>, blocks, threads, queue, pair_of(input),
         state, upstream, gradient);
}

}  // namespace

void token_kl_forward(const TokenKlInput& input, void* kl, double* state, const Queue& queue) {
  switch (input.dtype) {
    case DType::kFloat32:
      return forward<float>(input, kl, state, queue);
    case DType::kFloat64:
      return forward<double>(input, kl, state, queue);
    case DType::kBFloat16:
      return forward<BFloat16>(input, kl, state, queue);
    case DType::kFloat16:
      return forward<Float16>(input, kl, state, queue);
  }
}

void token_kl_backward(const TokenKlInput& input, const double* state, const void* upstream,
                       const TokenKlGradient& gradient, const TokenKlGradient& ref_gradient, const Queue& queue) {
  PairGradient gradients{gradient, ref_gradient};
  if (input.kind == Divergence::kForward) std::swap(gradients.p, gradients.q);
  switch (input.dtype) {
    case DType::kFloat32:
      return backward<float>(input, state, upstream, gradients, queue);
    case DType::kFloat64:
      return backward<double>(input, state, upstream, gradients, queue);
    case DType::kBFloat16:
      return backward<BFloat16>(input, state, upstream, gradients, queue);
    case DType::kFloat16:
      return backward<Float16>(input, state, upstream, gradients, queue);
  }
}

}  // namespace irlfast::cuda
