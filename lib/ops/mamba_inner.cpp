#include <retain/lib/ops/mamba_inner.h>

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <retain/lib/ops/causal_conv1d.h>
#include <retain/lib/ops/mamba_inner_tensors.h>
#include <retain/lib/ops/selective_scan.h>
#include <retain/lib/ops/thin_linear.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/library.h>

#include <algorithm>

namespace retain {
namespace {

using Optional = std::optional<Tensor>;
using Outputs = std::tuple<Tensor, Tensor, Tensor>;

// The scan keeps decay and step in fp32 whatever the weights' type.
Tensor at_least_fp32(const Tensor& t) {
  return !t.defined() || t.scalar_type() == at::kDouble ? t : t.to(at::kFloat);
}

Optional with_time(const Optional& tensor) {
  return present(tensor) ? Optional(tensor->unsqueeze(0)) : std::nullopt;
}

/// The step as a sequence of one, for every device and for gradients.
Outputs composed_update(MAMBA_UPDATE_PARAMETERS) {
  const auto weights = gather_mamba_weights(MAMBA_UPDATE_ARGUMENTS);
  check_mamba_update("mamba_update", xz, conv_state, ssm_state, weights, reset);
  auto [y, new_conv_state, new_ssm_state] =
      mamba_inner(xz.unsqueeze(0), conv_state, ssm_state, weights, with_time(reset));
  return {y.squeeze(0), new_conv_state, new_ssm_state};
}

Outputs call_update(MAMBA_UPDATE_PARAMETERS) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("retain::mamba_update", "")
                             .typed<decltype(composed_update)>();
  return op.call(MAMBA_UPDATE_ARGUMENTS);
}

Tensor composed_update_(MAMBA_UPDATE_PARAMETERS) {
  const auto [y, new_conv_state, new_ssm_state] = call_update(MAMBA_UPDATE_ARGUMENTS);
  Tensor(conv_state).copy_(new_conv_state);
  Tensor(ssm_state).copy_(new_ssm_state);
  return y;
}

Tensor call_update_(MAMBA_UPDATE_PARAMETERS) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("retain::mamba_update_", "")
                             .typed<decltype(composed_update_)>();
  return op.call(MAMBA_UPDATE_ARGUMENTS);
}

bool needs_gradient(MAMBA_UPDATE_PARAMETERS) {
  static_cast<void>(reset);
  if (!at::GradMode::is_enabled()) return false;
  const auto all = {xz,
                    conv_state,
                    ssm_state,
                    conv_weight,
                    value_or_undefined(conv_bias),
                    x_proj_weight,
                    dt_proj_weight,
                    value_or_undefined(dt_proj_bias),
                    A_log,
                    value_or_undefined(D)};
  return std::any_of(all.begin(), all.end(),
                     [](const Tensor& t) { return t.defined() && t.requires_grad(); });
}

Outputs update_autograd(MAMBA_UPDATE_PARAMETERS) {
  if (needs_gradient(MAMBA_UPDATE_ARGUMENTS)) return composed_update(MAMBA_UPDATE_ARGUMENTS);
  const at::AutoDispatchBelowADInplaceOrView guard;
  return call_update(MAMBA_UPDATE_ARGUMENTS);
}

Tensor update_autograd_(MAMBA_UPDATE_PARAMETERS) {
  TORCH_CHECK(!needs_gradient(MAMBA_UPDATE_ARGUMENTS),
              "mamba_update_: the states are written in place, without gradients; mamba_update "
              "gives them, and a NoGradGuard does without");
  Tensor y;
  {
    const at::AutoDispatchBelowADInplaceOrView guard;
    y = call_update_(MAMBA_UPDATE_ARGUMENTS);
  }
  for (const Tensor& state : {conv_state, ssm_state}) {
    if (!state.is_inference()) torch::autograd::impl::bump_version(state);
  }
  return y;
}

}  // namespace

void check_mamba_update(const char* op, const Tensor& xz, const Tensor& conv_state,
                        const Tensor& ssm_state, const MambaWeights& weights,
                        const Optional& reset) {
  check_rank(op, "xz", xz, "[B, 2 d_inner]");
  check_floating(op, "xz", xz);
  check_rank(op, "conv_weight", weights.conv_weight, "[d_inner, d_conv]");
  check_rank(op, "A_log", weights.A_log, "[d_inner, d_state]");
  check_rank(op, "dt_proj_weight", weights.dt_proj_weight, "[d_inner, dt_rank]");
  const auto B = xz.sym_size(0), D = weights.A_log.sym_size(0), N = weights.A_log.sym_size(1),
             K = weights.conv_weight.sym_size(1), R = weights.dt_proj_weight.sym_size(1);
  const auto check = [&](const char* name, const Tensor& tensor, const char* layout,
                         std::initializer_list<c10::SymInt> sizes) {
    check_shape(op, name, tensor, layout, sizes);
    check_like(op, name, tensor, "xz", xz);
  };
  check_shape(op, "xz", xz, "[B, 2 d_inner]", {B, 2 * D});
  check("conv_state", conv_state, "[B, d_conv - 1, d_inner]", {B, K - 1, D});
  check("ssm_state", ssm_state, "[B, d_inner, d_state]", {B, D, N});
  check("conv_weight", weights.conv_weight, "[d_inner, d_conv]", {D, K});
  check("x_proj_weight", weights.x_proj_weight, "[dt_rank + 2 d_state, d_inner]", {R + 2 * N, D});
  check("dt_proj_weight", weights.dt_proj_weight, "[d_inner, dt_rank]", {D, R});
  check("A_log", weights.A_log, "[d_inner, d_state]", {D, N});
  if (weights.conv_bias.defined()) check("conv_bias", weights.conv_bias, "[d_inner]", {D});
  if (weights.dt_proj_bias.defined()) check("dt_proj_bias", weights.dt_proj_bias, "[d_inner]", {D});
  if (weights.D.defined()) check("D", weights.D, "[d_inner]", {D});
  if (present(reset)) check_reset(op, *reset, "[B]", {B}, "xz", xz);
}

Outputs mamba_inner(const Tensor& xz, const Tensor& conv_state, const Tensor& ssm_state,
                    const MambaWeights& weights, const Optional& reset) {
  const auto x_z = xz.chunk(2, -1);  // views
  const int64_t R = weights.dt_proj_weight.size(1), N = weights.A_log.size(1);
  const auto [x, new_conv_state] = causal_conv1d(x_z[0], weights.conv_weight, weights.conv_bias,
                                                 /*silu=*/true, conv_state, reset);
  const auto dt_B_C = at::linear(x, weights.x_proj_weight).split_with_sizes({R, N, N}, -1);
  const auto delta = thin_linear(dt_B_C[0], weights.dt_proj_weight);  // its bias goes into the scan
  const auto A = -at_least_fp32(weights.A_log).exp();
  const auto [y, new_ssm_state] = selective_scan(
      x, delta, A, dt_B_C[1].unsqueeze(2), dt_B_C[2].unsqueeze(2), at_least_fp32(weights.D),
      /*z=*/x_z[1], at_least_fp32(weights.dt_proj_bias), /*delta_softplus=*/true, ssm_state, reset);
  return {y, new_conv_state, new_ssm_state};
}

Outputs mamba_update(const Tensor& xz, const Tensor& conv_state, const Tensor& ssm_state,
                     const MambaWeights& w, const Optional& reset) {
  check_mamba_update("mamba_update", xz, conv_state, ssm_state, w, reset);
  return call_update(xz, conv_state, ssm_state, w.conv_weight, if_present(w.conv_bias),
                     w.x_proj_weight, w.dt_proj_weight, if_present(w.dt_proj_bias), w.A_log,
                     if_present(w.D), if_present(reset));
}

Tensor mamba_update_(const Tensor& xz, const Tensor& conv_state, const Tensor& ssm_state,
                     const MambaWeights& w, const Optional& reset) {
  check_mamba_update("mamba_update_", xz, conv_state, ssm_state, w, reset);
  return call_update_(xz, conv_state, ssm_state, w.conv_weight, if_present(w.conv_bias),
                      w.x_proj_weight, w.dt_proj_weight, if_present(w.dt_proj_bias), w.A_log,
                      if_present(w.D), if_present(reset));
}

TORCH_LIBRARY_FRAGMENT(retain, m) {
  m.def(
      "mamba_update(Tensor xz, Tensor conv_state, Tensor ssm_state, Tensor conv_weight, "
      "Tensor? conv_bias, Tensor x_proj_weight, Tensor dt_proj_weight, Tensor? dt_proj_bias, "
      "Tensor A_log, Tensor? D=None, Tensor? reset=None) "
      "-> (Tensor y, Tensor new_conv_state, Tensor new_ssm_state)");
  m.def(
      "mamba_update_(Tensor xz, Tensor(a!) conv_state, Tensor(b!) ssm_state, Tensor conv_weight, "
      "Tensor? conv_bias, Tensor x_proj_weight, Tensor dt_proj_weight, Tensor? dt_proj_bias, "
      "Tensor A_log, Tensor? D=None, Tensor? reset=None) -> Tensor");
}

TORCH_LIBRARY_IMPL(retain, CompositeExplicitAutograd, m) {
  m.impl("mamba_update", composed_update);
  m.impl("mamba_update_", composed_update_);
}

TORCH_LIBRARY_IMPL(retain, Autograd, m) {
  m.impl("mamba_update", update_autograd);
  m.impl("mamba_update_", update_autograd_);
}

}  // namespace retain
