#include <c10/cuda/CUDAGuard.h>
#include <retain/kernels/scan_inputs/scan_inputs_cuda.h>
#include <retain/lib/ops/causal_conv1d_cuda_arguments.h>
#include <retain/lib/ops/scan_inputs.h>
#include <torch/library.h>

namespace retain {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> scan_inputs_cuda(
    const Tensor& x, const Tensor& conv_weight, const OptionalTensor& conv_bias,
    const Tensor& x_proj_in, const Tensor& dt_proj_in, const OptionalTensor& conv_state,
    const OptionalTensor& reset) {
  check_scan_inputs(x, conv_weight, conv_bias, x_proj_in, dt_proj_in, conv_state, reset);
  const auto by_products = [&] {
    return scan_inputs_by_products(x, conv_weight, conv_bias, x_proj_in, dt_proj_in, conv_state,
                                   reset);
  };
  if (!at::isReducedFloatingType(x.scalar_type())) return by_products();
  const c10::cuda::CUDAGuard guard(x.device());
  const auto x_proj = x_proj_in.contiguous(), dt_proj = dt_proj_in.contiguous();
  const CausalConv1dCudaArguments prepared(x, conv_weight, conv_bias, /*silu=*/true, conv_state,
                                           reset);
  const auto& in = prepared.in;
  kernels::ScanInputsCuda params{.conv = {.in = in},
                                 .P = x_proj.size(0),
                                 .R = dt_proj.size(1),
                                 .x_proj = x_proj.const_data_ptr(),
                                 .dt_proj = dt_proj.const_data_ptr()};
  if (!kernels::scan_inputs_has_kernel(params)) return by_products();
  const auto u = prepared.like_x(), delta = prepared.like_x(),
             dt_B_C = at::empty({in.T, in.B, params.P}, x.options()),
             last_state = prepared.floats({in.B, in.K - 1, in.D});
  params.conv.y = mutable_activations(u);
  params.conv.last_state = mutable_pointer<float>(last_state);
  params.dt_B_C = dt_B_C.mutable_data_ptr();
  params.delta = mutable_activations(delta);
  kernels::cut_into_runs(params);
  kernels::scan_inputs_cuda(params, current_stream());
  return {u, dt_B_C, delta, last_state};
}

}  // namespace

TORCH_LIBRARY_IMPL(retain, CUDA, m) { m.impl("scan_inputs", scan_inputs_cuda); }

}  // namespace retain
