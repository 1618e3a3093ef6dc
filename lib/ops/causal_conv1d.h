#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace retain {
using at::Tensor;

/// Depthwise causal convolution over time with explicit state:
///   y_t[d] = act(bias[d] + sum_k weight[d, k] x_{t - (K - 1) + k}[d]),  act = silu or identity.
/// Inputs before t = 0 come from initial_state (the last K - 1 inputs, oldest first), or are 0.
/// Inputs on the far side of a reset count as 0 (by selection).
///
/// Shapes: x [T, B, D]; weight [D, K]; bias [D]; initial_state [B, K - 1, D]; reset [T, B] bool. An
/// undefined tensor counts as absent. Returns y [T, B, D] and last_state [B, K - 1, D] (zeros where
/// a reset cut it). Differentiable in x, weight, bias, initial_state, through both outputs. Throws
/// c10::Error naming the argument.
std::tuple<Tensor, Tensor> causal_conv1d(const Tensor& x, const Tensor& weight,
                                         const std::optional<Tensor>& bias = {}, bool silu = false,
                                         const std::optional<Tensor>& initial_state = {},
                                         const std::optional<Tensor>& reset = {});

/// The plain composition of tensor operations, differentiable by autograd; the oracle in fp64.
std::tuple<Tensor, Tensor> causal_conv1d_reference(const Tensor& x, const Tensor& weight,
                                                   const std::optional<Tensor>& bias = {},
                                                   bool silu = false,
                                                   const std::optional<Tensor>& initial_state = {},
                                                   const std::optional<Tensor>& reset = {});

}  // namespace retain
