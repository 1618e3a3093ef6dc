#pragma once
// What a Mamba block's scan reads, in one pass over x (Gu & Dao 2023, arXiv:2312.00752, section
// 3.4):
//   u = silu(conv1d(x)),   (dt, B, C) = x_proj u,   delta = dt_proj dt.
//
// All pointers are device pointers, none is owned or kept. A call launches on its stream and
// returns; it neither allocates nor synchronises. Throws std::runtime_error if CUDA refuses a
// launch.

#include <retain/kernels/causal_conv1d/causal_conv1d_cuda.h>

namespace retain::kernels {

struct ScanInputsCuda {
  CausalConv1dCudaFwd conv;       ///< from x to u
  int64_t P = 0;                  ///< outputs of x_proj: dt_rank + 2 d_state
  int64_t R = 0;                  ///< dt_rank
  const void* x_proj = nullptr;   ///< [P, D] contiguous activations, as all here
  const void* dt_proj = nullptr;  ///< [D, R] contiguous
  void* dt_B_C = nullptr;         ///< out: [T, B, P] contiguous
  Activations delta = {};         ///< out: [T, B, D]
};

/// Whether there is a kernel for it: half types in words of 16 bytes, as are bias and states, 128,
/// 256 or 512 channels, 2 to 4 taps and SiLU, dt_rank 8 or 16, P even and up to 48, 1 to 2^31 - 1
/// steps of all rows, compute capability 9.0. Asks for the inputs; the outputs must lie likewise.
bool scan_inputs_has_kernel(const ScanInputsCuda& params);

/// Sets conv.in.run_steps by a fixed rule on the sizes.
void cut_into_runs(ScanInputsCuda& params);

void scan_inputs_cuda(const ScanInputsCuda& params, CudaStream stream);

}  // namespace retain::kernels
