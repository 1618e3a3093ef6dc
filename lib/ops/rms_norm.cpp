#include <ATen/ATen.h>
#include <retain/kernels/rms_norm/rms_norm.h>
#include <retain/lib/ops/checks.h>
#include <retain/lib/ops/find_op.h>
#include <retain/lib/ops/gradients.h>
#include <retain/lib/ops/kernel_arguments.h>
#include <retain/lib/ops/rms_norm.h>
#include <retain/lib/ops/rms_norm_tensors.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace retain {
namespace {

using Pair = std::tuple<Tensor, Tensor>;

constexpr char kOp[] = "rms_norm";

kernels::NormSizes sizes_of(const Tensor& x) {
  const int64_t D = x.size(-1);
  return {D == 0 ? 0 : x.numel() / D, D};
}

Pair rms_norm_meta(const Tensor& x, const Tensor& weight, const OptionalTensor& residual,
                   double eps) {
  check_rms_norm(x, weight, residual, eps);
  return {at::empty_symint(x.sym_sizes(), x.options()),
          at::empty_symint(x.sym_sizes(), x.options().dtype(state_dtype(x)))};
}

Pair rms_norm_cpu(const Tensor& x, const Tensor& weight, const OptionalTensor& residual,
                  double eps) {
  check_rms_norm(x, weight, residual, eps);
  const auto dtype = state_dtype(x);
  const auto input = dense(x, dtype), gain = dense(weight, dtype), added = dense(residual, dtype);
  const auto y = at::empty(x.sizes(), input.options());
  const auto residual_out = at::empty(x.sizes(), input.options());
  AT_DISPATCH_FLOATING_TYPES(dtype, kOp, [&] {
    const kernels::RmsNormFwd<scalar_t> params{
        .size = sizes_of(x),
        .x = pointer<scalar_t>(input),
        .residual = pointer<scalar_t>(added),
        .weight = pointer<scalar_t>(gain),
        .eps = eps,
        .y = mutable_pointer<scalar_t>(y),
        .residual_out = mutable_pointer<scalar_t>(residual_out)};
    parallel_items(params.size.items(), 0.5 * static_cast<double>(x.numel()),
                   [&](int64_t begin, int64_t end) { kernels::rms_norm_fwd(params, begin, end); });
  });
  return {y.to(x.scalar_type()), residual_out};
}

Pair rms_norm_bwd_meta(const OptionalTensor&, const OptionalTensor&, const Tensor& residual_out,
                       const Tensor& weight, double) {
  const auto dense_like = [](const Tensor& x) {
    return at::empty_symint(x.sym_sizes(), x.options());
  };
  return {dense_like(residual_out), dense_like(weight)};
}

Pair rms_norm_bwd_cpu(const OptionalTensor& dy_in, const OptionalTensor& dresidual_out_in,
                      const Tensor& residual_out_in, const Tensor& weight, double eps) {
  check_rms_norm_bwd(dy_in, dresidual_out_in, residual_out_in, weight);
  const auto dtype = residual_out_in.scalar_type();
  const auto dy = dense(dy_in, dtype), dresidual_out = dense(dresidual_out_in, dtype);
  const auto residual_out = dense(residual_out_in, dtype), gain = dense(weight, dtype);
  const auto size = sizes_of(residual_out);
  const auto dx = at::empty(residual_out.sizes(), residual_out.options());
  const auto dweight_rows =
      at::zeros({size.items(), residual_out.size(-1)}, residual_out.options());
  AT_DISPATCH_FLOATING_TYPES(dtype, kOp, [&] {
    const kernels::RmsNormBwd<scalar_t> params{
        .size = size,
        .residual_out = pointer<scalar_t>(residual_out),
        .weight = pointer<scalar_t>(gain),
        .dy = pointer<scalar_t>(dy),
        .dresidual_out = pointer<scalar_t>(dresidual_out),
        .eps = eps,
        .dx = mutable_pointer<scalar_t>(dx),
        .dweight_rows = mutable_pointer<scalar_t>(dweight_rows)};
    parallel_items(size.items(), static_cast<double>(dx.numel()),
                   [&](int64_t begin, int64_t end) { kernels::rms_norm_bwd(params, begin, end); });
  });
  // A sum to one number alone would be cut by threads.
  const auto parts = dweight_rows.size(1) == 1 ? dweight_rows.expand({-1, 2}) : dweight_rows;
  const auto dweight = parts.sum(0, false, at::kDouble).narrow(0, 0, dweight_rows.size(1));
  return {dx, dweight.to(weight.scalar_type(), /*non_blocking=*/false, /*copy=*/true)};
}

Pair call(const Tensor& x, const Tensor& weight, const OptionalTensor& residual, double eps) {
  static const auto op = find_op<decltype(rms_norm_cpu)>("retain::rms_norm");
  return op.call(x, weight, if_present(residual), eps);
}

Pair call_bwd(const Tensor& dy, const Tensor& dresidual_out, const Tensor& residual_out,
              const Tensor& weight, double eps) {
  static const auto op = find_op<decltype(rms_norm_bwd_cpu)>("retain::rms_norm_bwd");
  return op.call(if_present(dy), if_present(dresidual_out), residual_out, weight, eps);
}

class RmsNormFunction : public torch::autograd::Function<RmsNormFunction> {
 public:
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* context,
                                                const Tensor& x, const Tensor& weight,
                                                const OptionalTensor& residual, double eps) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const auto [y, residual_out] = call(x, weight, residual, eps);
    context->save_for_backward({residual_out, weight});
    context->saved_data["eps"] = eps;
    context->saved_data["x"] = static_cast<int64_t>(x.scalar_type());
    context->saved_data["residual"] =
        present(residual) ? static_cast<int64_t>(residual->scalar_type()) : int64_t{-1};
    context->set_materialize_grads(false);
    return {y, residual_out};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& gradients) {
    const Unrecorded unrecorded;
    const auto saved = context->get_saved_variables();
    const auto [dx, dweight] = call_bwd(gradients[0], gradients[1], saved[0], saved[1],
                                        context->saved_data["eps"].toDouble());
    const auto in_dtype = [&](const char* name) {
      const auto dtype = context->saved_data[name].toInt();
      return dtype < 0 ? Tensor() : dx.to(static_cast<at::ScalarType>(dtype));
    };
    return {in_dtype("x"), dweight, in_dtype("residual"), Tensor()};
  }
};

Pair rms_norm_autograd(const Tensor& x, const Tensor& weight, const OptionalTensor& residual,
                       double eps) {
  if (!needs_gradient({x, weight, value_or_undefined(residual)})) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return call(x, weight, residual, eps);
  }
  if (!has_kernels("retain::rms_norm_bwd", x)) return rms_norm_reference(x, weight, residual, eps);
  const auto outputs = RmsNormFunction::apply(x, weight, residual, eps);
  return {outputs[0], outputs[1]};
}

}  // namespace

void check_rms_norm(const Tensor& x, const Tensor& weight, const OptionalTensor& residual,
                    double eps) {
  TORCH_CHECK(x.defined() && x.dim() >= 1, kOp, ": x must be [..., D], got ",
              x.defined() ? c10::str(x.sym_sizes()) : "an undefined tensor");
  check_floating(kOp, "x", x);
  check_shape(kOp, "weight", weight, "[D]", {x.sym_size(-1)});
  check_like(kOp, "weight", weight, "x", x);
  TORCH_CHECK(eps >= 0, kOp, ": eps must not be negative, got ", eps);
  if (!present(residual)) return;
  TORCH_CHECK(residual->sym_sizes() == x.sym_sizes(), kOp, ": residual must have the shape of x, ",
              x.sym_sizes(), ", got ", residual->sym_sizes());
  check_like(kOp, "residual", *residual, "x", x);
}

void check_rms_norm_bwd(const OptionalTensor& dy, const OptionalTensor& dresidual_out,
                        const Tensor& residual_out, const Tensor& weight) {
  constexpr char kBwd[] = "rms_norm_bwd";
  TORCH_CHECK(residual_out.dim() >= 1, kBwd, ": residual_out must be [..., D], got ",
              residual_out.sym_sizes());
  check_if_present(kBwd, "weight", weight, "[D]", {residual_out.sym_size(-1)}, "residual_out",
                   residual_out);
  const auto check = [&](const char* name, const OptionalTensor& tensor) {
    if (!present(tensor)) return;
    TORCH_CHECK(tensor->sym_sizes() == residual_out.sym_sizes() &&
                    tensor->device() == residual_out.device(),
                kBwd, ": ", name, " must be as residual_out is, ", residual_out.sym_sizes(), " on ",
                residual_out.device(), ", got ", tensor->sym_sizes(), " on ", tensor->device());
  };
  check("dy", dy);
  check("dresidual_out", dresidual_out);
}

Pair rms_norm(const Tensor& x, const Tensor& weight, const OptionalTensor& residual, double eps) {
  check_rms_norm(x, weight, residual, eps);
  return call(x, weight, residual, eps);
}

Pair rms_norm_reference(const Tensor& x, const Tensor& weight, const OptionalTensor& residual,
                        double eps) {
  check_rms_norm(x, weight, residual, eps);
  const auto dtype = state_dtype(x);
  auto s = x.to(dtype);
  s = present(residual) ? s + residual->to(dtype) : s.clone();
  const auto y = s * (s.square().mean(-1, /*keepdim=*/true) + eps).rsqrt() * weight.to(dtype);
  return {y.to(x.scalar_type()).contiguous(), s.contiguous()};
}

TORCH_LIBRARY_FRAGMENT(retain, m) {
  m.def(
      "rms_norm(Tensor x, Tensor weight, Tensor? residual=None, float eps=1e-5) -> (Tensor y, "
      "Tensor residual_out)");
  m.def(
      "rms_norm_bwd(Tensor? dy, Tensor? dresidual_out, Tensor residual_out, Tensor weight, float "
      "eps) -> (Tensor dx, Tensor dweight)");
}

TORCH_LIBRARY_IMPL(retain, CPU, m) {
  m.impl("rms_norm", rms_norm_cpu);
  m.impl("rms_norm_bwd", rms_norm_bwd_cpu);
}

TORCH_LIBRARY_IMPL(retain, Meta, m) {
  m.impl("rms_norm", rms_norm_meta);
  m.impl("rms_norm_bwd", rms_norm_bwd_meta);
}

TORCH_LIBRARY_IMPL(retain, CompositeExplicitAutograd, m) { m.impl("rms_norm", rms_norm_reference); }

TORCH_LIBRARY_IMPL(retain, Autograd, m) {
  m.impl("rms_norm", rms_norm_autograd);
  m.impl("rms_norm_bwd", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace retain
