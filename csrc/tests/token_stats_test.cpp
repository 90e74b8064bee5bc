// Runs the CPU kernels without Python, on ragged sizes, layouts, types and instruction sets, against plain loops in
// long double. Every buffer is an allocation of its own of exactly the size used, so that a sanitizer sees the first
// element read or written outside it.
#include "irlfast/token_stats.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "irlfast/cuda.h"
#include "irlfast/huge_pages.h"
#include "irlfast/isa.h"
#include "irlfast/online_softmax.h"
#include "support.h"
#include "tests.h"

namespace {

using irlfast::DType;
using irlfast::Isa;

Expectations expect;

struct Case {
  DType dtype;
  Isa isa;
  int64_t outer, inner, vocab, gap;  // `gap` elements between one row and the next
  int64_t labels_per_row;
  double softcap;
  bool row_temperature, masked, inplace;
  int threads;
  bool cuda = false;  // the CUDA kernels, emulated, in place of an instruction set's

  std::string name() const {
    return std::string(cuda ? "cuda" : irlfast::isa_name(isa)) + " dtype " + std::to_string(int(dtype)) + " rows " +
           std::to_string(outer) + "x" + std::to_string(inner) + " vocab " + std::to_string(vocab) + " gap " +
           std::to_string(gap) + " labels " + std::to_string(labels_per_row) + " softcap " + std::to_string(softcap) +
           (row_temperature ? " row-temperature" : "") + (masked ? " masked" : "") + (inplace ? " inplace" : "") +
           " threads " + std::to_string(threads);
  }
};

void run(const Case& c, std::mt19937& random) {
  const bool wide = c.dtype == DType::kFloat64;
  const int64_t bytes = irlfast::dtype_size(c.dtype), wide_bytes = wide ? 8 : 4;
  const DType statistic = wide ? DType::kFloat64 : DType::kFloat32;
  const int64_t rows = c.outer * c.inner, k = c.labels_per_row;
  const int64_t inner_stride = c.vocab + c.gap, outer_stride = c.inner * inner_stride + c.gap;
  const irlfast::RowLayout layout{c.outer, c.inner, outer_stride, inner_stride};
  // Nothing after the last row's last logit.
  const int64_t extent = layout.offset(rows - 1) + c.vocab;

  Buffer logits(extent * bytes), labels(rows * k * 8), temperature(rows * wide_bytes);
  std::normal_distribution<float> normal(0, 3);
  for (int64_t i = 0; i < extent; ++i) write(logits.as<void>(), c.dtype, i, normal(random));
  std::vector<std::vector<long double>> values;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t at = layout.offset(r);
    for (int64_t v = 0; c.masked && v + 1 < c.vocab; v += v < 1100 ? 1 : 3) {
      write(logits.as<void>(), c.dtype, at + v, -INFINITY);
    }
    std::vector<long double> row;
    for (int64_t v = 0; v < c.vocab; ++v) row.push_back(read(logits.as<void>(), c.dtype, at + v));
    values.push_back(row);
    for (int64_t j = 0; j < k; ++j) {
      // The last column, a random one, and repeats; the second row is ignored.
      const int64_t label = j % 3 == 0 ? c.vocab - 1 : int64_t(random() % uint64_t(c.vocab));
      labels.as<int64_t>()[r * k + j] = r == 1 ? -100 : label;
    }
    write(temperature.as<void>(), statistic, r, 0.5f + 0.25f * float(r % 4));
  }

  irlfast::TokenStatsInput input;
  input.logits = logits.as<void>();
  input.dtype = c.dtype;
  input.layout = layout;
  input.vocab = c.vocab;
  input.labels = labels.as<int64_t>();
  input.labels_per_row = k;
  input.temperature = 0.75;
  input.row_temperature = c.row_temperature ? temperature.as<void>() : nullptr;
  input.softcap = c.softcap;
  expect(irlfast::first_invalid_label(input.labels, rows * k, c.vocab, -100) == -1, c.name() + ": labels are valid");

  Buffer logprob(rows * k * wide_bytes), entropy(rows * wide_bytes), lse(rows * wide_bytes);
  Buffer state(3 * rows * wide_bytes);
  const irlfast::TokenStatsOutput output{logprob.as<void>(), entropy.as<void>(), lse.as<void>(), state.as<void>()};
  if (c.cuda) {
    irlfast::cuda::token_stats_forward(input, output, {});
  } else {
    irlfast::token_stats_forward(input, output, c.threads, c.isa);
  }

  Buffer g(rows * k * wide_bytes), h(rows * wide_bytes), u(rows * wide_bytes);
  for (int64_t i = 0; i < rows * k; ++i) write(g.as<void>(), statistic, i, normal(random));
  for (int64_t i = 0; i < rows; ++i) write(h.as<void>(), statistic, i, normal(random));
  for (int64_t i = 0; i < rows; ++i) write(u.as<void>(), statistic, i, normal(random));
  const irlfast::RowLayout packed{1, rows, 0, c.vocab};
  Buffer fresh(rows * c.vocab * bytes);
  void* gradient = c.inplace ? logits.as<void>() : fresh.as<void>();
  const irlfast::RowLayout& gradient_layout = c.inplace ? layout : packed;
  const irlfast::TokenStatsUpstream upstreams{g.as<void>(), h.as<void>(), u.as<void>()};
  const irlfast::TokenStatsGradient result{gradient, c.dtype, gradient_layout};
  if (c.cuda) {
    irlfast::cuda::token_stats_backward(input, state.as<void>(), upstreams, result, {});
  } else {
    irlfast::token_stats_backward(input, state.as<void>(), upstreams, result, c.threads, c.isa);
  }

  const long double tolerance = wide ? 1e-13L : 2e-6L;
  const long double rounding = c.dtype == DType::kBFloat16 ? 0x1p-8L : c.dtype == DType::kFloat16 ? 0x1p-11L : 0;
  for (int64_t r = 0; r < rows; ++r) {
    const long double t = c.row_temperature ? read(temperature.as<void>(), statistic, r) : 0.75L;
    const Exact exact = exact_row(values[size_t(r)], c.softcap, t);
    const bool ignored = r == 1;
    const std::string name = c.name() + " row " + std::to_string(r);
    expect(close(read(lse.as<void>(), statistic, r), ignored ? 0 : exact.lse, tolerance), name + ": lse");
    expect(close(read(entropy.as<void>(), statistic, r), ignored ? 0 : exact.entropy, tolerance), name + ": entropy");
    long double total = 0;
    std::vector<long double> received(size_t(c.vocab), 0);
    for (int64_t j = 0; j < k && !ignored; ++j) {
      const int64_t label = labels.as<int64_t>()[r * k + j];
      const long double upstream = read(g.as<void>(), statistic, r * k + j);
      received[size_t(label)] += upstream;
      total += upstream;
      expect(close(read(logprob.as<void>(), statistic, r * k + j), exact.z[size_t(label)] - exact.lse, tolerance),
             name + ": logprob");
    }
    const long double hr = read(h.as<void>(), statistic, r), ur = read(u.as<void>(), statistic, r);
    for (int64_t v = 0; v < c.vocab; ++v) {
      const long double z = exact.z[size_t(v)], p = std::exp(z - exact.lse);
      long double d = p == 0 ? 0 : p * (ur - total + hr * (exact.lse - exact.entropy) - hr * z);
      d = ignored ? 0 : (d + received[size_t(v)]) * exact.slope[size_t(v)];
      const long double ours = read(gradient, c.dtype, gradient_layout.offset(r) + v);
      if (!close(ours, d, tolerance * 4 + rounding)) {
        expect(false, name + ": gradient " + std::to_string(v) + " = " + std::to_string(double(ours)) + ", expected " +
                          std::to_string(double(d)));
        break;
      }
    }
  }
}

// Any split of a row gives its summary, ties and parts without a finite logit included.
void test_merge() {
  const std::vector<double> logits{1.5, -INFINITY, 3.0, 3.0, -2.0, -INFINITY, 0.25};
  const double inverse_temperature = 0.8;
  for (size_t cut = 0; cut <= logits.size(); ++cut) {
    irlfast::OnlineSoftmax<double> part[2];
    for (int half = 0; half < 2; ++half) {
      part[half] = irlfast::online_softmax_empty<double>();
      for (size_t i = half == 0 ? 0 : cut; i < (half == 0 ? cut : logits.size()); ++i) {
        part[half] = irlfast::online_softmax_merge(part[half], {logits[i], 0.0, 0.0}, inverse_temperature);
      }
    }
    const auto merged = irlfast::online_softmax_merge(part[0], part[1], inverse_temperature);
    std::vector<long double> row(logits.begin(), logits.end());
    const Exact exact = exact_row(row, 0, 1 / inverse_temperature);
    const long double lse = merged.max * inverse_temperature + irlfast::online_softmax_log_sum(merged);
    expect(close(lse, exact.lse, 1e-14L), "merge at " + std::to_string(cut) + ": lse");
    expect(close(irlfast::online_softmax_entropy(merged), exact.entropy, 1e-14L),
           "merge at " + std::to_string(cut) + ": entropy");
  }
  const auto nothing = irlfast::online_softmax_empty<double>();
  expect(std::isnan(irlfast::online_softmax_log_sum(irlfast::online_softmax_merge(nothing, nothing, 1.0))),
         "a row without a finite logit has no distribution");
}

void test_first_invalid_label() {
  const std::vector<int64_t> labels{0, -100, 4, 5, -1};
  expect(irlfast::first_invalid_label(labels.data(), 5, 5, -100) == 3, "label 5 of 5 is invalid");
  expect(irlfast::first_invalid_label(labels.data(), 5, 6, -100) == 4, "label -1 is invalid");
  expect(irlfast::first_invalid_label(labels.data(), 3, 5, -100) == -1, "0, ignored and 4 of 5 are valid");
}

void test_huge_pages() {
  Buffer buffer(5 << 20);
  for (int64_t offset : {0, 1, 4095}) irlfast::advise_huge_pages(buffer.as<char>() + offset, (5 << 20) - offset);
  irlfast::advise_huge_pages(buffer.as<char>(), 100);
  expect(buffer.as<unsigned char>()[(5 << 20) - 1] == 0xff, "advice leaves the contents alone");
}

}  // namespace

int main() {
  std::mt19937 random(20240611);
  test_merge();
  test_first_invalid_label();
  test_huge_pages();
  int cases = 0;
  for (Isa isa : irlfast::built_isas()) {
    if (!irlfast::isa_runs_here(isa)) {
      std::printf("%s: not supported by this machine, skipped\n", irlfast::isa_name(isa));
      continue;
    }
    for (int dtype = 0; dtype < irlfast::kDTypes; ++dtype) {
      // Around every vector and block length, and on both sides of a piece of 32768.
      for (int64_t vocab :
           {1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 129, 1000, 4093, 32768, 32769, 70001}) {
        const bool large = vocab > 5000;
        for (int variant = 0; variant < 8; ++variant) {
          if (large && variant % 3 != 0) continue;
          Case c{DType(dtype), isa, 2, large ? 1 : 3, vocab, 0, 1, 0.0, false, false, false, 1};
          c.gap = variant & 1 ? 5 : 0;
          c.labels_per_row = variant & 2 ? 4 : 1;
          c.row_temperature = variant & 2;
          c.softcap = variant & 4 ? 8.0 : 0.0;
          c.masked = variant == 1 || variant == 3;
          c.inplace = variant == 2 || variant == 3 || variant == 5;
          c.threads = variant == 6 || large ? 3 : 1;
          run(c, random);
          ++cases;
        }
      }
      // 32 MiB of gradient, written past the caches.
      const int64_t vocab = 131, rows = (int64_t(32) << 20) / irlfast::dtype_size(DType(dtype)) / vocab + 1;
      if (dtype == 0) run({DType(dtype), isa, 1, rows, vocab, 0, 1, 0.0, false, false, false, 2}, random);
    }
  }
  // Rows for one warp and for several, of fewer and of more than 16 bytes.
  for (int dtype = 0; irlfast::cuda::emulated() && dtype < irlfast::kDTypes; ++dtype) {
    for (int64_t vocab : {1, 3, 8, 17, 64, 131, 1000, 4093}) {
      for (int variant = 0; variant < 8; ++variant) {
        Case c{DType(dtype), Isa::kBaseline, 2, 3, vocab, variant & 1 ? 5 : 0, 1, 0.0, false, false, false, 1, true};
        c.labels_per_row = variant & 2 ? 4 : 1;
        c.row_temperature = variant & 2;
        c.softcap = variant & 4 ? 8.0 : 0.0;
        c.masked = variant == 1 || variant == 3;
        c.inplace = variant == 2 || variant == 3 || variant == 5;
        run(c, random);
        ++cases;
      }
    }
  }
  const int failures = expect.failures() + bf16_product_failures(cases) + linear_token_stats_failures(cases) +
                       pair_failures(cases) + segments_failures(cases);
  std::printf("%d cases, %d failures\n", cases, failures);
  return failures == 0 ? 0 : 1;
}
