#pragma once

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <retain/lib/ops/causal_conv1d.h>

#include <vector>

#include "support/errors.h"
#include "support/op_checks.h"

namespace retain::testing {

/// Sizes and which optional arguments are there.
struct ConvProblem {
  int64_t T, B, D, K;
  bool bias = true, silu = true, initial_state = true, reset = true;
};

/// x, weight, then the optional arguments that are there.
inline Tensors inputs_of(const ConvProblem& p) {
  Tensors inputs = {randn({p.T, p.B, p.D}, 1, at::kDouble), randn({p.D, p.K}, 2, at::kDouble)};
  if (p.bias) inputs.push_back(randn({p.D}, 3, at::kDouble));
  if (p.initial_state) inputs.push_back(randn({p.B, p.K - 1, p.D}, 4, at::kDouble));
  return inputs;
}

inline at::Tensor reset_of(const ConvProblem& p) {
  return p.reset ? random_mask({p.T, p.B}, 0.3, 77) : at::Tensor();
}

template <typename Function>
Op op_of(const Function& function, const ConvProblem& p, const at::Tensor& reset) {
  return [=](const Tensors& inputs) -> Tensors {
    const auto mask = reset.defined() ? reset.to(inputs[0].device()) : reset;
    const auto [y, last_state] =
        function(inputs[0], inputs[1], p.bias ? inputs[2] : at::Tensor(), p.silu,
                 p.initial_state ? inputs.back() : at::Tensor(), mask);
    return {y, last_state};
  };
}

inline Op kernel(const ConvProblem& p) { return op_of(causal_conv1d, p, reset_of(p)); }
inline Op reference(const ConvProblem& p) { return op_of(causal_conv1d_reference, p, reset_of(p)); }

/// The problem with every optional argument, without each one, and with none.
inline std::vector<ConvProblem> variants(const ConvProblem& whole) {
  std::vector<ConvProblem> problems(6, whole);
  problems[1].bias = false;
  problems[2].silu = false;
  problems[3].initial_state = false;
  problems[4].reset = false;
  problems[5] = {whole.T, whole.B, whole.D, whole.K, false, false, false, false};
  return problems;
}

/// Wrong shapes, dtypes and devices are named.
inline void expect_bad_input_is_named(at::Device device) {
  using ::testing::HasSubstr;
  const ConvProblem p{3, 2, 5, 4};
  const auto in = to(inputs_of(p), at::kFloat);
  const auto reset = reset_of(p);
  const auto fails = [&](size_t index, const at::Tensor& value) {
    auto bad = in;
    bad.push_back(reset);
    bad[index] = value;
    for (auto& tensor : bad) {
      if (tensor.defined() && !tensor.is_meta()) tensor = tensor.to(device);
    }
    return error_of([&] { causal_conv1d(bad[0], bad[1], bad[2], true, bad[3], bad[4]); });
  };
  EXPECT_THAT(fails(0, in[0][0]),
              HasSubstr("causal_conv1d: x must be [T, B, d_inner], got [2, 5]"));
  EXPECT_THAT(fails(0, in[0].to(at::kInt)), HasSubstr("causal_conv1d: x must be float"));
  EXPECT_THAT(fails(0, at::Tensor()), HasSubstr("causal_conv1d: x must be a tensor"));
  EXPECT_THAT(fails(1, at::zeros({6, 4})),
              HasSubstr("causal_conv1d: weight must be [d_inner, d_conv] = [5, 4], got [6, 4]"));
  EXPECT_THAT(fails(1, at::zeros({5, 0})),
              HasSubstr("causal_conv1d: weight must have at least one tap"));
  EXPECT_THAT(fails(1, at::zeros({5, 4}, at::kDouble)),
              HasSubstr("causal_conv1d: weight must have the dtype"));
  EXPECT_THAT(fails(2, at::zeros({4})),
              HasSubstr("causal_conv1d: bias must be [d_inner] = [5], got [4]"));
  EXPECT_THAT(fails(3, at::zeros({2, 4, 5})),
              HasSubstr("causal_conv1d: initial_state must be [B, d_conv - 1, d_inner] = "
                        "[2, 3, 5], got [2, 4, 5]"));
  EXPECT_THAT(fails(3, at::zeros({2, 3, 5}, at::kMeta)),
              HasSubstr("causal_conv1d: initial_state must be on"));
  EXPECT_THAT(fails(4, at::zeros({2, 3}, at::kBool)),
              HasSubstr("causal_conv1d: reset must be [T, B] = [3, 2], got [2, 3]"));
  EXPECT_THAT(fails(4, at::zeros({3, 2})), HasSubstr("causal_conv1d: reset must be bool"));
}

}  // namespace retain::testing
