#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

// Between the dispatcher and the kernels of the norm.
namespace retain {
using at::Tensor;

/// Shapes, dtypes, devices.
void check_rms_norm(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& residual,
                    double eps);

/// Shapes and devices of what the backward pass takes.
void check_rms_norm_bwd(const std::optional<Tensor>& dy, const std::optional<Tensor>& dresidual_out,
                        const Tensor& residual_out, const Tensor& weight);

}  // namespace retain
