// Sums or means of token log-probs over sequences, and their gradient: one block a sequence, one launch a pass.
#include "common/segments.cuh"

namespace irlfast::cuda {
namespace {

template <typename T>
__global__ void __launch_bounds__(kSequenceThreads)
    sequence_forward(Segments segments, int64_t tokens, const void* logprobs, TokenMask mask, bool mean, void* result) {
  const T* values = static_cast<const T*>(logprobs);
  IRLFAST_FOR_BLOCKS(sequence, segments.count) {
    const Span span = span_of(segments, tokens, sequence);
    double own = 0, own_count = 0;
    for (int64_t i = span.begin + threadIdx.x; i < span.end; i += blockDim.x) {
      const bool counted = counts(mask, i);
      own += counted ? double(to_real(values[i])) : 0.0;  // whatever a masked token holds takes no part
      own_count += counted ? 1.0 : 0.0;
    }
    double sum = block_sum(own);
    if (mean) sum /= larger(block_sum(own_count), 1.0);
    if (threadIdx.x == 0) static_cast<RealOf<T>*>(result)[sequence] = RealOf<T>(sum);
  }
}

template <typename T>
__global__ void __launch_bounds__(kSequenceThreads)
    sequence_backward(Segments segments, int64_t tokens, const void* upstream, TokenMask mask, bool mean,
                      void* gradient) {
  T* out = static_cast<T*>(gradient);
  IRLFAST_FOR_BLOCKS(sequence, segments.count) {
    zero_outside(out, segments, tokens, sequence);
    const Span span = span_of(segments, tokens, sequence);
    double value = double(static_cast<const RealOf<T>*>(upstream)[sequence]);
    if (mean) value /= larger(count_tokens(mask, span), 1.0);
    const T share = rounded<T>(RealOf<T>(value));
    for (int64_t i = span.begin + threadIdx.x; i < span.end; i += blockDim.x) out[i] = counts(mask, i) ? share : T{};
  }
}

template <typename T>
void forward(const Segments& segments, int64_t tokens, const void* logprobs, const TokenMask& mask, bool mean,
             void* result, const Queue& queue) {
  const int64_t blocks = blocks_for(segments.count, kSequenceThreads, false, queue.device);
  launch(sequence_forward<T>, blocks, kSequenceThreads, queue, segments, tokens, logprobs, mask, mean, result);
}

template <typename T>
void backward(const Segments& segments, int64_t tokens, const void* upstream, const TokenMask& mask, bool mean,
              void* gradient, const Queue& queue) {
  const int64_t blocks = blocks_for(segments.count, kSequenceThreads, false, queue.device);
  launch(sequence_backward<T>, blocks, kSequenceThreads, queue, segments, tokens, upstream, mask, mean, gradient);
}

}  // namespace

void sequence_logprobs_forward(const Segments& segments, int64_t tokens, const void* logprobs, DType dtype,
                               const TokenMask& mask, bool mean, void* result, const Queue& queue) {
  switch (dtype) {
    case DType::kFloat32:
      return forward<float>(segments, tokens, logprobs, mask, mean, result, queue);
    case DType::kFloat64:
      return forward<double>(segments, tokens, logprobs, mask, mean, result, queue);
    case DType::kBFloat16:
      return forward<BFloat16>(segments, tokens, logprobs, mask, mean, result, queue);
    case DType::kFloat16:
      return forward<Float16>(segments, tokens, logprobs, mask, mean, result, queue);
  }
}

void sequence_logprobs_backward(const Segments& segments, int64_t tokens, const void* upstream, DType dtype,
                                const TokenMask& mask, bool mean, void* gradient, const Queue& queue) {
  switch (dtype) {
    case DType::kFloat32:
      return backward<float>(segments, tokens, upstream, mask, mean, gradient, queue);
    case DType::kFloat64:
      return backward<double>(segments, tokens, upstream, mask, mean, gradient, queue);
    case DType::kBFloat16:
      return backward<BFloat16>(segments, tokens, upstream, mask, mean, gradient, queue);
    case DType::kFloat16:
      return backward<Float16>(segments, tokens, upstream, mask, mean, gradient, queue);
  }
}

}  // namespace irlfast::cuda
