#pragma once

#include <retain/lib/ops/checks.h>

#include <tuple>

// Between the dispatcher and the kernels of the causal convolution.
namespace retain {
using at::Tensor;

/// Shapes, dtypes, devices.
void check_causal_conv1d(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                         const std::optional<Tensor>& initial_state,
                         const std::optional<Tensor>& reset);

/// The same, and shapes and devices of what the backward pass takes and writes.
void check_causal_conv1d_bwd(const std::optional<Tensor>& dy,
                             const std::optional<Tensor>& dlast_state, const Tensor& x,
                             const Tensor& weight, const std::optional<Tensor>& bias,
                             const std::optional<Tensor>& initial_state,
                             const std::optional<Tensor>& reset, const std::optional<Tensor>& rows,
                             const std::optional<Tensor>& columns, const Tensor& dx);

/// The type of bias's gradient: its own, or weight's where it is absent.
inline at::ScalarType dbias_dtype(const Tensor& weight, const std::optional<Tensor>& bias) {
  return present(bias) ? bias->scalar_type() : weight.scalar_type();
}

/// The pass back: gradients of weight, bias and initial_state; dx, of x's shape and dtype, is
/// written. To dy adds the product of rows [T, B, P] and columns [P, d_inner], where they are
/// there.
std::tuple<Tensor, Tensor, Tensor> causal_conv1d_bwd_into(
    const std::optional<Tensor>& dy, const std::optional<Tensor>& dlast_state, const Tensor& x,
    const Tensor& weight, const std::optional<Tensor>& bias, bool silu,
    const std::optional<Tensor>& initial_state, const std::optional<Tensor>& reset,
    const std::optional<Tensor>& rows, const std::optional<Tensor>& columns, const Tensor& dx);

/// Whether kernels may add it as they go, where x is of a half type on a GPU; elsewhere a pass over
/// dy of its own does.
bool adds_product_on_the_way(const Tensor& x);

/// dy with that product.
Tensor with_product(const std::optional<Tensor>& dy, const std::optional<Tensor>& rows,
                    const std::optional<Tensor>& columns);

}  // namespace retain
