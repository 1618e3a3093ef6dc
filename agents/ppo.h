#pragma once

#include <retain/agents/actor_critic.h>
#include <retain/agents/rollout.h>
#include <torch/optim/adam.h>

namespace retain {

struct PPOOptions {
  double learning_rate = 1e-3;
  bool anneal = false;              ///< Learning rate falls linearly to 0 over the planned updates.
  int64_t update_epochs = 1;        ///< 1 epoch with 1 minibatch is A2C.
  int64_t num_minibatches = 1;      ///< Minibatches split the environments, never time.
  double gamma = 1.0;
  double gae_lambda = 1.0;
  double clip_coef = 0.2;
  double ent_coef = 0.01;
  double vf_coef = 0.5;
  double max_grad_norm = 0.5;
  bool normalize_advantage = true;  ///< Over decision steps.
  double target_kl = 0;             ///< Stop the epochs beyond this approximate KL; 0 = never.
};

struct PPOMetrics {
  double policy_loss, value_loss, entropy, approx_kl, clip_fraction, grad_norm;
  double first_ratio_error;  ///< max |ratio − 1| of the first minibatch of the first epoch
  int64_t epochs;
};

// class PPO { PPO(std::shared_ptr<ActorCritic>, PPOOptions); PPOMetrics update(const Rollout&, uint64_t seed, int64_t update_index); save/load optimiser }

}  // namespace retain
