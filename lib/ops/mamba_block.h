#pragma once

#include <retain/lib/ops/mamba_update.h>

namespace retain {

/// The Mamba-1 block (Gu & Dao 2023, arXiv:2312.00752, section 3.4, figure 3) over a sequence:
///   y = out_proj mamba_inner(in_proj x)
/// Shapes: x [T, B, d_model]; in_proj_weight [2 d_inner, d_model]; out_proj_weight [d_model,
/// d_inner]; the rest as mamba_inner's. Returns y [T, B, d_model] and the two states after the last
/// step. With gradients it is one node of the graph, whose gradients have none (create_graph
/// throws). Gradients of weights are sums over all steps, those before a reset, too: what is not
/// finite there reaches them. Scan and convolution give a row the same bits alone as in a batch; a
/// product of matrices need not, because LibTorch adds up in an order that follows its size.
/// Autocast rounds x and the weights of all products to its type; states stay fp32. Throws
/// c10::Error naming the argument.
std::tuple<Tensor, Tensor, Tensor> mamba_block(const Tensor& x, const Tensor& in_proj_weight,
                                               const Tensor& out_proj_weight,
                                               const Tensor& conv_state, const Tensor& ssm_state,
                                               const MambaWeights& weights,
                                               const std::optional<Tensor>& reset = {});

/// The same by the references of its ops, plain tensor operations that autograd differentiates; no
/// autocast.
std::tuple<Tensor, Tensor, Tensor> mamba_block_reference(
    const Tensor& x, const Tensor& in_proj_weight, const Tensor& out_proj_weight,
    const Tensor& conv_state, const Tensor& ssm_state, const MambaWeights& weights,
    const std::optional<Tensor>& reset = {});

/// What lies between the two:
///   (x, z) = xz;  x = silu(conv1d(x));  (dt, B, C) = x_proj x;  delta = dt_proj dt
///   y = selective_scan(x, delta, A, B, C, D, z), with softplus and dt_proj_bias
/// Shapes: xz [T, B, 2 d_inner]; conv_state [B, d_conv - 1, d_inner]; ssm_state [B, d_inner,
/// d_state]; reset [T, B] bool. Returns y [T, B, d_inner] of xz's dtype and the two states after
/// the last step. Differentiable in all but reset. Throws c10::Error naming the argument.
std::tuple<Tensor, Tensor, Tensor> mamba_inner(const Tensor& xz, const Tensor& conv_state,
                                               const Tensor& ssm_state, const MambaWeights& weights,
                                               const std::optional<Tensor>& reset = {});

}  // namespace retain
