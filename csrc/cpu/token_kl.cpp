#include "irlfast/token_kl.h"

#include <cmath>
#include <cstring>
#include <utility>

#include "irlfast/online_divergence.h"
#include "isa/pair_spans.h"
#include "rows.h"

namespace irlfast {
namespace {

TokenStatsInput one_side(const TokenKlInput& input, const void* logits, const RowLayout& layout) {
  TokenStatsInput side;
  side.logits = logits;
  side.dtype = input.dtype;
  side.layout = layout;
  side.vocab = input.vocab;
  side.temperature = input.temperature;
  side.row_temperature = input.row_temperature;
  side.softcap = input.softcap;
  return side;
}

// The two sides. For the forward divergence they change places: KL(q || p) is the reverse divergence of q from p.
class Pair {
 public:
  Pair(const TokenKlInput& input, Isa isa)
      : input_(input),
        p_input_(one_side(input, input.logits, input.layout)),
        q_input_(one_side(input, input.ref_logits, input.ref_layout)),
        p_(swapped() ? q_input_ : p_input_, isa),
        q_(swapped() ? p_input_ : q_input_, isa),
        spans_(pair_spans(isa)) {}
  Pair(const Pair&) = delete;

  const TokenKlInput& input() const { return input_; }
  bool swapped() const { return input_.kind == Divergence::kForward; }
  bool mixed() const { return input_.kind == Divergence::kJensenShannon; }
  const Rows& p() const { return p_; }
  const Rows& q() const { return q_; }
  const PairSpans& spans() const { return spans_; }
  int dtype() const { return p_.dtype(); }
  int64_t count() const { return p_.count(); }

 private:
  const TokenKlInput& input_;
  TokenStatsInput p_input_, q_input_;
  Rows p_, q_;
  const PairSpans& spans_;
};

// kTokenKlState doubles a row.
class State {
 public:
  State(double* data, int64_t rows) : data_(data), rows_(rows) {}

  void set_softmax(int64_t row, const OnlineSoftmax<double>& p, const OnlineSoftmax<double>& q) const {
    at(0, row) = p.max;
    at(1, row) = p.others;
    at(2, row) = q.max;
    at(3, row) = q.others;
  }
  OnlineSoftmax<double> p(int64_t row) const { return {at(0, row), at(1, row), 0.0}; }
  OnlineSoftmax<double> q(int64_t row) const { return {at(2, row), at(3, row), 0.0}; }

  void set_divergence(int64_t row, const MixtureDivergence& d) const {
    at(4, row) = d.p;
    at(5, row) = d.q;
  }
  MixtureDivergence divergence(int64_t row) const { return {at(4, row), at(5, row)}; }

 private:
  double& at(int64_t which, int64_t row) const { return data_[which * rows_ + row]; }

  double* data_;
  int64_t rows_;
};

// What every pass but the first needs to know of a row.
PairParameters parameters_of(const Pair& pair, const State& state, int64_t row) {
  const OnlineSoftmax<double> p = state.p(row), q = state.q(row);
  PairParameters parameters{};
  parameters.p_max = p.max;
  parameters.q_max = q.max;
  parameters.inverse_temperature = pair.p().inverse_temperature(row);
  parameters.softcap = pair.input().softcap;
  parameters.p_argmax = 1.0 / (1.0 + p.others);
  parameters.q_argmax = 1.0 / (1.0 + q.others);
  parameters.weight = pair.input().weight;
  return parameters;
}

class Forward {
 public:
  Forward(const Pair& pair, void* kl, double* state)
      : pair_(pair), kl_(kl, pair.input().dtype), state_(state, pair.count()) {}

  void run(int threads) const {
    const int64_t rows = pair_.count(), vocab = pair_.input().vocab, pieces = pair_.p().pieces();
    const auto summarise = [&](int64_t row, int64_t piece) { return summarise_piece(row, piece); };
    const auto merge = [&](int64_t row, const OnlineDivergence<double>& a, const OnlineDivergence<double>& b) {
      return online_divergence_merge(a, b, pair_.p().inverse_temperature(row));
    };
    if (!pair_.mixed()) {
      reduce_rows(rows, vocab, threads, summarise, merge,
                  [&](int64_t row, const OnlineDivergence<double>& s) { write(row, s); });
      return;
    }
    // The mixture needs both normalisers, so each row is read twice, the second time from the caches where rows are
    // what the threads share.
    const auto keep = [&](int64_t row, const OnlineDivergence<double>& s) { state_.set_softmax(row, s.p, s.q); };
    const auto mix = [&](int64_t row, int64_t piece) { return mix_piece(row, piece); };
    const auto add = [](int64_t, const MixtureDivergence& a, const MixtureDivergence& b) {
      return MixtureDivergence{a.p + b.p, a.q + b.q};
    };
    const auto finish = [&](int64_t row, const MixtureDivergence& d) { write(row, d); };
    if (share_out_pieces(rows, pieces, threads)) {
      reduce_rows(rows, vocab, threads, summarise, merge, keep);
      reduce_rows(rows, vocab, threads, mix, add, finish);
    } else {
      parallel_for(rows, task_grain(vocab), threads, [&](int64_t row) {
        keep(row, reduce_pieces(row, pieces, summarise, merge));
        finish(row, reduce_pieces(row, pieces, mix, add));
      });
    }
  }

 private:
  int64_t length(int64_t begin) const { return std::min(kPiece, pair_.input().vocab - begin); }

  OnlineDivergence<double> summarise_piece(int64_t row, int64_t piece) const {
    const int64_t begin = piece * kPiece;
    return pair_.spans().summarise[pair_.dtype()](pair_.p().logit(row, begin), pair_.q().logit(row, begin),
                                                  length(begin), pair_.p().inverse_temperature(row),
                                                  pair_.input().softcap, false, online_divergence_empty<double>());
  }

  MixtureDivergence mix_piece(int64_t row, int64_t piece) const {
    const int64_t begin = piece * kPiece;
    return pair_.spans().mixture[pair_.dtype()](pair_.p().logit(row, begin), pair_.q().logit(row, begin), length(begin),
                                                parameters_of(pair_, state_, row));
  }

  void write(int64_t row, const OnlineDivergence<double>& s) const {
    const double kl = online_divergence_kl(s.p, s.q, s.p_over_q);
    kl_.set(row, kl);
    state_.set_softmax(row, s.p, s.q);
    state_.set_divergence(row, {kl, 0.0});
  }

  void write(int64_t row, const MixtureDivergence& d) const {
    const double w = pair_.input().weight;
    const double defined = online_softmax_log_sum(state_.p(row)) + online_softmax_log_sum(state_.q(row));
    kl_.set(row, w * d.p + (1.0 - w) * d.q + (defined - defined));
    state_.set_divergence(row, d);
  }

  const Pair& pair_;
  Statistic kl_;
  State state_;
};

class Backward {
 public:
  Backward(const Pair& pair, const double* state, const void* upstream, const TokenKlGradient& gradient,
           const TokenKlGradient& ref_gradient)
      : pair_(pair),
        state_(const_cast<double*>(state), pair.count()),
        upstream_(upstream, pair.input().dtype),
        policy_(gradient),
        reference_(ref_gradient) {}

  void run(int threads) const {
    for_spans(pair_.count(), pair_.input().vocab, threads, [&](int64_t row, int64_t begin, int64_t end) {
      // The policy's last: it may overwrite the logits.
      if (reference_.data != nullptr) differentiate(row, begin, end, reference_, pair_.swapped());
      if (policy_.data != nullptr) differentiate(row, begin, end, policy_, !pair_.swapped());
    });
  }

 private:
  // The gradient of D(p || q), of whose two sides it is.
  void differentiate(int64_t row, int64_t begin, int64_t end, const TokenKlGradient& gradient, bool of_p) const {
    const int64_t bytes = pair_.p().element_bytes();
    char* destination = static_cast<char*>(gradient.data) + (gradient.layout.offset(row) + begin) * bytes;
    const double upstream = upstream_.get(row);
    const MixtureDivergence divergence = state_.divergence(row);
    if (upstream == 0.0 || (!pair_.mixed() && std::isinf(divergence.p))) {
      std::memset(destination, 0, size_t((end - begin) * bytes));
      return;
    }
    PairParameters parameters = parameters_of(pair_, state_, row);
    const double log_ratio = online_softmax_log_sum(state_.p(row)) - online_softmax_log_sum(state_.q(row));
    const double defined = log_ratio - log_ratio;  // else NaN
    const double scale = upstream * parameters.inverse_temperature;
    const double p_scale = scale * parameters.p_argmax, q_scale = scale * parameters.q_argmax;
    if (pair_.mixed()) {
      // dD/dz_v = w p_v (log(p_v / M_v) - KL(p || M)); of q with the weights exchanged.
      if (!of_p) exchange(parameters);
      parameters.form = PairForm::kJensenShannon;
      parameters.ratio = scale * parameters.weight;
      parameters.constant = defined - parameters.ratio * (of_p ? divergence.p : divergence.q);
    } else if (of_p) {
      // p_v (log p_v - log q_v - KL)
      parameters.form = PairForm::kRatio;
      parameters.ratio = p_scale * parameters.inverse_temperature;
      parameters.constant = defined - p_scale * (log_ratio + divergence.p);
    } else {
      // q_v - p_v
      exchange(parameters);
      parameters.form = PairForm::kDifference;
      parameters.constant = defined + q_scale;
      parameters.other = -p_scale;
    }
    parameters.stream =
        gradient.data != pair_.input().logits && pair_.count() * pair_.input().vocab * bytes >= kStreamBytes;
    const Rows& own = of_p ? pair_.p() : pair_.q();
    const Rows& other = of_p ? pair_.q() : pair_.p();
    pair_.spans().differentiate[pair_.dtype()](own.logit(row, begin), other.logit(row, begin), destination, end - begin,
                                               parameters);
  }

  static void exchange(PairParameters& parameters) {
    std::swap(parameters.p_max, parameters.q_max);
    std::swap(parameters.p_argmax, parameters.q_argmax);
    parameters.weight = 1.0 - parameters.weight;
  }

  const Pair& pair_;
  State state_;
  Statistic upstream_;
  TokenKlGradient policy_, reference_;
};

}  // namespace

void token_kl_forward(const TokenKlInput& input, void* kl, double* state, int threads, Isa isa) {
  Forward(Pair(input, isa), kl, state).run(threads);
}

void token_kl_backward(const TokenKlInput& input, const double* state, const void* upstream,
                       const TokenKlGradient& gradient, const TokenKlGradient& ref_gradient, int threads, Isa isa) {
  Backward(Pair(input, isa), state, upstream, gradient, ref_gradient).run(threads);
}

}  // namespace irlfast
