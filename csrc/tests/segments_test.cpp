// The kernels over sequences of tokens and groups of samples against plain loops in long double: padded, packed and
// empty, under masks of every width. Every array is an allocation of its own of exactly the size used.
#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "irlfast/gae.h"
#include "irlfast/importance.h"
#include "irlfast/isa.h"
#include "irlfast/policy_terms.h"
#include "irlfast/sequence.h"
#include "support.h"
#include "tests.h"

namespace {

using irlfast::Aggregation;
using irlfast::Isa;
using irlfast::KlEstimator;
using irlfast::PolicyMetric;
using irlfast::PolicyTerm;
using irlfast::Segments;
using irlfast::TokenMask;
using Real = long double;

Expectations expect;

void expect_close(Real ours, Real exact, Real tolerance, const std::string& what) {
  expect(close(ours, exact, tolerance), what + " is " + std::to_string(ours) + ", expected " + std::to_string(exact));
}

template <typename T>
constexpr DType kTypeOf = sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32;

template <typename T>
constexpr Real kTolerance = sizeof(T) == 8 ? 1e-12L : 5e-6L;

struct Layout {
  std::string name;
  Segments segments;
  std::vector<int64_t> wide;
  std::vector<int32_t> narrow;
};

Layout padded(int64_t count, int64_t width) {
  Layout layout;
  layout.name = "padded " + std::to_string(count) + "x" + std::to_string(width);
  layout.segments.count = count;
  layout.segments.width = width;
  return layout;
}

Layout packed(const std::vector<int64_t>& lengths, bool wide) {
  Layout layout;
  layout.name = wide ? "packed int64" : "packed int32";
  layout.wide.push_back(0);
  for (int64_t length : lengths) layout.wide.push_back(layout.wide.back() + length);
  layout.narrow.assign(layout.wide.begin(), layout.wide.end());
  layout.segments.count = int64_t(lengths.size());
  layout.segments.offsets =
      wide ? static_cast<const void*>(layout.wide.data()) : static_cast<const void*>(layout.narrow.data());
  layout.segments.wide_offsets = wide;
  return layout;
}

// 1024 and 256 tokens are a block of the widest float vectors, and of the scan: one more, one less, and ragged ends.
std::vector<Layout> layouts() {
  std::vector<Layout> all;
  all.push_back(packed({0, 1, 3, 70, 1025, 9, 0, 255, 64}, true));
  all.push_back(packed({1024, 0, 0, 33, 2, 257}, false));
  for (int64_t width : {1, 7, 130, 1030}) all.push_back(padded(6, width));
  all.push_back(padded(0, 5));
  all.push_back(padded(3, 0));
  return all;
}

struct Mask {
  std::vector<bool> counts;
  std::vector<char> data;
  TokenMask view;
};

// Words whose lowest or, of integers, highest bit alone is set count; -0.0 does not. Sequence 4 is masked throughout.
Mask make_mask(const Segments& segments, int bytes, bool floating, std::mt19937& random) {
  Mask mask;
  const int64_t tokens = segments.tokens();
  mask.counts.assign(size_t(tokens), true);
  if (bytes == 0) return mask;
  mask.data.resize(size_t(tokens * bytes));
  mask.view.data = mask.data.data();
  mask.view.bytes = bytes;
  mask.view.floating = floating;
  const uint64_t top = uint64_t(1) << (8 * bytes - 1);
  for (int64_t i = 0; i < segments.count; ++i) {
    for (int64_t t = segments.begin(i); t < segments.end(i); ++t) {
      const bool counts = i != 4 && random() % 4 != 0, high = random() % 2 != 0;
      const uint64_t word = counts ? (high && !floating ? top : 1) : (high && floating ? top : 0);
      mask.counts[size_t(t)] = counts;
      std::memcpy(mask.data.data() + t * bytes, &word, size_t(bytes));
    }
  }
  return mask;
}

struct MaskKind {
  int bytes;
  bool floating;
};
constexpr MaskKind kMasks[] = {{0, false}, {1, false}, {2, false}, {2, true},
                               {4, false}, {4, true},  {8, false}, {8, true}};

// Multiples of 1/16, so that no ratio of two comes near to a threshold; NaN where masked.
template <typename T>
std::vector<T> token_values(const Mask& mask, double spread, std::mt19937& random) {
  std::normal_distribution<double> normal(0, spread);
  std::vector<T> values;
  values.reserve(mask.counts.size());
  for (bool counts : mask.counts) values.push_back(counts ? T(std::round(16 * normal(random)) / 16) : T(NAN));
  return values;
}

int64_t count_tokens(const Mask& mask, int64_t begin, int64_t end) {
  return std::count(mask.counts.begin() + begin, mask.counts.begin() + end, true);
}

void run_sequence(Isa isa, DType dtype, const Layout& layout, const Mask& mask, int threads, std::mt19937& random) {
  const Segments& segments = layout.segments;
  const int64_t tokens = segments.tokens();
  const DType result_type = dtype == DType::kFloat64 ? dtype : DType::kFloat32;
  const Real tolerance = dtype == DType::kFloat64 ? 1e-13L : 1e-6L;
  const Buffer values(tokens * irlfast::dtype_size(dtype)), gradient(tokens * irlfast::dtype_size(dtype));
  const Buffer result(segments.count * irlfast::dtype_size(result_type)),
      upstream(segments.count * irlfast::dtype_size(result_type));
  std::normal_distribution<float> normal;
  for (int64_t t = 0; t < tokens; ++t)
    write(values.as<char>(), dtype, t, mask.counts[size_t(t)] ? normal(random) : NAN);
  for (int64_t i = 0; i < segments.count; ++i) write(upstream.as<char>(), result_type, i, 1.5f - float(i));
  for (const bool mean : {false, true}) {
    irlfast::sequence_logprobs_forward(segments, values.as<char>(), dtype, mask.view, mean, result.as<char>(), threads,
                                       isa);
    irlfast::sequence_logprobs_backward(segments, upstream.as<char>(), dtype, mask.view, mean, gradient.as<char>(),
                                        threads, isa);
    for (int64_t i = 0; i < segments.count; ++i) {
      const int64_t begin = segments.begin(i), end = segments.end(i), n = count_tokens(mask, begin, end);
      const Real divisor = mean ? Real(std::max<int64_t>(1, n)) : 1;
      Real total = 0;
      for (int64_t t = begin; t < end; ++t) total += mask.counts[size_t(t)] ? read(values.as<char>(), dtype, t) : 0;
      const std::string name =
          "sequence_logprobs " + layout.name + " dtype " + std::to_string(int(dtype)) + " row " + std::to_string(i);
      expect_close(read(result.as<char>(), result_type, i), total / divisor, tolerance, name);
      const Real share = read(upstream.as<char>(), result_type, i) / divisor;
      const Real rounding = dtype == DType::kBFloat16 ? 4e-3L : dtype == DType::kFloat16 ? 1e-3L : tolerance;
      for (int64_t t = begin; t < end; ++t) {
        expect_close(read(gradient.as<char>(), dtype, t), mask.counts[size_t(t)] ? share : 0, rounding,
                     name + " gradient");
      }
    }
  }
}

template <typename T>
void run_gae(const Layout& layout, const Mask& mask, int threads, std::mt19937& random) {
  const Segments& segments = layout.segments;
  const std::vector<T> rewards = token_values<T>(mask, 1, random), values = token_values<T>(mask, 2, random);
  std::vector<T> last(size_t(segments.count), T(0.75)), advantages(rewards.size()), returns(rewards.size());
  for (const bool bootstraps : {false, true}) {
    irlfast::GaeInput input;
    input.segments = segments;
    input.rewards = rewards.data();
    input.values = values.data();
    input.last_values = bootstraps ? last.data() : nullptr;
    input.dtype = kTypeOf<T>;
    input.mask = mask.view;
    input.gamma = 0.9;
    input.lam = 0.8;
    irlfast::gae(input, advantages.data(), returns.data(), threads);
    for (int64_t i = 0; i < segments.count; ++i) {
      Real advantage = 0, next = bootstraps ? 0.75L : 0;
      for (int64_t t = segments.end(i) - 1; t >= segments.begin(i); --t) {
        const size_t at = size_t(t);
        const bool counts = mask.counts[at];
        if (counts) {
          advantage = rewards[at] + Real(input.gamma) * next - values[at] + Real(input.gamma) * input.lam * advantage;
          next = values[at];
        }
        const std::string name = "gae " + layout.name + " token " + std::to_string(t);
        expect_close(advantages[at], counts ? advantage : 0, kTolerance<T>, name);
        expect_close(returns[at], counts ? advantage + values[at] : 0, kTolerance<T>, name + " return");
      }
    }
  }
}

struct ExactWeights {
  std::vector<Real> weights;
  std::map<int64_t, Real> log_normalizer, ess;  // by id
};

ExactWeights exact_weights(const std::vector<Real>& log_ratio, const std::vector<int64_t>& ids, Real low, Real high,
                           Real temper) {
  ExactWeights exact;
  exact.weights.assign(ids.size(), 0);
  std::map<int64_t, std::vector<size_t>> groups;
  for (size_t k = 0; k < ids.size(); ++k) groups[ids[k]].push_back(k);
  for (const auto& [id, rows] : groups) {
    Real total = 0, sum = 0, squares = 0;
    for (size_t k : rows) total += std::exp(log_ratio[k]);
    const Real log_z = std::log(total / Real(rows.size()));
    exact.log_normalizer[id] = log_z;
    for (size_t k : rows) {
      if (std::isinf(log_ratio[k])) continue;
      exact.weights[k] = std::exp(temper * std::min(std::max(log_ratio[k] - log_z, low), high));
      sum += exact.weights[k];
    }
    for (size_t k : rows) {
      if (sum > 0) exact.weights[k] /= sum;
      squares += exact.weights[k] * exact.weights[k];
    }
    exact.ess[id] = squares > 0 ? 1 / squares : 0;
  }
  return exact;
}

// The gradient is compared with differences of the sum of the outputs, each times its upstream.
template <typename T>
void run_importance(Isa isa, int64_t rows, int64_t spacing, int variant, int threads, std::mt19937& random) {
  const size_t n = size_t(rows);
  std::normal_distribution<double> normal;
  std::vector<T> target(n), proposal(n), weights(n), log_normalizer(n), ess(n), gradient(n), up(n);
  std::vector<int64_t> ids(n, 0);
  std::vector<Real> log_ratio(n);
  for (size_t k = 0; k < n; ++k) {
    ids[k] = (int64_t(random() % 5) - 2) * spacing;
    target[k] = (spacing != 0 && ids[k] == spacing) || random() % 8 == 0 ? T(-INFINITY) : T(normal(random));
    proposal[k] = T(normal(random));
    up[k] = T(normal(random));
    log_ratio[k] = Real(target[k]) - Real(proposal[k]);
  }
  irlfast::ImportanceInput input;
  input.log_target = target.data();
  input.log_proposal = proposal.data();
  input.dtype = kTypeOf<T>;
  input.rows = rows;
  input.groups = spacing != 0 ? ids.data() : nullptr;
  input.clip_low = variant & 1 ? -1.0 : -INFINITY;
  input.clip_high = variant & 1 ? 0.5 : INFINITY;
  input.temper = variant & 2 ? 0.75 : 1.0;
  const auto outputs_of = [&](const std::vector<Real>& at) {
    return exact_weights(at, ids, input.clip_low, input.clip_high, input.temper);
  };
  const ExactWeights exact = outputs_of(log_ratio);
  const int64_t groups =
      irlfast::importance_weights_forward(input, {weights.data(), log_normalizer.data(), ess.data()}, threads, isa);
  const std::string name = "importance_weights " + std::to_string(rows) + " rows, variant " + std::to_string(variant);
  expect(groups == int64_t(exact.ess.size()), name + " number of groups");
  for (size_t k = 0; k < n; ++k) expect_close(weights[k], exact.weights[k], kTolerance<T>, name);
  size_t number = 0;
  for (const auto& [id, size] : exact.ess) {
    expect_close(log_normalizer[number], exact.log_normalizer.at(id), kTolerance<T>, name + " log_normalizer");
    expect_close(ess[number++], size, kTolerance<T>, name + " ess");
  }
  for (int given = 0; given < 8; ++given) {
    irlfast::importance_weights_backward(input, given & 1 ? up.data() : nullptr, given & 2 ? up.data() : nullptr,
                                         given & 4 ? up.data() : nullptr, gradient.data(), threads, isa);
    const auto objective = [&](size_t row, Real step) {
      std::vector<Real> moved = log_ratio;
      moved[row] += step;
      const ExactWeights out = outputs_of(moved);
      Real sum = 0;
      for (size_t k = 0; k < n && (given & 1); ++k) sum += up[k] * out.weights[k];
      size_t group = 0;
      for (const auto& [id, size] : out.ess) {
        // The normaliser of a group that cannot occur is -inf, and has no slope.
        if ((given & 2) && !std::isinf(out.log_normalizer.at(id))) sum += up[group] * out.log_normalizer.at(id);
        if (given & 4) sum += up[group] * size;
        ++group;
      }
      return sum;
    };
    for (size_t k = 0; k < n; k += rows > 50 ? size_t(rows) / 8 : 1) {
      const Real step = 1e-6L, slope = (objective(k, step) - objective(k, -step)) / (2 * step);
      expect_close(gradient[k], std::isinf(log_ratio[k]) ? 0 : slope, std::max(kTolerance<T>, 1e-9L) * 10,
                   name + " gradient " + std::to_string(given));
    }
  }
}

void test_importance_refuses() {
  for (const double bad : {double(NAN), double(INFINITY)}) {
    const std::vector<double> target{0.0, -INFINITY, bad, 0.0}, proposal(4, 0.0);
    std::vector<double> weights(4, 7.0), log_normalizer(4, 7.0), ess(4, 7.0);
    irlfast::ImportanceInput input;
    input.log_target = target.data();
    input.log_proposal = proposal.data();
    input.dtype = DType::kFloat64;
    input.rows = 4;
    input.clip_low = -INFINITY;
    input.clip_high = INFINITY;
    expect(irlfast::importance_weights_forward(input, {weights.data(), log_normalizer.data(), ess.data()}, 1,
                                               irlfast::best_isa()) == -3,
           "the row of a log ratio that is no number is named");
    expect(weights == std::vector<double>(4, 7.0) && ess == weights && log_normalizer == weights, "nothing is written");
  }
}

void test_offsets() {
  for (const bool wide : {true, false}) {
    const Layout sound = packed({2, 0, 3}, wide), falling = packed({2, -1, 4}, wide);
    expect(irlfast::first_invalid_offset(sound.segments, 5) == -1, "sound offsets");
    expect(irlfast::first_invalid_offset(sound.segments, 6) == -2, "offsets that end early");
    expect(irlfast::first_invalid_offset(falling.segments, 5) == 1, "offsets that fall");
  }
}

template <typename T>
struct PolicyBatch {
  std::vector<T> logprobs, old, ref, rollout, entropy, advantages;
  std::vector<uint8_t> keep;
  irlfast::PolicyTermsInput input;
  irlfast::PolicyTermsOptions options;
};

template <typename T>
PolicyBatch<T> policy_batch(const Layout& layout, const Mask& mask, PolicyTerm term, std::mt19937& random) {
  PolicyBatch<T> batch;
  const auto one_in = [&](unsigned n) { return random() % n == 0; };
  const double spread = 0.4;
  batch.logprobs = token_values<T>(mask, 1, random);
  const auto near = [&] {
    std::vector<T> values = token_values<T>(mask, spread, random);
    for (size_t t = 0; t < values.size(); ++t) values[t] += batch.logprobs[t];
    return values;
  };
  batch.old = near();
  batch.ref = near();
  batch.rollout = near();
  batch.entropy = token_values<T>(mask, 1, random);
  // Beyond +-20 ratios are held and have no slope.
  if (one_in(4) && batch.old.size() > 8) batch.old[1] -= 24, batch.old[6] += 24, batch.ref[2] += 24;
  const bool per_token = one_in(2);
  const size_t sequences = size_t(layout.segments.count);
  batch.advantages = token_values<T>(mask, 1, random);
  if (!per_token) {
    batch.advantages.assign(sequences, T(0));
    for (T& a : batch.advantages) a = T(double(random() % 33) / 16 - 1);
  }
  batch.keep.assign(sequences, 1);
  for (uint8_t& keep : batch.keep) keep = one_in(5) ? 0 : 1;

  irlfast::PolicyTermsInput& in = batch.input;
  in.segments = layout.segments;
  in.dtype = kTypeOf<T>;
  in.logprobs = batch.logprobs.data();
  in.old_logprobs = term == PolicyTerm::kReinforce && one_in(2) ? nullptr : batch.old.data();
  in.ref_logprobs = one_in(3) ? nullptr : batch.ref.data();
  in.rollout_logprobs = one_in(3) ? nullptr : batch.rollout.data();
  in.entropy = one_in(3) ? nullptr : batch.entropy.data();
  in.advantages = batch.advantages.data();
  in.advantage_per_token = per_token;
  in.mask = mask.view;
  in.keep = one_in(2) ? batch.keep.data() : nullptr;

  irlfast::PolicyTermsOptions& o = batch.options;
  const bool gspo = term == PolicyTerm::kGspo;
  o.term = term;
  o.clip_low = gspo ? 0.02 : 0.2;
  o.clip_high = gspo ? 0.03 : 0.3;
  o.dual_clip = (gspo || term == PolicyTerm::kPpo) && one_in(2) ? 1.5 : 0;
  o.kl_estimator = KlEstimator(random() % 3);
  o.kl_coef = in.ref_logprobs != nullptr && o.kl_estimator != KlEstimator::kK1 ? 0.3 : 0;
  o.entropy_coef = in.entropy != nullptr ? 0.2 : 0;
  if (in.rollout_logprobs != nullptr) {
    o.tis_cap = one_in(2) ? 1.3 : 0;
    if (one_in(2)) o.icepop_low = 0.6, o.icepop_high = 1.8;
    o.sequence_correction = one_in(2);
  }
  o.aggregation = Aggregation(random() % 4);
  o.denominator = one_in(3) ? 17.5 : 0;
  return batch;
}

struct ExactPolicy {
  Real loss = 0, magnitude = 0;  // the latter of what adds up to the loss
  Real metrics[size_t(PolicyMetric::kCount)] = {};
  std::vector<Real> grad_logprobs, grad_entropy;

  Real& operator[](PolicyMetric metric) { return metrics[size_t(metric)]; }
};

Real held(Real x) {
  return std::min<Real>(std::max<Real>(x, -irlfast::kMaxLogRatio), irlfast::kMaxLogRatio);
}

// A policy term, what it changes by with the logarithm of its ratio (or with logp), and whether the clip stopped it.
struct ExactTerm {
  Real value, slope;
  bool stopped;
};

ExactTerm exact_term(const irlfast::PolicyTermsOptions& o, Real logprob, Real log_ratio, Real advantage) {
  const Real ratio = std::exp(held(log_ratio)), low = Real(1) - o.clip_low, high = Real(1) + o.clip_high;
  if (o.term == PolicyTerm::kReinforce) return {-advantage * logprob, -advantage, false};
  if (o.term == PolicyTerm::kCispo) {
    const Real slope = -std::min(ratio, high) * advantage;
    return {slope * logprob, slope, ratio > high};
  }
  const Real plain = -ratio * advantage, clipped = -std::min(std::max(ratio, low), high) * advantage;
  ExactTerm term{std::max(plain, clipped), plain, clipped > plain};
  if (o.dual_clip > 0 && advantage < 0 && term.value > -o.dual_clip * advantage) {
    term.value = -o.dual_clip * advantage;
    term.stopped = true;
  }
  if (term.stopped || held(log_ratio) != log_ratio) term.slope = 0;
  return term;
}

template <typename T>
ExactPolicy exact_policy(const PolicyBatch<T>& batch, const Mask& mask) {
  const irlfast::PolicyTermsInput& in = batch.input;
  const irlfast::PolicyTermsOptions& o = batch.options;
  const Segments& segments = in.segments;
  ExactPolicy exact;
  exact.grad_logprobs.assign(mask.counts.size(), 0);
  exact.grad_entropy.assign(mask.counts.size(), 0);
  const auto kept = [&](int64_t i) {
    const bool whole = in.keep == nullptr || batch.keep[size_t(i)] != 0;
    return whole ? count_tokens(mask, segments.begin(i), segments.end(i)) : int64_t(0);
  };
  Real tokens = 0, answers = 0;
  for (int64_t i = 0; i < segments.count; ++i) {
    tokens += Real(kept(i));
    answers += kept(i) > 0;
  }
  Real denominator = o.aggregation == Aggregation::kTokenMean ? tokens : answers;
  if (o.aggregation == Aggregation::kTokenSum) denominator = 1;
  if (o.denominator != 0) denominator = o.denominator;
  exact[PolicyMetric::kTokens] = tokens;
  exact[PolicyMetric::kSequences] = answers;
  Real ratios = 0, ratio_sum = 0, squares = 0, ratio_min = INFINITY, ratio_max = -INFINITY, loss = 0;
  const auto see = [&](Real ratio) {
    ratios += 1;
    ratio_sum += ratio;
    squares += ratio * ratio;
    ratio_min = std::min(ratio_min, ratio);
    ratio_max = std::max(ratio_max, ratio);
  };
  for (int64_t i = 0; i < segments.count; ++i) {
    const int64_t n = kept(i);
    if (n == 0) continue;
    const bool by_mean = o.aggregation == Aggregation::kSeqMeanTokenMean;
    const Real weight = 1 / (by_mean ? denominator * Real(n) : denominator);
    const bool gspo = o.term == PolicyTerm::kGspo;
    Real mean = 0, sequence_gap = 0, sequence_slope = 0;
    const auto old_at = [&](size_t t) { return Real(in.old_logprobs != nullptr ? batch.old[t] : batch.logprobs[t]); };
    for (size_t t = size_t(segments.begin(i)); t < size_t(segments.end(i)); ++t) {
      if (!mask.counts[t]) continue;
      mean += (Real(batch.logprobs[t]) - old_at(t)) / Real(n);
      sequence_gap += old_at(t) - Real(batch.rollout[t]);
    }
    if (gspo) see(std::exp(held(mean)));
    for (size_t t = size_t(segments.begin(i)); t < size_t(segments.end(i)); ++t) {
      if (!mask.counts[t]) continue;
      const Real logprob = batch.logprobs[t], log_ratio = logprob - old_at(t), ratio = std::exp(held(log_ratio));
      const Real advantage = batch.advantages[in.advantage_per_token ? t : size_t(i)];
      if (!gspo) see(ratio);
      if (in.old_logprobs != nullptr) {
        const Real below = std::min<Real>(log_ratio, irlfast::kMaxLogRatio);
        exact[PolicyMetric::kApproxKl] += (std::expm1(held(log_ratio)) - below) / tokens;
      }
      const Real used = gspo ? mean : log_ratio;
      ExactTerm term = exact_term(o, logprob, used, advantage);
      if (term.stopped && used < 0) exact[PolicyMetric::kClipFractionLow] += 1 / tokens;
      if (term.stopped && used > 0) exact[PolicyMetric::kClipFractionHigh] += 1 / tokens;
      if (in.rollout_logprobs != nullptr) {
        Real gap = old_at(t) - Real(batch.rollout[t]);
        exact[PolicyMetric::kRolloutGap] += std::fabs(gap) / tokens;
        exact[PolicyMetric::kRolloutGapMax] = std::max(exact[PolicyMetric::kRolloutGapMax], std::fabs(gap));
        const Real below = std::min<Real>(gap, irlfast::kMaxLogRatio);
        exact[PolicyMetric::kRolloutKl] += (std::expm1(below) - below) / tokens;
        if (o.sequence_correction) gap = sequence_gap;
        Real factor = std::exp(std::min<Real>(gap, irlfast::kMaxLogRatio));
        const bool outside = o.icepop_high > 0 && (factor < o.icepop_low || factor > o.icepop_high);
        if (o.tis_cap > 0 && factor > o.tis_cap) {
          exact[PolicyMetric::kTisFraction] += 1 / tokens;
          factor = o.tis_cap;
        }
        if (outside) exact[PolicyMetric::kIcepopFraction] += 1 / tokens;
        if (!o.corrects()) factor = 1;
        term.value *= outside ? 0 : factor;
        term.slope *= outside ? 0 : factor;
      }
      exact[PolicyMetric::kPolicy] += weight * term.value;
      loss += weight * term.value;
      exact.magnitude += std::fabs(weight * term.value);
      if (gspo) {
        sequence_slope += term.slope;
      } else {
        exact.grad_logprobs[t] += weight * term.slope;
      }
      if (in.ref_logprobs != nullptr) {
        const Real d = logprob - Real(batch.ref[t]), floor = std::max<Real>(d, -irlfast::kMaxLogRatio);
        const Real k3 = std::expm1(-floor) + floor;
        const Real kl = o.kl_estimator == KlEstimator::kK1 ? d : o.kl_estimator == KlEstimator::kK2 ? d * d / 2 : k3;
        exact[PolicyMetric::kKl] += kl / tokens;
        const bool corrected = o.kl_estimator == KlEstimator::kK3;
        const Real penalty = weight * o.kl_coef * (corrected ? ratio * kl : kl);
        loss += penalty;
        exact.magnitude += std::fabs(penalty);
        Real slope = d;
        if (corrected) {
          slope = ratio * ((floor == d ? -std::expm1(-d) : 0) + (held(log_ratio) == log_ratio ? k3 : 0));
        }
        exact.grad_logprobs[t] += weight * o.kl_coef * slope;
      }
      if (in.entropy != nullptr) {
        exact[PolicyMetric::kEntropy] += batch.entropy[t] / tokens;
        loss -= weight * o.entropy_coef * batch.entropy[t];
        exact.magnitude += std::fabs(weight * o.entropy_coef * batch.entropy[t]);
        exact.grad_entropy[t] = -weight * o.entropy_coef;
      }
    }
    for (size_t t = size_t(segments.begin(i)); gspo && t < size_t(segments.end(i)); ++t) {
      if (mask.counts[t]) exact.grad_logprobs[t] += weight * sequence_slope / Real(n);
    }
  }
  exact.loss = loss;
  exact[PolicyMetric::kClipFraction] = exact[PolicyMetric::kClipFractionLow] + exact[PolicyMetric::kClipFractionHigh];
  const bool seen = in.old_logprobs != nullptr && ratios > 0;
  exact[PolicyMetric::kRatioMean] = seen ? ratio_sum / ratios : 1;
  exact[PolicyMetric::kRatioMin] = seen ? ratio_min : 1;
  exact[PolicyMetric::kRatioMax] = seen ? ratio_max : 1;
  exact[PolicyMetric::kEss] = seen ? ratio_sum * ratio_sum / (ratios * squares) : 1;
  return exact;
}

template <typename T>
void run_policy(Isa isa, const Layout& layout, const Mask& mask, PolicyTerm term, std::mt19937& random) {
  const PolicyBatch<T> batch = policy_batch<T>(layout, mask, term, random);
  const ExactPolicy exact = exact_policy(batch, mask);
  const size_t tokens = mask.counts.size();
  const auto run = [&](int threads, bool with_gradient) {
    const size_t size = with_gradient ? tokens : 0;
    std::vector<std::vector<T>> out{std::vector<T>(1), std::vector<T>(size_t(PolicyMetric::kCount)),
                                    std::vector<T>(size, T(NAN)), std::vector<T>(size, T(NAN))};
    const bool bonus = with_gradient && batch.input.entropy != nullptr;
    irlfast::policy_terms(
        batch.input, batch.options,
        {out[0].data(), out[1].data(), with_gradient ? out[2].data() : nullptr, bonus ? out[3].data() : nullptr},
        threads, isa);
    if (!bonus) std::fill(out[3].begin(), out[3].end(), T(0));
    return out;
  };
  const auto out = run(1, true), team = run(3, true), without = run(1, false);
  const std::string name = "policy_terms " + std::string(irlfast::isa_name(isa)) + " " + layout.name + " mask " +
                           std::to_string(mask.view.bytes) + " term " + std::to_string(int(term));
  expect(out == team, name + ": three threads give other numbers than one");
  expect(out[0] == without[0] && out[1] == without[1],
         name + ": the loss depends on whether its gradient is asked for");
  const Real tolerance = kTolerance<T> * (1 + exact.magnitude);
  expect_close(out[0][0], exact.loss, tolerance, name + " loss");
  for (size_t k = 0; k < out[1].size(); ++k) {
    expect_close(out[1][k], exact.metrics[k], k == size_t(PolicyMetric::kPolicy) ? tolerance : kTolerance<T>,
                 name + " metric " + std::to_string(k));
  }
  for (size_t t = 0; t < tokens; ++t) {
    expect_close(out[2][t], exact.grad_logprobs[t], kTolerance<T>, name + " gradient");
    expect_close(out[3][t], exact.grad_entropy[t], kTolerance<T>, name + " entropy gradient");
  }
}

constexpr PolicyTerm kTerms[] = {PolicyTerm::kReinforce, PolicyTerm::kPpo, PolicyTerm::kGspo, PolicyTerm::kCispo};

}  // namespace

int segments_failures(int& cases) {
  std::mt19937 random(20241125);
  test_offsets();
  test_importance_refuses();
  for (Isa isa : irlfast::built_isas()) {
    if (!irlfast::isa_runs_here(isa)) continue;
    for (int64_t rows : {0, 1, 2, 7, 30, 300}) {
      for (int variant = 0; variant < 4; ++variant) {
        // One group; ids that are counted; ids too far apart for that.
        for (const int64_t spacing : {int64_t(0), int64_t(1), int64_t(1) << 61}) {
          run_importance<float>(isa, rows, spacing, variant, 1, random);
          run_importance<double>(isa, rows, spacing, variant, 1, random);
          cases += 2;
        }
      }
    }
    for (const Layout& layout : layouts()) {
      for (const MaskKind& kind : kMasks) {
        const Mask mask = make_mask(layout.segments, kind.bytes, kind.floating, random);
        for (DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16}) {
          run_sequence(isa, dtype, layout, mask, 1, random);
        }
        run_gae<float>(layout, mask, 1, random);
        run_gae<double>(layout, mask, 1, random);
        for (PolicyTerm term : kTerms) {
          run_policy<float>(isa, layout, mask, term, random);
          run_policy<double>(isa, layout, mask, term, random);
        }
        cases += 14;
      }
    }
    // Enough tokens that a team shares them out.
    const Layout layout = packed({40000, 3, 0, 20000, 7, 30000}, true);
    const Mask mask = make_mask(layout.segments, 1, false, random);
    run_sequence(isa, DType::kFloat32, layout, mask, 3, random);
    run_gae<float>(layout, mask, 3, random);
    run_importance<float>(isa, 2000, 1, 3, 3, random);
    for (PolicyTerm term : kTerms) run_policy<double>(isa, layout, mask, term, random);
    cases += 7;
  }
  return expect.failures();
}
