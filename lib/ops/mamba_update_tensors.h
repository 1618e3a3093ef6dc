#pragma once

#include <retain/lib/ops/checks.h>
#include <retain/lib/ops/mamba_update.h>

// Between the dispatcher and the kernels of the acting step.
namespace retain {

// The arguments that both forms of the step take, and their names.
#define MAMBA_UPDATE_PARAMETERS                                                                    \
  const Tensor &xz, const Tensor &conv_state, const Tensor &ssm_state, const Tensor &conv_weight,  \
      const std::optional<Tensor>&conv_bias, const Tensor &x_proj_weight,                          \
      const Tensor &dt_proj_weight, const std::optional<Tensor>&dt_proj_bias, const Tensor &A_log, \
      const std::optional<Tensor>&D, const std::optional<Tensor>&reset
#define MAMBA_UPDATE_ARGUMENTS                                                                    \
  xz, conv_state, ssm_state, conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_proj_bias, \
      A_log, D, reset

inline MambaWeights gather_mamba_weights(MAMBA_UPDATE_PARAMETERS) {
  static_cast<void>(xz), static_cast<void>(conv_state), static_cast<void>(ssm_state);
  static_cast<void>(reset);
  return {conv_weight,          value_or_undefined(conv_bias),    x_proj_weight,
          dt_proj_weight,       value_or_undefined(dt_proj_bias), A_log,
          value_or_undefined(D)};
}

/// One step by the other ops, on any device; differentiable.
std::tuple<Tensor, Tensor, Tensor> composed_mamba_update(MAMBA_UPDATE_PARAMETERS);

/// Shapes, dtypes and devices of states, weights and reset beside an input of [(T,) B, ...].
void check_mamba(const char* op, const char* input_name, const Tensor& input,
                 const Tensor& conv_state, const Tensor& ssm_state, const MambaWeights& weights,
                 const std::optional<Tensor>& reset);

/// The same and xz, which is [(T,) B, 2 d_inner] as `layout` says.
void check_mamba_xz(const char* op, const char* layout, const Tensor& xz, const Tensor& conv_state,
                    const Tensor& ssm_state, const MambaWeights& weights,
                    const std::optional<Tensor>& reset);

/// A step's.
void check_mamba_update(const Tensor& xz, const Tensor& conv_state, const Tensor& ssm_state,
                        const MambaWeights& weights, const std::optional<Tensor>& reset);

/// A step's in place, whose states must not overlap themselves.
void check_mamba_update_(const Tensor& xz, const Tensor& conv_state, const Tensor& ssm_state,
                         const MambaWeights& weights, const std::optional<Tensor>& reset);

}  // namespace retain
