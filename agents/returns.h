#pragma once

#include <ATen/core/Tensor.h>

namespace retain {
using at::Tensor;

struct Advantages {
  Tensor advantage;  ///< [T, B]; 0 where mask is 0
  Tensor returns;    ///< [T, B]; advantage + value
};

/// Generalised advantage estimation (Schulman et al. 2016, arXiv:1506.02438, eq. 16).
///   δ_t = reward_t + γ discount_t V_{t+1} − V_t;   A_t = δ_t + γ λ discount_t mask_{t+1} A_{t+1}
/// Row t is observation t and what its action earned: reward_t and discount_t come with step t + 1.
/// mask_t is 0 on LAST steps (their action is ignored) and on padding: nothing flows across such a
/// row, but its value bootstraps the row before it, so a truncation bootstraps from the state
/// before the reset. V_T is bootstrap_value. Shapes: reward, discount, value [T, B]; mask [T, B]
/// bool; bootstrap_value [B]. Pure; no gradient. Throws c10::Error naming the argument on a wrong
/// shape and if mask is not bool.
Advantages gae(const Tensor& reward, const Tensor& discount, const Tensor& value,
               const Tensor& bootstrap_value, const Tensor& mask, double gamma, double gae_lambda);

}  // namespace retain
