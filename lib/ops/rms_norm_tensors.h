#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

// Between the dispatcher and the kernels of the norm.
namespace retain {
using at::Tensor;

/// Shapes, dtypes, devices.
void check_rms_norm(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& residual,
                    double eps);

}  // namespace retain
