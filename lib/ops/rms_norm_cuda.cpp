#include <ATen/ATen.h>
#include <c10/cuda/CUDAGuard.h>
#include <retain/kernels/rms_norm/rms_norm_cuda.h>
#include <retain/lib/ops/cuda_arguments.h>
#include <retain/lib/ops/rms_norm.h>
#include <retain/lib/ops/rms_norm_tensors.h>
#include <torch/library.h>

namespace retain {
namespace {

/// [..., D] as [T, B, D] with contiguous rows; copied only if it has to be.
Tensor as_rows(const OptionalTensor& tensor, at::ScalarType dtype) {
  const auto dense_rows = with_dense_rows(tensor, dtype);
  if (!dense_rows.defined() || dense_rows.dim() == 3) return dense_rows;
  const auto sizes = dense_rows.sizes();
  const int64_t D = sizes.back(), B = sizes.size() > 1 ? sizes[sizes.size() - 2] : 1;
  int64_t T = 1;
  for (size_t i = 0; i + 2 < sizes.size(); ++i) T *= sizes[i];
  return dense_rows.reshape({T, B, D});
}

std::tuple<Tensor, Tensor> rms_norm_cuda(const Tensor& x_in, const Tensor& weight,
                                         const OptionalTensor& residual_in, double eps) {
  // fp64 has no kernels.
  if (x_in.scalar_type() == at::kDouble) {
    return rms_norm_reference(x_in, weight, residual_in, eps);
  }
  check_rms_norm(x_in, weight, residual_in, eps);
  const c10::cuda::CUDAGuard guard(x_in.device());
  const auto x = as_rows(x_in, x_in.scalar_type());
  const auto residual_dtype = present(residual_in) ? residual_in->scalar_type() : at::kFloat;
  const auto residual = as_rows(residual_in, residual_dtype);
  const auto gain = dense(weight, at::kFloat);
  const auto y = at::empty(x_in.sizes(), x.options());
  const auto residual_out = at::empty(x_in.sizes(), x.options().dtype(at::kFloat));
  kernels::rms_norm_cuda_fwd({.T = x.size(0),
                              .B = x.size(1),
                              .D = x.size(2),
                              .type = activation_type(x.scalar_type()),
                              .x = activations(x),
                              .residual_type = activation_type(residual_dtype),
                              .residual = activations(residual),
                              .weight = pointer<float>(gain),
                              .eps = static_cast<float>(eps),
                              .y = y.mutable_data_ptr(),
                              .residual_out = mutable_pointer<float>(residual_out)},
                             current_stream());
  return {y, residual_out};
}

/// dx in the type of residual_out, dweight in that of weight.
std::tuple<Tensor, Tensor> rms_norm_bwd_cuda(const OptionalTensor& dy_in,
                                             const OptionalTensor& dresidual_out_in,
                                             const Tensor& residual_out, const Tensor& weight,
                                             double eps) {
  check_rms_norm_bwd(dy_in, dresidual_out_in, residual_out, weight);
  const c10::cuda::CUDAGuard guard(residual_out.device());
  const auto s = as_rows(dense(residual_out, at::kFloat), at::kFloat);
  const auto dy_dtype = present(dy_in) ? dy_in->scalar_type() : at::kFloat;
  const auto dy = as_rows(dy_in, dy_dtype);
  const auto dresidual_out = dense(dresidual_out_in, at::kFloat);
  const auto gain = dense(weight, at::kFloat);
  const int64_t T = s.size(0), B = s.size(1), D = s.size(2);
  const int64_t parts = kernels::rms_norm_cuda_parts(T * B, D);
  const auto dx = at::empty(residual_out.sizes(), s.options());
  const auto dweight = at::empty({D}, s.options());
  const auto dweight_parts = at::empty({parts, D}, s.options());
  const auto scales = at::empty({T, B}, s.options());
  kernels::rms_norm_cuda_bwd({.T = T,
                              .B = B,
                              .D = D,
                              .residual_out = pointer<float>(s),
                              .weight = pointer<float>(gain),
                              .type = activation_type(dy_dtype),
                              .dy = activations(dy),
                              .dresidual_out = pointer<float>(dresidual_out),
                              .eps = static_cast<float>(eps),
                              .dx = mutable_pointer<float>(dx),
                              .dweight = mutable_pointer<float>(dweight),
                              .parts = parts,
                              .dweight_parts = mutable_pointer<float>(dweight_parts),
                              .scales = mutable_pointer<float>(scales)},
                             current_stream());
  return {dx, dweight.to(weight.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_IMPL(retain, CUDA, m) {
  m.impl("rms_norm", rms_norm_cuda);
  m.impl("rms_norm_bwd", rms_norm_bwd_cuda);
}

}  // namespace retain
