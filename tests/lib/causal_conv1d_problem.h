#pragma once

#include <ATen/ATen.h>
#include <retain/lib/ops/causal_conv1d.h>

#include <vector>

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

}  // namespace retain::testing
