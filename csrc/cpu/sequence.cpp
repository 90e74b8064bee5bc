#include "irlfast/sequence.h"

#include "isa/sequence_spans.h"
#include "rows.h"

namespace irlfast {

int64_t first_invalid_offset(const Segments& segments, int64_t tokens) {
  if (segments.begin(0) != 0 || segments.begin(segments.count) != tokens) return -2;
  for (int64_t i = 0; i < segments.count; ++i) {
    if (segments.end(i) < segments.begin(i)) return i;
  }
  return -1;
}

namespace {

// A token is one addition: a logit takes several times as long.
int64_t sequence_grain(const Segments& segments) {
  return task_grain(segments.tokens() / std::max<int64_t>(1, segments.count) / 4);
}

}  // namespace

void sequence_logprobs_forward(const Segments& segments, const void* logprobs, DType dtype, const TokenMask& mask,
                               bool mean, void* result, int threads, Isa isa) {
  const auto sum = sequence_spans(isa).sum[int(dtype)];
  const Statistic results(result, dtype);
  parallel_for(segments.count, sequence_grain(segments), threads, [&](int64_t i) {
    const MaskedSum total = sum(logprobs, mask, segments.begin(i), segments.end(i));
    results.set(i, mean && total.count > 0 ? total.sum / double(total.count) : total.sum);
  });
}

void sequence_logprobs_backward(const Segments& segments, const void* upstream, DType dtype, const TokenMask& mask,
                                bool mean, void* gradient, int threads, Isa isa) {
  const SequenceSpans& spans = sequence_spans(isa);
  const Statistic upstreams(upstream, dtype);
  parallel_for(segments.count, sequence_grain(segments), threads, [&](int64_t i) {
    const int64_t begin = segments.begin(i), end = segments.end(i);
    double value = upstreams.get(i);
    if (mean) value /= double(std::max<int64_t>(1, spans.count(mask, begin, end)));
    spans.spread[int(dtype)](gradient, mask, begin, end, value);
  });
}

}  // namespace irlfast
