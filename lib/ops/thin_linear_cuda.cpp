#include <ATen/ATen.h>
#include <c10/cuda/CUDAGuard.h>
#include <retain/kernels/thin_linear/thin_linear_cuda.h>
#include <retain/lib/ops/cuda_arguments.h>
#include <retain/lib/ops/thin_linear.h>
#include <torch/library.h>

namespace retain {
namespace {

Tensor thin_linear_bwd_into_cuda(const Tensor& dy, const Tensor& x, const Tensor& columns,
                                 const Tensor& dx) {
  check_thin_linear_bwd(dy, x, columns, dx);
  const c10::cuda::CUDAGuard guard(dy.device());
  const auto weight = columns.t();
  const bool dense_rows = dy.stride(1) == 1 && x.stride(1) == 1 && dx.stride(1) == 1;
  if (dy.scalar_type() == at::kDouble || !dense_rows || !weight.is_contiguous()) {
    return thin_linear_bwd_by_products(dy, x, columns, dx);
  }
  kernels::ThinLinearCudaBwd params{.rows = dy.size(0),
                                    .in = x.size(1),
                                    .out = dy.size(1),
                                    .type = activation_type(dy.scalar_type()),
                                    .dy = dy.const_data_ptr(),
                                    .dy_stride = dy.stride(0),
                                    .x = x.const_data_ptr(),
                                    .x_stride = x.stride(0),
                                    .weight = weight.const_data_ptr(),
                                    .dx = dx.mutable_data_ptr(),
                                    .dx_stride = dx.stride(0)};
  if (!kernels::thin_linear_has_kernel(params)) {
    return thin_linear_bwd_by_products(dy, x, columns, dx);
  }
  kernels::cut_into_parts(params);
  const auto floats = dy.options().dtype(at::kFloat);
  const auto parts = at::empty({params.parts, params.in, params.out}, floats),
             dcolumns = at::empty(columns.sizes(), floats);
  params.dcolumns_parts = mutable_pointer<float>(parts);
  params.dcolumns = mutable_pointer<float>(dcolumns);
  kernels::thin_linear_cuda_bwd(params, current_stream());
  return dcolumns.to(dy.scalar_type());
}

}  // namespace

TORCH_LIBRARY_IMPL(retain, CUDA, m) { m.impl("thin_linear_bwd_into", thin_linear_bwd_into_cuda); }

}  // namespace retain
