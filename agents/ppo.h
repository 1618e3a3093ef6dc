#pragma once

#include <retain/agents/actor_critic.h>
#include <retain/agents/rollout.h>
#include <torch/optim/adam.h>

namespace retain {

/// Equations are those of Schulman et al. 2017, arXiv:1707.06347, unless another paper is named.
struct PPOOptions {
  double learning_rate = 1e-3;  ///< Adam's step size; under `anneal` that of update 0.
  bool anneal = false;          ///< Learning rate falls linearly to 0 over num_updates.
  int64_t num_updates = 0;      ///< Planned updates; only `anneal` reads it.
  int64_t update_epochs = 1;    ///< 1 epoch with 1 minibatch is A2C.
  int64_t num_minibatches = 1;  ///< Minibatches split the environments, never time.
  double gamma = 1.0;       ///< Below 1 where every episode is cut off (LAST with a discount of 1).
  double gae_lambda = 1.0;  ///< λ of GAE (Schulman et al. 2016, arXiv:1506.02438, eq. 16).
  double clip_coef = 0.2;   ///< ε of eq. 7, which clips the ratio to [1 − ε, 1 + ε].
  double ent_coef = 0.01;   ///< c2 of eq. 9, the weight of the entropy.
  double vf_coef = 0.5;     ///< Weight of half the squared value error: twice c1 of eq. 9.
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
  /// Throws c10::Error naming the option unless learning_rate, update_epochs, num_minibatches,
  /// clip_coef, max_grad_norm and adam_eps are positive and finite, gamma and gae_lambda in [0, 1],
  /// ent_coef, vf_coef and target_kl not negative and, under `anneal`, num_updates positive.
  PPO(std::shared_ptr<ActorCritic> policy, const PPOOptions& options);

  /// Throws unless so many environments can be cut into the minibatches.
  void check_num_envs(int64_t num_envs) const;

  /// Throws if the gradient is not finite, before it reaches a weight. `seed` and `update_index`
  /// fix the minibatches.
  PPOMetrics update(const Rollout& rollout, uint64_t seed, int64_t update_index);

  /// Adam's moments and step, as "optimizer/<parameter>/…".
  void save(CheckpointWriter& writer) const;
  /// Throws, and changes nothing, if load() would fail.
  void check(const CheckpointReader& reader) const;
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
