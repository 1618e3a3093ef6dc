#pragma once

#include <retain/agents/actor_critic.h>
#include <retain/agents/rollout.h>
#include <torch/optim/adam.h>

namespace retain {

struct PPOOptions {
  double learning_rate = 1e-3;
  bool anneal = false;          ///< Learning rate falls linearly to 0 over num_updates.
  int64_t num_updates = 0;      ///< Planned updates; only `anneal` reads it.
  int64_t update_epochs = 1;    ///< 1 epoch with 1 minibatch is A2C.
  int64_t num_minibatches = 1;  ///< Minibatches split the environments, never time.
  double gamma = 1.0;  ///< Below 1 where every episode is cut off (LAST with a discount of 1).
  double gae_lambda = 1.0;
  double clip_coef = 0.2;
  double ent_coef = 0.01;
  double vf_coef = 0.5;
  bool value_on_decisions = false;  ///< Value loss over decision steps only: where whole episodes
                                    ///< and gae_lambda = 1 leave no other value to be read.
  double adam_eps = 1e-5;           ///< Added to the root of Adam's second moment.
  double max_grad_norm = 0.5;       ///< Of all parameters together.
  bool normalize_advantage = true;  ///< Over the rollout's decision steps.
  double target_kl = 0;             ///< Stop the epochs beyond this approximate KL; 0 = never.
};

/// Means over the minibatches of one update.
struct PPOMetrics {
  double policy_loss = 0, value_loss = 0, entropy = 0, approx_kl = 0, clip_fraction = 0;
  double grad_norm = 0;          ///< Before clipping.
  double first_ratio_error = 0;  ///< max |ratio − 1| of the first minibatch of the first epoch.
  int64_t epochs = 0;            ///< That were run.
};

/// Proximal policy optimisation (Schulman et al. 2017, arXiv:1707.06347, eq. 7 and 9) on recurrent
/// rollouts. The policy's terms are means over decision steps, the value's over the steps whose
/// action counts. Memory is replayed over all T rows from the rollout's initial state; in chunks
/// that state is the one the acting weights left, and goes stale over several epochs.
class PPO {
 public:
  PPO(std::shared_ptr<ActorCritic> policy, const PPOOptions& options);

  /// Throws unless so many environments can be cut into the minibatches.
  void check_num_envs(int64_t num_envs) const;

  /// Throws if the gradient is not finite, before it reaches a weight. `seed` and `update_index`
  /// fix the minibatches.
  PPOMetrics update(const Rollout& rollout, uint64_t seed, int64_t update_index);

  void save(
      CheckpointWriter& writer) const;  ///< Adam's moments and step, as "optimizer/<parameter>/…".
  void check(const CheckpointReader& reader)
      const;  ///< Throws, and changes nothing, if load() would fail.
  void load(const CheckpointReader& reader);

 private:
  void set_learning_rate(int64_t update_index);
  /// One step down the gradients, one a parameter; returns their norm.
  double step(const std::vector<Tensor>& gradients, int64_t update_index);
  /// "optimizer/<parameter path>" and Adam's state of that parameter.
  std::vector<std::pair<std::string, torch::optim::AdamParamState*>> moments() const;

  std::shared_ptr<ActorCritic> policy_;
  PPOOptions options_;
  torch::optim::Adam optimizer_;
};

}  // namespace retain
