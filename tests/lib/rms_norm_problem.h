#pragma once

#include <ATen/ATen.h>
#include <retain/lib/ops/rms_norm.h>

#include "support/op_checks.h"

namespace retain::testing {

/// x, weight and, if asked for, residual.
inline Tensors inputs_of(at::IntArrayRef sizes, bool residual) {
  Tensors inputs = {randn(sizes, 1, at::kDouble), randn({sizes.back()}, 2, at::kDouble)};
  if (residual) inputs.push_back(randn(sizes, 3, at::kDouble));
  return inputs;
}

template <typename Function>
Op op_of(const Function& function, double eps = 1e-5) {
  return [=](const Tensors& in) -> Tensors {
    const auto [y, residual_out] =
        function(in[0], in[1], in.size() > 2 ? in[2] : at::Tensor(), eps);
    return {y, residual_out};
  };
}

}  // namespace retain::testing
