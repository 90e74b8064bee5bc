// What the files of the standalone driver share: raw buffers, elements of every type, and softmax statistics in plain
// loops of long double.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "irlfast/dtype.h"

using irlfast::DType;

// Reports what does not hold, and counts it.
class Expectations {
 public:
  void operator()(bool holds, const std::string& what) {
    if (holds) return;
    std::fprintf(stderr, "FAILED: %s\n", what.c_str());
    ++failures_;
  }
  int failures() const { return failures_; }

 private:
  int failures_ = 0;
};

inline bool close(long double ours, long double exact, long double tolerance) {
  if (std::isnan(exact) || std::isinf(exact)) return std::isnan(ours) == std::isnan(exact) || ours == exact;
  return std::fabs(ours - exact) <= tolerance * (1 + std::fabs(exact));
}

// An exact-size allocation of raw bytes, filled so that reading what was never written shows.
class Buffer {
 public:
  explicit Buffer(int64_t bytes) : data_(new char[size_t(bytes)]) { std::memset(data_.get(), 0xff, size_t(bytes)); }
  template <typename T>
  T* as() const {
    return reinterpret_cast<T*>(data_.get());
  }

 private:
  std::unique_ptr<char[]> data_;
};

inline float bfloat16_value(uint16_t half) {
  const uint32_t wide = uint32_t(half) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

inline float float16_value(uint16_t half) {
  const int exponent = (half >> 10) & 31;
  const float mantissa = float(half & 1023);
  float value = exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
  if (exponent == 31) value = mantissa != 0 ? NAN : INFINITY;
  return half & 0x8000 ? -value : value;
}

inline long double read(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::kFloat64:
      return static_cast<const double*>(data)[i];
    case DType::kBFloat16:
      return bfloat16_value(static_cast<const uint16_t*>(data)[i]);
    case DType::kFloat16:
      return float16_value(static_cast<const uint16_t*>(data)[i]);
    default:
      return static_cast<const float*>(data)[i];
  }
}

// Cuts the mantissa short: inputs need to be of the type, not nearest to anything.
inline void write(void* data, DType dtype, int64_t i, float value) {
  uint32_t wide;
  std::memcpy(&wide, &value, sizeof wide);
  switch (dtype) {
    case DType::kFloat64:
      static_cast<double*>(data)[i] = value;
      break;
    case DType::kBFloat16:
      static_cast<uint16_t*>(data)[i] = uint16_t(wide >> 16);
      break;
    case DType::kFloat16: {
      uint16_t half = uint16_t((wide >> 16) & 0x8000);
      if (std::isinf(value)) {
        half = uint16_t(half | 0x7c00);
      } else if (std::fabs(value) >= 0x1p-14f) {
        half = uint16_t(half | (((wide & 0x7fffffff) - (112u << 23)) >> 13));
      }
      static_cast<uint16_t*>(data)[i] = half;
      break;
    }
    default:
      static_cast<float*>(data)[i] = value;
  }
}

struct Exact {
  std::vector<long double> z, slope;  // scaled logits, dz / dlogit
  long double lse, entropy;
};

inline Exact exact_row(const std::vector<long double>& logits, long double softcap, long double temperature) {
  Exact exact;
  long double max = -INFINITY;
  for (long double logit : logits) {
    const long double t = softcap != 0 ? std::tanh(logit / softcap) : 0;
    exact.z.push_back((softcap != 0 ? softcap * t : logit) / temperature);
    exact.slope.push_back((softcap != 0 ? 1 - t * t : 1) / temperature);
    max = std::max(max, exact.z.back());
  }
  long double sum = 0, weighted = 0;
  for (long double z : exact.z) {
    const long double e = std::exp(z - max);
    sum += e;
    weighted += e == 0 ? 0 : e * (z - max);
  }
  exact.lse = max + std::log(sum);
  exact.entropy = std::log(sum) - weighted / sum;
  return exact;
}
