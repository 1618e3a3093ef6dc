#pragma once

#include <retain/agents/ppo.h>
#include <retain/envs/vector_env.h>
#include <retain/lib/io/checkpoint.h>

#include <memory>

namespace retain {

struct TrainerOptions {
  ActorCriticOptions policy;
  PPOOptions ppo;
  int64_t num_steps = 0;           ///< Rows a rollout; 0 = whole episodes. > 0 = truncated chunks with carried memory.
  uint64_t seed = 1;
  bool normalize_observation = false;
  bool normalize_reward = false;
  std::string device = "cpu";
};

struct TrainMetrics {
  PPOMetrics ppo;
  int64_t env_steps;        ///< So far.
  int64_t episodes;         ///< That ended in this update.
  double mean_return;       ///< Of those; NaN if none.
  double rollout_seconds, learn_seconds;
};

/// An actor–learner loop in one process: rollout, update, and everything that is needed to go on exactly from here.
class Trainer {
 public:
  Trainer(std::unique_ptr<VectorEnv> env, const TrainerOptions& options);
  TrainMetrics update();
  int64_t updates() const;
  int64_t env_steps() const;
  ActorCritic& policy();
  void save(CheckpointWriter& writer) const;   ///< model/, optimizer/, rng/, progress/, envs/, state/
  void load(const CheckpointReader& reader);
};

struct Evaluation {
  int64_t episodes;
  double mean_return;
  double normalized;           ///< (mean_return − chance) / (best − chance)
  double low, high;            ///< 95 % interval of `normalized`
};

/// Greedy play of `episodes` whole episodes, one an environment, with memory carried from FIRST to LAST.
Evaluation evaluate(ActorCritic& policy, VectorEnv& env, const std::string& device = "cpu");

}  // namespace retain
