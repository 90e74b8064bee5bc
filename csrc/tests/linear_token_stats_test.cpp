// The chunked kernels against plain loops in long double: logits arrive some columns at a time, rows by their numbers,
// and gradients leave in the logits' type or as bfloat16. Every chunk is an allocation of its own of exactly the size
// used.
#include "irlfast/linear_token_stats.h"

#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "irlfast/isa.h"
#include "support.h"
#include "tests.h"

namespace {

using irlfast::Isa;

Expectations expect;

struct Case {
  DType dtype, result;
  Isa isa;
  int64_t vocab, chunk, gap;  // `gap` elements between one row and the next
  double softcap;
  bool row_temperature, masked;
  int threads;

  std::string name() const {
    return "linear " + std::string(irlfast::isa_name(isa)) + " dtype " + std::to_string(int(dtype)) + " to " +
           std::to_string(int(result)) + " vocab " + std::to_string(vocab) + " chunk " + std::to_string(chunk) +
           " gap " + std::to_string(gap) + " softcap " + std::to_string(softcap) +
           (row_temperature ? " row-temperature" : "") + (masked ? " masked" : "") + " threads " +
           std::to_string(threads);
  }
};

constexpr int64_t kRows = 5;
constexpr int64_t kNoDistribution = 3;  // where masked, this row's logits are all -inf

// Some columns of the logits, rows `gap` elements apart.
struct Chunk {
  int64_t first, columns, stride;
  Buffer logits;
};

int64_t extent(int64_t rows, int64_t columns, int64_t stride) {
  return (rows - 1) * stride + columns;
}

void run(const Case& c, std::mt19937& random) {
  const bool wide = c.dtype == DType::kFloat64;
  const DType statistic = wide ? DType::kFloat64 : DType::kFloat32;
  const int64_t bytes = irlfast::dtype_size(c.dtype), wide_bytes = irlfast::dtype_size(statistic);
  std::normal_distribution<float> normal(0, 3);

  std::vector<Chunk> chunks;
  std::vector<std::vector<long double>> values(kRows);
  for (int64_t first = 0; first < c.vocab; first += c.chunk) {
    const int64_t columns = std::min(c.chunk, c.vocab - first), stride = columns + c.gap;
    Chunk chunk{first, columns, stride, Buffer(extent(kRows, columns, stride) * bytes)};
    for (int64_t r = 0; r < kRows; ++r) {
      for (int64_t v = 0; v < columns; ++v) {
        // The whole first piece, and every third after it.
        const bool out = c.masked && (first + v < c.vocab - 1 && (first + v < 2048 || (first + v) % 3 == 0));
        const float value = out || (c.masked && r == kNoDistribution) ? -INFINITY : normal(random);
        write(chunk.logits.as<void>(), c.dtype, r * stride + v, value);
        values[size_t(r)].push_back(read(chunk.logits.as<void>(), c.dtype, r * stride + v));
      }
    }
    chunks.push_back(std::move(chunk));
  }

  Buffer labels(kRows * 8), temperature(kRows * wide_bytes);
  for (int64_t r = 0; r < kRows; ++r) {
    // The last column, the first, and others.
    labels.as<int64_t>()[r] = r == 0 ? c.vocab - 1 : r == 1 ? 0 : int64_t(random() % uint64_t(c.vocab));
    write(temperature.as<void>(), statistic, r, 0.5f + 0.25f * float(r % 4));
  }

  const auto input_of = [&](const Chunk& chunk) {
    irlfast::TokenStatsInput input;
    input.logits = chunk.logits.as<void>();
    input.dtype = c.dtype;
    input.layout = {1, kRows, 0, chunk.stride};
    input.vocab = chunk.columns;
    input.labels = labels.as<int64_t>();
    input.ignore_index = INT64_MIN;
    input.temperature = 0.75;
    input.row_temperature = c.row_temperature ? temperature.as<void>() : nullptr;
    input.softcap = c.softcap;
    input.first_column = chunk.first;
    return input;
  };

  Buffer max(kRows * 8), others(kRows * 8), weighted(kRows * 8), label_logit(kRows * 8);
  for (int64_t r = 0; r < kRows; ++r) {
    max.as<double>()[r] = -INFINITY;
    for (const Buffer* sum : {&others, &weighted, &label_logit}) sum->as<double>()[r] = 0;
  }
  const irlfast::RunningStats running{max.as<double>(), others.as<double>(), weighted.as<double>(),
                                      label_logit.as<double>()};
  for (const Chunk& chunk : chunks) {
    irlfast::linear_token_stats_merge(input_of(chunk), true, running, c.threads, c.isa);
  }

  const long double tolerance = wide ? 1e-13L : 3e-6L;
  const long double rounding = c.result == DType::kBFloat16 ? 0x1p-8L : c.result == DType::kFloat16 ? 0x1p-11L : 0;
  std::vector<Exact> exact;
  std::vector<long double> scale;
  for (int64_t r = 0; r < kRows; ++r) {
    const std::string name = c.name() + " row " + std::to_string(r);
    scale.push_back(c.row_temperature ? read(temperature.as<void>(), statistic, r) : 0.75L);
    exact.push_back(exact_row(values[size_t(r)], c.softcap, scale.back()));
    const Exact& e = exact.back();
    const long double mass = 1 + running.others[r], top = running.max[r] / scale.back();
    if (c.masked && c.softcap == 0 && r == kNoDistribution) {
      expect(running.max[r] == -INFINITY, name + ": no maximum");
      continue;
    }
    expect(close(top + std::log(mass), e.lse, tolerance), name + ": lse");
    expect(close(std::log(mass) - running.weighted[r] / mass, e.entropy, tolerance), name + ": entropy");
    const int64_t label = labels.as<int64_t>()[r];
    expect(close(running.label_logit[r] / scale.back(), e.z[size_t(label)], tolerance), name + ": label's logit");
  }

  // exp((l - max) / T) dl / dlogit of each chunk, 0 at the label: in place where the type allows, as the sweep does.
  const int64_t result_bytes = irlfast::dtype_size(c.result);
  for (const Chunk& chunk : chunks) {
    Buffer result(extent(kRows, chunk.columns, chunk.stride) * result_bytes);
    irlfast::linear_token_stats_exponentials(
        input_of(chunk), running.max, {result.as<void>(), c.result, {1, kRows, 0, chunk.stride}}, c.threads, c.isa);
    for (int64_t r = 0; r < kRows; ++r) {
      const Exact& e = exact[size_t(r)];
      const bool none = running.max[r] == -INFINITY;
      for (int64_t v = 0; v < chunk.columns; ++v) {
        const int64_t column = chunk.first + v;
        const long double z = e.z[size_t(column)] - running.max[r] / scale[size_t(r)];
        const bool label = column == labels.as<int64_t>()[r];
        const long double truth = none || label ? 0 : std::exp(z) * e.slope[size_t(column)] * scale[size_t(r)];
        const long double ours = read(result.as<void>(), c.result, r * chunk.stride + v);
        if ((label && ours != 0) || !close(ours, truth, tolerance * 4 + rounding)) {
          expect(false, c.name() + " row " + std::to_string(r) + ": exponential " + std::to_string(column));
          break;
        }
      }
    }
  }

  // Of the numbered rows alone, in an order of their own, their statistics and upstream gradients in that order.
  const std::vector<int64_t> numbers{4, 0, 2, 1};
  const int64_t count = int64_t(numbers.size());
  Buffer numbered(count * 8), state(3 * count * wide_bytes), chosen_labels(count * 8);
  Buffer chosen_temperature(count * wide_bytes), g(count * wide_bytes), h(count * wide_bytes), u(count * wide_bytes);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t r = numbers[size_t(i)];
    numbered.as<int64_t>()[i] = r;
    chosen_labels.as<int64_t>()[i] = labels.as<int64_t>()[r];
    write(chosen_temperature.as<void>(), statistic, i, 0.5f + 0.25f * float(r % 4));
    const long double three[3] = {(long double)(running.max[r]), (long double)(running.others[r]),
                                  exact[size_t(r)].entropy};
    for (int64_t j = 0; j < 3; ++j) {
      if (wide) {
        state.as<double>()[j * count + i] = double(three[j]);
      } else {
        state.as<float>()[j * count + i] = float(three[j]);
      }
    }
    // The third has no gradient, and has to come out as zeros.
    for (const Buffer* upstream : {&g, &h, &u}) {
      write(upstream->as<void>(), statistic, i, i == 2 ? 0.0f : normal(random));
    }
  }
  for (const Chunk& chunk : chunks) {
    irlfast::TokenStatsInput input = input_of(chunk);
    input.labels = chosen_labels.as<int64_t>();
    input.row_temperature = c.row_temperature ? chosen_temperature.as<void>() : nullptr;
    input.row_numbers = numbered.as<int64_t>();
    input.numbered_rows = count;
    Buffer gradient(extent(count, chunk.columns, chunk.columns + 2) * result_bytes);
    irlfast::token_stats_backward(input, state.as<void>(), {g.as<void>(), h.as<void>(), u.as<void>()},
                                  {gradient.as<void>(), c.result, {1, count, 0, chunk.columns + 2}}, c.threads, c.isa);
    for (int64_t i = 0; i < count; ++i) {
      const Exact& e = exact[size_t(numbers[size_t(i)])];
      const long double gi = read(g.as<void>(), statistic, i), hi = read(h.as<void>(), statistic, i),
                        ui = read(u.as<void>(), statistic, i);
      for (int64_t v = 0; v < chunk.columns; ++v) {
        const int64_t column = chunk.first + v;
        const long double z = e.z[size_t(column)], p = std::exp(z - e.lse);
        long double d = p == 0 ? 0 : p * (ui - gi + hi * (e.lse - e.entropy) - hi * z);
        if (column == chosen_labels.as<int64_t>()[i]) d += gi;
        d *= e.slope[size_t(column)];
        const long double ours = read(gradient.as<void>(), c.result, i * (chunk.columns + 2) + v);
        if (!close(ours, d, tolerance * 4 + rounding) || (i == 2 && ours != 0)) {
          expect(false, c.name() + " numbered row " + std::to_string(i) + ": gradient " + std::to_string(column) +
                            " = " + std::to_string(double(ours)) + ", expected " + std::to_string(double(d)));
          break;
        }
      }
    }
  }
}

// Whatever the chunks, the running statistics have the same bits; so do they for any number of threads.
void test_chunks_do_not_show(Isa isa, std::mt19937& random) {
  const int64_t vocab = 9001, rows = 7;
  Buffer logits(rows * vocab * 4);
  std::normal_distribution<float> normal(0, 3);
  for (int64_t i = 0; i < rows * vocab; ++i) logits.as<float>()[i] = normal(random);
  const std::vector<int64_t> labels{0, 2047, 2048, 4096, 9000, 5000, 1};
  std::vector<std::vector<double>> results;
  for (const int64_t chunk : {2048, 4096, 6144, 10240}) {
    std::vector<double> running(4 * rows, 0.0);
    for (int64_t r = 0; r < rows; ++r) running[size_t(r)] = -INFINITY;
    for (int64_t first = 0; first < vocab; first += chunk) {
      irlfast::TokenStatsInput input;
      input.logits = logits.as<float>() + first;
      input.layout = {1, rows, 0, vocab};
      input.vocab = std::min(chunk, vocab - first);
      input.labels = labels.data();
      input.ignore_index = INT64_MIN;
      input.first_column = first;
      double* at = running.data();
      irlfast::linear_token_stats_merge(input, true, {at, at + rows, at + 2 * rows, at + 3 * rows},
                                        chunk == 4096 ? 3 : 1, isa);
    }
    results.push_back(running);
  }
  for (const auto& running : results) {
    expect(running == results[0], std::string(irlfast::isa_name(isa)) + ": chunks show in the statistics");
  }
}

}  // namespace

int linear_token_stats_failures(int& cases) {
  std::mt19937 random(20241124);
  for (Isa isa : irlfast::built_isas()) {
    if (!irlfast::isa_runs_here(isa)) continue;
    for (int dtype = 0; dtype < irlfast::kDTypes; ++dtype) {
      // Around a vector, a chunk, and a chunk of two pieces.
      for (int64_t vocab : {1, 5, 33, 2047, 2048, 2049, 4096, 5003}) {
        for (int variant = 0; variant < 6; ++variant) {
          Case c{DType(dtype), DType(dtype), isa, vocab, 2048, 0, 0.0, false, false, 1};
          c.chunk = variant & 1 ? 4096 : 2048;
          c.gap = variant & 1 ? 3 : 0;
          c.softcap = variant & 2 ? 8.0 : 0.0;
          c.row_temperature = variant & 2;
          c.masked = variant == 1 || variant == 4;
          c.threads = variant == 5 ? 3 : 1;
          run(c, random);
          ++cases;
          if (c.dtype != DType::kFloat32) continue;
          c.result = DType::kBFloat16;
          run(c, random);
          ++cases;
        }
      }
    }
    test_chunks_do_not_show(isa, random);
    ++cases;
  }
  return expect.failures();
}
