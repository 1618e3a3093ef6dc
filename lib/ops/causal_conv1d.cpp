#include <ATen/ATen.h>
#include <retain/kernels/causal_conv1d/causal_conv1d.h>
#include <retain/lib/ops/casts.h>
#include <retain/lib/ops/causal_conv1d.h>
#include <retain/lib/ops/causal_conv1d_tensors.h>
#include <retain/lib/ops/checks.h>
#include <retain/lib/ops/find_op.h>
#include <retain/lib/ops/gradients.h>
#include <retain/lib/ops/kernel_arguments.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace retain {
namespace {

using Pair = std::tuple<Tensor, Tensor>;
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Weights = std::tuple<Tensor, Tensor, Tensor>;  ///< gradients of all but x

constexpr char kOp[] = "causal_conv1d";

/// The arguments as the kernels take them: one dtype, dense channels, taps outermost.
struct Arguments {
  at::ScalarType dtype;
  Tensor x, weight, bias, initial_state, reset;
  bool silu;

  Arguments(const Tensor& x_, const Tensor& weight_, const OptionalTensor& bias_, bool silu_,
            const OptionalTensor& initial_state_, const OptionalTensor& reset_)
      : dtype(state_dtype(x_)),
        x(with_dense_rows(x_, dtype)),
        weight(dense(weight_.t(), dtype)),
        bias(dense(bias_, dtype)),
        initial_state(dense(initial_state_, dtype)),
        reset(value_or_undefined(reset_)),
        silu(silu_) {}

  int64_t taps() const { return weight.size(0); }

  template <typename T>
  kernels::CausalConv1dInputs<T> inputs() const {
    return {.size = {x.size(0), x.size(1), x.size(2), taps()},
            .x = time_major<T>(x),
            .weight = pointer<T>(weight),
            .bias = pointer<T>(bias),
            .initial_state = pointer<T>(initial_state),
            .reset = time_major<bool>(reset),
            .silu = silu};
  }
};

Pair empty_outputs(const Tensor& x, const Tensor& weight) {
  return {at::empty_symint(x.sym_sizes(), x.options()),
          at::empty_symint({x.sym_size(1), weight.sym_size(1) - 1, x.sym_size(2)},
                           x.options().dtype(state_dtype(x)))};
}

Pair causal_conv1d_meta(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, bool,
                        const OptionalTensor& initial_state, const OptionalTensor& reset) {
  check_causal_conv1d(x, weight, bias, initial_state, reset);
  return empty_outputs(x, weight);
}

Pair causal_conv1d_cpu(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, bool silu,
                       const OptionalTensor& initial_state, const OptionalTensor& reset) {
  check_causal_conv1d(x, weight, bias, initial_state, reset);
  const Arguments args(x, weight, bias, silu, initial_state, reset);
  const auto y = at::empty(x.sizes(), x.options().dtype(args.dtype));
  const auto last_state = std::get<1>(empty_outputs(x, weight));
  AT_DISPATCH_FLOATING_TYPES(args.dtype, kOp, [&] {
    const kernels::CausalConv1dFwd<scalar_t> params{
        .in = args.inputs<scalar_t>(),
        .y = mutable_time_major<scalar_t>(y),
        .last_state = mutable_pointer<scalar_t>(last_state)};
    parallel_items(
        params.in.size.items(), 1.5 * static_cast<double>(x.numel()),
        [&](int64_t begin, int64_t end) { kernels::causal_conv1d_fwd(params, begin, end); });
  });
  return {y.to(x.scalar_type()), last_state};
}

Weights causal_conv1d_bwd_into_meta(const OptionalTensor&, const OptionalTensor&, const Tensor& x,
                                    const Tensor& weight, const OptionalTensor& bias, bool,
                                    const OptionalTensor&, const OptionalTensor&,
                                    const OptionalTensor&, const OptionalTensor&, const Tensor&) {
  return {at::empty_symint(weight.sym_sizes(), weight.options()),
          at::empty_symint({x.sym_size(2)}, weight.options().dtype(dbias_dtype(weight, bias))),
          std::get<1>(empty_outputs(x, weight))};
}

Weights causal_conv1d_bwd_into_cpu(const OptionalTensor& dy_in,
                                   const OptionalTensor& dlast_state_in, const Tensor& x,
                                   const Tensor& weight, const OptionalTensor& bias, bool silu,
                                   const OptionalTensor& initial_state, const OptionalTensor& reset,
                                   const OptionalTensor& rows, const OptionalTensor& columns,
                                   const Tensor& dx_out) {
  check_causal_conv1d_bwd(dy_in, dlast_state_in, x, weight, bias, initial_state, reset, rows,
                          columns, dx_out);
  const Arguments args(x, weight, bias, silu, initial_state, reset);
  const auto dy = with_dense_rows(with_product(dy_in, rows, columns), args.dtype);
  const auto dlast_state = dense(dlast_state_in, args.dtype);
  const auto options = x.options().dtype(args.dtype);
  const kernels::ConvSizes size{x.size(0), x.size(1), x.size(2), args.taps()};
  const bool in_place = has_dense_rows(dx_out, args.dtype);
  const auto dx = in_place ? dx_out : at::empty(x.sizes(), options);
  const auto dweight_rows =
      at::zeros({size.row_tiles(), size.K + 1, size.D}, options.dtype(at::kDouble));
  const auto dinitial_state = at::zeros({size.B, size.K - 1, size.D}, options);
  AT_DISPATCH_FLOATING_TYPES(args.dtype, kOp, [&] {
    const kernels::CausalConv1dBwd<scalar_t> params{
        .in = args.inputs<scalar_t>(),
        .dy = time_major<scalar_t>(dy),
        .dlast_state = pointer<scalar_t>(dlast_state),
        .dx = mutable_time_major<scalar_t>(dx),
        .dweight_rows = dweight_rows.mutable_data_ptr<double>(),
        .dinitial_state = mutable_pointer<scalar_t>(dinitial_state)};
    parallel_items(size.items(), 4.0 * static_cast<double>(x.numel()),
                   [&](int64_t begin, int64_t end) {
                     std::vector<scalar_t> scratch(kernels::causal_conv1d_bwd_scratch(size));
                     kernels::causal_conv1d_bwd(params, begin, end, scratch.data());
                   });
  });
  if (!in_place) Tensor(dx_out).copy_(dx);
  const auto sums = dweight_rows.sum(0);
  return {sums.narrow(0, 0, size.K)
              .t()
              .to(weight.scalar_type(), false, true, at::MemoryFormat::Contiguous),
          sums.select(0, size.K).to(dbias_dtype(weight, bias)), dinitial_state};
}

/// With dx of its own.
Gradients causal_conv1d_bwd(const OptionalTensor& dy, const OptionalTensor& dlast_state,
                            const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                            bool silu, const OptionalTensor& initial_state,
                            const OptionalTensor& reset) {
  const auto dx = at::empty_symint(x.sym_sizes(), x.options());
  auto [dweight, dbias, dinitial_state] = causal_conv1d_bwd_into(
      dy, dlast_state, x, weight, bias, silu, initial_state, reset, {}, {}, dx);
  return {dx, dweight, dbias, dinitial_state};
}

Pair call(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, bool silu,
          const OptionalTensor& initial_state, const OptionalTensor& reset) {
  static const auto op = find_op<decltype(causal_conv1d_cpu)>("retain::causal_conv1d");
  return op.call(x, weight, if_present(bias), silu, if_present(initial_state), if_present(reset));
}

Gradients call_bwd(const Tensor& dy, const Tensor& dlast_state, const Tensor& x,
                   const Tensor& weight, const Tensor& bias, bool silu, const Tensor& initial_state,
                   const Tensor& reset) {
  static const auto op = find_op<decltype(causal_conv1d_bwd)>("retain::causal_conv1d_bwd");
  return op.call(if_present(dy), if_present(dlast_state), x, weight, if_present(bias), silu,
                 if_present(initial_state), if_present(reset));
}

class CausalConv1dFunction : public torch::autograd::Function<CausalConv1dFunction> {
 public:
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* context,
                                                const Tensor& x, const Tensor& weight,
                                                const OptionalTensor& bias, bool silu,
                                                const OptionalTensor& initial_state,
                                                const OptionalTensor& reset) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const auto [y, last_state] = call(x, weight, bias, silu, initial_state, reset);
    context->save_for_backward({x, weight, value_or_undefined(bias),
                                value_or_undefined(initial_state), value_or_undefined(reset)});
    context->saved_data["silu"] = silu;
    context->set_materialize_grads(false);
    return {y, last_state};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& gradients) {
    const Unrecorded unrecorded;
    const auto saved = context->get_saved_variables();
    const auto& bias = saved[2];
    const auto& initial_state = saved[3];
    const auto [dx, dweight, dbias, dinitial_state] =
        call_bwd(gradients[0], gradients[1], saved[0], saved[1], bias,
                 context->saved_data["silu"].toBool(), initial_state, saved[4]);
    return {dx,
            dweight,
            bias.defined() ? dbias : Tensor(),
            Tensor(),
            initial_state.defined() ? dinitial_state.to(initial_state.scalar_type()) : Tensor(),
            Tensor()};
  }
};

Pair causal_conv1d_autograd(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                            bool silu, const OptionalTensor& initial_state,
                            const OptionalTensor& reset) {
  if (!needs_gradient({x, weight, value_or_undefined(bias), value_or_undefined(initial_state)})) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return call(x, weight, bias, silu, initial_state, reset);
  }
  if (!has_kernels("retain::causal_conv1d_bwd_into", x)) {
    return causal_conv1d_reference(x, weight, bias, silu, initial_state, reset);
  }
  const auto outputs = CausalConv1dFunction::apply(x, weight, bias, silu, initial_state, reset);
  return {outputs[0], outputs[1]};
}

/// Autocast: activations in the narrow type; weights and state stay as they are.
Pair causal_conv1d_autocast(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                            bool silu, const OptionalTensor& initial_state,
                            const OptionalTensor& reset) {
  const auto narrow = autocasted(x);
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  return call(narrow, weight, bias, silu, initial_state, reset);
}

}  // namespace

Weights causal_conv1d_bwd_into(const OptionalTensor& dy, const OptionalTensor& dlast_state,
                               const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                               bool silu, const OptionalTensor& initial_state,
                               const OptionalTensor& reset, const OptionalTensor& rows,
                               const OptionalTensor& columns, const Tensor& dx) {
  static const auto op =
      find_op<decltype(causal_conv1d_bwd_into)>("retain::causal_conv1d_bwd_into");
  return op.call(dy, dlast_state, x, weight, bias, silu, initial_state, reset, rows, columns, dx);
}

bool adds_product_on_the_way(const Tensor& x) { return x.is_cuda() && x.element_size() == 2; }

Tensor with_product(const OptionalTensor& dy, const OptionalTensor& rows,
                    const OptionalTensor& columns) {
  if (!present(rows)) return value_or_undefined(dy);
  const auto flat = rows->flatten(0, 1);
  const auto sum =
      present(dy) ? at::addmm(dy->flatten(0, 1), flat, *columns) : at::mm(flat, *columns);
  return sum.view({rows->size(0), rows->size(1), columns->size(1)});
}

void check_causal_conv1d(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                         const OptionalTensor& initial_state, const OptionalTensor& reset) {
  check_rank(kOp, "x", x, "[T, B, d_inner]");
  check_floating(kOp, "x", x);
  check_rank(kOp, "weight", weight, "[d_inner, d_conv]");
  const auto T = x.sym_size(0), B = x.sym_size(1), D = x.sym_size(2), K = weight.sym_size(1);
  check_shape(kOp, "weight", weight, "[d_inner, d_conv]", {D, K});
  check_like(kOp, "weight", weight, "x", x);
  TORCH_CHECK(K >= 1, kOp, ": weight must have at least one tap, got ", weight.sym_sizes());
  if (present(bias)) {
    check_shape(kOp, "bias", *bias, "[d_inner]", {D});
    check_like(kOp, "bias", *bias, "x", x);
  }
  if (present(initial_state)) {
    check_shape(kOp, "initial_state", *initial_state, "[B, d_conv - 1, d_inner]", {B, K - 1, D});
    check_like(kOp, "initial_state", *initial_state, "x", x);
  }
  if (present(reset)) check_reset(kOp, *reset, "[T, B]", {T, B}, "x", x);
}

void check_causal_conv1d_bwd(const OptionalTensor& dy, const OptionalTensor& dlast_state,
                             const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                             const OptionalTensor& initial_state, const OptionalTensor& reset,
                             const OptionalTensor& rows, const OptionalTensor& columns,
                             const Tensor& dx) {
  constexpr char kBwd[] = "causal_conv1d_bwd";
  check_causal_conv1d(x, weight, bias, initial_state, reset);
  TORCH_CHECK(present(rows) == present(columns), kBwd,
              ": rows and columns must be there together, got ", present(rows) ? "rows" : "columns",
              " alone");
  const auto T = x.sym_size(0), B = x.sym_size(1), D = x.sym_size(2), K = weight.sym_size(1);
  const auto check = [&](const char* name, const OptionalTensor& tensor, const char* layout,
                         std::initializer_list<c10::SymInt> sizes) {
    check_if_present(kBwd, name, tensor, layout, sizes, "x", x);
  };
  check("dy", dy, "[T, B, d_inner]", {T, B, D});
  check("dlast_state", dlast_state, "[B, d_conv - 1, d_inner]", {B, K - 1, D});
  check("dx", dx, "[T, B, d_inner]", {T, B, D});
  check_apart(kBwd, "dx", dx);
  if (!present(rows)) return;
  check_rank(kBwd, "columns", *columns, "[P, d_inner]");
  const auto P = columns->sym_size(0);
  check("columns", columns, "[P, d_inner]", {P, D});
  check("rows", rows, "[T, B, P]", {T, B, P});
}

Pair causal_conv1d(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, bool silu,
                   const OptionalTensor& initial_state, const OptionalTensor& reset) {
  check_causal_conv1d(x, weight, bias, initial_state, reset);
  return call(x, weight, bias, silu, initial_state, reset);
}

// y_t = act(bias + sum_j weight[K - 1 - j] x_{t - j}), where x_{t - j} is 0 if a reset lies in (t -
// j, t].
Pair causal_conv1d_reference(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                             bool silu, const OptionalTensor& initial_state,
                             const OptionalTensor& reset) {
  check_causal_conv1d(x, weight, bias, initial_state, reset);
  const auto dtype = state_dtype(x);
  const int64_t T = x.size(0), B = x.size(1), D = x.size(2), K = weight.size(1);
  const auto before = present(initial_state) ? initial_state->to(dtype).transpose(0, 1)
                                             : at::zeros({K - 1, B, D}, x.options().dtype(dtype));
  const auto inputs = at::cat({before, x.to(dtype)});
  const auto resets = present(reset) ? *reset : at::zeros({T, B}, x.options().dtype(at::kBool));
  // Episodes are numbered; the initial state belongs to the one that no reset has ended yet.
  const auto episode = at::cat(
      {at::zeros({K - 1, B}, resets.options().dtype(at::kLong)), resets.to(at::kLong).cumsum(0)});
  const auto now = episode.narrow(0, K - 1, T);
  auto sum = at::zeros({T, B, D}, x.options().dtype(dtype));
  for (int64_t k = 0; k < K; ++k) {
    const auto same = (episode.narrow(0, k, T) == now).unsqueeze(-1);
    sum = sum + at::where(same, inputs.narrow(0, k, T), 0.0) * weight.select(1, k).to(dtype);
  }
  if (present(bias)) sum = sum + bias->to(dtype);
  const auto latest = T > 0 ? episode.select(0, T + K - 2) : at::zeros({B}, episode.options());
  const auto last_state = at::where((episode.narrow(0, T, K - 1) == latest).unsqueeze(-1),
                                    inputs.narrow(0, T, K - 1), 0.0)
                              .transpose(0, 1)
                              .contiguous();
  return {(silu ? at::silu(sum) : sum).to(x.scalar_type()), last_state};
}

TORCH_LIBRARY_FRAGMENT(retain, m) {
  m.def(
      "causal_conv1d(Tensor x, Tensor weight, Tensor? bias=None, bool silu=False, Tensor? "
      "initial_state=None, Tensor? reset=None) -> (Tensor y, Tensor last_state)");
  m.def(
      "causal_conv1d_bwd(Tensor? dy, Tensor? dlast_state, Tensor x, Tensor weight, Tensor? bias, "
      "bool silu, Tensor? initial_state, Tensor? reset) -> (Tensor dx, Tensor dweight, Tensor "
      "dbias, Tensor dinitial_state)");
  m.def(
      "causal_conv1d_bwd_into(Tensor? dy, Tensor? dlast_state, Tensor x, Tensor weight, "
      "Tensor? bias, bool silu, Tensor? initial_state, Tensor? reset, Tensor? rows, "
      "Tensor? columns, Tensor(a!) dx) -> (Tensor dweight, Tensor dbias, Tensor dinitial_state)");
}

TORCH_LIBRARY_IMPL(retain, CPU, m) {
  m.impl("causal_conv1d", causal_conv1d_cpu);
  m.impl("causal_conv1d_bwd_into", causal_conv1d_bwd_into_cpu);
}

TORCH_LIBRARY_IMPL(retain, Meta, m) {
  m.impl("causal_conv1d", causal_conv1d_meta);
  m.impl("causal_conv1d_bwd_into", causal_conv1d_bwd_into_meta);
}

TORCH_LIBRARY_IMPL(retain, CompositeExplicitAutograd, m) {
  m.impl("causal_conv1d", causal_conv1d_reference);
  m.impl("causal_conv1d_bwd", causal_conv1d_bwd);
}

TORCH_LIBRARY_IMPL(retain, AutocastCPU, m) { m.impl("causal_conv1d", causal_conv1d_autocast); }

TORCH_LIBRARY_IMPL(retain, AutocastCUDA, m) { m.impl("causal_conv1d", causal_conv1d_autocast); }

TORCH_LIBRARY_IMPL(retain, Autograd, m) {
  m.impl("causal_conv1d", causal_conv1d_autograd);
  m.impl("causal_conv1d_bwd", torch::autograd::autogradNotImplementedFallback());
  m.impl("causal_conv1d_bwd_into", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace retain
