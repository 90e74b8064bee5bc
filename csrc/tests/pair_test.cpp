// Divergences of two rows of logits, in one sweep and chunk by chunk, against plain loops in long double. Every buffer
// is an allocation of its own of exactly the size used, so that a sanitizer sees the first element read or written
// outside.
#include <cmath>
#include <cstdio>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "irlfast/cuda.h"
#include "irlfast/linear_policy_ref_stats.h"
#include "irlfast/online_divergence.h"
#include "irlfast/token_kl.h"
#include "tests.h"

namespace {

using irlfast::Divergence;
using irlfast::DType;
using irlfast::Isa;

int failures = 0;

void expect_close(long double ours, long double exact, long double tolerance, const std::string& what) {
  const bool same = ours == exact || (std::isnan(ours) && std::isnan(exact));
  if (same || std::fabs(ours - exact) <= tolerance * (1 + std::fabs(exact))) return;
  std::fprintf(stderr, "FAILED: %s is %.9Lg, expected %.9Lg\n", what.c_str(), ours, exact);
  ++failures;
}

// Rows of float or double, `gap` elements apart, in an allocation that ends with the last row.
template <typename T>
class Matrix {
 public:
  Matrix(int64_t rows, int64_t columns, int64_t gap)
      : stride(columns + gap), size_(rows * stride - gap), data_(new T[size_t(size_)]) {
    for (int64_t i = 0; i < size_; ++i) data_[size_t(i)] = T(NAN);
  }
  T& at(int64_t row, int64_t column) { return data_[size_t(row * stride + column)]; }
  T* data() { return data_.get(); }
  irlfast::RowLayout layout(int64_t rows) const { return {1, rows, 0, stride}; }

  int64_t stride;

 private:
  int64_t size_;
  std::unique_ptr<T[]> data_;
};

struct Exact {
  std::vector<long double> p, q, log_p, log_q, slope;
  long double lse = 0, ref_lse = 0, entropy = 0, reverse = 0, forward = 0, of_p = 0, of_q = 0;
};

std::vector<long double> log_softmax(std::vector<long double> z, long double& lse) {
  long double max = -INFINITY, sum = 0;
  for (long double x : z) max = std::max(max, x);
  for (long double x : z) sum += std::exp(x - max);
  lse = max + std::log(sum);
  for (long double& x : z) x -= lse;
  return z;
}

long double times_log(long double p, long double log_ratio) {
  return p == 0 ? 0 : p * log_ratio;
}

template <typename T>
Exact exact_row(Matrix<T>& logits, Matrix<T>& ref_logits, int64_t row, int64_t vocab, long double temperature,
                long double softcap, long double w) {
  Exact exact;
  std::vector<long double> z, r;
  for (int64_t v = 0; v < vocab; ++v) {
    for (const bool ref : {false, true}) {
      const long double l = ref ? ref_logits.at(row, v) : logits.at(row, v);
      const long double t = softcap != 0 ? std::tanh(l / softcap) : 0;
      (ref ? r : z).push_back((softcap != 0 ? softcap * t : l) / temperature);
      if (!ref) exact.slope.push_back((softcap != 0 ? 1 - t * t : 1) / temperature);
    }
  }
  exact.log_p = log_softmax(z, exact.lse);
  exact.log_q = log_softmax(r, exact.ref_lse);
  for (int64_t v = 0; v < vocab; ++v) {
    const long double a = exact.log_p[size_t(v)], b = exact.log_q[size_t(v)], p = std::exp(a), q = std::exp(b);
    const long double log_m = std::log(w * p + (1 - w) * q);
    exact.p.push_back(p);
    exact.q.push_back(q);
    exact.entropy -= times_log(p, a);
    exact.reverse += times_log(p, a - b);
    exact.forward += times_log(q, b - a);
    exact.of_p += times_log(p, a - log_m);
    exact.of_q += times_log(q, b - log_m);
  }
  return exact;
}

template <typename T>
void fill(Matrix<T>& logits, Matrix<T>& ref_logits, int64_t rows, int64_t vocab, bool masked, std::mt19937& random) {
  std::normal_distribution<float> normal(0, 3);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t v = 0; v < vocab; ++v) {
      const float shift = row == 2 ? 100.0f : 0.0f, value = normal(random);
      const bool hidden = masked && v % 3 != 0;
      logits.at(row, v) = hidden ? T(-INFINITY) : T(value + shift);
      ref_logits.at(row, v) = hidden ? T(-INFINITY) : T(value + normal(random) * 0.2f - shift);
    }
  }
}

std::string describe(const char* kernels, DType dtype, int64_t vocab, int variant) {
  return std::string(kernels) + " dtype " + std::to_string(int(dtype)) + " vocab " + std::to_string(vocab) +
         " variant " + std::to_string(variant);
}

// `cuda`: the CUDA kernels, emulated, in place of an instruction set's.
template <typename T>
void run_token_kl(Isa isa, bool cuda, DType dtype, int64_t vocab, int variant, std::mt19937& random) {
  const int64_t rows = 3;
  const long double tolerance = sizeof(T) == 8 ? 1e-12L : 3e-6L;
  for (int kind = 0; kind < irlfast::kDivergences; ++kind) {
    Matrix<T> logits(rows, vocab, variant & 1 ? 3 : 0), ref_logits(rows, vocab, variant & 1 ? 0 : 5);
    fill(logits, ref_logits, rows, vocab, variant & 2, random);
    irlfast::TokenKlInput input;
    input.logits = logits.data();
    input.ref_logits = ref_logits.data();
    input.dtype = dtype;
    input.layout = logits.layout(rows);
    input.ref_layout = ref_logits.layout(rows);
    input.vocab = vocab;
    input.kind = Divergence(kind);
    input.weight = 0.3;
    input.temperature = 0.75;
    input.softcap = variant & 4 ? 8.0 : 0.0;
    std::vector<Exact> exact;
    for (int64_t row = 0; row < rows; ++row) {
      exact.push_back(exact_row(logits, ref_logits, row, vocab, 0.75L, input.softcap, 0.3L));
    }
    Matrix<T> kl(1, rows, 0), upstream(1, rows, 0);
    Matrix<double> state(irlfast::kTokenKlState, rows, 0);
    for (int64_t row = 0; row < rows; ++row) upstream.at(0, row) = T(row == 1 ? 0.0 : 1.5 - double(row));
    const int threads = variant & 2 ? 3 : 1;
    if (cuda) {
      irlfast::cuda::token_kl_forward(input, kl.data(), state.data(), {});
    } else {
      irlfast::token_kl_forward(input, kl.data(), state.data(), threads, isa);
    }
    // The policy's gradient over its logits, or beside them.
    Matrix<T> fresh(rows, vocab, 0), ref_gradient(rows, vocab, 1);
    Matrix<T>& gradient = variant & 1 ? logits : fresh;
    const irlfast::TokenKlGradient of_p{gradient.data(), gradient.layout(rows)};
    const irlfast::TokenKlGradient of_q{ref_gradient.data(), ref_gradient.layout(rows)};
    if (cuda) {
      irlfast::cuda::token_kl_backward(input, state.data(), upstream.data(), of_p, of_q, {});
    } else {
      irlfast::token_kl_backward(input, state.data(), upstream.data(), of_p, of_q, threads, isa);
    }
    for (int64_t row = 0; row < rows; ++row) {
      const Exact& e = exact[size_t(row)];
      const std::string name = "token_kl " + describe(cuda ? "cuda" : irlfast::isa_name(isa), dtype, vocab, variant) +
                               " kind " + std::to_string(kind);
      const long double expected = kind == 0 ? e.reverse : kind == 1 ? e.forward : 0.3L * e.of_p + 0.7L * e.of_q;
      expect_close(kl.at(0, row), expected, tolerance, name);
      const long double g = upstream.at(0, row);
      for (int64_t v = 0; v < vocab; ++v) {
        const size_t i = size_t(v);
        const long double p = e.p[i], q = e.q[i], d = e.log_p[i] - e.log_q[i];
        const long double log_m = std::log(0.3L * p + 0.7L * q);
        long double of_p = p - q, of_q = q - p;
        if (kind == 0) of_p = times_log(p, d - e.reverse);
        if (kind == 1) of_q = times_log(q, -d - e.forward);
        if (kind == 2) {
          of_p = 0.3L * times_log(p, e.log_p[i] - log_m - e.of_p);
          of_q = 0.7L * times_log(q, e.log_q[i] - log_m - e.of_q);
        }
        if (g == 0) of_p = of_q = 0;
        expect_close(gradient.at(row, v), of_p == 0 ? 0 : g * of_p * e.slope[i], tolerance, name + " gradient");
        if (variant & 4) continue;  // the slope at hand is the policy's
        expect_close(ref_gradient.at(row, v), of_q == 0 ? 0 : g * of_q / 0.75L, tolerance, name + " ref_gradient");
      }
    }
  }
}

template <typename T>
void run_chunks(Isa isa, DType dtype, int64_t vocab, int variant, std::mt19937& random) {
  const int64_t rows = 3, chunk = irlfast::kChunkPiece * (variant & 1 ? 2 : 1);
  const long double tolerance = sizeof(T) == 8 ? 1e-12L : 3e-6L;
  const double softcap = variant & 4 ? 8.0 : 0.0;
  Matrix<T> logits(rows, vocab, 2), ref_logits(rows, vocab, 0), upstream(5, rows, 0);
  fill(logits, ref_logits, rows, vocab, variant & 2, random);
  const std::vector<int64_t> labels{0, vocab - 1, vocab / 2};
  std::vector<Exact> exact;
  for (int64_t row = 0; row < rows; ++row) {
    exact.push_back(exact_row(logits, ref_logits, row, vocab, 0.75L, softcap, 0.5L));
  }
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < 5 * rows; ++i) upstream.at(i / rows, i % rows) = T(normal(random));
  Matrix<double> running(irlfast::kPairRunning, rows, 0);
  for (int64_t i = 0; i < irlfast::kPairRunning * rows; ++i) running.data()[i] = 0;
  for (int64_t row = 0; row < rows; ++row) {
    running.at(irlfast::kPolicyMax, row) = running.at(irlfast::kRefMax, row) = -INFINITY;
  }
  const auto columns = [&](int64_t begin) {
    irlfast::PairChunk at;
    at.policy.logits = logits.data() + begin;
    at.policy.dtype = dtype;
    at.policy.layout = logits.layout(rows);
    at.policy.vocab = std::min(chunk, vocab - begin);
    at.policy.labels = labels.data();
    at.policy.ignore_index = INT64_MIN;
    at.policy.temperature = 0.75;
    at.policy.softcap = softcap;
    at.policy.first_column = begin;
    at.reference = at.policy;
    at.reference.logits = ref_logits.data() + begin;
    at.reference.layout = ref_logits.layout(rows);
    return at;
  };
  const int threads = variant & 2 ? 3 : 1;
  for (int64_t begin = 0; begin < vocab; begin += chunk) {
    irlfast::linear_policy_ref_stats_merge(columns(begin), running.data(), rows, threads, isa);
  }
  const auto received = [&](int64_t which) { return &upstream.at(which, 0); };
  const irlfast::PairUpstream all{received(0), received(1), received(2), received(3), received(4)};
  for (int64_t begin = 0; begin < vocab; begin += chunk) {
    irlfast::linear_policy_ref_stats_differentiate(columns(begin), running.data(), rows, all,
                                                   {logits.data() + begin, dtype, logits.layout(rows)}, threads, isa);
  }
  for (int64_t row = 0; row < rows; ++row) {
    const Exact& e = exact[size_t(row)];
    const std::string name = "chunks " + describe(irlfast::isa_name(isa), dtype, vocab, variant);
    const long double g = upstream.at(0, row), h = upstream.at(1, row), u = upstream.at(2, row);
    const long double r = upstream.at(3, row), f = upstream.at(4, row);
    for (int64_t v = 0; v < vocab; ++v) {
      const size_t i = size_t(v);
      const long double p = e.p[i], log_p = e.log_p[i];
      long double d = p == 0 ? 0 : p * (u - g - h * (log_p + e.entropy) + r * (log_p - e.log_q[i] - e.reverse) + f);
      d += (v == labels[size_t(row)] ? g : 0) - f * e.q[i];
      expect_close(logits.at(row, v), d == 0 ? 0 : d * e.slope[i], tolerance * 2, name + " gradient");
    }
  }
}

// Any split of a row gives its summary, parts without a finite logit included.
void test_merge() {
  const std::vector<double> l{1.5, -INFINITY, 3.0, 3.0, -2.0, -INFINITY, 0.25},
      r{0.5, -INFINITY, 2.0, 4.0, 4.0, 1.0, 1.0};
  const double inverse_temperature = 0.8;
  Matrix<double> logits(1, 7, 0), ref_logits(1, 7, 0);
  for (int64_t v = 0; v < 7; ++v) {
    logits.at(0, v) = l[size_t(v)];
    ref_logits.at(0, v) = r[size_t(v)];
  }
  const Exact exact = exact_row(logits, ref_logits, 0, 7, 1 / inverse_temperature, 0, 0.5L);
  for (size_t cut = 0; cut <= l.size(); ++cut) {
    irlfast::OnlineDivergence<double> part[2];
    for (size_t half = 0; half < 2; ++half) {
      part[half] = irlfast::online_divergence_empty<double>();
      for (size_t i = half == 0 ? 0 : cut; i < (half == 0 ? cut : l.size()); ++i) {
        // One token: differences from its own maxima are 0, or infinite where one side lacks it.
        const double q_over_p = l[i] == -INFINITY && r[i] != -INFINITY ? INFINITY : 0.0;
        part[half] = irlfast::online_divergence_merge(part[half], {{l[i], 0, 0}, {r[i], 0, 0}, 0.0, q_over_p},
                                                      inverse_temperature);
      }
    }
    const auto merged = irlfast::online_divergence_merge(part[0], part[1], inverse_temperature);
    const std::string name = "merge at " + std::to_string(cut);
    expect_close(irlfast::online_divergence_kl(merged.p, merged.q, merged.p_over_q), exact.reverse, 1e-14L, name);
    expect_close(irlfast::online_divergence_kl(merged.q, merged.p, merged.q_over_p), INFINITY, 0, name + " backwards");
  }
}

}  // namespace

int pair_failures(int& cases) {
  std::mt19937 random(20241124);
  test_merge();
  for (Isa isa : irlfast::built_isas()) {
    if (!irlfast::isa_runs_here(isa)) continue;
    // Around every block, both sides of a chunk's piece of 2048 and of a row's of 32768.
    for (int64_t vocab : {1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 1000, 2048, 2049, 4097, 32769}) {
      for (int variant = 0; variant < 8; ++variant) {
        if (vocab > 1000 && variant % 3 != 0) continue;
        if (vocab < 20000) {
          run_chunks<float>(isa, DType::kFloat32, vocab, variant, random);
          run_chunks<double>(isa, DType::kFloat64, vocab, variant, random);
        }
        run_token_kl<float>(isa, false, DType::kFloat32, vocab, variant, random);
        run_token_kl<double>(isa, false, DType::kFloat64, vocab, variant, random);
        cases += 4;
      }
    }
  }
  for (int64_t vocab : {1, 3, 17, 131, 1000, 4093}) {
    for (int variant = 0; irlfast::cuda::emulated() && variant < 8; ++variant) {
      run_token_kl<float>(Isa::kBaseline, true, DType::kFloat32, vocab, variant, random);
      run_token_kl<double>(Isa::kBaseline, true, DType::kFloat64, vocab, variant, random);
      cases += 2;
    }
  }
  return failures;
}
