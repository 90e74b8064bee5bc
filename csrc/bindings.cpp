// The Python module irlfast._native: the only file that includes pybind11.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "irlfast/bf16_product.h"
#include "irlfast/dtype.h"
#include "irlfast/huge_pages.h"
#include "irlfast/isa.h"
#include "irlfast/linear_token_stats.h"
#include "irlfast/token_stats.h"

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

void token_stats_forward(uintptr_t logits, int dtype, const Layout& layout, int64_t vocab, uintptr_t labels,
                         int64_t labels_per_row, int64_t ignore_index, double temperature, uintptr_t row_temperature,
                         double softcap, uintptr_t logprob, uintptr_t entropy, uintptr_t lse, uintptr_t state,
                         int threads, const std::string& isa) {
  const irlfast::TokenStatsInput input = parse_input(logits, dtype, layout, vocab, labels, labels_per_row, ignore_index,
                                                     temperature, row_temperature, softcap);
  const irlfast::Isa selected = parse_isa(isa);
  if (input.layout.rows() == 0) return;
  irlfast::TokenStatsOutput output;
  if (labels_per_row > 0) output.logprob = pointer<void>(logprob, "logprob");
  output.entropy = reinterpret_cast<void*>(entropy);
  output.lse = reinterpret_cast<void*>(lse);
  output.state = reinterpret_cast<void*>(state);
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
  const irlfast::RowLayout gradient_rows = parse_layout(gradient_layout, "gradient_layout");
  if (gradient_rows.rows() != input.layout.rows()) {
    throw std::invalid_argument("the gradient has " + std::to_string(gradient_rows.rows()) + " rows, the logits " +
                                std::to_string(input.layout.rows()));
  }
  const irlfast::Isa selected = parse_isa(isa);
  if (input.layout.rows() == 0) return;
  const void* saved = pointer<const void>(state, "state");
  void* result = pointer<void>(gradient, "gradient");
  irlfast::TokenStatsUpstream upstream;
  upstream.logprob = reinterpret_cast<const void*>(grad_logprob);
  upstream.entropy = reinterpret_cast<const void*>(grad_entropy);
  upstream.lse = reinterpret_cast<const void*>(grad_lse);
  py::gil_scoped_release release;
  irlfast::token_stats_backward(input, saved, upstream, {result, input.dtype, gradient_rows}, threads, selected);
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
  irlfast::TokenStatsUpstream upstream;
  upstream.logprob = reinterpret_cast<const void*>(grad_logprob);
  upstream.entropy = reinterpret_cast<const void*>(grad_entropy);
  upstream.lse = reinterpret_cast<const void*>(grad_lse);
  py::gil_scoped_release release;
  irlfast::token_stats_backward(input, saved, upstream, written, threads, selected);
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

void advise_huge_pages(uintptr_t data, int64_t bytes) {
  irlfast::advise_huge_pages(reinterpret_cast<void*>(data), bytes);
}

}  // namespace

PYBIND11_MODULE(_native, m, py::mod_gil_not_used()) {
  m.doc() = "CPU kernels. Addresses are tensors' data_ptr(), strides are in elements; irlfast.ops is the public face.";

  py::dict dtypes;
  dtypes["float32"] = int(irlfast::DType::kFloat32);
  dtypes["float64"] = int(irlfast::DType::kFloat64);
  dtypes["bfloat16"] = int(irlfast::DType::kBFloat16);
  dtypes["float16"] = int(irlfast::DType::kFloat16);
  m.attr("DTYPES") = dtypes;

  m.def("build_info", &build_info,
        "What was compiled: version, compiler, instruction sets (built, usable here, selected), CUDA, sanitizers.");
  m.def("advise_huge_pages", &advise_huge_pages, py::arg("data"), py::arg("bytes"),
        "Ask for huge pages for the untouched whole pages inside a range.");
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
}
