#include <c10/cuda/CUDAGuard.h>
#include <retain/lib/ops/causal_conv1d.h>
#include <retain/lib/ops/causal_conv1d_cuda_arguments.h>
#include <retain/lib/ops/causal_conv1d_tensors.h>
#include <torch/library.h>

namespace retain {
namespace {

std::tuple<Tensor, Tensor> causal_conv1d_cuda(const Tensor& x, const Tensor& weight,
                                              const OptionalTensor& bias, bool silu,
                                              const OptionalTensor& initial_state,
                                              const OptionalTensor& reset) {
  // fp64 has no kernels.
  if (x.scalar_type() == at::kDouble) {
    return causal_conv1d_reference(x, weight, bias, silu, initial_state, reset);
  }
  check_causal_conv1d(x, weight, bias, initial_state, reset);
  const c10::cuda::CUDAGuard guard(x.device());
  const CausalConv1dCudaArguments prepared(x, weight, bias, silu, initial_state, reset);
  const auto& in = prepared.in;
  const auto y = prepared.like_x(), last_state = prepared.floats({in.B, in.K - 1, in.D});
  kernels::CausalConv1dCudaFwd params{
      .in = in, .y = mutable_activations(y), .last_state = mutable_pointer<float>(last_state)};
  kernels::cut_into_runs(params);
  kernels::causal_conv1d_cuda_fwd(params, current_stream());
  return {y, last_state};
}

/// Each gradient in the type of its argument; that of the state in fp32.
std::tuple<Tensor, Tensor, Tensor> causal_conv1d_bwd_into_cuda(
    const OptionalTensor& dy_in, const OptionalTensor& dlast_state_in, const Tensor& x,
    const Tensor& weight, const OptionalTensor& bias, bool silu,
    const OptionalTensor& initial_state, const OptionalTensor& reset, const OptionalTensor& rows,
    const OptionalTensor& columns, const Tensor& dx_out) {
  check_causal_conv1d_bwd(dy_in, dlast_state_in, x, weight, bias, initial_state, reset, rows,
                          columns, dx_out);
  const c10::cuda::CUDAGuard guard(x.device());
  const CausalConv1dCudaArguments prepared(x, weight, bias, silu, initial_state, reset);
  const auto& in = prepared.in;
  auto dy = with_dense_rows(dy_in, x.scalar_type());
  const auto dlast_state = dense(dlast_state_in, at::kFloat);
  const bool in_place = has_dense_rows(dx_out, x.scalar_type());
  const auto dx = in_place ? dx_out : prepared.like_x();
  const auto dweight = prepared.floats({in.D, in.K}), dbias = prepared.floats({in.D});
  const bool with_state = in.initial_state != nullptr;
  const auto dinitial_state = with_state ? prepared.floats({in.B, in.K - 1, in.D})
                                         : at::zeros({in.B, in.K - 1, in.D}, dweight.options());
  kernels::CausalConv1dCudaBwd params{
      .in = in,
      .dy = activations(dy),
      .dlast_state = pointer<float>(dlast_state),
      .dx = mutable_activations(dx),
      .dweight = mutable_pointer<float>(dweight),
      .dbias = mutable_pointer<float>(dbias),
      .dinitial_state = with_state ? mutable_pointer<float>(dinitial_state) : nullptr};
  const auto product_rows = with_dense_rows(rows, x.scalar_type()),
             product_columns = dense(columns, x.scalar_type());
  if (present(rows)) {
    params.rows = activations(product_rows);
    params.columns = product_columns.const_data_ptr();
    params.P = product_rows.size(2);
    if (!kernels::conv_adds_product(params)) {
      params.P = 0;
      dy = with_product(dy, rows, columns);
      params.dy = activations(dy);
    }
  }
  kernels::cut_into_runs(params);
  const auto dweight_parts = prepared.floats({params.parts, in.D, in.K});
  const auto dbias_parts = prepared.floats({params.parts, in.D});
  const bool needs_dsum = kernels::conv_needs_dsum(params);
  const auto dsum = needs_dsum ? prepared.floats({in.T, in.B, in.D}) : Tensor();
  params.dweight_parts = mutable_pointer<float>(dweight_parts);
  params.dbias_parts = mutable_pointer<float>(dbias_parts);
  params.dsum = mutable_pointer<float>(dsum);
  kernels::causal_conv1d_cuda_bwd(params, current_stream());
  if (!in_place) Tensor(dx_out).copy_(dx);
  return {dweight.to(weight.scalar_type()), dbias.to(dbias_dtype(weight, bias)), dinitial_state};
}

}  // namespace

TORCH_LIBRARY_IMPL(retain, CUDA, m) {
  m.impl("causal_conv1d", causal_conv1d_cuda);
  m.impl("causal_conv1d_bwd_into", causal_conv1d_bwd_into_cuda);
}

}  // namespace retain
