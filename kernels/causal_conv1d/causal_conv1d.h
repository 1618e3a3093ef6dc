#pragma once
// Depthwise causal convolution over time with resets and explicit state:
//   y_t[d] = act(bias[d] + sum_k weight[k, d] x_{t - (K - 1) + k}[d]),  act = silu or identity.
//
// An item is kConvRows batch rows and one block of kConvLanes channels. Items are independent, and
// no result depends on how they are spread over threads. No pointer is owned or kept: all of them
// need to live only as long as the call.

#include <retain/kernels/common/time_major.h>

#include <cstdint>

namespace retain::kernels {

/// batch rows whose weight gradients are summed in one item
inline constexpr int64_t kConvRows = 8;
inline constexpr int64_t kConvLanes = 64;  ///< channels of one item
/// steps summed in the element type before they go to double
inline constexpr int64_t kConvChunk = 256;

struct ConvSizes {
  int64_t T = 0;  ///< time steps
  int64_t B = 0;  ///< batch rows
  int64_t D = 0;  ///< channels
  int64_t K = 0;  ///< taps

  int64_t row_tiles() const { return (B + kConvRows - 1) / kConvRows; }
  int64_t blocks() const { return (D + kConvLanes - 1) / kConvLanes; }
  int64_t items() const { return row_tiles() * blocks(); }
};

/// What both passes read.
template <typename T>
struct CausalConv1dInputs {
  ConvSizes size;
  TimeMajor<const T> x;              ///< [T, B, D]
  const T* weight = nullptr;         ///< [K, D] contiguous: taps outermost, the oldest first
  const T* bias = nullptr;           ///< [D], or nullptr
  const T* initial_state = nullptr;  ///< [B, K - 1, D] contiguous, or nullptr for zero
  TimeMajor<const bool> reset;       ///< [T, B]: inputs before t count as zero from t on; or absent
  bool silu = false;
};

template <typename T>
struct CausalConv1dFwd {
  CausalConv1dInputs<T> in;
  TimeMajor<T> y;           ///< out: [T, B, D]
  T* last_state = nullptr;  ///< out: [B, K - 1, D] contiguous; may not overlap initial_state
};

template <typename T>
struct CausalConv1dBwd {
  CausalConv1dInputs<T> in;
  TimeMajor<const T> dy;           ///< [T, B, D], or absent for zero
  const T* dlast_state = nullptr;  ///< [B, K - 1, D] contiguous, or nullptr for zero
  TimeMajor<T> dx;                 ///< out: [T, B, D]
  /// in, zeros; out: [row_tiles, K + 1, D], the bias's gradient last
  double* dweight_rows = nullptr;
  T* dinitial_state = nullptr;  ///< in, zeros; out: [B, K - 1, D] contiguous, or nullptr
};

/// Elements of T that the backward needs as scratch memory in each thread, uninitialised.
int64_t causal_conv1d_bwd_scratch(const ConvSizes& size);

/// Items [begin, end) of size.items().
template <typename T>
void causal_conv1d_fwd(const CausalConv1dFwd<T>& params, int64_t begin, int64_t end);
template <typename T>
void causal_conv1d_bwd(const CausalConv1dBwd<T>& params, int64_t begin, int64_t end, T* scratch);

}  // namespace retain::kernels
