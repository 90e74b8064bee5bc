// Sequences of tokens, and masks over them, as kernels see them: one block a sequence. Sums run in double, thread by
// thread, so that a sequence's bits depend neither on the batch nor on padding nor on the layout.
#pragma once

#include "common/block.cuh"
#include "common/numbers.cuh"
#include "irlfast/segments.h"

namespace irlfast::cuda {

constexpr unsigned kSequenceThreads = 256;

struct Span {
  int64_t begin = 0, end = 0;
};

IRLFAST_DEVICE int64_t clamp_offset(int64_t x, int64_t low, int64_t high) {
  return x < low ? low : x > high ? high : x;
}

IRLFAST_DEVICE int64_t offset_of(const Segments& segments, int64_t i) {
  if (segments.offsets == nullptr) return i * segments.width;
  return segments.wide_offsets ? static_cast<const int64_t*>(segments.offsets)[i]
                               : int64_t(static_cast<const int32_t*>(segments.offsets)[i]);
}

// Offsets on a device are not looked at beforehand: they are held within the tokens.
IRLFAST_DEVICE Span span_of(const Segments& segments, int64_t tokens, int64_t i) {
  const int64_t begin = clamp_offset(offset_of(segments, i), 0, tokens);
  return {begin, clamp_offset(offset_of(segments, i + 1), begin, tokens)};
}

// Whether token i counts.
IRLFAST_DEVICE bool counts(const TokenMask& mask, int64_t i) {
  if (mask.data == nullptr) return true;
  switch (mask.bytes) {
    case 1:
      return static_cast<const uint8_t*>(mask.data)[i] != 0;
    case 2: {
      const uint16_t bits = static_cast<const uint16_t*>(mask.data)[i];
      return uint16_t(mask.floating ? bits << 1 : bits) != 0;  // -0.0 does not count
    }
    case 4: {
      const uint32_t bits = static_cast<const uint32_t*>(mask.data)[i];
      return (mask.floating ? bits << 1 : bits) != 0;
    }
    default: {
      const uint64_t bits = static_cast<const uint64_t*>(mask.data)[i];
      return (mask.floating ? bits << 1 : bits) != 0;
    }
  }
}

// How many tokens of a span count, the same for every thread. Exact: below 2^53.
IRLFAST_DEVICE double count_tokens(const TokenMask& mask, const Span& span) {
  if (mask.data == nullptr) return double(span.end - span.begin);
  double own = 0;
  for (int64_t i = span.begin + threadIdx.x; i < span.end; i += blockDim.x) own += counts(mask, i) ? 1.0 : 0.0;
  return block_sum(own);
}

template <typename T>
IRLFAST_DEVICE void fill_zero(T* data, int64_t begin, int64_t end) {
  for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) data[i] = T{};
}

// Zeros before the first offset and after the last: there may be a gap, as nobody looks at them. By the blocks of the
// first and the last sequence, or by the only block where there is no sequence.
template <typename T>
IRLFAST_DEVICE void zero_outside(T* data, const Segments& segments, int64_t tokens, int64_t sequence) {
  if (segments.offsets == nullptr) return;
  if (sequence == 0) fill_zero(data, 0, clamp_offset(offset_of(segments, 0), 0, tokens));
  if (sequence == segments.count - 1) {
    fill_zero(data, clamp_offset(offset_of(segments, segments.count), 0, tokens), tokens);
  }
}

}  // namespace irlfast::cuda
