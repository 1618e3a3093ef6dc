#pragma once
// The selective scan of Mamba-1 (Gu & Dao 2023, arXiv:2312.00752, Algorithm 2) on CUDA; the
// equations are in lib/ops/selective_scan.h.
//
// Time runs in order unless it is cut into segments: then what each segment makes of zero is found
// for its last state alone, from its last reset on; these states are carried over the segments, and
// all segments run at once from the state that enters them. One segment is the sequential order,
// which equals repeated updates bit for bit.
//
// All pointers are device pointers, none is owned or kept. A call launches on its stream and
// returns; it neither allocates nor synchronises. Throws std::runtime_error if CUDA refuses a
// launch.

#include <retain/kernels/common/cuda_types.h>
#include <retain/kernels/common/time_major.h>

#include <algorithm>
#include <cstdint>

namespace retain::kernels {

inline constexpr int64_t kScanCudaTile = 16;  ///< states are kept at multiples of so many steps
inline constexpr int64_t kScanCudaMaxState = 256;  ///< largest d_state

/// What every pass reads.
struct SelectiveScanCudaInputs {
  int64_t T = 0;  ///< time steps
  int64_t B = 0;  ///< batch rows
  int64_t D = 0;  ///< channels (d_inner)
  int64_t N = 0;  ///< state indices (d_state), at most kScanCudaMaxState
  int64_t G = 1;  ///< groups of channels that share B and C; divides D
  ActivationType type = ActivationType::fp32;
  Activations u;         ///< [T, B, D]
  Activations delta;     ///< [T, B, D], before bias and softplus
  Activations z;         ///< [T, B, D] gate, or absent
  Activations B_matrix;  ///< [T, B, G, N]
  Activations C_matrix;  ///< [T, B, G, N]
  int64_t B_stride_g = 0;
  int64_t C_stride_g = 0;
  const float* A = nullptr;           ///< [D, N]
  const float* D_skip = nullptr;      ///< [D], or nullptr
  const float* delta_bias = nullptr;  ///< [D], or nullptr
  bool delta_softplus = false;
  TimeMajor<const bool> reset;  ///< [T, B]: clear the state before step t; or absent
  int64_t segments = 1;         ///< parts that time is cut into
  int64_t segment_steps = 0;    ///< steps of each but the last; a multiple of checkpoint_every
  int64_t checkpoint_every = kScanCudaTile;               ///< a multiple of kScanCudaTile
  ActivationType checkpoint_type = ActivationType::fp32;  ///< or bf16, with bf16 activations
  float* segment_states = nullptr;  ///< scratch [segments, B, D, N] where segments > 1
  float* segment_decays = nullptr;  ///< scratch [segments, B, D, N] where segments > 1
};

struct SelectiveScanCudaFwd {
  SelectiveScanCudaInputs in;
  const float* initial_state = nullptr;  ///< [B, D, N] contiguous, or nullptr for zero
  Activations y;                         ///< out: [T, B, D]
  float* last_state = nullptr;  ///< out: [B, D, N] contiguous; initial_state itself at most
  void* checkpoints = nullptr;  ///< out: [ceil(T / checkpoint_every), B, D, N], the state that
                                ///< enters every checkpoint_every-th step; or nullptr
};

struct SelectiveScanCudaBwd {
  SelectiveScanCudaInputs in;
  const void* checkpoints = nullptr;  ///< as the forward pass wrote them, of scan_checkpoint_type
  Activations y;   ///< [T, B, D] of the forward pass, where states are bf16 and z is there
  Activations dy;  ///< [T, B, D], or absent for zero
  const float* dlast_state = nullptr;  ///< [B, D, N] contiguous, or nullptr for zero
  Activations du;                      ///< out: [T, B, D]
  Activations ddelta;                  ///< out: [T, B, D]
  Activations dz;                      ///< out: [T, B, D]; absent where z is
  void* dB = nullptr;                  ///< out: [T B, G N] activations
  void* dC = nullptr;                  ///< out: [T B, G N] activations
  int64_t pair_stride = 0;             ///< of a row of dB and of dC
  float* dA = nullptr;                 ///< out: [D, N]
  float* dD = nullptr;                 ///< out: [D]
  float* ddelta_bias = nullptr;        ///< out: [D]
  float* dinitial_state = nullptr;     ///< out: [B, D, N] contiguous
  float* dB_blocks = nullptr;          ///< scratch of selective_scan_cuda_block_sums floats
  float* dC_blocks = nullptr;          ///< scratch of selective_scan_cuda_block_sums floats
  float* dA_rows = nullptr;            ///< scratch [segments, B, D, N]
  float* dD_rows = nullptr;            ///< scratch [segments, B, D]
  float* ddelta_bias_rows = nullptr;   ///< scratch [segments, B, D]
};

/// As what a training forward pass keeps the state. The backward pass over bf16 states multiplies
/// them on the tensor cores.
inline ActivationType scan_checkpoint_type(int64_t N, ActivationType type) {
  return type == ActivationType::bf16 && N >= 8 && N <= 32 ? type : ActivationType::fp32;
}

/// How often: such that what it keeps is no larger than u where shared memory holds as many states.
inline int64_t scan_checkpoint_every(int64_t N, ActivationType type) {
  const int64_t steps = element_bytes(scan_checkpoint_type(N, type)) * N / element_bytes(type);
  const int64_t wanted = (steps + kScanCudaTile - 1) / kScanCudaTile * kScanCudaTile;
  return std::clamp<int64_t>(wanted, kScanCudaTile, N > 128 ? 32 : 128);
}

/// Sets segments and segment_steps by a fixed rule on the sizes: one segment where rows and
/// channels fill the device.
void cut_into_segments(SelectiveScanCudaInputs& in, bool backward);

/// Floats in which all blocks of channels leave their shares of dB, or of dC, for a second pass.
int64_t selective_scan_cuda_block_sums(const SelectiveScanCudaInputs& in);

void selective_scan_cuda_fwd(const SelectiveScanCudaFwd& params, CudaStream stream);

/// T = 1 without checkpoints; last_state may be initial_state. The same bits as
/// selective_scan_cuda_fwd.
void selective_scan_cuda_update(const SelectiveScanCudaFwd& params, CudaStream stream);

void selective_scan_cuda_bwd(const SelectiveScanCudaBwd& params, CudaStream stream);

}  // namespace retain::kernels
