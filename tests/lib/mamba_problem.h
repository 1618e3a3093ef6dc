#pragma once

#include <ATen/ATen.h>
#include <retain/lib/ops/mamba_block.h>

#include <cmath>

#include "support/op_checks.h"

namespace retain::testing {

/// A Mamba-1 block between its projections, over T steps.
struct MambaProblem {
  int64_t T, B, D, N, R, K = 4;
  bool options = true;  ///< whether the optional arguments are there
};

/// xz, conv_state, ssm_state, then the weights that are there, in fp64.
inline Tensors inputs_of(const MambaProblem& p, uint64_t seed = 1) {
  const auto wide = at::kDouble;
  Tensors inputs = {randn({p.T, p.B, 2 * p.D}, seed, wide),
                    randn({p.B, p.K - 1, p.D}, seed + 1, wide),
                    randn({p.B, p.D, p.N}, seed + 2, wide),
                    randn({p.D, p.K}, seed + 3, wide),
                    randn({p.R + 2 * p.N, p.D}, seed + 4, wide) / std::sqrt(p.D),
                    randn({p.D, p.R}, seed + 5, wide) / std::sqrt(p.R),
                    0.5 * randn({p.D, p.N}, seed + 6, wide)};
  if (!p.options) return inputs;
  inputs.push_back(randn({p.D}, seed + 7, wide));
  inputs.push_back(randn({p.D}, seed + 8, wide));
  inputs.push_back(randn({p.D}, seed + 9, wide));
  return inputs;
}

inline at::Tensor reset_of(const MambaProblem& p) {
  return p.options ? random_mask({p.T, p.B}, 0.2, 78) : at::Tensor();
}

inline MambaWeights weights_of(const MambaProblem& p, const Tensors& in) {
  const auto optional = [&](size_t i) { return p.options ? in[i] : at::Tensor(); };
  return {.conv_weight = in[3],
          .conv_bias = optional(7),
          .x_proj_weight = in[4],
          .dt_proj_weight = in[5],
          .dt_proj_bias = optional(8),
          .A_log = in[6],
          .D = optional(9)};
}

/// y and both states after the sequence.
inline Op sequence(const MambaProblem& p) {
  return [=](const Tensors& in) -> Tensors {
    const auto reset = reset_of(p).defined() ? reset_of(p).to(in[0].device()) : at::Tensor();
    const auto [y, conv, ssm] = mamba_inner(in[0], in[1], in[2], weights_of(p, in), reset);
    return {y, conv, ssm};
  };
}

/// The same, a step at a time.
inline Op updates(const MambaProblem& p, bool in_place = false) {
  return [=](const Tensors& in) -> Tensors {
    const auto reset = reset_of(p).defined() ? reset_of(p).to(in[0].device()) : at::Tensor();
    const auto weights = weights_of(p, in);
    auto conv = in_place ? in[1].clone() : in[1], ssm = in_place ? in[2].clone() : in[2];
    Tensors outputs;
    for (int64_t t = 0; t < p.T; ++t) {
      const auto now = reset.defined() ? reset[t] : reset;
      if (in_place) {
        outputs.push_back(mamba_update_(in[0][t], conv, ssm, weights, now));
      } else {
        auto [y, next_conv, next_ssm] = mamba_update(in[0][t], conv, ssm, weights, now);
        outputs.push_back(y);
        conv = next_conv;
        ssm = next_ssm;
      }
    }
    return {at::stack(outputs), conv, ssm};
  };
}

/// Channels, states and ranks that fill no tile; few and many taps; absent arguments.
inline std::vector<MambaProblem> odd_mamba_shapes() {
  return {
      {1, 1, 16, 16, 1},
      {3, 2, 20, 8, 3},
      {5, 3, 32, 16, 4},
      {2, 2, 64, 17, 5, 3},
      {4, 70, 12, 4, 20},
      {3, 2, 9, 5, 2, 2},
      {3, 1, 6, 3, 1, 6},
      {2, 3, 33, 64, 9},
      {2, 1, 8, 256, 7},
      {3, 300, 40, 16, 16},
      {2, 2, 24, 16, 36, 4, false},
      // sizes of the fused kernel: one block and several, a rest of rows, a rank beyond the lanes
      {3, 4100, 32, 16, 2},
      {3, 7, 64, 16, 4},
      {3, 1, 128, 16, 8},
      {3, 9, 256, 16, 37},
      {3, 301, 512, 16, 16},
      {2, 5, 1024, 16, 64},
      {3, 5, 192, 16, 12},
      {2, 9, 384, 16, 24},
      {3, 70, 768, 16, 48},
      {2, 5, 32, 32, 4},
      {2, 5, 64, 32, 70},
      {3, 6, 128, 32, 20},
      {3, 5, 192, 32, 12},
      {2, 6, 384, 32, 24},
      {2, 3, 512, 32, 9, 4, false}};
}

}  // namespace retain::testing
