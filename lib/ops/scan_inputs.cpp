#include <retain/lib/ops/scan_inputs.h>

#include <ATen/ATen.h>
#include <retain/lib/ops/causal_conv1d.h>
#include <retain/lib/ops/causal_conv1d_tensors.h>
#include <retain/lib/ops/find_op.h>
#include <retain/lib/ops/thin_linear.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

namespace retain {
namespace {

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Outputs checked_by_products(const Tensor& x, const Tensor& conv_weight,
                            const OptionalTensor& conv_bias, const Tensor& x_proj,
                            const Tensor& dt_proj, const OptionalTensor& conv_state,
                            const OptionalTensor& reset) {
  check_scan_inputs(x, conv_weight, conv_bias, x_proj, dt_proj, conv_state, reset);
  return scan_inputs_by_products(x, conv_weight, conv_bias, x_proj, dt_proj, conv_state, reset);
}

}  // namespace

void check_scan_inputs(const Tensor& x, const Tensor& conv_weight, const OptionalTensor& conv_bias,
                       const Tensor& x_proj, const Tensor& dt_proj,
                       const OptionalTensor& conv_state, const OptionalTensor& reset) {
  constexpr char kOp[] = "scan_inputs";
  check_causal_conv1d(x, conv_weight, conv_bias, conv_state, reset);
  check_rank(kOp, "x_proj", x_proj, "[dt_rank + 2 d_state, d_inner]");
  check_rank(kOp, "dt_proj", dt_proj, "[d_inner, dt_rank]");
  const auto D = x.sym_size(2), P = x_proj.sym_size(0), R = dt_proj.sym_size(1);
  check_shape(kOp, "x_proj", x_proj, "[dt_rank + 2 d_state, d_inner]", {P, D});
  check_same(kOp, "x_proj", x_proj, "x", x);
  check_shape(kOp, "dt_proj", dt_proj, "[d_inner, dt_rank]", {D, R});
  check_same(kOp, "dt_proj", dt_proj, "x", x);
  TORCH_CHECK(R <= P, kOp, ": x_proj must have at least dt_rank = ", R, " rows, got ", P);
}

Outputs scan_inputs_by_products(const Tensor& x, const Tensor& conv_weight,
                                const OptionalTensor& conv_bias, const Tensor& x_proj,
                                const Tensor& dt_proj, const OptionalTensor& conv_state,
                                const OptionalTensor& reset) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const auto [u, last_state] =
      causal_conv1d(x, conv_weight, conv_bias, /*silu=*/true, conv_state, reset);
  const auto dt_B_C = at::mm(u.flatten(0, 1), x_proj.t());
  const auto delta = at::mm(dt_B_C.narrow(1, 0, dt_proj.size(1)), columns_of(dt_proj));
  const auto over_time = [&](const Tensor& rows) {
    return rows.view({x.size(0), x.size(1), rows.size(1)});
  };
  return {u, over_time(dt_B_C), over_time(delta), last_state};
}

Outputs scan_inputs(const Tensor& x, const Tensor& conv_weight, const OptionalTensor& conv_bias,
                    const Tensor& x_proj, const Tensor& dt_proj, const OptionalTensor& conv_state,
                    const OptionalTensor& reset) {
  static const auto op = find_op<decltype(scan_inputs)>("retain::scan_inputs");
  return op.call(x, conv_weight, if_present(conv_bias), x_proj, dt_proj, if_present(conv_state),
                 if_present(reset));
}

TORCH_LIBRARY_FRAGMENT(retain, m) {
  m.def(
      "scan_inputs(Tensor x, Tensor conv_weight, Tensor? conv_bias, Tensor x_proj, Tensor dt_proj, "
      "Tensor? conv_state, Tensor? reset) -> (Tensor u, Tensor dt_B_C, Tensor delta, Tensor "
      "last_state)");
}

TORCH_LIBRARY_IMPL(retain, CompositeExplicitAutograd, m) {
  m.impl("scan_inputs", checked_by_products);
}

TORCH_LIBRARY_IMPL(retain, Autograd, m) {
  m.impl("scan_inputs", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace retain
