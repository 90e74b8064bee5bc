// Sequences of tokens that lie one after the other in flat arrays, padded to one width or packed, and masks over them.
#pragma once

#include <cstdint>

namespace irlfast {

struct Segments {
  int64_t count = 0;
  int64_t width = 0;              // padded: sequence i is [i * width, (i + 1) * width)
  const void* offsets = nullptr;  // packed: count + 1 of them, rising; in place of the width
  bool wide_offsets = true;       // they are int64, else int32

  int64_t begin(int64_t i) const {
    if (offsets == nullptr) return i * width;
    return wide_offsets ? static_cast<const int64_t*>(offsets)[i] : int64_t(static_cast<const int32_t*>(offsets)[i]);
  }
  int64_t end(int64_t i) const { return begin(i + 1); }
  int64_t tokens() const { return count == 0 ? 0 : begin(count); }
};

// Non-zero on the tokens that count. Null data counts all.
struct TokenMask {
  const void* data = nullptr;
  int bytes = 1;          // of an element: 1, 2, 4 or 8
  bool floating = false;  // -0.0 is zero, whatever its bits
};

// -1 where offsets rise from 0 to `tokens`; the first sequence whose offset falls; or -2 where an end is another.
int64_t first_invalid_offset(const Segments& segments, int64_t tokens);

}  // namespace irlfast
