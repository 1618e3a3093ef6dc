#include <retain/lib/ops/mamba_update.h>

#include <ATen/ATen.h>
#include <retain/lib/dtype_name.h>
#include <retain/lib/ops/casts.h>
#include <retain/lib/ops/find_op.h>
#include <retain/lib/ops/gradients.h>
#include <retain/lib/ops/mamba_block.h>
#include <retain/lib/ops/mamba_update_tensors.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/library.h>

namespace retain {
namespace {

using Outputs = std::tuple<Tensor, Tensor, Tensor>;

bool needs_gradient(MAMBA_UPDATE_PARAMETERS) {
  static_cast<void>(reset);
  return retain::needs_gradient({xz, conv_state, ssm_state, conv_weight,
                                 value_or_undefined(conv_bias), x_proj_weight, dt_proj_weight,
                                 value_or_undefined(dt_proj_bias), A_log, value_or_undefined(D)});
}

Outputs call_update(MAMBA_UPDATE_PARAMETERS) {
  static const auto op = find_op<decltype(composed_mamba_update)>("retain::mamba_update");
  return op.call(MAMBA_UPDATE_ARGUMENTS);
}

Tensor composed_update_(MAMBA_UPDATE_PARAMETERS) {
  const auto weights = gather_mamba_weights(MAMBA_UPDATE_ARGUMENTS);
  check_mamba_update_(xz, conv_state, ssm_state, weights, reset);
  const auto [y, new_conv_state, new_ssm_state] = call_update(MAMBA_UPDATE_ARGUMENTS);
  Tensor(conv_state).copy_(new_conv_state);
  Tensor(ssm_state).copy_(new_ssm_state);
  return y;
}

Tensor call_update_(MAMBA_UPDATE_PARAMETERS) {
  static const auto op = find_op<decltype(composed_update_)>("retain::mamba_update_");
  return op.call(MAMBA_UPDATE_ARGUMENTS);
}

// Meta: shapes and dtypes only

Tensor y_like(const Tensor& xz) {
  return at::empty_symint({xz.sym_size(0), xz.sym_size(1) / 2}, xz.options());
}

Outputs update_meta(MAMBA_UPDATE_PARAMETERS) {
  check_mamba_update(xz, conv_state, ssm_state, gather_mamba_weights(MAMBA_UPDATE_ARGUMENTS),
                     reset);
  const auto options = xz.options().dtype(state_dtype(xz));
  return {y_like(xz), at::empty_symint(conv_state.sym_sizes(), options),
          at::empty_symint(ssm_state.sym_sizes(), options)};
}

Tensor update_meta_(MAMBA_UPDATE_PARAMETERS) {
  check_mamba_update_(xz, conv_state, ssm_state, gather_mamba_weights(MAMBA_UPDATE_ARGUMENTS),
                      reset);
  return y_like(xz);
}

Outputs update_autograd(MAMBA_UPDATE_PARAMETERS) {
  if (needs_gradient(MAMBA_UPDATE_ARGUMENTS)) return composed_mamba_update(MAMBA_UPDATE_ARGUMENTS);
  const at::AutoDispatchBelowADInplaceOrView guard;
  return call_update(MAMBA_UPDATE_ARGUMENTS);
}

Tensor update_autograd_(MAMBA_UPDATE_PARAMETERS) {
  TORCH_CHECK(!needs_gradient(MAMBA_UPDATE_ARGUMENTS),
              "mamba_update_: the states are written in place, without gradients; mamba_update "
              "gives them, and a NoGradGuard does without");
  const at::AutoDispatchBelowAutograd guard;
  return call_update_(MAMBA_UPDATE_ARGUMENTS);
}

/// Autocast: the input in the narrow type; weights and states stay as they are.
template <auto& kCall>
auto update_autocast(MAMBA_UPDATE_PARAMETERS) {
  const auto narrow = autocasted(xz);
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  return kCall(narrow, conv_state, ssm_state, conv_weight, conv_bias, x_proj_weight, dt_proj_weight,
               dt_proj_bias, A_log, D, reset);
}

/// In inference mode, too: a graph recorded before may have kept the states.
Tensor update_and_count_(MAMBA_UPDATE_PARAMETERS) {
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

void check_mamba(const char* op, const char* input_name, const Tensor& input,
                 const Tensor& conv_state, const Tensor& ssm_state, const MambaWeights& weights,
                 const OptionalTensor& reset) {
  check_floating(op, input_name, input);
  check_rank(op, "conv_weight", weights.conv_weight, "[d_inner, d_conv]");
  check_rank(op, "A_log", weights.A_log, "[d_inner, d_state]");
  check_rank(op, "dt_proj_weight", weights.dt_proj_weight, "[d_inner, dt_rank]");
  const auto B = input.sym_size(-2), D = weights.A_log.sym_size(0), N = weights.A_log.sym_size(1),
             K = weights.conv_weight.sym_size(1), R = weights.dt_proj_weight.sym_size(1);
  const auto check = [&](const char* name, const Tensor& tensor, const char* layout,
                         std::initializer_list<c10::SymInt> sizes) {
    check_shape(op, name, tensor, layout, sizes);
    check_like(op, name, tensor, input_name, input);
  };
  if (present(reset) && input.dim() == 2) check_reset(op, *reset, "[B]", {B}, input_name, input);
  if (present(reset) && input.dim() == 3) {
    check_reset(op, *reset, "[T, B]", {input.sym_size(0), B}, input_name, input);
  }
  check("conv_state", conv_state, "[B, d_conv - 1, d_inner]", {B, K - 1, D});
  check("ssm_state", ssm_state, "[B, d_inner, d_state]", {B, D, N});
  check("conv_weight", weights.conv_weight, "[d_inner, d_conv]", {D, K});
  check("x_proj_weight", weights.x_proj_weight, "[dt_rank + 2 d_state, d_inner]", {R + 2 * N, D});
  check("dt_proj_weight", weights.dt_proj_weight, "[d_inner, dt_rank]", {D, R});
  check("A_log", weights.A_log, "[d_inner, d_state]", {D, N});
  if (weights.conv_bias.defined()) check("conv_bias", weights.conv_bias, "[d_inner]", {D});
  if (weights.dt_proj_bias.defined()) check("dt_proj_bias", weights.dt_proj_bias, "[d_inner]", {D});
  if (weights.D.defined()) check("D", weights.D, "[d_inner]", {D});
}

void check_mamba_xz(const char* op, const char* layout, const Tensor& xz, const Tensor& conv_state,
                    const Tensor& ssm_state, const MambaWeights& weights,
                    const OptionalTensor& reset) {
  check_rank(op, "xz", xz, layout);
  check_rank(op, "A_log", weights.A_log, "[d_inner, d_state]");
  const auto width = 2 * weights.A_log.sym_size(0);
  if (xz.dim() == 2) check_shape(op, "xz", xz, layout, {xz.sym_size(0), width});
  if (xz.dim() == 3) check_shape(op, "xz", xz, layout, {xz.sym_size(0), xz.sym_size(1), width});
  check_mamba(op, "xz", xz, conv_state, ssm_state, weights, reset);
}

void check_mamba_update(const Tensor& xz, const Tensor& conv_state, const Tensor& ssm_state,
                        const MambaWeights& weights, const OptionalTensor& reset) {
  check_mamba_xz("mamba_update", "[B, 2 d_inner]", xz, conv_state, ssm_state, weights, reset);
}

void check_mamba_update_(const Tensor& xz, const Tensor& conv_state, const Tensor& ssm_state,
                         const MambaWeights& weights, const OptionalTensor& reset) {
  constexpr char kOp[] = "mamba_update_";
  check_mamba_xz(kOp, "[B, 2 d_inner]", xz, conv_state, ssm_state, weights, reset);
  for (const auto& [name, state] :
       {std::pair("conv_state", conv_state), {"ssm_state", ssm_state}}) {
    TORCH_CHECK(state.scalar_type() == state_dtype(xz), kOp, ": ", name, " must be ",
                dtype_name(state_dtype(xz)), " to be written in place, got ",
                dtype_name(state.scalar_type()));
    check_apart(kOp, name, state);
    check_apart(kOp, "xz", xz, name, state);
  }
  check_apart(kOp, "conv_state", conv_state, "ssm_state", ssm_state);
}

Outputs composed_mamba_update(MAMBA_UPDATE_PARAMETERS) {
  const auto weights = gather_mamba_weights(MAMBA_UPDATE_ARGUMENTS);
  check_mamba_update(xz, conv_state, ssm_state, weights, reset);
  const auto reset_then = present(reset) ? OptionalTensor(reset->unsqueeze(0)) : std::nullopt;
  auto [y, new_conv_state, new_ssm_state] =
      mamba_inner(xz.unsqueeze(0), conv_state, ssm_state, weights, reset_then);
  return {y.squeeze(0), new_conv_state, new_ssm_state};
}

Outputs mamba_update(const Tensor& xz, const Tensor& conv_state, const Tensor& ssm_state,
                     const MambaWeights& w, const OptionalTensor& reset) {
  return call_update(xz, conv_state, ssm_state, w.conv_weight, if_present(w.conv_bias),
                     w.x_proj_weight, w.dt_proj_weight, if_present(w.dt_proj_bias), w.A_log,
                     if_present(w.D), if_present(reset));
}

Tensor mamba_update_(const Tensor& xz, const Tensor& conv_state, const Tensor& ssm_state,
                     const MambaWeights& w, const OptionalTensor& reset) {
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

TORCH_LIBRARY_IMPL(retain, Meta, m) {
  m.impl("mamba_update", update_meta);
  m.impl("mamba_update_", update_meta_);
}

TORCH_LIBRARY_IMPL(retain, CompositeExplicitAutograd, m) {
  m.impl("mamba_update", composed_mamba_update);
  m.impl("mamba_update_", composed_update_);
}

TORCH_LIBRARY_IMPL(retain, AutocastCPU, m) {
  m.impl("mamba_update", update_autocast<call_update>);
  m.impl("mamba_update_", update_autocast<call_update_>);
}

TORCH_LIBRARY_IMPL(retain, AutocastCUDA, m) {
  m.impl("mamba_update", update_autocast<call_update>);
  m.impl("mamba_update_", update_autocast<call_update_>);
}

TORCH_LIBRARY_IMPL(retain, ADInplaceOrView, m) { m.impl("mamba_update_", update_and_count_); }

TORCH_LIBRARY_IMPL(retain, Autograd, m) {
  m.impl("mamba_update", update_autograd);
  m.impl("mamba_update_", update_autograd_);
}

}  // namespace retain
