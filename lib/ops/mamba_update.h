#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace retain {
using at::Tensor;

/// What a Mamba-1 block holds between its in_proj and its out_proj, by the public models' names.
struct MambaWeights {
  Tensor conv_weight;     ///< [d_inner, d_conv], the oldest tap first
  Tensor conv_bias;       ///< [d_inner], or undefined
  Tensor x_proj_weight;   ///< [dt_rank + 2 d_state, d_inner]: rows of dt, B, C
  Tensor dt_proj_weight;  ///< [d_inner, dt_rank]
  Tensor dt_proj_bias;    ///< [d_inner], or undefined
  Tensor A_log;           ///< [d_inner, d_state]: A = -exp(A_log)
  Tensor D;               ///< [d_inner], or undefined
};

/// One step of the Mamba-1 block between in_proj and out_proj, the acting step (Gu & Dao 2023,
/// arXiv:2312.00752, section 3.4, figure 3); mamba_inner is its sequence and says the equations.
/// Shapes: xz [B, 2 d_inner]; conv_state [B, d_conv - 1, d_inner]; ssm_state [B, d_inner, d_state];
/// reset [B] bool. Returns y [B, d_inner] and the two new states. On CUDA (compute capability 9.0
/// on) without gradients this is one kernel where d_conv is 4, d_state 16 and d_inner 32, 64, 128,
/// 192, 256, 384, 512, 768 or 1024, or d_state 32 and d_inner one of those up to 512; its products
/// are summed in another order than a sequence's. Elsewhere it is the sequence of one. Throws
/// c10::Error naming the argument.
std::tuple<Tensor, Tensor, Tensor> mamba_update(const Tensor& xz, const Tensor& conv_state,
                                                const Tensor& ssm_state,
                                                const MambaWeights& weights,
                                                const std::optional<Tensor>& reset = {});

/// The same with the states written in place; returns y. Addresses stay, so that a CUDA graph can
/// hold the call. Throws if a gradient is asked for.
Tensor mamba_update_(const Tensor& xz, const Tensor& conv_state, const Tensor& ssm_state,
                     const MambaWeights& weights, const std::optional<Tensor>& reset = {});

}  // namespace retain
