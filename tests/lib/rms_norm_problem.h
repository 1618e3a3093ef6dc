#pragma once

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <retain/lib/ops/rms_norm.h>

#include "support/errors.h"
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

/// Wrong shapes, dtypes and devices are named.
inline void expect_bad_input_is_named(at::Device device) {
  using ::testing::HasSubstr;
  const auto x = randn({3, 2, 5}, 1).to(device), weight = randn({5}, 2).to(device);
  const auto fails = [](const at::Tensor& x, const at::Tensor& weight,
                        const at::Tensor& residual = {}, double eps = 1e-5) {
    return error_of([&] { rms_norm(x, weight, residual, eps); });
  };
  EXPECT_THAT(fails(at::Tensor(), weight), HasSubstr("rms_norm: x must be"));
  EXPECT_THAT(fails(at::zeros({}, device), weight),
              HasSubstr("rms_norm: x must be [..., D], got []"));
  EXPECT_THAT(fails(x.to(at::kLong), weight), HasSubstr("rms_norm: x must be float"));
  EXPECT_THAT(fails(x, randn({4}, 2).to(device)),
              HasSubstr("rms_norm: weight must be [D] = [5], got [4]"));
  EXPECT_THAT(fails(x, weight.to(at::kDouble)), HasSubstr("rms_norm: weight must have the dtype"));
  EXPECT_THAT(fails(x, weight, randn({3, 1, 5}, 3).to(device)),
              HasSubstr("rms_norm: residual must have the shape of x, [3, 2, 5], got [3, 1, 5]"));
  EXPECT_THAT(fails(x, weight, x.to(at::kMeta)), HasSubstr("rms_norm: residual must be on"));
  EXPECT_THAT(fails(x, weight, {}, -1), HasSubstr("rms_norm: eps must not be negative, got -1"));
}

}  // namespace retain::testing
