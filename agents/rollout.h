#pragma once

#include <retain/agents/actor_critic.h>
#include <retain/envs/vector_env.h>

namespace retain {

/// T steps of B environments, with the memory they began with. Row t holds observation t, the action taken on it
/// and what that earned.
struct Rollout {
  Tensor observation;    ///< [T, B, F]
  Tensor reset;          ///< [T, B] bool: observation t is the first of an episode
  Tensor legal_actions;  ///< [T, B, A] bool or undefined
  Tensor action;         ///< [T, B] or [T, B, K]
  Tensor log_prob;       ///< [T, B]
  Tensor value;          ///< [T, B]
  Tensor reward;         ///< [T, B]: for action t
  Tensor discount;       ///< [T, B]: after action t; 0 = terminated
  Tensor mask;           ///< [T, B] bool: action t counts (not a LAST step, not padding)
  Tensor decision;       ///< [T, B] bool: mask, and more than one action was legal
  Tensor bootstrap_value;  ///< [B]: value of the observation after the last row
  State initial_state;     ///< Before row 0.
  State final_state;       ///< After row T - 1: where the next chunk begins.

  Tensor episode_return;  ///< [E] undiscounted returns of the episodes that ended here
};

}  // namespace retain
