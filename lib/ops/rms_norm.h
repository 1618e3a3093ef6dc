#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace retain {
using at::Tensor;

/// Root-mean-square norm with residual add (Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4):
///   residual_out = x + residual (x itself without residual);  y = residual_out /
///   sqrt(mean(residual_out²) + eps) · weight.
/// Shapes: x, residual [..., D]; weight [D]. Returns y and residual_out, both of x's shape;
/// residual_out is fp32 for half types. Differentiable in x, weight, residual, through both
/// outputs. Throws c10::Error naming the argument.
std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight,
                                    const std::optional<Tensor>& residual = {}, double eps = 1e-5);

/// The plain composition of tensor operations, differentiable by autograd; the oracle in fp64.
std::tuple<Tensor, Tensor> rms_norm_reference(const Tensor& x, const Tensor& weight,
                                              const std::optional<Tensor>& residual = {},
                                              double eps = 1e-5);

}  // namespace retain
