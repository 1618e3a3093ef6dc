#pragma once

#include <ATen/ops/addmm.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>

namespace retain {

/// at::linear: x [..., in], weight [out, in], bias [out] or undefined → [..., out]. Where few
/// inputs meet the CPU it transposes the weight, which makes the products of its backward several
/// times faster.
inline at::Tensor thin_linear(const at::Tensor& x, const at::Tensor& weight,
                              const at::Tensor& bias = {}) {
  constexpr int64_t kFew = 16;
  const int64_t in = weight.size(1);
  if (!x.is_cpu() || in > kFew) return at::linear(x, weight, bias);
  const auto rows = x.reshape({x.numel() / in, in}), columns = weight.t().contiguous();
  auto sizes = x.sizes().vec();
  sizes.back() = weight.size(0);
  return (bias.defined() ? at::addmm(bias, rows, columns) : at::mm(rows, columns)).view(sizes);
}

}  // namespace retain
