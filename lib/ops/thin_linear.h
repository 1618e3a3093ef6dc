#pragma once

#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>
#include <c10/util/accumulate.h>

namespace retain {

/// weight [out, in] as the columns [in, out] of a product x · columns. Where few inputs meet the
/// CPU they are copied, which makes the product and those of its backward several times faster.
inline at::Tensor columns_of(const at::Tensor& weight) {
  constexpr int64_t kFew = 16;
  const auto columns = weight.t();
  return weight.is_cpu() && weight.size(1) <= kFew ? columns.contiguous() : columns;
}

/// at::linear by way of columns_of: x [..., in], weight [out, in], bias [out] or undefined →
/// [..., out].
inline at::Tensor thin_linear(const at::Tensor& x, const at::Tensor& weight,
                              const at::Tensor& bias = {}) {
  const auto outer = x.sizes().slice(0, x.dim() - 1);
  const auto rows = x.reshape({c10::multiply_integers(outer), weight.size(1)});
  const auto columns = columns_of(weight);
  auto sizes = outer.vec();
  sizes.push_back(weight.size(0));
  return (bias.defined() ? at::addmm(bias, rows, columns) : at::mm(rows, columns)).view(sizes);
}

/// The pass back of y = x · columns: the gradient [in, out] of columns; that of x, dx [rows, in],
/// is written. dy [rows, out] is read once where it is of a half type on a GPU and the inputs are 8
/// or 16. All are of one dtype.
at::Tensor thin_linear_bwd_into(const at::Tensor& dy, const at::Tensor& x,
                                const at::Tensor& columns, const at::Tensor& dx);

/// The same by two products, of arguments that are checked.
at::Tensor thin_linear_bwd_by_products(const at::Tensor& dy, const at::Tensor& x,
                                       const at::Tensor& columns, const at::Tensor& dx);

/// Throws c10::Error that names what does not fit.
void check_thin_linear_bwd(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& columns,
                           const at::Tensor& dx);

}  // namespace retain
