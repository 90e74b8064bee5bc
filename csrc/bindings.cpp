// The Python module irlfast._native: the only file that includes pybind11.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "irlfast/bf16_product.h"
#include "irlfast/cuda.h"
#include "irlfast/dtype.h"
#include "irlfast/gae.h"
#include "irlfast/importance.h"
#include "irlfast/isa.h"
#include "irlfast/linear_policy_ref_stats.h"
#include "irlfast/linear_token_stats.h"
#include "irlfast/policy_terms.h"
#include "irlfast/sequence.h"
#include "irlfast/token_kl.h"
#include "irlfast/token_stats.h"
#include "irlfast/warm_memory.h"

namespace py = pybind11;

namespace {

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts;
  size_t begin = 0;
  while (begin < text.size()) {
    size_t end = text.find(',', begin);
    if (end == std::string::npos) end = text.size();
    parts.push_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return parts;
}

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

py::dict build_info() {
  py::list built, usable;
  for (irlfast::Isa isa : irlfast::built_isas()) {
    built.append(irlfast::isa_name(isa));
    if (irlfast::isa_runs_here(isa)) usable.append(irlfast::isa_name(isa));
  }
  py::dict info;
  info["version"] = IRLFAST_VERSION;
  info["compiler"] = compiler();
  info["isas_built"] = built;
  info["isas_usable"] = usable;
  info["isa"] = irlfast::isa_name(irlfast::best_isa());
  info["bf16_product"] = irlfast::bf16_product_available();
  info["cuda_built"] = bool(IRLFAST_CUDA_BUILT);
  info["cuda_emulated"] = irlfast::cuda::emulated();
  info["cuda_compiler"] = IRLFAST_CUDA_COMPILER;
  info["cuda_architectures"] = split(IRLFAST_CUDA_ARCHITECTURES);
  info["sanitizers"] = split(IRLFAST_SANITIZERS);
  return info;
}

irlfast::Isa parse_isa(const std::string& name) {
  if (name == "auto") return irlfast::best_isa();
  for (irlfast::Isa isa : irlfast::built_isas()) {
    if (name != irlfast::isa_name(isa)) continue;
    if (irlfast::isa_runs_here(isa)) return isa;
    throw std::invalid_argument("isa=\"" + name + "\" is built in, but this machine cannot run it; use \"auto\"");
  }
  throw std::invalid_argument("isa=\"" + name + "\" is not built in; build_info()[\"isas_usable\"] lists what is");
}

irlfast::DType parse_dtype(int dtype) {
  if (dtype < 0 || dtype >= irlfast::kDTypes) {
    throw std::invalid_argument("dtype code " + std::to_string(dtype) + " is unknown; the codes are DTYPES");
  }
  return static_cast<irlfast::DType>(dtype);
}

// (outer, inner, outer_stride, inner_stride)
using Layout = std::tuple<int64_t, int64_t, int64_t, int64_t>;

irlfast::RowLayout parse_layout(const Layout& layout, const char* name) {
  irlfast::RowLayout rows;
  std::tie(rows.outer, rows.inner, rows.outer_stride, rows.inner_stride) = layout;
  if (rows.outer < 0 || rows.inner < 0) {
    throw std::invalid_argument(std::string(name) + " has a negative number of rows");
  }
  return rows;
}

template <typename T>
T* pointer(uintptr_t address, const char* name) {
  if (address == 0) throw std::invalid_argument(std::string(name) + " is a null pointer");
  return reinterpret_cast<T*>(address);
}

irlfast::TokenStatsInput parse_input(uintptr_t logits, int dtype, const Layout& layout, int64_t vocab, uintptr_t labels,
                                     int64_t labels_per_row, int64_t ignore_index, double temperature,
                                     uintptr_t row_temperature, double softcap) {
  if (vocab < 1) throw std::invalid_argument("vocab = " + std::to_string(vocab) + " is below 1");
  if (labels_per_row < 0) throw std::invalid_argument("labels_per_row is negative");
  irlfast::TokenStatsInput input;
  input.dtype = parse_dtype(dtype);
  input.layout = parse_layout(layout, "layout");
  input.vocab = vocab;
  input.labels_per_row = labels_per_row;
  input.ignore_index = ignore_index;
  input.temperature = temperature;
  input.softcap = softcap;
  if (input.layout.rows() > 0) {
    input.logits = pointer<const void>(logits, "logits");
    if (labels_per_row > 0) input.labels = pointer<const int64_t>(labels, "labels");
    input.row_temperature = reinterpret_cast<const void*>(row_temperature);
  }
  return input;
}

irlfast::TokenStatsOutput parse_output(const irlfast::TokenStatsInput& input, uintptr_t logprob, uintptr_t entropy,
                                       uintptr_t lse, uintptr_t state) {
  irlfast::TokenStatsOutput output;
  if (input.labels_per_row > 0) output.logprob = pointer<void>(logprob, "logprob");
  output.entropy = reinterpret_cast<void*>(entropy);
  output.lse = reinterpret_cast<void*>(lse);
  output.state = reinterpret_cast<void*>(state);
  return output;
}

irlfast::TokenStatsUpstream parse_upstream(uintptr_t logprob, uintptr_t entropy, uintptr_t lse) {
  return {reinterpret_cast<const void*>(logprob), reinterpret_cast<const void*>(entropy),
          reinterpret_cast<const void*>(lse)};
}

irlfast::RowLayout parse_gradient_layout(const Layout& layout, int64_t rows) {
  const irlfast::RowLayout parsed = parse_layout(layout, "gradient_layout");
  if (parsed.rows() != rows) {
    throw std::invalid_argument("a gradient has " + std::to_string(parsed.rows()) + " rows, the logits " +
                                std::to_string(rows));
  }
  return parsed;
}

void token_stats_forward(uintptr_t logits, int dtype, const Layout& layout, int64_t vocab, uintptr_t labels,
                         int64_t labels_per_row, int64_t ignore_index, double temperature, uintptr_t row_temperature,
                         double softcap, uintptr_t logprob, uintptr_t entropy, uintptr_t lse, uintptr_t state,
                         int threads, const std::string& isa) {
  const irlfast::TokenStatsInput input = parse_input(logits, dtype, layout, vocab, labels, labels_per_row, ignore_index,
                                                     temperature, row_temperature, softcap);
  const irlfast::Isa selected = parse_isa(isa);
  if (input.layout.rows() == 0) return;
  const irlfast::TokenStatsOutput output = parse_output(input, logprob, entropy, lse, state);
  py::gil_scoped_release release;
  irlfast::token_stats_forward(input, output, threads, selected);
}

void token_stats_backward(uintptr_t logits, int dtype, const Layout& layout, int64_t vocab, uintptr_t labels,
                          int64_t labels_per_row, int64_t ignore_index, double temperature, uintptr_t row_temperature,
                          double softcap, uintptr_t state, uintptr_t grad_logprob, uintptr_t grad_entropy,
                          uintptr_t grad_lse, uintptr_t gradient, const Layout& gradient_layout, int threads,
                          const std::string& isa) {
  const irlfast::TokenStatsInput input = parse_input(logits, dtype, layout, vocab, labels, labels_per_row, ignore_index,
                                                     temperature, row_temperature, softcap);
  const irlfast::RowLayout gradient_rows = parse_gradient_layout(gradient_layout, input.layout.rows());
  const irlfast::Isa selected = parse_isa(isa);
  if (input.layout.rows() == 0) return;
  const void* saved = pointer<const void>(state, "state");
  void* result = pointer<void>(gradient, "gradient");
  const irlfast::TokenStatsUpstream upstream = parse_upstream(grad_logprob, grad_entropy, grad_lse);
  py::gil_scoped_release release;
  irlfast::token_stats_backward(input, saved, upstream, {result, input.dtype, gradient_rows}, threads, selected);
}

// A CUDA device and one of its streams.
irlfast::cuda::Queue parse_queue(int device, uintptr_t stream) {
  if (device < 0) throw std::invalid_argument("device = " + std::to_string(device) + " is negative");
  return {device, stream};
}

void cuda_token_stats_forward(uintptr_t logits, int dtype, const Layout& layout, int64_t vocab, uintptr_t labels,
                              int64_t labels_per_row, int64_t ignore_index, double temperature,
                              uintptr_t row_temperature, double softcap, uintptr_t logprob, uintptr_t entropy,
                              uintptr_t lse, uintptr_t state, int device, uintptr_t stream) {
  const irlfast::TokenStatsInput input = parse_input(logits, dtype, layout, vocab, labels, labels_per_row, ignore_index,
                                                     temperature, row_temperature, softcap);
  const irlfast::cuda::Queue queue = parse_queue(device, stream);
  if (input.layout.rows() == 0) return;
  const irlfast::TokenStatsOutput output = parse_output(input, logprob, entropy, lse, state);
  py::gil_scoped_release release;
  irlfast::cuda::token_stats_forward(input, output, queue);
}

void cuda_token_stats_backward(uintptr_t logits, int dtype, const Layout& layout, int64_t vocab, uintptr_t labels,
                               int64_t labels_per_row, int64_t ignore_index, double temperature,
                               uintptr_t row_temperature, double softcap, uintptr_t state, uintptr_t grad_logprob,
                               uintptr_t grad_entropy, uintptr_t grad_lse, uintptr_t gradient,
                               const Layout& gradient_layout, int device, uintptr_t stream) {
  const irlfast::TokenStatsInput input = parse_input(logits, dtype, layout, vocab, labels, labels_per_row, ignore_index,
                                                     temperature, row_temperature, softcap);
  const irlfast::cuda::Queue queue = parse_queue(device, stream);
  const irlfast::RowLayout gradient_rows = parse_gradient_layout(gradient_layout, input.layout.rows());
  if (input.layout.rows() == 0) return;
  const void* saved = pointer<const void>(state, "state");
  void* result = pointer<void>(gradient, "gradient");
  const irlfast::TokenStatsUpstream upstream = parse_upstream(grad_logprob, grad_entropy, grad_lse);
  py::gil_scoped_release release;
  irlfast::cuda::token_stats_backward(input, saved, upstream, {result, input.dtype, gradient_rows}, queue);
}

// The logits of some columns: `rows` rows, `stride` elements apart, one label each.
irlfast::TokenStatsInput parse_chunk(uintptr_t logits, int dtype, int64_t stride, int64_t rows, int64_t first_column,
                                     int64_t columns, uintptr_t labels, double temperature, uintptr_t row_temperature,
                                     double softcap) {
  if (first_column < 0 || first_column % irlfast::kChunkPiece != 0) {
    throw std::invalid_argument("first_column = " + std::to_string(first_column) + " is no multiple of " +
                                std::to_string(irlfast::kChunkPiece));
  }
  // No label is ignored here: whoever calls has left those rows out.
  irlfast::TokenStatsInput input = parse_input(logits, dtype, {1, rows, 0, stride}, columns, labels, 1, INT64_MIN,
                                               temperature, row_temperature, softcap);
  input.first_column = first_column;
  return input;
}

irlfast::TokenStatsGradient parse_chunk_gradient(const irlfast::TokenStatsInput& input, uintptr_t data, int dtype,
                                                 int64_t stride, int64_t rows) {
  irlfast::TokenStatsGradient gradient{pointer<void>(data, "the gradient"), parse_dtype(dtype), {1, rows, 0, stride}};
  const bool rounded = input.dtype == irlfast::DType::kFloat32 && gradient.dtype == irlfast::DType::kBFloat16;
  if (gradient.dtype != input.dtype && !rounded) {
    throw std::invalid_argument("the gradient has the logits' type, or bfloat16 for float32 logits");
  }
  return gradient;
}

void linear_token_stats_merge(uintptr_t logits, int dtype, int64_t stride, int64_t rows, int64_t first_column,
                              int64_t columns, uintptr_t labels, double temperature, uintptr_t row_temperature,
                              double softcap, uintptr_t running, int64_t running_stride, bool weighted, int threads,
                              const std::string& isa) {
  const irlfast::Isa selected = parse_isa(isa);
  if (rows == 0) return;
  const irlfast::TokenStatsInput input =
      parse_chunk(logits, dtype, stride, rows, first_column, columns, labels, temperature, row_temperature, softcap);
  double* state = pointer<double>(running, "running");
  py::gil_scoped_release release;
  irlfast::linear_token_stats_merge(
      input, weighted, {state, state + running_stride, state + 2 * running_stride, state + 3 * running_stride}, threads,
      selected);
}

void linear_token_stats_exponentials(uintptr_t logits, int dtype, int64_t stride, int64_t rows, int64_t first_column,
                                     int64_t columns, uintptr_t labels, double temperature, uintptr_t row_temperature,
                                     double softcap, uintptr_t max, uintptr_t result, int result_dtype,
                                     int64_t result_stride, int threads, const std::string& isa) {
  const irlfast::Isa selected = parse_isa(isa);
  if (rows == 0) return;
  const irlfast::TokenStatsInput input =
      parse_chunk(logits, dtype, stride, rows, first_column, columns, labels, temperature, row_temperature, softcap);
  const irlfast::TokenStatsGradient written = parse_chunk_gradient(input, result, result_dtype, result_stride, rows);
  const double* maxima = pointer<const double>(max, "max");
  py::gil_scoped_release release;
  irlfast::linear_token_stats_exponentials(input, maxima, written, threads, selected);
}

void linear_token_stats_differentiate(uintptr_t logits, int dtype, int64_t stride, int64_t rows, int64_t first_column,
                                      int64_t columns, uintptr_t labels, double temperature, uintptr_t row_temperature,
                                      double softcap, uintptr_t row_numbers, uintptr_t state, uintptr_t grad_logprob,
                                      uintptr_t grad_entropy, uintptr_t grad_lse, uintptr_t gradient,
                                      int gradient_dtype, int64_t gradient_stride, int threads,
                                      const std::string& isa) {
  const irlfast::Isa selected = parse_isa(isa);
  if (rows == 0) return;
  irlfast::TokenStatsInput input =
      parse_chunk(logits, dtype, stride, rows, first_column, columns, labels, temperature, row_temperature, softcap);
  if (row_numbers != 0) {
    input.row_numbers = reinterpret_cast<const int64_t*>(row_numbers);
    input.numbered_rows = rows;
    input.layout.inner = INT64_MAX;  // how many rows the numbers may refer to is not known here
  }
  const irlfast::TokenStatsGradient written =
      parse_chunk_gradient(input, gradient, gradient_dtype, gradient_stride, rows);
  const void* saved = pointer<const void>(state, "state");
  const irlfast::TokenStatsUpstream upstream = parse_upstream(grad_logprob, grad_entropy, grad_lse);
  py::gil_scoped_release release;
  irlfast::token_stats_backward(input, saved, upstream, written, threads, selected);
}

// A chunk of columns of two models: one type, rows, labels and temperatures, two addresses and strides.
irlfast::PairChunk parse_pair_chunk(uintptr_t logits, int64_t stride, uintptr_t ref_logits, int64_t ref_stride,
                                    int dtype, int64_t rows, int64_t first_column, int64_t columns, uintptr_t labels,
                                    double temperature, uintptr_t row_temperature, double softcap) {
  return {
      parse_chunk(logits, dtype, stride, rows, first_column, columns, labels, temperature, row_temperature, softcap),
      parse_chunk(ref_logits, dtype, ref_stride, rows, first_column, columns, labels, temperature, row_temperature,
                  softcap)};
}

void linear_policy_ref_stats_merge(uintptr_t logits, int64_t stride, uintptr_t ref_logits, int64_t ref_stride,
                                   int dtype, int64_t rows, int64_t first_column, int64_t columns, uintptr_t labels,
                                   double temperature, uintptr_t row_temperature, double softcap, uintptr_t running,
                                   int64_t running_stride, int threads, const std::string& isa) {
  const irlfast::Isa selected = parse_isa(isa);
  if (rows == 0) return;
  const irlfast::PairChunk chunk = parse_pair_chunk(logits, stride, ref_logits, ref_stride, dtype, rows, first_column,
                                                    columns, labels, temperature, row_temperature, softcap);
  double* state = pointer<double>(running, "running");
  py::gil_scoped_release release;
  irlfast::linear_policy_ref_stats_merge(chunk, state, running_stride, threads, selected);
}

void linear_policy_ref_stats_differentiate(uintptr_t logits, int64_t stride, uintptr_t ref_logits, int64_t ref_stride,
                                           int dtype, int64_t rows, int64_t first_column, int64_t columns,
                                           uintptr_t labels, double temperature, uintptr_t row_temperature,
                                           double softcap, uintptr_t running, int64_t running_stride,
                                           uintptr_t grad_logprob, uintptr_t grad_entropy, uintptr_t grad_lse,
                                           uintptr_t grad_reverse_kl, uintptr_t grad_forward_kl, uintptr_t gradient,
                                           int gradient_dtype, int64_t gradient_stride, int threads,
                                           const std::string& isa) {
  const irlfast::Isa selected = parse_isa(isa);
  if (rows == 0) return;
  const irlfast::PairChunk chunk = parse_pair_chunk(logits, stride, ref_logits, ref_stride, dtype, rows, first_column,
                                                    columns, labels, temperature, row_temperature, softcap);
  const irlfast::TokenStatsGradient written =
      parse_chunk_gradient(chunk.policy, gradient, gradient_dtype, gradient_stride, rows);
  const double* state = pointer<const double>(running, "running");
  const auto received = [](uintptr_t address) { return reinterpret_cast<const void*>(address); };
  const irlfast::PairUpstream upstream{received(grad_logprob), received(grad_entropy), received(grad_lse),
                                       received(grad_reverse_kl), received(grad_forward_kl)};
  py::gil_scoped_release release;
  irlfast::linear_policy_ref_stats_differentiate(chunk, state, running_stride, upstream, written, threads, selected);
}

irlfast::TokenKlInput parse_kl_input(uintptr_t logits, uintptr_t ref_logits, int dtype, const Layout& layout,
                                     const Layout& ref_layout, int64_t vocab, int kind, double weight,
                                     double temperature, uintptr_t row_temperature, double softcap) {
  if (vocab < 1) throw std::invalid_argument("vocab = " + std::to_string(vocab) + " is below 1");
  if (kind < 0 || kind >= irlfast::kDivergences) {
    throw std::invalid_argument("kind " + std::to_string(kind) + " is unknown; the kinds are DIVERGENCES");
  }
  irlfast::TokenKlInput input;
  input.dtype = parse_dtype(dtype);
  input.layout = parse_layout(layout, "layout");
  input.ref_layout = parse_layout(ref_layout, "ref_layout");
  if (input.layout.rows() != input.ref_layout.rows()) {
    throw std::invalid_argument("the reference has " + std::to_string(input.ref_layout.rows()) + " rows, the logits " +
                                std::to_string(input.layout.rows()));
  }
  input.vocab = vocab;
  input.kind = static_cast<irlfast::Divergence>(kind);
  input.weight = weight;
  input.temperature = temperature;
  input.softcap = softcap;
  if (input.layout.rows() > 0) {
    input.logits = pointer<const void>(logits, "logits");
    input.ref_logits = pointer<const void>(ref_logits, "ref_logits");
    input.row_temperature = reinterpret_cast<const void*>(row_temperature);
  }
  return input;
}

// Address 0 where it is not wanted.
irlfast::TokenKlGradient parse_kl_gradient(const irlfast::TokenKlInput& input, uintptr_t data, const Layout& layout) {
  if (data == 0) return {};
  return {reinterpret_cast<void*>(data), parse_gradient_layout(layout, input.layout.rows())};
}

void token_kl_forward(uintptr_t logits, uintptr_t ref_logits, int dtype, const Layout& layout, const Layout& ref_layout,
                      int64_t vocab, int kind, double weight, double temperature, uintptr_t row_temperature,
                      double softcap, uintptr_t kl, uintptr_t state, int threads, const std::string& isa) {
  const irlfast::TokenKlInput input = parse_kl_input(logits, ref_logits, dtype, layout, ref_layout, vocab, kind, weight,
                                                     temperature, row_temperature, softcap);
  const irlfast::Isa selected = parse_isa(isa);
  if (input.layout.rows() == 0) return;
  void* result = pointer<void>(kl, "kl");
  double* saved = pointer<double>(state, "state");
  py::gil_scoped_release release;
  irlfast::token_kl_forward(input, result, saved, threads, selected);
}

void token_kl_backward(uintptr_t logits, uintptr_t ref_logits, int dtype, const Layout& layout,
                       const Layout& ref_layout, int64_t vocab, int kind, double weight, double temperature,
                       uintptr_t row_temperature, double softcap, uintptr_t state, uintptr_t upstream,
                       uintptr_t gradient, const Layout& gradient_layout, uintptr_t ref_gradient,
                       const Layout& ref_gradient_layout, int threads, const std::string& isa) {
  const irlfast::TokenKlInput input = parse_kl_input(logits, ref_logits, dtype, layout, ref_layout, vocab, kind, weight,
                                                     temperature, row_temperature, softcap);
  const irlfast::Isa selected = parse_isa(isa);
  if (input.layout.rows() == 0) return;
  const double* saved = pointer<const double>(state, "state");
  const void* received = pointer<const void>(upstream, "upstream");
  const irlfast::TokenKlGradient result = parse_kl_gradient(input, gradient, gradient_layout);
  const irlfast::TokenKlGradient ref_result = parse_kl_gradient(input, ref_gradient, ref_gradient_layout);
  py::gil_scoped_release release;
  irlfast::token_kl_backward(input, saved, received, result, ref_result, threads, selected);
}

void cuda_token_kl_forward(uintptr_t logits, uintptr_t ref_logits, int dtype, const Layout& layout,
                           const Layout& ref_layout, int64_t vocab, int kind, double weight, double temperature,
                           uintptr_t row_temperature, double softcap, uintptr_t kl, uintptr_t state, int device,
                           uintptr_t stream) {
  const irlfast::TokenKlInput input = parse_kl_input(logits, ref_logits, dtype, layout, ref_layout, vocab, kind, weight,
                                                     temperature, row_temperature, softcap);
  const irlfast::cuda::Queue queue = parse_queue(device, stream);
  if (input.layout.rows() == 0) return;
  void* result = pointer<void>(kl, "kl");
  double* saved = pointer<double>(state, "state");
  py::gil_scoped_release release;
  irlfast::cuda::token_kl_forward(input, result, saved, queue);
}

void cuda_token_kl_backward(uintptr_t logits, uintptr_t ref_logits, int dtype, const Layout& layout,
                            const Layout& ref_layout, int64_t vocab, int kind, double weight, double temperature,
                            uintptr_t row_temperature, double softcap, uintptr_t state, uintptr_t upstream,
                            uintptr_t gradient, const Layout& gradient_layout, uintptr_t ref_gradient,
                            const Layout& ref_gradient_layout, int device, uintptr_t stream) {
  const irlfast::TokenKlInput input = parse_kl_input(logits, ref_logits, dtype, layout, ref_layout, vocab, kind, weight,
                                                     temperature, row_temperature, softcap);
  const irlfast::cuda::Queue queue = parse_queue(device, stream);
  if (input.layout.rows() == 0) return;
  const double* saved = pointer<const double>(state, "state");
  const void* received = pointer<const void>(upstream, "upstream");
  const irlfast::TokenKlGradient result = parse_kl_gradient(input, gradient, gradient_layout);
  const irlfast::TokenKlGradient ref_result = parse_kl_gradient(input, ref_gradient, ref_gradient_layout);
  py::gil_scoped_release release;
  irlfast::cuda::token_kl_backward(input, saved, received, result, ref_result, queue);
}

int64_t first_invalid_label(uintptr_t labels, int64_t count, int64_t vocab, int64_t ignore_index) {
  if (count <= 0) return -1;
  return irlfast::first_invalid_label(pointer<const int64_t>(labels, "labels"), count, vocab, ignore_index);
}

irlfast::Bf16Matrix parse_bf16_matrix(uintptr_t data, const std::tuple<int64_t, int64_t>& strides, bool empty,
                                      const char* name) {
  irlfast::Bf16Matrix matrix;
  std::tie(matrix.row_stride, matrix.column_stride) = strides;
  if (matrix.row_stride != 1 && matrix.column_stride != 1) {
    throw std::invalid_argument(std::string(name) + " has strides (" + std::to_string(matrix.row_stride) + ", " +
                                std::to_string(matrix.column_stride) + "), expected one of them to be 1");
  }
  if (!empty) matrix.data = pointer<const void>(data, name);
  return matrix;
}

void bf16_product(uintptr_t a, const std::tuple<int64_t, int64_t>& a_strides, uintptr_t b,
                  const std::tuple<int64_t, int64_t>& b_strides, uintptr_t out, int64_t out_stride, int out_dtype,
                  const std::tuple<int64_t, int64_t, int64_t>& shape, bool accumulate, int threads) {
  irlfast::Bf16Product product;
  std::tie(product.rows, product.columns, product.depth) = shape;
  if (product.rows < 0 || product.columns < 0 || product.depth < 0) {
    throw std::invalid_argument("shape has a negative extent");
  }
  const irlfast::DType dtype = parse_dtype(out_dtype);
  if (dtype != irlfast::DType::kFloat32 && dtype != irlfast::DType::kBFloat16) {
    throw std::invalid_argument("out_dtype code " + std::to_string(out_dtype) + " is neither float32 nor bfloat16");
  }
  if (!irlfast::bf16_product_available()) {
    throw std::runtime_error("bf16_product needs AVX512_BF16, in the compiler and in the processor");
  }
  if (product.rows == 0 || product.columns == 0) return;
  if (product.rows > 1 && out_stride < product.columns) {
    throw std::invalid_argument("out_stride = " + std::to_string(out_stride) + " is below the " +
                                std::to_string(product.columns) + " columns: rows of out overlap");
  }
  product.a = parse_bf16_matrix(a, a_strides, product.depth == 0, "a");
  product.b = parse_bf16_matrix(b, b_strides, product.depth == 0, "b");
  product.out = pointer<void>(out, "out");
  product.out_stride = out_stride;
  product.out_bf16 = dtype == irlfast::DType::kBFloat16;
  product.accumulate = accumulate;
  py::gil_scoped_release release;
  irlfast::bf16_product(product, threads);
}

std::unique_ptr<irlfast::WarmBlock> warm_block(int64_t bytes) {
  if (bytes < 1) throw std::invalid_argument("a block of " + std::to_string(bytes) + " bytes; expected at least 1");
  return std::make_unique<irlfast::WarmBlock>(bytes);
}

void set_warm_memory_limit(int64_t bytes) {
  if (bytes < 0) throw std::invalid_argument("a limit of " + std::to_string(bytes) + " bytes; expected at least 0");
  irlfast::set_warm_memory_limit(bytes);
}

// Sequences: offsets of address 0 mean rows of `width`.
irlfast::Segments parse_segments(int64_t count, int64_t width, uintptr_t offsets, bool wide_offsets) {
  if (count < 0 || width < 0) throw std::invalid_argument("a number of sequences, or their width, is negative");
  return {count, width, reinterpret_cast<const void*>(offsets), wide_offsets};
}

irlfast::TokenMask parse_mask(uintptr_t mask, int bytes, bool floating) {
  if (bytes != 1 && bytes != 2 && bytes != 4 && bytes != 8) {
    throw std::invalid_argument("mask elements have " + std::to_string(bytes) + " bytes, expected 1, 2, 4 or 8");
  }
  return {reinterpret_cast<const void*>(mask), bytes, floating};
}

irlfast::DType parse_statistic(int dtype) {
  const irlfast::DType parsed = parse_dtype(dtype);
  if (parsed != irlfast::DType::kFloat32 && parsed != irlfast::DType::kFloat64) {
    throw std::invalid_argument("dtype code " + std::to_string(dtype) + " is neither float32 nor float64");
  }
  return parsed;
}

int64_t first_invalid_offset(uintptr_t offsets, bool wide_offsets, int64_t count, int64_t tokens) {
  pointer<const void>(offsets, "offsets");
  return irlfast::first_invalid_offset(parse_segments(count, 0, offsets, wide_offsets), tokens);
}

void sequence_logprobs_forward(int64_t count, int64_t width, uintptr_t offsets, bool wide_offsets, uintptr_t logprobs,
                               int dtype, uintptr_t mask, int mask_bytes, bool mask_floating, bool mean,
                               uintptr_t result, int threads, const std::string& isa) {
  const irlfast::Segments segments = parse_segments(count, width, offsets, wide_offsets);
  const irlfast::TokenMask token_mask = parse_mask(mask, mask_bytes, mask_floating);
  const irlfast::DType type = parse_dtype(dtype);
  const irlfast::Isa selected = parse_isa(isa);
  if (count == 0) return;
  if (segments.tokens() > 0) pointer<const void>(logprobs, "logprobs");
  void* out = pointer<void>(result, "result");
  py::gil_scoped_release release;
  irlfast::sequence_logprobs_forward(segments, reinterpret_cast<const void*>(logprobs), type, token_mask, mean, out,
                                     threads, selected);
}

void sequence_logprobs_backward(int64_t count, int64_t width, uintptr_t offsets, bool wide_offsets, uintptr_t upstream,
                                int dtype, uintptr_t mask, int mask_bytes, bool mask_floating, bool mean,
                                uintptr_t gradient, int threads, const std::string& isa) {
  const irlfast::Segments segments = parse_segments(count, width, offsets, wide_offsets);
  const irlfast::TokenMask token_mask = parse_mask(mask, mask_bytes, mask_floating);
  const irlfast::DType type = parse_dtype(dtype);
  const irlfast::Isa selected = parse_isa(isa);
  if (count == 0) return;
  const void* given = pointer<const void>(upstream, "upstream");
  if (segments.tokens() > 0) pointer<void>(gradient, "gradient");
  py::gil_scoped_release release;
  irlfast::sequence_logprobs_backward(segments, given, type, token_mask, mean, reinterpret_cast<void*>(gradient),
                                      threads, selected);
}

// Where offsets lie on a device, the number of tokens is told, not read.
int64_t parse_tokens(int64_t tokens, uintptr_t data, const char* name) {
  if (tokens < 0) throw std::invalid_argument("tokens = " + std::to_string(tokens) + " is negative");
  if (tokens > 0) pointer<const void>(data, name);
  return tokens;
}

void cuda_sequence_logprobs_forward(int64_t count, int64_t width, uintptr_t offsets, bool wide_offsets, int64_t tokens,
                                    uintptr_t logprobs, int dtype, uintptr_t mask, int mask_bytes, bool mask_floating,
                                    bool mean, uintptr_t result, int device, uintptr_t stream) {
  const irlfast::Segments segments = parse_segments(count, width, offsets, wide_offsets);
  const irlfast::TokenMask token_mask = parse_mask(mask, mask_bytes, mask_floating);
  const irlfast::DType type = parse_dtype(dtype);
  const irlfast::cuda::Queue queue = parse_queue(device, stream);
  parse_tokens(tokens, logprobs, "logprobs");
  if (count == 0) return;
  void* out = pointer<void>(result, "result");
  py::gil_scoped_release release;
  irlfast::cuda::sequence_logprobs_forward(segments, tokens, reinterpret_cast<const void*>(logprobs), type, token_mask,
                                           mean, out, queue);
}

void cuda_sequence_logprobs_backward(int64_t count, int64_t width, uintptr_t offsets, bool wide_offsets, int64_t tokens,
                                     uintptr_t upstream, int dtype, uintptr_t mask, int mask_bytes, bool mask_floating,
                                     bool mean, uintptr_t gradient, int device, uintptr_t stream) {
  const irlfast::Segments segments = parse_segments(count, width, offsets, wide_offsets);
  const irlfast::TokenMask token_mask = parse_mask(mask, mask_bytes, mask_floating);
  const irlfast::DType type = parse_dtype(dtype);
  const irlfast::cuda::Queue queue = parse_queue(device, stream);
  parse_tokens(tokens, gradient, "gradient");
  if (count == 0) return;
  const void* given = pointer<const void>(upstream, "upstream");
  py::gil_scoped_release release;
  irlfast::cuda::sequence_logprobs_backward(segments, tokens, given, type, token_mask, mean,
                                            reinterpret_cast<void*>(gradient), queue);
}

irlfast::ImportanceInput parse_importance(uintptr_t log_target, uintptr_t log_proposal, int dtype, int64_t rows,
                                          uintptr_t groups, double clip_low, double clip_high, double temper) {
  if (rows < 1) throw std::invalid_argument("rows = " + std::to_string(rows) + " is below 1");
  return {pointer<const void>(log_target, "log_target"),
          pointer<const void>(log_proposal, "log_proposal"),
          parse_statistic(dtype),
          rows,
          reinterpret_cast<const int64_t*>(groups),
          clip_low,
          clip_high,
          temper};
}

int64_t importance_weights_forward(uintptr_t log_target, uintptr_t log_proposal, int dtype, int64_t rows,
                                   uintptr_t groups, double clip_low, double clip_high, double temper,
                                   uintptr_t weights, uintptr_t log_normalizer, uintptr_t ess, int threads,
                                   const std::string& isa) {
  const irlfast::ImportanceInput input =
      parse_importance(log_target, log_proposal, dtype, rows, groups, clip_low, clip_high, temper);
  const irlfast::Isa selected = parse_isa(isa);
  const irlfast::ImportanceOutput output{pointer<void>(weights, "weights"),
                                         pointer<void>(log_normalizer, "log_normalizer"), pointer<void>(ess, "ess")};
  py::gil_scoped_release release;
  return irlfast::importance_weights_forward(input, output, threads, selected);
}

void importance_weights_backward(uintptr_t log_target, uintptr_t log_proposal, int dtype, int64_t rows,
                                 uintptr_t groups, double clip_low, double clip_high, double temper,
                                 uintptr_t grad_weights, uintptr_t grad_log_normalizer, uintptr_t grad_ess,
                                 uintptr_t gradient, int threads, const std::string& isa) {
  const irlfast::ImportanceInput input =
      parse_importance(log_target, log_proposal, dtype, rows, groups, clip_low, clip_high, temper);
  const irlfast::Isa selected = parse_isa(isa);
  void* result = pointer<void>(gradient, "gradient");
  py::gil_scoped_release release;
  irlfast::importance_weights_backward(input, reinterpret_cast<const void*>(grad_weights),
                                       reinterpret_cast<const void*>(grad_log_normalizer),
                                       reinterpret_cast<const void*>(grad_ess), result, threads, selected);
}

irlfast::cuda::GroupLists parse_group_lists(uintptr_t order, uintptr_t offsets, int64_t count) {
  if (count < 1) throw std::invalid_argument("a number of groups below 1");
  if (order == 0) return {};
  return {pointer<const int64_t>(order, "order"), pointer<const int64_t>(offsets, "offsets"), count};
}

void cuda_importance_weights_forward(uintptr_t log_target, uintptr_t log_proposal, int dtype, int64_t rows,
                                     uintptr_t order, uintptr_t offsets, int64_t groups, double clip_low,
                                     double clip_high, double temper, uintptr_t weights, uintptr_t log_normalizer,
                                     uintptr_t ess, int device, uintptr_t stream) {
  const irlfast::ImportanceInput input =
      parse_importance(log_target, log_proposal, dtype, rows, 0, clip_low, clip_high, temper);
  const irlfast::cuda::GroupLists lists = parse_group_lists(order, offsets, groups);
  const irlfast::cuda::Queue queue = parse_queue(device, stream);
  const irlfast::ImportanceOutput output{pointer<void>(weights, "weights"),
                                         pointer<void>(log_normalizer, "log_normalizer"), pointer<void>(ess, "ess")};
  py::gil_scoped_release release;
  irlfast::cuda::importance_weights_forward(input, lists, output, queue);
}

void cuda_importance_weights_backward(uintptr_t log_target, uintptr_t log_proposal, int dtype, int64_t rows,
                                      uintptr_t order, uintptr_t offsets, int64_t groups, double clip_low,
                                      double clip_high, double temper, uintptr_t grad_weights,
                                      uintptr_t grad_log_normalizer, uintptr_t grad_ess, uintptr_t gradient, int device,
                                      uintptr_t stream) {
  const irlfast::ImportanceInput input =
      parse_importance(log_target, log_proposal, dtype, rows, 0, clip_low, clip_high, temper);
  const irlfast::cuda::GroupLists lists = parse_group_lists(order, offsets, groups);
  const irlfast::cuda::Queue queue = parse_queue(device, stream);
  void* result = pointer<void>(gradient, "gradient");
  py::gil_scoped_release release;
  irlfast::cuda::importance_weights_backward(input, lists, reinterpret_cast<const void*>(grad_weights),
                                             reinterpret_cast<const void*>(grad_log_normalizer),
                                             reinterpret_cast<const void*>(grad_ess), result, queue);
}

void gae(int64_t count, int64_t width, uintptr_t offsets, bool wide_offsets, uintptr_t rewards, uintptr_t values,
         uintptr_t last_values, int dtype, uintptr_t mask, int mask_bytes, bool mask_floating, double gamma, double lam,
         uintptr_t advantages, uintptr_t returns, int threads) {
  const irlfast::GaeInput input{parse_segments(count, width, offsets, wide_offsets),
                                reinterpret_cast<const void*>(rewards),
                                reinterpret_cast<const void*>(values),
                                reinterpret_cast<const void*>(last_values),
                                parse_statistic(dtype),
                                parse_mask(mask, mask_bytes, mask_floating),
                                gamma,
                                lam};
  if (input.segments.tokens() > 0) {
    for (uintptr_t address : {rewards, values, advantages, returns}) pointer<void>(address, "a tensor of tokens");
  }
  py::gil_scoped_release release;
  irlfast::gae(input, reinterpret_cast<void*>(advantages), reinterpret_cast<void*>(returns), threads);
}

template <typename Enum>
Enum parse_choice(int value, int choices, const char* name) {
  if (value < 0 || value >= choices) {
    throw std::invalid_argument(std::string(name) + " = " + std::to_string(value) + " is outside [0, " +
                                std::to_string(choices) + ")");
  }
  return static_cast<Enum>(value);
}

// `tokens`: of all sequences together.
irlfast::PolicyTermsInput parse_policy_input(const irlfast::Segments& segments, int64_t tokens, int dtype,
                                             uintptr_t logprobs, uintptr_t old_logprobs, uintptr_t ref_logprobs,
                                             uintptr_t rollout_logprobs, uintptr_t entropy, uintptr_t advantages,
                                             bool advantage_per_token, const irlfast::TokenMask& mask, uintptr_t keep,
                                             const irlfast::PolicyTermsOptions& options) {
  irlfast::PolicyTermsInput input;
  input.segments = segments;
  input.dtype = parse_statistic(dtype);
  input.logprobs = reinterpret_cast<const void*>(logprobs);
  input.old_logprobs = reinterpret_cast<const void*>(old_logprobs);
  input.ref_logprobs = reinterpret_cast<const void*>(ref_logprobs);
  input.rollout_logprobs = reinterpret_cast<const void*>(rollout_logprobs);
  input.entropy = reinterpret_cast<const void*>(entropy);
  input.advantages = reinterpret_cast<const void*>(advantages);
  input.advantage_per_token = advantage_per_token;
  input.mask = mask;
  input.keep = reinterpret_cast<const uint8_t*>(keep);
  if (tokens > 0) {
    pointer<const void>(logprobs, "logprobs");
    pointer<const void>(advantages, "advantages");
    if (options.term != irlfast::PolicyTerm::kReinforce) pointer<const void>(old_logprobs, "old_logprobs");
    if (options.corrects()) pointer<const void>(rollout_logprobs, "rollout_logprobs");
  }
  return input;
}

irlfast::PolicyTermsOptions parse_policy_options(int term, double clip_low, double clip_high, double dual_clip,
                                                 double kl_coef, int kl_estimator, double entropy_coef, double tis_cap,
                                                 double icepop_low, double icepop_high, bool sequence_correction,
                                                 int aggregation, double denominator) {
  irlfast::PolicyTermsOptions options;
  options.term = parse_choice<irlfast::PolicyTerm>(term, 4, "term");
  options.clip_low = clip_low;
  options.clip_high = clip_high;
  options.dual_clip = dual_clip;
  options.kl_coef = kl_coef;
  options.kl_estimator = parse_choice<irlfast::KlEstimator>(kl_estimator, 3, "kl_estimator");
  options.entropy_coef = entropy_coef;
  options.tis_cap = tis_cap;
  options.icepop_low = icepop_low;
  options.icepop_high = icepop_high;
  options.sequence_correction = sequence_correction;
  options.aggregation = parse_choice<irlfast::Aggregation>(aggregation, 4, "aggregation");
  options.denominator = denominator;
  return options;
}

irlfast::PolicyTermsOutput parse_policy_output(uintptr_t loss, uintptr_t metrics, uintptr_t grad_logprobs,
                                               uintptr_t grad_entropy) {
  return {pointer<void>(loss, "loss"), pointer<void>(metrics, "metrics"), reinterpret_cast<void*>(grad_logprobs),
          reinterpret_cast<void*>(grad_entropy)};
}

void policy_terms(int64_t count, int64_t width, uintptr_t offsets, bool wide_offsets, int dtype, uintptr_t logprobs,
                  uintptr_t old_logprobs, uintptr_t ref_logprobs, uintptr_t rollout_logprobs, uintptr_t entropy,
                  uintptr_t advantages, bool advantage_per_token, uintptr_t mask, int mask_bytes, bool mask_floating,
                  uintptr_t keep, int term, double clip_low, double clip_high, double dual_clip, double kl_coef,
                  int kl_estimator, double entropy_coef, double tis_cap, double icepop_low, double icepop_high,
                  bool sequence_correction, int aggregation, double denominator, uintptr_t loss, uintptr_t metrics,
                  uintptr_t grad_logprobs, uintptr_t grad_entropy, int threads, const std::string& isa) {
  const irlfast::Segments segments = parse_segments(count, width, offsets, wide_offsets);
  const irlfast::PolicyTermsOptions options =
      parse_policy_options(term, clip_low, clip_high, dual_clip, kl_coef, kl_estimator, entropy_coef, tis_cap,
                           icepop_low, icepop_high, sequence_correction, aggregation, denominator);
  const irlfast::PolicyTermsInput input = parse_policy_input(
      segments, segments.tokens(), dtype, logprobs, old_logprobs, ref_logprobs, rollout_logprobs, entropy, advantages,
      advantage_per_token, parse_mask(mask, mask_bytes, mask_floating), keep, options);
  const irlfast::PolicyTermsOutput output = parse_policy_output(loss, metrics, grad_logprobs, grad_entropy);
  const irlfast::Isa selected = parse_isa(isa);
  py::gil_scoped_release release;
  irlfast::policy_terms(input, options, output, threads, selected);
}

void cuda_policy_terms(int64_t count, int64_t width, uintptr_t offsets, bool wide_offsets, int64_t tokens, int dtype,
                       uintptr_t logprobs, uintptr_t old_logprobs, uintptr_t ref_logprobs, uintptr_t rollout_logprobs,
                       uintptr_t entropy, uintptr_t advantages, bool advantage_per_token, uintptr_t mask,
                       int mask_bytes, bool mask_floating, uintptr_t keep, int term, double clip_low, double clip_high,
                       double dual_clip, double kl_coef, int kl_estimator, double entropy_coef, double tis_cap,
                       double icepop_low, double icepop_high, bool sequence_correction, int aggregation,
                       double denominator, uintptr_t device_denominator, uintptr_t loss, uintptr_t metrics,
                       uintptr_t grad_logprobs, uintptr_t grad_entropy, uintptr_t partials, uintptr_t finished,
                       uintptr_t scale, int device, uintptr_t stream) {
  const irlfast::PolicyTermsOptions options =
      parse_policy_options(term, clip_low, clip_high, dual_clip, kl_coef, kl_estimator, entropy_coef, tis_cap,
                           icepop_low, icepop_high, sequence_correction, aggregation, denominator);
  const irlfast::PolicyTermsInput input =
      parse_policy_input(parse_segments(count, width, offsets, wide_offsets), tokens, dtype, logprobs, old_logprobs,
                         ref_logprobs, rollout_logprobs, entropy, advantages, advantage_per_token,
                         parse_mask(mask, mask_bytes, mask_floating), keep, options);
  const irlfast::PolicyTermsOutput output = parse_policy_output(loss, metrics, grad_logprobs, grad_entropy);
  irlfast::cuda::PolicyTermsWorkspace workspace;
  if (count > 0) workspace.partials = pointer<double>(partials, "partials");
  workspace.finished = pointer<int32_t>(finished, "finished");
  workspace.denominator = reinterpret_cast<const void*>(device_denominator);
  workspace.scale = pointer<void>(scale, "scale");
  const irlfast::cuda::Queue queue = parse_queue(device, stream);
  py::gil_scoped_release release;
  irlfast::cuda::policy_terms(input, parse_tokens(tokens, logprobs, "logprobs"), options, output, workspace, queue);
}

}  // namespace

PYBIND11_MODULE(_native, m, py::mod_gil_not_used()) {
  m.doc() =
      "CPU and CUDA kernels. Addresses are tensors' data_ptr(), strides are in elements; irlfast.ops is the public "
      "face.";

  py::dict dtypes;
  dtypes["float32"] = int(irlfast::DType::kFloat32);
  dtypes["float64"] = int(irlfast::DType::kFloat64);
  dtypes["bfloat16"] = int(irlfast::DType::kBFloat16);
  dtypes["float16"] = int(irlfast::DType::kFloat16);
  m.attr("DTYPES") = dtypes;

  m.def("build_info", &build_info,
        "What was compiled: version, compiler, instruction sets (built, usable here, selected), CUDA, sanitizers.");
  // No name in the module: all that Python does with one is to keep it.
  py::class_<irlfast::WarmBlock>(py::handle(), "WarmBlock", py::buffer_protocol())
      .def_buffer([](const irlfast::WarmBlock& block) {
        return py::buffer_info(static_cast<uint8_t*>(block.data()), block.bytes());
      });
  m.def("warm_block", &warm_block, py::arg("bytes"),
        "A buffer that keeps its pages when it is released, for the next of about its size.");
  m.def("set_warm_memory_limit", &set_warm_memory_limit, py::arg("bytes"),
        "How many bytes of released blocks are kept; what is beyond goes back to the system.");
  m.def("warm_memory_held", &irlfast::warm_memory_held, "Bytes of released blocks that are kept now.");
  m.def("bf16_product_available", &irlfast::bf16_product_available,
        "Whether bf16_product was compiled and the processor has AVX512_BF16.");
  m.def("bf16_product", &bf16_product, py::arg("a"), py::arg("a_strides"), py::arg("b"), py::arg("b_strides"),
        py::arg("out"), py::arg("out_stride"), py::arg("out_dtype"), py::arg("shape"), py::arg("accumulate"),
        py::arg("threads"),
        "out [M, N] = or += a [M, K] b [K, N], bfloat16 operands and float32 sums; shape (M, N, K).");
  m.def("first_invalid_label", &first_invalid_label, py::arg("labels"), py::arg("count"), py::arg("vocab"),
        py::arg("ignore_index"), "Position of the first label that is neither in [0, vocab) nor ignore_index, or -1.");
  m.def("token_stats_forward", &token_stats_forward, py::arg("logits"), py::arg("dtype"), py::arg("layout"),
        py::arg("vocab"), py::arg("labels"), py::arg("labels_per_row"), py::arg("ignore_index"), py::arg("temperature"),
        py::arg("row_temperature"), py::arg("softcap"), py::arg("logprob"), py::arg("entropy"), py::arg("lse"),
        py::arg("state"), py::arg("threads"), py::arg("isa"),
        "Write log-prob, entropy, log-sum-exp and what the gradient needs (address 0: not wanted, but for log-prob).");
  m.def("token_stats_backward", &token_stats_backward, py::arg("logits"), py::arg("dtype"), py::arg("layout"),
        py::arg("vocab"), py::arg("labels"), py::arg("labels_per_row"), py::arg("ignore_index"), py::arg("temperature"),
        py::arg("row_temperature"), py::arg("softcap"), py::arg("state"), py::arg("grad_logprob"),
        py::arg("grad_entropy"), py::arg("grad_lse"), py::arg("gradient"), py::arg("gradient_layout"),
        py::arg("threads"), py::arg("isa"), "Write the logits' gradient, which may be the logits themselves.");

  m.attr("CHUNK_PIECE") = irlfast::kChunkPiece;
  m.def("linear_token_stats_merge", &linear_token_stats_merge, py::arg("logits"), py::arg("dtype"), py::arg("stride"),
        py::arg("rows"), py::arg("first_column"), py::arg("columns"), py::arg("labels"), py::arg("temperature"),
        py::arg("row_temperature"), py::arg("softcap"), py::arg("running"), py::arg("running_stride"),
        py::arg("weighted"), py::arg("threads"), py::arg("isa"),
        "Add a chunk of columns to running statistics: max, others, weighted, label logit, doubles.");
  m.def("linear_token_stats_exponentials", &linear_token_stats_exponentials, py::arg("logits"), py::arg("dtype"),
        py::arg("stride"), py::arg("rows"), py::arg("first_column"), py::arg("columns"), py::arg("labels"),
        py::arg("temperature"), py::arg("row_temperature"), py::arg("softcap"), py::arg("max"), py::arg("result"),
        py::arg("result_dtype"), py::arg("result_stride"), py::arg("threads"), py::arg("isa"),
        "Write exp((l - max) / T) dl/dlogit for a chunk of columns, 0 at the label.");
  m.def("linear_token_stats_differentiate", &linear_token_stats_differentiate, py::arg("logits"), py::arg("dtype"),
        py::arg("stride"), py::arg("rows"), py::arg("first_column"), py::arg("columns"), py::arg("labels"),
        py::arg("temperature"), py::arg("row_temperature"), py::arg("softcap"), py::arg("row_numbers"),
        py::arg("state"), py::arg("grad_logprob"), py::arg("grad_entropy"), py::arg("grad_lse"), py::arg("gradient"),
        py::arg("gradient_dtype"), py::arg("gradient_stride"), py::arg("threads"), py::arg("isa"),
        "Write the gradient of a chunk of columns, whose row r is row row_numbers[r] of the logits (0: row r).");
  m.def("first_invalid_offset", &first_invalid_offset, py::arg("offsets"), py::arg("wide_offsets"), py::arg("count"),
        py::arg("tokens"),
        "The first sequence whose offset falls, -1 where they rise from 0 to tokens, -2 where an end is another.");
  m.def("sequence_logprobs_forward", &sequence_logprobs_forward, py::arg("count"), py::arg("width"), py::arg("offsets"),
        py::arg("wide_offsets"), py::arg("logprobs"), py::arg("dtype"), py::arg("mask"), py::arg("mask_bytes"),
        py::arg("mask_floating"), py::arg("mean"), py::arg("result"), py::arg("threads"), py::arg("isa"),
        "Write the sum or mean over each sequence's unmasked tokens.");
  m.def("sequence_logprobs_backward", &sequence_logprobs_backward, py::arg("count"), py::arg("width"),
        py::arg("offsets"), py::arg("wide_offsets"), py::arg("upstream"), py::arg("dtype"), py::arg("mask"),
        py::arg("mask_bytes"), py::arg("mask_floating"), py::arg("mean"), py::arg("gradient"), py::arg("threads"),
        py::arg("isa"), "Write the gradient of every token.");
  m.def("importance_weights_forward", &importance_weights_forward, py::arg("log_target"), py::arg("log_proposal"),
        py::arg("dtype"), py::arg("rows"), py::arg("groups"), py::arg("clip_low"), py::arg("clip_high"),
        py::arg("temper"), py::arg("weights"), py::arg("log_normalizer"), py::arg("ess"), py::arg("threads"),
        py::arg("isa"),
        "Write weights, normalisers and ESS; the number of groups, or -(i + 1) where row i is no log weight.");
  m.def("importance_weights_backward", &importance_weights_backward, py::arg("log_target"), py::arg("log_proposal"),
        py::arg("dtype"), py::arg("rows"), py::arg("groups"), py::arg("clip_low"), py::arg("clip_high"),
        py::arg("temper"), py::arg("grad_weights"), py::arg("grad_log_normalizer"), py::arg("grad_ess"),
        py::arg("gradient"), py::arg("threads"), py::arg("isa"), "Write the gradient to log_target.");
  m.def("gae", &gae, py::arg("count"), py::arg("width"), py::arg("offsets"), py::arg("wide_offsets"),
        py::arg("rewards"), py::arg("values"), py::arg("last_values"), py::arg("dtype"), py::arg("mask"),
        py::arg("mask_bytes"), py::arg("mask_floating"), py::arg("gamma"), py::arg("lam"), py::arg("advantages"),
        py::arg("returns"), py::arg("threads"), "Write generalised advantages and returns.");
  m.def("policy_terms", &policy_terms, py::arg("count"), py::arg("width"), py::arg("offsets"), py::arg("wide_offsets"),
        py::arg("dtype"), py::arg("logprobs"), py::arg("old_logprobs"), py::arg("ref_logprobs"),
        py::arg("rollout_logprobs"), py::arg("entropy"), py::arg("advantages"), py::arg("advantage_per_token"),
        py::arg("mask"), py::arg("mask_bytes"), py::arg("mask_floating"), py::arg("keep"), py::arg("term"),
        py::arg("clip_low"), py::arg("clip_high"), py::arg("dual_clip"), py::arg("kl_coef"), py::arg("kl_estimator"),
        py::arg("entropy_coef"), py::arg("tis_cap"), py::arg("icepop_low"), py::arg("icepop_high"),
        py::arg("sequence_correction"), py::arg("aggregation"), py::arg("denominator"), py::arg("loss"),
        py::arg("metrics"), py::arg("grad_logprobs"), py::arg("grad_entropy"), py::arg("threads"), py::arg("isa"),
        "Write a policy loss, its metrics and its gradient (address 0: not wanted).");

  py::dict divergences;
  divergences["reverse"] = int(irlfast::Divergence::kReverse);
  divergences["forward"] = int(irlfast::Divergence::kForward);
  divergences["js"] = int(irlfast::Divergence::kJensenShannon);
  m.attr("DIVERGENCES") = divergences;
  m.def("token_kl_forward", &token_kl_forward, py::arg("logits"), py::arg("ref_logits"), py::arg("dtype"),
        py::arg("layout"), py::arg("ref_layout"), py::arg("vocab"), py::arg("kind"), py::arg("weight"),
        py::arg("temperature"), py::arg("row_temperature"), py::arg("softcap"), py::arg("kl"), py::arg("state"),
        py::arg("threads"), py::arg("isa"), "Write the divergence of each row, and 6 doubles that its gradient needs.");
  m.def(
      "token_kl_backward", &token_kl_backward, py::arg("logits"), py::arg("ref_logits"), py::arg("dtype"),
      py::arg("layout"), py::arg("ref_layout"), py::arg("vocab"), py::arg("kind"), py::arg("weight"),
      py::arg("temperature"), py::arg("row_temperature"), py::arg("softcap"), py::arg("state"), py::arg("upstream"),
      py::arg("gradient"), py::arg("gradient_layout"), py::arg("ref_gradient"), py::arg("ref_gradient_layout"),
      py::arg("threads"), py::arg("isa"),
      "Write the gradient of the logits, which may be the logits themselves, and of the reference (address 0: none).");

  m.attr("PAIR_RUNNING") = irlfast::kPairRunning;
  m.def("linear_policy_ref_stats_merge", &linear_policy_ref_stats_merge, py::arg("logits"), py::arg("stride"),
        py::arg("ref_logits"), py::arg("ref_stride"), py::arg("dtype"), py::arg("rows"), py::arg("first_column"),
        py::arg("columns"), py::arg("labels"), py::arg("temperature"), py::arg("row_temperature"), py::arg("softcap"),
        py::arg("running"), py::arg("running_stride"), py::arg("threads"), py::arg("isa"),
        "Add a chunk of columns of policy and reference to PAIR_RUNNING arrays of running sums.");
  m.def("linear_policy_ref_stats_differentiate", &linear_policy_ref_stats_differentiate, py::arg("logits"),
        py::arg("stride"), py::arg("ref_logits"), py::arg("ref_stride"), py::arg("dtype"), py::arg("rows"),
        py::arg("first_column"), py::arg("columns"), py::arg("labels"), py::arg("temperature"),
        py::arg("row_temperature"), py::arg("softcap"), py::arg("running"), py::arg("running_stride"),
        py::arg("grad_logprob"), py::arg("grad_entropy"), py::arg("grad_lse"), py::arg("grad_reverse_kl"),
        py::arg("grad_forward_kl"), py::arg("gradient"), py::arg("gradient_dtype"), py::arg("gradient_stride"),
        py::arg("threads"), py::arg("isa"), "Write the gradient of a chunk of columns of the policy.");

  m.attr("POLICY_METRICS") = int(irlfast::PolicyMetric::kCount);
  m.attr("CUDA_MAX_LABELS") = irlfast::cuda::kMaxLabels;
  m.attr("CUDA_POLICY_PARTIALS") = irlfast::cuda::kPolicyPartials;
  m.def("cuda_device_count", &irlfast::cuda::device_count, "Devices of CUDA; 0 where there is no driver.");
  m.def("cuda_unavailable", &irlfast::cuda::unavailable, py::arg("device"),
        "Why the CUDA kernels cannot run on a device; empty where they can.");
  m.def("cuda_token_stats_forward", &cuda_token_stats_forward, py::arg("logits"), py::arg("dtype"), py::arg("layout"),
        py::arg("vocab"), py::arg("labels"), py::arg("labels_per_row"), py::arg("ignore_index"), py::arg("temperature"),
        py::arg("row_temperature"), py::arg("softcap"), py::arg("logprob"), py::arg("entropy"), py::arg("lse"),
        py::arg("state"), py::arg("device"), py::arg("stream"),
        "As token_stats_forward, on a stream; nothing is waited for.");
  m.def("cuda_token_stats_backward", &cuda_token_stats_backward, py::arg("logits"), py::arg("dtype"), py::arg("layout"),
        py::arg("vocab"), py::arg("labels"), py::arg("labels_per_row"), py::arg("ignore_index"), py::arg("temperature"),
        py::arg("row_temperature"), py::arg("softcap"), py::arg("state"), py::arg("grad_logprob"),
        py::arg("grad_entropy"), py::arg("grad_lse"), py::arg("gradient"), py::arg("gradient_layout"),
        py::arg("device"), py::arg("stream"), "As token_stats_backward, on a stream.");
  m.def("cuda_token_kl_forward", &cuda_token_kl_forward, py::arg("logits"), py::arg("ref_logits"), py::arg("dtype"),
        py::arg("layout"), py::arg("ref_layout"), py::arg("vocab"), py::arg("kind"), py::arg("weight"),
        py::arg("temperature"), py::arg("row_temperature"), py::arg("softcap"), py::arg("kl"), py::arg("state"),
        py::arg("device"), py::arg("stream"), "As token_kl_forward, on a stream.");
  m.def("cuda_token_kl_backward", &cuda_token_kl_backward, py::arg("logits"), py::arg("ref_logits"), py::arg("dtype"),
        py::arg("layout"), py::arg("ref_layout"), py::arg("vocab"), py::arg("kind"), py::arg("weight"),
        py::arg("temperature"), py::arg("row_temperature"), py::arg("softcap"), py::arg("state"), py::arg("upstream"),
        py::arg("gradient"), py::arg("gradient_layout"), py::arg("ref_gradient"), py::arg("ref_gradient_layout"),
        py::arg("device"), py::arg("stream"), "As token_kl_backward, on a stream.");
  m.def("cuda_sequence_logprobs_forward", &cuda_sequence_logprobs_forward, py::arg("count"), py::arg("width"),
        py::arg("offsets"), py::arg("wide_offsets"), py::arg("tokens"), py::arg("logprobs"), py::arg("dtype"),
        py::arg("mask"), py::arg("mask_bytes"), py::arg("mask_floating"), py::arg("mean"), py::arg("result"),
        py::arg("device"), py::arg("stream"),
        "As sequence_logprobs_forward, on a stream; offsets are held within the tokens.");
  m.def("cuda_sequence_logprobs_backward", &cuda_sequence_logprobs_backward, py::arg("count"), py::arg("width"),
        py::arg("offsets"), py::arg("wide_offsets"), py::arg("tokens"), py::arg("upstream"), py::arg("dtype"),
        py::arg("mask"), py::arg("mask_bytes"), py::arg("mask_floating"), py::arg("mean"), py::arg("gradient"),
        py::arg("device"), py::arg("stream"), "As sequence_logprobs_backward, on a stream.");
  m.def("cuda_importance_weights_forward", &cuda_importance_weights_forward, py::arg("log_target"),
        py::arg("log_proposal"), py::arg("dtype"), py::arg("rows"), py::arg("order"), py::arg("offsets"),
        py::arg("groups"), py::arg("clip_low"), py::arg("clip_high"), py::arg("temper"), py::arg("weights"),
        py::arg("log_normalizer"), py::arg("ess"), py::arg("device"), py::arg("stream"),
        "Of groups as lists of rows (order 0: one of all); one that is no distribution is NaN.");
  m.def("cuda_importance_weights_backward", &cuda_importance_weights_backward, py::arg("log_target"),
        py::arg("log_proposal"), py::arg("dtype"), py::arg("rows"), py::arg("order"), py::arg("offsets"),
        py::arg("groups"), py::arg("clip_low"), py::arg("clip_high"), py::arg("temper"), py::arg("grad_weights"),
        py::arg("grad_log_normalizer"), py::arg("grad_ess"), py::arg("gradient"), py::arg("device"), py::arg("stream"),
        "Write the gradient to log_target, on a stream.");
  m.def("cuda_policy_terms", &cuda_policy_terms, py::arg("count"), py::arg("width"), py::arg("offsets"),
        py::arg("wide_offsets"), py::arg("tokens"), py::arg("dtype"), py::arg("logprobs"), py::arg("old_logprobs"),
        py::arg("ref_logprobs"), py::arg("rollout_logprobs"), py::arg("entropy"), py::arg("advantages"),
        py::arg("advantage_per_token"), py::arg("mask"), py::arg("mask_bytes"), py::arg("mask_floating"),
        py::arg("keep"), py::arg("term"), py::arg("clip_low"), py::arg("clip_high"), py::arg("dual_clip"),
        py::arg("kl_coef"), py::arg("kl_estimator"), py::arg("entropy_coef"), py::arg("tis_cap"), py::arg("icepop_low"),
        py::arg("icepop_high"), py::arg("sequence_correction"), py::arg("aggregation"), py::arg("denominator"),
        py::arg("device_denominator"), py::arg("loss"), py::arg("metrics"), py::arg("grad_logprobs"),
        py::arg("grad_entropy"), py::arg("partials"), py::arg("finished"), py::arg("scale"), py::arg("device"),
        py::arg("stream"),
        "As policy_terms, on a stream, but for the gradients, which lack the factor written to scale.");
}
