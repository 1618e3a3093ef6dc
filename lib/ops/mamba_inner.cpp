#include <retain/lib/ops/mamba_inner.h>

#include <ATen/ATen.h>
#include <ATen/MemoryOverlap.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <retain/lib/ops/causal_conv1d.h>
#include <retain/lib/ops/causal_conv1d_tensors.h>
#include <retain/lib/ops/kernel_arguments.h>
#include <retain/lib/ops/mamba_inner_tensors.h>
#include <retain/lib/ops/selective_scan.h>
#include <retain/lib/ops/selective_scan_tensors.h>
#include <retain/lib/ops/thin_linear.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/library.h>

namespace retain {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Optional = std::optional<Tensor>;
using Outputs = std::tuple<Tensor, Tensor, Tensor>;

// The scan keeps decay and step in fp32 whatever the weights' type.
Tensor at_least_fp32(const Tensor& t) {
  return !t.defined() || t.scalar_type() == at::kDouble ? t : t.to(at::kFloat);
}

bool needs_gradient(MAMBA_UPDATE_PARAMETERS) {
  static_cast<void>(reset);
  return retain::needs_gradient({xz, conv_state, ssm_state, conv_weight,
                                 value_or_undefined(conv_bias), x_proj_weight, dt_proj_weight,
                                 value_or_undefined(dt_proj_bias), A_log, value_or_undefined(D)});
}

Optional with_time(const Optional& tensor) {
  return present(tensor) ? Optional(tensor->unsqueeze(0)) : std::nullopt;
}

/// One step's check, or a sequence's: xz [(T,) B, 2 d_inner] and reset [(T,) B].
void check_mamba(const char* op, bool sequence, const Tensor& xz, const Tensor& conv_state,
                 const Tensor& ssm_state, const MambaWeights& weights, const Optional& reset) {
  const char* const layout = sequence ? "[T, B, 2 d_inner]" : "[B, 2 d_inner]";
  check_rank(op, "xz", xz, layout);
  check_floating(op, "xz", xz);
  check_rank(op, "conv_weight", weights.conv_weight, "[d_inner, d_conv]");
  check_rank(op, "A_log", weights.A_log, "[d_inner, d_state]");
  check_rank(op, "dt_proj_weight", weights.dt_proj_weight, "[d_inner, dt_rank]");
  const auto T = xz.sym_size(0), B = xz.sym_size(-2), D = weights.A_log.sym_size(0),
             N = weights.A_log.sym_size(1), K = weights.conv_weight.sym_size(1),
             R = weights.dt_proj_weight.sym_size(1);
  const auto check = [&](const char* name, const Tensor& tensor, const char* layout,
                         std::initializer_list<c10::SymInt> sizes) {
    check_shape(op, name, tensor, layout, sizes);
    check_like(op, name, tensor, "xz", xz);
  };
  if (sequence) {
    check_shape(op, "xz", xz, layout, {T, B, 2 * D});
    if (present(reset)) check_reset(op, *reset, "[T, B]", {T, B}, "xz", xz);
  } else {
    check_shape(op, "xz", xz, layout, {B, 2 * D});
    if (present(reset)) check_reset(op, *reset, "[B]", {B}, "xz", xz);
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

/// (dt, B, C) of x_proj's output; B and C with one group.
struct Projected {
  Tensor dt, B, C;
  Projected(const Tensor& dt_B_C, const Tensor& dt_proj_weight, const Tensor& A_log) {
    const int64_t R = dt_proj_weight.size(1), N = A_log.size(1);
    const auto parts = dt_B_C.split_with_sizes({R, N, N}, -1);
    dt = parts[0];
    B = parts[1].unsqueeze(2);
    C = parts[2].unsqueeze(2);
  }
};

/// The sequence by way of each op's own gradients.
Outputs composed_inner(MAMBA_UPDATE_PARAMETERS) {
  const auto x_z = xz.chunk(2, -1);  // views
  const auto [x, new_conv_state] =
      causal_conv1d(x_z[0], conv_weight, conv_bias, /*silu=*/true, conv_state, reset);
  const Projected projected(at::linear(x, x_proj_weight), dt_proj_weight, A_log);
  const auto delta = thin_linear(projected.dt, dt_proj_weight);  // its bias goes into the scan
  const auto A = -at_least_fp32(A_log).exp();
  const auto [y, new_ssm_state] = selective_scan(
      x, delta, A, projected.B, projected.C, at_least_fp32(value_or_undefined(D)), /*z=*/x_z[1],
      at_least_fp32(value_or_undefined(dt_proj_bias)), /*delta_softplus=*/true, ssm_state, reset);
  return {y, new_conv_state, new_ssm_state};
}

/// [T, B, features] as [T B, features].
Tensor rows_of(const Tensor& x) { return x.reshape({x.size(0) * x.size(1), x.size(2)}); }

/// The sequence with one node in the graph: gradients are written where they are needed, and those
/// that meet in one tensor are added up by the products that make them.
class MambaInner : public torch::autograd::Function<MambaInner> {
 public:
  static variable_list forward(AutogradContext* context, MAMBA_UPDATE_PARAMETERS) {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const auto dtype = xz.scalar_type();
    const auto x_z = xz.chunk(2, -1);
    const auto [x, new_conv_state] =
        causal_conv1d(x_z[0], conv_weight, conv_bias, /*silu=*/true, conv_state, reset);
    const auto x_proj = x_proj_weight.to(dtype);
    const auto dt_columns = columns_of(dt_proj_weight.to(dtype));
    const auto dt_B_C = at::mm(rows_of(x), x_proj.t()).view({x.size(0), x.size(1), x_proj.size(0)});
    const Projected projected(dt_B_C, dt_proj_weight, A_log);
    const auto delta = at::mm(rows_of(projected.dt), dt_columns).view(x.sizes());
    const auto A = at_least_fp32(A_log).exp().neg_();
    const auto D_skip = if_present(at_least_fp32(value_or_undefined(D)));
    const auto delta_bias = if_present(at_least_fp32(value_or_undefined(dt_proj_bias)));
    const auto kept = scan_checkpoints({x, delta, A, projected.B, projected.C});
    const auto [y, new_ssm_state, checkpoints] =
        selective_scan_fwd(x, delta, A, projected.B, projected.C, D_skip, x_z[1], delta_bias, true,
                           ssm_state, reset, false, kept.every, kept.dtype);
    context->set_materialize_grads(false);
    context->save_for_backward({xz, conv_state, conv_weight, value_or_undefined(conv_bias), x,
                                x_proj, dt_columns, dt_B_C, delta, A, value_or_undefined(D_skip),
                                value_or_undefined(delta_bias), checkpoints, x_proj_weight,
                                dt_proj_weight, value_or_undefined(dt_proj_bias), A_log,
                                value_or_undefined(D), value_or_undefined(reset)});
    context->saved_data["every"] = kept.every;
    return {y, new_conv_state, new_ssm_state};
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const auto saved = context->get_saved_variables();
    const auto &xz = saved[0], &conv_state = saved[1], &conv_weight = saved[2],
               &conv_bias = saved[3], &x = saved[4], &x_proj = saved[5], &dt_columns = saved[6],
               &dt_B_C = saved[7], &delta = saved[8], &A = saved[9], &D_skip = saved[10],
               &delta_bias = saved[11], &checkpoints = saved[12], &reset = saved[18];
    const auto x_z = xz.chunk(2, -1);
    const Projected projected(dt_B_C, saved[14], A);
    const auto dxz = at::empty(xz.sizes(), xz.options());
    const auto dx_dz = dxz.chunk(2, -1);
    auto [dx, ddelta, dA, dB, dC, dD, ddelta_bias, dssm_state] = selective_scan_bwd_into(
        if_present(gradients[0]), if_present(gradients[2]), x, delta, A, projected.B, projected.C,
        if_present(D_skip), x_z[1], if_present(delta_bias), true, std::nullopt, if_present(reset),
        false, checkpoints, context->saved_data["every"].toInt(), dx_dz[1]);
    const auto ddelta_rows = rows_of(ddelta);
    const auto ddt = at::mm(ddelta_rows, dt_columns.t());
    const auto ddt_columns = at::mm(rows_of(projected.dt).t(), ddelta_rows);
    const auto dprojected =
        at::cat({ddt, dB.flatten(0, 1).squeeze(1), dC.flatten(0, 1).squeeze(1)}, -1);
    rows_of(dx).addmm_(dprojected, x_proj);
    const auto dx_proj = at::mm(dprojected.t(), rows_of(x));
    const auto [dconv_weight, dconv_bias, dconv_state] = causal_conv1d_bwd_into(
        dx, if_present(gradients[1]), x_z[0], conv_weight, if_present(conv_bias), true, conv_state,
        if_present(reset), dx_dz[0]);
    const auto as = [](const Tensor& gradient, const Tensor& argument) {
      return argument.defined() ? gradient.to(argument.scalar_type()) : Tensor();
    };
    return {dxz,
            as(dconv_state, conv_state),
            dssm_state,
            as(dconv_weight, conv_weight),
            as(dconv_bias, conv_bias),
            as(dx_proj, saved[13]),
            as(ddt_columns.t(), saved[14]),
            as(ddelta_bias, saved[15]),
            as(dA.mul_(A), saved[16]),
            as(dD, saved[17]),
            Tensor()};
  }
};

Outputs call_update(MAMBA_UPDATE_PARAMETERS) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("retain::mamba_update", "")
                             .typed<decltype(composed_mamba_update)>();
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
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("retain::mamba_update_", "")
                             .typed<decltype(composed_update_)>();
  return op.call(MAMBA_UPDATE_ARGUMENTS);
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

void check_mamba_update(const Tensor& xz, const Tensor& conv_state, const Tensor& ssm_state,
                        const MambaWeights& weights, const Optional& reset) {
  check_mamba("mamba_update", /*sequence=*/false, xz, conv_state, ssm_state, weights, reset);
}

void check_mamba_update_(const Tensor& xz, const Tensor& conv_state, const Tensor& ssm_state,
                         const MambaWeights& weights, const Optional& reset) {
  check_mamba("mamba_update_", /*sequence=*/false, xz, conv_state, ssm_state, weights, reset);
  const auto check_writable = [](const char* name, const Tensor& state) {
    TORCH_CHECK(at::has_internal_overlap(state) != at::MemOverlap::Yes, "mamba_update_: ", name,
                " must not overlap itself, as an expanded tensor does; got strides ",
                state.strides());
  };
  check_writable("conv_state", conv_state);
  check_writable("ssm_state", ssm_state);
}

Outputs composed_mamba_update(MAMBA_UPDATE_PARAMETERS) {
  const auto weights = gather_mamba_weights(MAMBA_UPDATE_ARGUMENTS);
  check_mamba_update(xz, conv_state, ssm_state, weights, reset);
  auto [y, new_conv_state, new_ssm_state] =
      mamba_inner(xz.unsqueeze(0), conv_state, ssm_state, weights, with_time(reset));
  return {y.squeeze(0), new_conv_state, new_ssm_state};
}

Outputs mamba_inner(const Tensor& xz, const Tensor& conv_state, const Tensor& ssm_state,
                    const MambaWeights& w, const Optional& reset) {
  check_mamba("mamba_inner", /*sequence=*/true, xz, conv_state, ssm_state, w, reset);
  const auto call = [&](auto run) {
    return run(xz, conv_state, ssm_state, w.conv_weight, if_present(w.conv_bias), w.x_proj_weight,
               w.dt_proj_weight, if_present(w.dt_proj_bias), w.A_log, if_present(w.D),
               if_present(reset));
  };
  const bool fused =
      has_kernels("retain::selective_scan_bwd_into", xz) &&
      call([](MAMBA_UPDATE_PARAMETERS) { return needs_gradient(MAMBA_UPDATE_ARGUMENTS); });
  if (!fused) return call(composed_inner);
  const auto outputs =
      call([](MAMBA_UPDATE_PARAMETERS) { return MambaInner::apply(MAMBA_UPDATE_ARGUMENTS); });
  return {outputs[0], outputs[1], outputs[2]};
}

Outputs mamba_update(const Tensor& xz, const Tensor& conv_state, const Tensor& ssm_state,
                     const MambaWeights& w, const Optional& reset) {
  return call_update(xz, conv_state, ssm_state, w.conv_weight, if_present(w.conv_bias),
                     w.x_proj_weight, w.dt_proj_weight, if_present(w.dt_proj_bias), w.A_log,
                     if_present(w.D), if_present(reset));
}

Tensor mamba_update_(const Tensor& xz, const Tensor& conv_state, const Tensor& ssm_state,
                     const MambaWeights& w, const Optional& reset) {
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
  m.impl("mamba_update", composed_mamba_update);
  m.impl("mamba_update_", composed_update_);
}

TORCH_LIBRARY_IMPL(retain, Autograd, m) {
  m.impl("mamba_update", update_autograd);
  m.impl("mamba_update_", update_autograd_);
}

}  // namespace retain
