#pragma once
// The acting step of a Mamba-1 block between in_proj and out_proj as one CUDA kernel; the equations
// are in lib/ops/mamba_block.h.
//
// All pointers are device pointers, none is owned or kept. A call launches on its stream and
// returns; it neither allocates nor synchronises. Throws std::runtime_error if CUDA refuses a
// launch.

#include <retain/kernels/common/cuda_types.h>

#include <cstdint>

namespace retain::kernels {

struct MambaUpdateCuda {
  int64_t B = 0;  ///< batch rows
  int64_t D = 0;  ///< channels (d_inner)
  int64_t N = 0;  ///< state indices (d_state)
  int64_t K = 1;  ///< taps of the convolution
  int64_t R = 0;  ///< dt_rank
  ActivationType type = ActivationType::fp32;
  ActivationType weight_type = ActivationType::fp32;  ///< of all weights: fp32, or type
  const void* xz = nullptr;                           ///< [B, 2 D], rows contiguous
  int64_t xz_stride = 0;                              ///< elements from row to row
  const void* conv_weight = nullptr;                  ///< [D, K] contiguous, the oldest tap first
  const void* conv_bias = nullptr;                    ///< [D], or nullptr
  const void* x_proj_weight = nullptr;                ///< [R + 2 N, D] contiguous
  const void* dt_weight = nullptr;                    ///< [D, R] contiguous
  const void* dt_bias = nullptr;                      ///< [D], or nullptr
  const void* A_log = nullptr;                        ///< [D, N] contiguous: A = -exp(A_log)
  const void* D_skip = nullptr;                       ///< [D], or nullptr
  const bool* reset = nullptr;                        ///< [B], or nullptr
  int64_t reset_stride = 0;
  const float* conv_state = nullptr;  ///< [B, K - 1, D] contiguous
  const float* ssm_state = nullptr;   ///< [B, D, N] contiguous
  float* new_conv_state = nullptr;    ///< out: may be conv_state
  float* new_ssm_state = nullptr;     ///< out: may be ssm_state
  void* y = nullptr;                  ///< out: [B, D] contiguous
};

/// Whether the kernel takes these sizes on the current device: of compute capability 9.0 or more
/// and built for it; K is 4; N is 16 and D 32, 64, 128, 192, 256, 384, 512, 768 or 1024, or N is 32
/// and D one of those up to 512; B is such that indices fit into 32 bits.
bool mamba_update_cuda_takes(const MambaUpdateCuda& params);

void mamba_update_cuda(const MambaUpdateCuda& params, CudaStream stream);

}  // namespace retain::kernels
