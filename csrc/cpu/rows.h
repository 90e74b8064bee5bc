// What the kernels over rows of logits share: the rows themselves, arrays of statistics, and the loop over them.
// Internal to the including file: nothing here may become an out-of-line copy that other files link to.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "irlfast/online_softmax.h"
#include "irlfast/token_stats.h"
#include "isa/softmax_spans.h"
#include "parallel.h"

namespace irlfast {
namespace {

// A row is summarised in pieces of this many logits, merged in order. Few rows are shared out over the threads by
// piece, many by row: either way the same pieces are added in the same order. Long, as every piece has to find its
// maximum anew.
constexpr int64_t kPiece = 32768;

// Below this many logits a team of threads costs more than it saves.
constexpr int64_t kSerial = 16384;

// Gradients of this many bytes are not read back from the caches, so they are written past them.
constexpr int64_t kStreamBytes = int64_t(32) << 20;

// A statistic's array: float, or double where the logits are double.
class Statistic {
 public:
  Statistic(const void* data, DType dtype) : data_(const_cast<void*>(data)), wide_(dtype == DType::kFloat64) {}

  explicit operator bool() const { return data_ != nullptr; }

  double get(int64_t i) const {
    return wide_ ? static_cast<const double*>(data_)[i] : double(static_cast<const float*>(data_)[i]);
  }

  void set(int64_t i, double value) const {
    if (wide_) {
      static_cast<double*>(data_)[i] = value;
    } else {
      static_cast<float*>(data_)[i] = float(value);
    }
  }

 private:
  void* data_;
  bool wide_;
};

class Rows {
 public:
  Rows(const TokenStatsInput& input, Isa isa)
      : input_(input),
        spans_(softmax_spans(isa)),
        dtype_(int(input.dtype)),
        element_bytes_(dtype_size(input.dtype)),
        row_temperature_(input.row_temperature, input.dtype) {}

  const TokenStatsInput& input() const { return input_; }
  const SoftmaxSpans& spans() const { return spans_; }
  int dtype() const { return dtype_; }
  int64_t element_bytes() const { return element_bytes_; }
  int64_t count() const { return input_.row_numbers == nullptr ? input_.layout.rows() : input_.numbered_rows; }
  int64_t pieces() const { return (input_.vocab + kPiece - 1) / kPiece; }

  // column counts from the first one at hand, as everywhere here.
  const char* logit(int64_t row, int64_t column) const {
    const int64_t place = input_.row_numbers == nullptr ? row : input_.row_numbers[row];
    return static_cast<const char*>(input_.logits) + (input_.layout.offset(place) + column) * element_bytes_;
  }

  // Of a label that is not ignored; outside [0, vocab) where it lies in other columns than those at hand.
  int64_t label_column(int64_t row, int64_t k) const { return labels(row)[k] - input_.first_column; }

  const int64_t* labels(int64_t row) const { return input_.labels + row * input_.labels_per_row; }

  bool ignored(int64_t row) const {
    for (int64_t k = 0; k < input_.labels_per_row; ++k) {
      if (labels(row)[k] != input_.ignore_index) return false;
    }
    return true;
  }

  double inverse_temperature(int64_t row) const {
    return 1.0 / (row_temperature_ ? row_temperature_.get(row) : input_.temperature);
  }

  LogitElement element(int64_t row, int64_t column) const {
    return spans_.element[dtype_](logit(row, column), input_.softcap);
  }

  OnlineSoftmax<double> summarise(int64_t row, int64_t begin, int64_t end, bool weighted,
                                  const OnlineSoftmax<double>& before) const {
    return spans_.summarise[dtype_](logit(row, begin), end - begin, inverse_temperature(row), input_.softcap, weighted,
                                    before);
  }

  OnlineSoftmax<double> summarise_piece(int64_t row, int64_t piece, bool weighted) const {
    const int64_t begin = piece * kPiece;
    return summarise(row, begin, std::min(begin + kPiece, input_.vocab), weighted, online_softmax_empty<double>());
  }

 private:
  const TokenStatsInput& input_;
  const SoftmaxSpans& spans_;
  int dtype_;
  int64_t element_bytes_;
  Statistic row_temperature_;
};

// How many tasks of `cost` logits each are worth a thread.
inline int64_t task_grain(int64_t cost) {
  return std::max<int64_t>(1, kSerial / std::max<int64_t>(1, cost));
}

// How many rows a thread takes at a time. Adjacent ones, as what is asked for ahead of a row's end is the next row's
// beginning; few enough for the threads to end together.
inline int64_t row_grain(int64_t rows, int64_t vocab, int threads) {
  constexpr int64_t kTogether = int64_t(1) << 19, kShares = 8;
  const int64_t most = rows / (std::max(1, threads) * kShares);
  return std::max(task_grain(vocab), std::min(most, kTogether / std::max<int64_t>(1, vocab)));
}

bool share_out_pieces(int64_t rows, int64_t pieces, int threads) {
  return pieces > 1 && threads > 1 && rows < 4 * threads;
}

// One row's pieces, merged in their order.
template <typename Summarise, typename Merge>
auto reduce_pieces(int64_t row, int64_t pieces, const Summarise& summarise, const Merge& merge) {
  auto state = summarise(row, int64_t(0));
  for (int64_t piece = 1; piece < pieces; ++piece) state = merge(row, state, summarise(row, piece));
  return state;
}

// finish(row, state) for each row, where state is all its pieces' summarise(row, piece), merged. Rows or pieces are
// shared out over the threads, whichever there are more of, with the same bits.
template <typename Summarise, typename Merge, typename Finish>
void reduce_rows(int64_t rows, int64_t vocab, int threads, const Summarise& summarise, const Merge& merge,
                 const Finish& finish) {
  const int64_t pieces = (vocab + kPiece - 1) / kPiece;
  if (!share_out_pieces(rows, pieces, threads)) {
    parallel_for(rows, row_grain(rows, vocab, threads), threads,
                 [&](int64_t row) { finish(row, reduce_pieces(row, pieces, summarise, merge)); });
    return;
  }
  std::vector<decltype(summarise(0, 0))> states(size_t(rows * pieces));
  parallel_for(rows * pieces, task_grain(std::min(kPiece, vocab)), threads,
               [&](int64_t i) { states[size_t(i)] = summarise(i / pieces, i % pieces); });
  const auto computed = [&](int64_t row, int64_t piece) { return states[size_t(row * pieces + piece)]; };
  for (int64_t row = 0; row < rows; ++row) finish(row, reduce_pieces(row, pieces, computed, merge));
}

// task(row, begin, end) over all columns of all rows.
template <typename Task>
void for_spans(int64_t rows, int64_t vocab, int threads, const Task& task) {
  const int64_t pieces = (vocab + kPiece - 1) / kPiece;
  if (share_out_pieces(rows, pieces, threads)) {
    parallel_for(rows * pieces, task_grain(std::min(kPiece, vocab)), threads, [&](int64_t i) {
      const int64_t begin = (i % pieces) * kPiece;
      task(i / pieces, begin, std::min(begin + kPiece, vocab));
    });
  } else {
    parallel_for(rows, row_grain(rows, vocab, threads), threads, [&](int64_t row) { task(row, int64_t(0), vocab); });
  }
}

}  // namespace
}  // namespace irlfast
