#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

// Between the dispatcher and the kernels of the causal convolution.
namespace retain {
using at::Tensor;

/// Shapes, dtypes, devices.
void check_causal_conv1d(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                         const std::optional<Tensor>& initial_state,
                         const std::optional<Tensor>& reset);

/// The type of bias's gradient: its own, or weight's where it is absent.
inline at::ScalarType dbias_dtype(const Tensor& weight, const std::optional<Tensor>& bias) {
  return bias.has_value() && bias->defined() ? bias->scalar_type() : weight.scalar_type();
}

}  // namespace retain
