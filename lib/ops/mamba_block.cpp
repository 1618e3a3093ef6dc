#include <retain/lib/ops/mamba_block.h>

#include <ATen/ATen.h>
#include <retain/lib/ops/casts.h>
#include <retain/lib/ops/causal_conv1d.h>
#include <retain/lib/ops/causal_conv1d_tensors.h>
#include <retain/lib/ops/gradients.h>
#include <retain/lib/ops/kernel_arguments.h>
#include <retain/lib/ops/mamba_update_tensors.h>
#include <retain/lib/ops/scan_inputs.h>
#include <retain/lib/ops/selective_scan.h>
#include <retain/lib/ops/selective_scan_tensors.h>
#include <retain/lib/ops/thin_linear.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/engine.h>

#include <array>
#include <vector>

namespace retain {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Outputs = std::tuple<Tensor, Tensor, Tensor>;

/// The small weights, which the kernels take in fp32: conv_weight, conv_bias, dt_proj_bias, A_log
/// and D, or their gradients; undefined where absent.
using SmallWeights = std::array<Tensor, 5>;
using Types = std::array<at::ScalarType, 5>;  ///< of theirs

/// Their own types, or those in which the kernels take them.
Types types_of(const SmallWeights& weights, bool wide) {
  Types types = {};
  for (size_t i = 0; i < weights.size(); ++i) {
    const auto& weight = weights[i];
    if (weight.defined()) types[i] = wide ? state_dtype(weight) : weight.scalar_type();
  }
  return types;
}

/// The types as a context holds them.
std::vector<int64_t> numbers_of(const Types& types) {
  std::vector<int64_t> numbers;
  for (const auto type : types) numbers.push_back(static_cast<int64_t>(type));
  return numbers;
}

Types types_of(const std::vector<int64_t>& numbers) {
  Types types = {};
  for (size_t i = 0; i < types.size(); ++i) types[i] = static_cast<at::ScalarType>(numbers[i]);
  return types;
}

/// [T, B, features] as [T B, features].
Tensor rows_of(const Tensor& x) { return x.reshape({x.size(0) * x.size(1), x.size(2)}); }

/// x [T, B, in] · columns [in, out] → [T, B, out].
Tensor product(const Tensor& x, const Tensor& columns) {
  return at::mm(rows_of(x), columns).view({x.size(0), x.size(1), columns.size(1)});
}

/// The weights of x_proj and dt_proj in x's type. On a GPU dt_rank is filled up with zeros to whole
/// words of 16 bytes: rows of B and C then begin on a word, as the scan and the products want it.
struct ProjectionWeights {
  Tensor x_proj;   ///< [dt_rank + 2 d_state, d_inner]
  Tensor dt_proj;  ///< [d_inner, dt_rank]

  ProjectionWeights(const Tensor& x, const Tensor& x_proj_weight, const Tensor& dt_proj_weight)
      : x_proj(x_proj_weight.to(x.scalar_type())), dt_proj(dt_proj_weight.to(x.scalar_type())) {
    const int64_t R = dt_proj.size(1), word = 16 / x.element_size();
    const int64_t zeros = x.is_cuda() ? (word - R % word) % word : 0;
    if (zeros > 0) {
      x_proj = at::cat({x_proj.narrow(0, 0, R), at::zeros({zeros, x_proj.size(1)}, x.options()),
                        x_proj.narrow(0, R, x_proj.size(0) - R)});
      dt_proj = at::constant_pad_nd(dt_proj, {0, zeros});
    }
  }
};

/// (dt, B, C) of x_proj's output; B and C with one group.
struct Projected {
  Tensor dt, B, C;
  Projected(const Tensor& dt_B_C, int64_t dt_rank, int64_t d_state) {
    const auto parts = dt_B_C.split_with_sizes({dt_rank, d_state, d_state}, -1);
    dt = parts[0];
    B = parts[1].unsqueeze(2);
    C = parts[2].unsqueeze(2);
  }
};

/// The block with one node in the graph: gradients are written where they are needed, and those
/// that meet in one tensor are added up by the products that make them.
class MambaBlock : public torch::autograd::Function<MambaBlock> {
 public:
  static variable_list forward(AutogradContext* context, const Tensor& input,
                               const Tensor& in_proj_weight, const Tensor& out_proj_weight,
                               const Tensor& conv_state, const Tensor& ssm_state,
                               const Tensor& conv_weight, const OptionalTensor& conv_bias,
                               const Tensor& x_proj_weight, const Tensor& dt_proj_weight,
                               const OptionalTensor& dt_proj_bias, const Tensor& A_log,
                               const OptionalTensor& D, const OptionalTensor& reset) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const auto xz = product(input, in_proj_weight.t());
    const auto x_z = xz.chunk(2, -1);
    const SmallWeights small = {conv_weight, value_or_undefined(conv_bias),
                                value_or_undefined(dt_proj_bias), A_log, value_or_undefined(D)};
    const auto [taps, taps_bias, delta_bias, log_rates, D_skip] =
        cast_together(small, types_of(small, /*wide=*/true));
    const auto [x_proj, dt_proj] = ProjectionWeights(xz, x_proj_weight, dt_proj_weight);
    const auto [x, dt_B_C, delta, new_conv_state] =
        scan_inputs(x_z[0], taps, if_present(taps_bias), x_proj, dt_proj, conv_state, reset);
    const Projected projected(dt_B_C, dt_proj.size(1), A_log.size(1));
    const auto A = log_rates.exp().neg_();
    const auto wanted = scan_checkpoints({x, delta, A, projected.B, projected.C});
    const auto [y, new_ssm_state, checkpoints] = selective_scan_fwd(
        x, delta, A, projected.B, projected.C, if_present(D_skip), x_z[1], if_present(delta_bias),
        true, ssm_state, reset, false, wanted.kept ? wanted.every : 0, wanted.dtype);
    context->set_materialize_grads(false);
    context->save_for_backward({input, in_proj_weight, out_proj_weight, conv_state, xz, taps,
                                taps_bias, x, x_proj, dt_proj, dt_B_C, delta, A, D_skip, delta_bias,
                                wanted.kept ? checkpoints : Tensor(), value_or_undefined(reset),
                                wanted.kept ? Tensor() : ssm_state});
    context->saved_data["y"] = y;
    context->saved_data["every"] = wanted.every;
    context->saved_data["dt_rank"] = dt_proj_weight.size(1);
    context->saved_data["types"] = numbers_of(types_of(small, /*wide=*/false));
    return {product(y, out_proj_weight.t()), new_conv_state, new_ssm_state};
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    TORCH_CHECK(!at::GradMode::is_enabled(),
                "mamba_block: gradients of its gradients are not implemented (create_graph)");
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const auto saved = context->get_saved_variables();
    const auto &input = saved[0], &in_proj = saved[1], &out_proj = saved[2], &conv_state = saved[3],
               &xz = saved[4], &taps = saved[5], &x = saved[7], &x_proj = saved[8],
               &dt_B_C = saved[10], &delta = saved[11], &A = saved[12];
    const auto dt_columns = columns_of(saved[9]);
    const auto taps_bias = if_present(saved[6]), D_skip = if_present(saved[13]),
               delta_bias = if_present(saved[14]), reset = if_present(saved[16]);
    auto y = context->saved_data["y"].toTensor();
    // A saved variable's memory would stay; its own goes back when the scan has read it.
    if (!torch::autograd::get_current_graph_task_keep_graph()) context->saved_data.erase("y");
    Tensor dy, dout_proj;
    if (gradients[0].defined()) {
      dy = product(gradients[0], out_proj);
      dout_proj = at::mm(rows_of(gradients[0]).t(), rows_of(y));
    }
    const auto x_z = xz.chunk(2, -1);
    const Projected projected(dt_B_C, dt_columns.size(0), A.size(1));
    auto checkpoints = saved[15];
    if (!checkpoints.defined()) {
      checkpoints = scan_checkpoints_again(x, delta, A, projected.B, projected.C, D_skip, x_z[1],
                                           delta_bias, true, saved[17], reset, false);
    }
    if (!scan_takes_y(checkpoints.scalar_type(), /*gated=*/true)) y.reset();
    const auto dxz = at::empty(xz.sizes(), xz.options());
    const auto dx_dz = dxz.chunk(2, -1);
    const auto ddt_dB_dC = at::empty(dt_B_C.sizes(), dt_B_C.options());
    const Projected dprojected(ddt_dB_dC, dt_columns.size(0), A.size(1));
    auto [dx, ddelta, dA, dD, ddelta_bias, dssm_state] = selective_scan_bwd_into(
        if_present(dy), if_present(gradients[2]), x, delta, A, projected.B, projected.C, D_skip,
        x_z[1], delta_bias, true, std::nullopt, reset, false, if_present(y), checkpoints,
        context->saved_data["every"].toInt(), dprojected.B, dprojected.C, dx_dz[1]);
    dy.reset();  // gives its memory back
    y.reset();
    const auto ddt_columns =
        thin_linear_bwd_into(rows_of(ddelta), rows_of(projected.dt), dt_columns,
                             rows_of(ddt_dB_dC).narrow(1, 0, dt_columns.size(0)));
    ddelta.reset();
    // What x_proj passes back.
    const bool on_the_way = adds_product_on_the_way(dx);
    if (!on_the_way) rows_of(dx).addmm_(rows_of(ddt_dB_dC), x_proj);
    auto dx_proj = at::mm(rows_of(ddt_dB_dC).t(), rows_of(x));
    const auto [dtaps, dtaps_bias, dconv_state] = causal_conv1d_bwd_into(
        dx, if_present(gradients[1]), x_z[0], taps, taps_bias, true, conv_state, reset,
        on_the_way ? OptionalTensor(ddt_dB_dC) : OptionalTensor(),
        on_the_way ? OptionalTensor(x_proj) : OptionalTensor(), dx_dz[0]);
    dx.reset();
    constexpr size_t kInput = 0;  // of the tensors among the arguments
    const auto dinput = context->needs_input_grad(kInput) ? product(dxz, in_proj) : Tensor();
    const auto din_proj = at::mm(rows_of(dxz).t(), rows_of(input));
    // Without the zeros that fill up dt_rank.
    const int64_t R = context->saved_data["dt_rank"].toInt(), d_state = A.size(1);
    if (R < dt_columns.size(0)) {
      dx_proj =
          at::cat({dx_proj.narrow(0, 0, R), dx_proj.narrow(0, dt_columns.size(0), 2 * d_state)});
    }
    const SmallWeights dsmall = {dtaps, taps_bias ? dtaps_bias : Tensor(),
                                 delta_bias ? ddelta_bias : Tensor(), dA.mul_(A),
                                 D_skip ? dD : Tensor()};
    const auto [dconv_weight, dconv_bias, ddt_bias, dA_log, dD_weight] =
        cast_together(dsmall, types_of(context->saved_data["types"].toIntVector()));
    return {dinput,      din_proj,   dout_proj,
            dconv_state, dssm_state, dconv_weight,
            dconv_bias,  dx_proj,    ddt_columns.narrow(0, 0, R).t(),
            ddt_bias,    dA_log,     dD_weight,
            Tensor()};
  }
};

/// The scan's inputs by such a convolution and two products, as scan_inputs gives them.
template <typename Conv>
auto inputs_by(Conv conv) {
  return [conv](const Tensor& x, const Tensor& taps, const OptionalTensor& taps_bias,
                const Tensor& x_proj, const Tensor& dt_proj, const Tensor& conv_state,
                const OptionalTensor& reset) {
    const auto [u, new_conv_state] = conv(x, taps, taps_bias, /*silu=*/true, conv_state, reset);
    const auto dt_B_C = at::linear(u, x_proj);
    const auto delta = thin_linear(dt_B_C.narrow(-1, 0, dt_proj.size(1)), dt_proj);
    return std::make_tuple(u, dt_B_C, delta, new_conv_state);
  };
}

/// What lies between the large projections, by what makes the scan's inputs, and such a scan.
template <typename Inputs, typename Scan>
Outputs compose_inner(const Tensor& xz, const Tensor& conv_state, const Tensor& ssm_state,
                      const MambaWeights& w, const OptionalTensor& reset, const Inputs& inputs,
                      const Scan& scan) {
  const auto x_z = xz.chunk(2, -1);  // views
  const auto [x_proj, dt_proj] = ProjectionWeights(xz, w.x_proj_weight, w.dt_proj_weight);
  const auto [x, dt_B_C, delta, new_conv_state] =
      inputs(x_z[0], w.conv_weight, if_present(w.conv_bias), x_proj, dt_proj, conv_state, reset);
  const Projected projected(dt_B_C, dt_proj.size(1), w.A_log.size(1));
  const auto A = -at_least_fp32(w.A_log).exp();
  const auto [y, new_ssm_state] =
      scan(x, delta, A, projected.B, projected.C, at_least_fp32(w.D), /*z=*/x_z[1],
           at_least_fp32(w.dt_proj_bias), /*delta_softplus=*/true, ssm_state, reset);
  return {y, new_conv_state, new_ssm_state};
}

void check_mamba_block(const Tensor& x, const Tensor& in_proj_weight, const Tensor& out_proj_weight,
                       const Tensor& conv_state, const Tensor& ssm_state,
                       const MambaWeights& weights, const OptionalTensor& reset) {
  constexpr char kOp[] = "mamba_block";
  check_rank(kOp, "x", x, "[T, B, d_model]");
  check_mamba(kOp, "x", x, conv_state, ssm_state, weights, reset);
  const auto M = x.sym_size(-1), D = weights.A_log.sym_size(0);
  const auto check = [&](const char* name, const Tensor& weight, const char* layout,
                         std::initializer_list<c10::SymInt> sizes) {
    check_shape(kOp, name, weight, layout, sizes);
    check_same(kOp, name, weight, "x", x);
  };
  check("in_proj_weight", in_proj_weight, "[2 d_inner, d_model]", {2 * D, M});
  check("out_proj_weight", out_proj_weight, "[d_model, d_inner]", {M, D});
}

}  // namespace

Outputs mamba_block(const Tensor& x_in, const Tensor& in_proj_weight, const Tensor& out_proj_weight,
                    const Tensor& conv_state, const Tensor& ssm_state, const MambaWeights& w,
                    const OptionalTensor& reset) {
  const auto x = autocasted(x_in), in_proj = autocasted(in_proj_weight),
             out_proj = autocasted(out_proj_weight);
  check_mamba_block(x, in_proj, out_proj, conv_state, ssm_state, w, reset);
  const bool one_node =
      has_kernels("retain::selective_scan_bwd_into", x) &&
      needs_gradient({x, in_proj, out_proj, conv_state, ssm_state, w.conv_weight, w.conv_bias,
                      w.x_proj_weight, w.dt_proj_weight, w.dt_proj_bias, w.A_log, w.D});
  if (one_node) {
    const auto outputs =
        MambaBlock::apply(x, in_proj, out_proj, conv_state, ssm_state, w.conv_weight,
                          if_present(w.conv_bias), w.x_proj_weight, w.dt_proj_weight,
                          if_present(w.dt_proj_bias), w.A_log, if_present(w.D), if_present(reset));
    return {outputs[0], outputs[1], outputs[2]};
  }
  const auto [y, new_conv_state, new_ssm_state] =
      mamba_inner(at::linear(x, in_proj), conv_state, ssm_state, w, reset);
  return {at::linear(y, out_proj), new_conv_state, new_ssm_state};
}

Outputs mamba_block_reference(const Tensor& x, const Tensor& in_proj_weight,
                              const Tensor& out_proj_weight, const Tensor& conv_state,
                              const Tensor& ssm_state, const MambaWeights& weights,
                              const OptionalTensor& reset) {
  check_mamba_block(x, in_proj_weight, out_proj_weight, conv_state, ssm_state, weights, reset);
  const auto [y, new_conv_state, new_ssm_state] =
      compose_inner(at::linear(x, in_proj_weight), conv_state, ssm_state, weights, reset,
                    inputs_by(causal_conv1d_reference), selective_scan_reference);
  return {at::linear(y, out_proj_weight), new_conv_state, new_ssm_state};
}

Outputs mamba_inner(const Tensor& xz_in, const Tensor& conv_state, const Tensor& ssm_state,
                    const MambaWeights& w, const OptionalTensor& reset) {
  check_mamba_xz("mamba_inner", "[T, B, 2 d_inner]", xz_in, conv_state, ssm_state, w, reset);
  const auto xz = autocasted(xz_in);
  const auto scan = [](const auto&... arguments) { return selective_scan(arguments...); };
  const bool differentiable =
      needs_gradient({xz, conv_state, ssm_state, w.conv_weight, w.conv_bias, w.x_proj_weight,
                      w.dt_proj_weight, w.dt_proj_bias, w.A_log, w.D});
  return differentiable
             ? compose_inner(xz, conv_state, ssm_state, w, reset, inputs_by(causal_conv1d), scan)
             : compose_inner(xz, conv_state, ssm_state, w, reset, scan_inputs, scan);
}

}  // namespace retain
