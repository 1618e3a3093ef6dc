#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <c10/cuda/CUDAGuard.h>
#include <retain/kernels/causal_conv1d/causal_conv1d_cuda.h>
#include <retain/kernels/mamba_update/mamba_update_cuda.h>
#include <retain/kernels/selective_scan/selective_scan_cuda.h>
#include <retain/lib/ops/cuda_arguments.h>
#include <retain/lib/ops/mamba_inner_tensors.h>
#include <torch/library.h>

namespace retain {
namespace {

using Optional = std::optional<Tensor>;

/// A [B, features] tensor as a sequence of one step.
kernels::Activations one_step(const Tensor& tensor, int64_t feature = 0) {
  auto* first = static_cast<char*>(tensor.data_ptr()) + feature * tensor.element_size();
  return {first, 0, tensor.stride(0)};
}

kernels::TimeMajor<const bool> one_step(const Optional& reset) {
  if (!present(reset)) return {};
  return {reset->const_data_ptr<bool>(), 0, reset->stride(0)};
}

/// silu(conv1d(x)) of the first half of xz; `from` and `to`, the states, may be one tensor.
Tensor convolve(const Tensor& xz, const Tensor& from, const MambaWeights& weights,
                const Optional& reset, const Tensor& to) {
  const auto weight = dense(weights.conv_weight, at::kFloat);
  const auto bias = dense(weights.conv_bias, at::kFloat);
  const auto x = at::empty({xz.size(0), weight.size(0)}, xz.options());
  kernels::CausalConv1dCudaFwd params{.in = {.T = 1,
                                             .B = xz.size(0),
                                             .D = weight.size(0),
                                             .K = weight.size(1),
                                             .type = activation_type(xz.scalar_type()),
                                             .x = one_step(xz),
                                             .weight = pointer<float>(weight),
                                             .bias = pointer<float>(bias),
                                             .initial_state = pointer<float>(from),
                                             .reset = one_step(reset),
                                             .silu = true},
                                      .y = one_step(x),
                                      .last_state = mutable_pointer<float>(to)};
  kernels::cut_into_runs(params);
  kernels::causal_conv1d_cuda_fwd(params, current_stream());
  return x;
}

/// All that follows x_proj; `from` and `to`, the states, may be one tensor.
Tensor scan(const Tensor& x, const Tensor& xz, const Tensor& dt_B_C, const Tensor& from,
            const MambaWeights& weights, const Optional& reset, const Tensor& to) {
  const auto dt_weight = dense(weights.dt_proj_weight, at::kFloat);
  const auto dt_bias = dense(weights.dt_proj_bias, at::kFloat);
  const auto A_log = dense(weights.A_log, at::kFloat), D = dense(weights.D, at::kFloat);
  const int64_t channels = A_log.size(0), N = A_log.size(1), R = dt_weight.size(1);
  TORCH_CHECK(N <= kernels::kScanCudaMaxState, "mamba_update: d_state must be at most ",
              kernels::kScanCudaMaxState, " on CUDA, got ", N);
  const auto y = at::empty_like(x);
  const kernels::SelectiveScanCudaInputs in{.T = 1,
                                            .B = x.size(0),
                                            .D = channels,
                                            .N = N,
                                            .type = activation_type(x.scalar_type()),
                                            .u = one_step(x),
                                            .z = one_step(xz, channels),
                                            .B_matrix = one_step(dt_B_C, R),
                                            .C_matrix = one_step(dt_B_C, R + N),
                                            .A = pointer<float>(A_log),
                                            .D_skip = pointer<float>(D),
                                            .delta_bias = pointer<float>(dt_bias),
                                            .delta_softplus = true,
                                            .reset = one_step(reset)};
  kernels::selective_scan_cuda_update({.scan = {.in = in,
                                                .initial_state = pointer<float>(from),
                                                .y = one_step(y),
                                                .last_state = mutable_pointer<float>(to)},
                                       .A_is_log = true,
                                       .dt = one_step(dt_B_C),
                                       .dt_weight = pointer<float>(dt_weight),
                                       .R = R},
                                      current_stream());
  return y;
}

/// The step in one kernel, or an undefined tensor where none takes these sizes.
Tensor fused(const Tensor& xz, const Tensor& conv_from, const Tensor& ssm_from,
             const MambaWeights& w, const Optional& reset, const Tensor& conv_to,
             const Tensor& ssm_to) {
  const auto conv_weight = dense(w.conv_weight, at::kFloat);
  const auto conv_bias = dense(w.conv_bias, at::kFloat);
  const auto x_proj = dense(w.x_proj_weight, at::kFloat);
  const auto dt_weight = dense(w.dt_proj_weight, at::kFloat);
  const auto dt_bias = dense(w.dt_proj_bias, at::kFloat);
  const auto A_log = dense(w.A_log, at::kFloat), D = dense(w.D, at::kFloat);
  kernels::MambaUpdateCuda params{.B = xz.size(0),
                                  .D = A_log.size(0),
                                  .N = A_log.size(1),
                                  .K = conv_weight.size(1),
                                  .R = dt_weight.size(1),
                                  .type = activation_type(xz.scalar_type()),
                                  .xz = xz.const_data_ptr(),
                                  .xz_stride = xz.stride(0),
                                  .conv_weight = pointer<float>(conv_weight),
                                  .conv_bias = pointer<float>(conv_bias),
                                  .x_proj_weight = pointer<float>(x_proj),
                                  .dt_weight = pointer<float>(dt_weight),
                                  .dt_bias = pointer<float>(dt_bias),
                                  .A_log = pointer<float>(A_log),
                                  .D_skip = pointer<float>(D),
                                  .reset = present(reset) ? reset->const_data_ptr<bool>() : nullptr,
                                  .reset_stride = present(reset) ? reset->stride(0) : 0,
                                  .conv_state = pointer<float>(conv_from),
                                  .ssm_state = pointer<float>(ssm_from),
                                  .new_conv_state = mutable_pointer<float>(conv_to),
                                  .new_ssm_state = mutable_pointer<float>(ssm_to)};
  if (!kernels::mamba_update_cuda_takes(params)) return {};
  const auto y = at::empty({params.B, params.D}, xz.options());
  params.y = y.mutable_data_ptr();
  kernels::mamba_update_cuda(params, current_stream());
  return y;
}

/// One step from the states `conv_from`, `ssm_from` to `conv_to`, `ssm_to`; all dense fp32.
Tensor step(const Tensor& xz_in, const Tensor& conv_from, const Tensor& ssm_from,
            const MambaWeights& weights, const Optional& reset, const Tensor& conv_to,
            const Tensor& ssm_to) {
  const c10::cuda::CUDAGuard guard(xz_in.device());
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(
      at::autocast::get_autocast_dispatch_key_from_device_type(at::kCUDA));
  const auto xz = with_dense_rows(xz_in, xz_in.scalar_type());
  const auto y = fused(xz, conv_from, ssm_from, weights, reset, conv_to, ssm_to);
  if (y.defined()) return y;
  const auto x = convolve(xz, conv_from, weights, reset, conv_to);
  const auto dt_B_C = at::linear(x, weights.x_proj_weight.to(x.scalar_type()));
  return scan(x, xz, dt_B_C, ssm_from, weights, reset, ssm_to);
}

/// fp64 has no kernels.
std::tuple<Tensor, Tensor, Tensor> reference(MAMBA_UPDATE_PARAMETERS) {
  const auto weights = gather_mamba_weights(MAMBA_UPDATE_ARGUMENTS);
  const auto resets = present(reset) ? Optional(reset->unsqueeze(0)) : std::nullopt;
  auto [y, conv, ssm] = mamba_inner(xz.unsqueeze(0), conv_state, ssm_state, weights, resets);
  return {y.squeeze(0), conv, ssm};
}

std::tuple<Tensor, Tensor, Tensor> update(MAMBA_UPDATE_PARAMETERS) {
  const auto weights = gather_mamba_weights(MAMBA_UPDATE_ARGUMENTS);
  check_mamba_update("mamba_update", xz, conv_state, ssm_state, weights, reset);
  if (xz.scalar_type() == at::kDouble) return reference(MAMBA_UPDATE_ARGUMENTS);
  const auto conv = dense(conv_state, at::kFloat), ssm = dense(ssm_state, at::kFloat);
  const auto new_conv = at::empty_like(conv), new_ssm = at::empty_like(ssm);
  const auto y = step(xz, conv, ssm, weights, reset, new_conv, new_ssm);
  return {y, new_conv, new_ssm};
}

bool is_dense_float(const Tensor& state) {
  return state.scalar_type() == at::kFloat && state.is_contiguous();
}

Tensor update_(MAMBA_UPDATE_PARAMETERS) {
  const auto weights = gather_mamba_weights(MAMBA_UPDATE_ARGUMENTS);
  check_mamba_update("mamba_update_", xz, conv_state, ssm_state, weights, reset);
  const bool in_place = is_dense_float(conv_state) && is_dense_float(ssm_state);
  if (in_place && xz.scalar_type() != at::kDouble) {
    return step(xz, conv_state, ssm_state, weights, reset, conv_state, ssm_state);
  }
  const auto [y, new_conv, new_ssm] = update(MAMBA_UPDATE_ARGUMENTS);
  Tensor(conv_state).copy_(new_conv);
  Tensor(ssm_state).copy_(new_ssm);
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(retain, CUDA, m) {
  m.impl("mamba_update", update);
  m.impl("mamba_update_", update_);
}

}  // namespace retain
