// Generalised advantage estimation: one scan a sequence, from its last token to its first.
#pragma once

#include <cstdint>

#include "irlfast/dtype.h"
#include "irlfast/segments.h"

namespace irlfast {

struct GaeInput {
  Segments segments;
  const void* rewards = nullptr;  // [tokens], as values; float or double
  const void* values = nullptr;
  const void* last_values = nullptr;  // [count], the value after the last unmasked token; null for 0
  DType dtype = DType::kFloat32;
  TokenMask mask;
  double gamma = 1;
  double lam = 1;
};

// Both [tokens] in the input's type, 0 where masked.
void gae(const GaeInput& input, void* advantages, void* returns, int threads);

}  // namespace irlfast
