#pragma once

#include <cstdint>

namespace retain::kernels {

/// An array [T, B, …] whose innermost dimension is contiguous; strides count elements, 0 is
/// allowed.
template <typename T>
struct TimeMajor {
  T* data = nullptr;  ///< nullptr where the argument is absent
  int64_t stride_t = 0;
  int64_t stride_b = 0;

  [[gnu::always_inline]] T* at(int64_t t, int64_t b) const {
    return data + t * stride_t + b * stride_b;
  }
};

}  // namespace retain::kernels
