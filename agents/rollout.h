#pragma once

#include <retain/agents/actor_critic.h>
#include <retain/envs/vector_env.h>

namespace retain {

/// T steps of B environments, with the memory they began with. Row t holds observation t, the
/// action taken on it and what that earned.
struct Rollout {
  Tensor observation;      ///< [T, B, F]
  Tensor reset;            ///< [T, B] bool: observation t is the first of an episode
  Tensor legal_actions;    ///< [T, B, A] bool or undefined
  Tensor action;           ///< [T, B] or [T, B, K]
  Tensor log_prob;         ///< [T, B]
  Tensor value;            ///< [T, B]
  Tensor reward;           ///< [T, B]: for action t; 0 where mask is 0
  Tensor discount;         ///< [T, B]: after action t; 0 = terminated; 1 where mask is 0
  Tensor mask;             ///< [T, B] bool: action t counts (not a LAST step, not padding)
  Tensor decision;         ///< [T, B] bool: mask, and more than one action was legal
  Tensor bootstrap_value;  ///< [B]: value of the observation after the last row
  State initial_state;     ///< Before row 0.
  State final_state;       ///< After row T - 1: where the next chunk begins.

  Tensor episode_return;  ///< [E], on the CPU: undiscounted returns of the episodes that ended here
};

struct ActorOptions {
  int64_t num_steps = 0;  ///< Rows a rollout; 0 = one whole episode of every environment.
  uint64_t seed = 1;      ///< Of the actions.
  bool greedy = false;    ///< The most likely action instead of a sample.
  bool sweep = true;      ///< Roll a passive world out in one pass over time.
};

/// Plays environments with a policy, without gradients. Actions are drawn by counter, keyed by
/// (seed, environment, row since the start): the same actions stepped or swept, on any device.
///
/// Chunks (num_steps > 0) follow one another: memory and episodes go on from one to the next. Whole
/// episodes (num_steps = 0) begin together at a reset and end with the row in which the last
/// environment reaches its LAST; what an environment does after its own LAST is padding, with mask
/// 0.
class Actor {
 public:
  /// Throws c10::Error if num_steps is negative, or 0 in a world without max_episode_steps.
  Actor(VectorEnv& env, const ActorOptions& options);

  /// If a world throws, the next rollout begins new episodes. Throws c10::Error if a whole episode
  /// is longer than the spec's max_episode_steps.
  Rollout collect(ActorCritic& policy);

  /// The memory, the action counter and the open episodes' returns.
  void save(CheckpointWriter& writer) const;
  /// Throws, and changes nothing, if load() would fail.
  void check(const CheckpointReader& reader, const ActorCritic& policy) const;
  void load(const CheckpointReader& reader, const ActorCritic& policy);

 private:
  /// What the policy did in T rows: action [T, B, …], log_prob and value [T, B].
  struct Choice {
    Tensor action, log_prob, value;
  };
  struct Decision {
    Choice choice;
    State state;  ///< After it.
  };
  /// T rows of choices and the steps they were made on; in chunks one step more, the one that comes
  /// next.
  struct Played {
    TimeSteps steps;
    Choice choice;
  };

  bool whole_episodes() const { return options_.num_steps == 0; }
  int64_t max_rows() const {
    return whole_episodes() ? env_.spec().max_episode_steps + 1 : options_.num_steps;
  }
  /// On the steps of environments first, …, whose memory this is.
  Decision decide(ActorCritic& policy, const TimeSteps& steps, const State& memory,
                  int64_t first) const;
  static Choice join(const std::vector<Decision>& decisions);  ///< Along environments.
  Choice choose(ActorCritic& policy, const TimeSteps& steps);
  Played step(ActorCritic& policy);
  Played sweep(ActorCritic& policy);
  void fill(Rollout& rollout, Played& played, ActorCritic& policy);
  Tensor next_value(ActorCritic& policy, const TimeSteps& next) const;
  Tensor close_episodes(const Tensor& reward, const Tensor& ended);

  VectorEnv& env_;
  ActorOptions options_;
  State memory_;  ///< Before the row that comes next; no batch before the first rollout.
  bool interrupted_ = false;  ///< The last rollout threw: memory and environments are apart.
  int64_t rows_ = 0;          ///< Rows acted on so far.
  Tensor episode_return_;     ///< [B] fp64, of the episodes that are open
};

}  // namespace retain
