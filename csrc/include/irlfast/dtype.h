// Element types of the tensors that cross the boundary, as raw storage.
#pragma once

#include <cstdint>

namespace irlfast {

enum class DType : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };
constexpr int kDTypes = 4;

// Storage of the two 16-bit formats: distinct types, so that conversions are chosen by overload.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

constexpr int64_t dtype_size(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

}  // namespace irlfast
