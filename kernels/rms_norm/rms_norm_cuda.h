#pragma once
// Root-mean-square norm of rows with residual add on CUDA; the equations are in
// lib/ops/rms_norm.h.
//
// All pointers are device pointers, none is owned or kept. A call launches on its stream and
// returns; it neither allocates nor synchronises. Throws std::runtime_error if CUDA refuses a
// launch.

#include <retain/kernels/common/cuda_types.h>

#include <cstdint>

namespace retain::kernels {

struct RmsNormCudaFwd {
  int64_t T = 0;  ///< rows are T times B
  int64_t B = 0;
  int64_t D = 0;  ///< features a row
  ActivationType type = ActivationType::fp32;
  Activations x;                                        ///< [T, B, D]
  ActivationType residual_type = ActivationType::fp32;  ///< fp32 or `type`
  Activations residual;                                 ///< [T, B, D], or absent
  const float* weight = nullptr;                        ///< [D]
  float eps = 0;
  void* y = nullptr;              ///< out: [T, B, D] contiguous, of `type`
  float* residual_out = nullptr;  ///< out: [T, B, D] contiguous, x + residual
};

struct RmsNormCudaBwd {
  int64_t T = 0;  ///< rows are T times B
  int64_t B = 0;
  int64_t D = 0;                        ///< features a row
  const float* residual_out = nullptr;  ///< [T, B, D] contiguous, of the forward pass
  const float* weight = nullptr;        ///< [D]
  ActivationType type = ActivationType::fp32;
  Activations dy;                        ///< [T, B, D] of `type`, or absent for zero
  const float* dresidual_out = nullptr;  ///< [T, B, D] contiguous, or nullptr for zero
  float eps = 0;
  float* dx = nullptr;             ///< out: [T, B, D] contiguous, of x and of residual alike
  float* dweight = nullptr;        ///< out: [D]
  int64_t parts = 0;               ///< blocks that share the rows
  float* dweight_parts = nullptr;  ///< scratch [parts, D]
  float* scales = nullptr;         ///< scratch [T, B]: 1 / rms of each row
};

/// `parts` by a fixed rule on the sizes.
int64_t rms_norm_cuda_parts(int64_t rows, int64_t D);

void rms_norm_cuda_fwd(const RmsNormCudaFwd& params, CudaStream stream);
void rms_norm_cuda_bwd(const RmsNormCudaBwd& params, CudaStream stream);

}  // namespace retain::kernels
