#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace retain {
using at::Tensor;

/// One layer of GRU over time with resets (Cho et al. 2014, arXiv:1406.1078; the variant, weights
/// and gate order r, z, n of torch.nn.GRU):
///   r = σ(W_ir x + b_ir + W_hr h + b_hr);  z = σ(W_iz x + b_iz + W_hz h + b_hz)
///   n = tanh(W_in x + b_in + r ⊙ (W_hn h + b_hn));  h' = (1 − z) ⊙ n + z ⊙ h
/// Where reset[t, b] is set, h is replaced by zero before step t, by selection.
///
/// Shapes: x [T, B, I]; w_ih [3H, I]; w_hh [3H, H]; b_ih, b_hh [3H]; initial_state [B, H]; reset
/// [T, B] bool. An undefined tensor counts as absent. Returns y [T, B, H] and last_state [B, H].
/// forward(T) equals T forwards of one step bit for bit. Differentiable in every floating-point
/// input, through both outputs. Throws c10::Error naming the argument.
std::tuple<Tensor, Tensor> gru(const Tensor& x, const Tensor& w_ih, const Tensor& w_hh,
                               const std::optional<Tensor>& b_ih, const std::optional<Tensor>& b_hh,
                               const std::optional<Tensor>& initial_state = {},
                               const std::optional<Tensor>& reset = {});

/// The plain composition of tensor operations, differentiable by autograd; the oracle in fp64.
std::tuple<Tensor, Tensor> gru_reference(const Tensor& x, const Tensor& w_ih, const Tensor& w_hh,
                                         const std::optional<Tensor>& b_ih,
                                         const std::optional<Tensor>& b_hh,
                                         const std::optional<Tensor>& initial_state = {},
                                         const std::optional<Tensor>& reset = {});

}  // namespace retain
