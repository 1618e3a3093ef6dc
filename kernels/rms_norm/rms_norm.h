#pragma once
// Root-mean-square norm of rows with residual add (Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4):
//   s = x + residual;  y = s / sqrt(mean(s²) + eps) · weight
//
// All rows are contiguous. An item is kNormRows rows; items are independent, and no result depends
// on how they are spread over threads. No pointer is owned or kept.

#include <cstdint>

namespace retain::kernels {

inline constexpr int64_t kNormRows = 64;  ///< rows whose weight gradients are summed in one item

struct NormSizes {
  int64_t M = 0;  ///< rows
  int64_t D = 0;  ///< features a row

  int64_t items() const { return (M + kNormRows - 1) / kNormRows; }
};

template <typename T>
struct RmsNormFwd {
  NormSizes size;
  const T* x = nullptr;         ///< [M, D]
  const T* residual = nullptr;  ///< [M, D], or nullptr
  const T* weight = nullptr;    ///< [D]
  double eps = 0;
  T* y = nullptr;             ///< out: [M, D]
  T* residual_out = nullptr;  ///< out: [M, D], s; may be `residual` or `x` itself
};

template <typename T>
struct RmsNormBwd {
  NormSizes size;
  const T* residual_out = nullptr;   ///< [M, D], s of the forward pass
  const T* weight = nullptr;         ///< [D]
  const T* dy = nullptr;             ///< [M, D], or nullptr for zero
  const T* dresidual_out = nullptr;  ///< [M, D], or nullptr for zero
  double eps = 0;
  T* dx = nullptr;            ///< out: [M, D], the gradient of x and of residual alike
  T* dweight_rows = nullptr;  ///< in, zeros; out: [items, D]; dweight is their sum
};

/// Items [begin, end) of size.items().
template <typename T>
void rms_norm_fwd(const RmsNormFwd<T>& params, int64_t begin, int64_t end);
template <typename T>
void rms_norm_bwd(const RmsNormBwd<T>& params, int64_t begin, int64_t end);

}  // namespace retain::kernels
