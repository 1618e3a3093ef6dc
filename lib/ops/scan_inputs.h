#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace retain {

/// What a Mamba block's scan reads (Gu & Dao 2023, arXiv:2312.00752, section 3.4),
///   u = silu(conv1d(x)),   (dt, B, C) = x_proj u,   delta = dt_proj dt:
/// u [T, B, d_inner], (dt, B, C) [T, B, dt_rank + 2 d_state], delta [T, B, d_inner] and the
/// convolution's last state [B, d_conv - 1, d_inner], of x [T, B, d_inner], the convolution's
/// weights, x_proj [dt_rank + 2 d_state, d_inner], dt_proj [d_inner, dt_rank], the state that the
/// convolution begins with, and reset [T, B]; the two projections are of x's dtype. x is read once
/// and u not at all where they are of a half type on a GPU of compute capability 9.0 or more, with
/// 128, 256 or 512 channels, d_conv 2 to 4, dt_rank 8 or 16 and at most 48 rows of x_proj. Has no
/// gradient of its own.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> scan_inputs(
    const at::Tensor& x, const at::Tensor& conv_weight, const std::optional<at::Tensor>& conv_bias,
    const at::Tensor& x_proj, const at::Tensor& dt_proj,
    const std::optional<at::Tensor>& conv_state, const std::optional<at::Tensor>& reset);

/// The same by the convolution's op and two products, of arguments that are checked.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> scan_inputs_by_products(
    const at::Tensor& x, const at::Tensor& conv_weight, const std::optional<at::Tensor>& conv_bias,
    const at::Tensor& x_proj, const at::Tensor& dt_proj,
    const std::optional<at::Tensor>& conv_state, const std::optional<at::Tensor>& reset);

/// Throws c10::Error that names what does not fit.
void check_scan_inputs(const at::Tensor& x, const at::Tensor& conv_weight,
                       const std::optional<at::Tensor>& conv_bias, const at::Tensor& x_proj,
                       const at::Tensor& dt_proj, const std::optional<at::Tensor>& conv_state,
                       const std::optional<at::Tensor>& reset);

}  // namespace retain
