#pragma once
// Depthwise causal convolution over time with resets and explicit state on CUDA; the equations are
// in lib/ops/causal_conv1d.h.
//
// All pointers are device pointers, none is owned or kept. A call launches on its stream and
// returns; it neither allocates nor synchronises. Throws std::runtime_error if CUDA refuses a
// launch.

#include <retain/kernels/common/cuda_types.h>
#include <retain/kernels/common/time_major.h>

#include <cstdint>

namespace retain::kernels {

/// What both passes read.
struct CausalConv1dCudaInputs {
  int64_t T = 0;  ///< time steps
  int64_t B = 0;  ///< batch rows
  int64_t D = 0;  ///< channels
  int64_t K = 1;  ///< taps
  ActivationType type = ActivationType::fp32;
  Activations x;                         ///< [T, B, D]
  const float* weight = nullptr;         ///< [D, K] contiguous, the oldest tap first
  const float* bias = nullptr;           ///< [D], or nullptr
  const float* initial_state = nullptr;  ///< [B, K - 1, D] contiguous, or nullptr for zero
  TimeMajor<const bool> reset;  ///< [T, B]: inputs before t count as zero from t on; or absent
  bool silu = false;
  int64_t run_steps = 0;  ///< time steps that one thread walks over; a multiple of 8
};

struct CausalConv1dCudaFwd {
  CausalConv1dCudaInputs in;
  Activations y = {};           ///< out: [T, B, D]
  float* last_state = nullptr;  ///< out: [B, K - 1, D] contiguous; may not overlap initial_state
};

struct CausalConv1dCudaBwd {
  CausalConv1dCudaInputs in;
  Activations dy;                      ///< [T, B, D], or absent for zero
  const float* dlast_state = nullptr;  ///< [B, K - 1, D] contiguous, or nullptr for zero
  Activations rows = {};               ///< [T, B, P]: rows · columns adds to dy; or absent
  const void* columns = nullptr;       ///< [P, D] contiguous activations
  int64_t P = 0;                       ///< if conv_adds_product
  Activations dx;                      ///< out: [T, B, D]
  float* dweight = nullptr;            ///< out: [D, K]
  float* dbias = nullptr;              ///< out: [D]
  float* dinitial_state = nullptr;     ///< out: [B, K - 1, D] contiguous, or nullptr
  int64_t parts = 0;                   ///< blocks that share the rows of a channel
  float* dweight_parts = nullptr;      ///< scratch [parts, D, K]
  float* dbias_parts = nullptr;        ///< scratch [parts, D]
  float* dsum = nullptr;               ///< scratch [T, B, D] if conv_needs_dsum, or nullptr
};

/// Sets run_steps by a fixed rule on the sizes.
void cut_into_runs(CausalConv1dCudaFwd& params);
/// Sets run_steps and parts.
void cut_into_runs(CausalConv1dCudaBwd& params);

/// Whether the backward takes the way by dsum: for any number of taps but 2, 3 and 4, without steps
/// or dy, or where channels do not lie in fours. Asks for all pointers but scratch memory.
bool conv_needs_dsum(const CausalConv1dCudaBwd& params);

/// Whether the backward adds a product to dy on its way: of half types in whole words, with SiLU,
/// all channels in blocks of 128. Asks for all pointers but scratch memory.
bool conv_adds_product(const CausalConv1dCudaBwd& params);

void causal_conv1d_cuda_fwd(const CausalConv1dCudaFwd& params, CudaStream stream);
void causal_conv1d_cuda_bwd(const CausalConv1dCudaBwd& params, CudaStream stream);

}  // namespace retain::kernels
