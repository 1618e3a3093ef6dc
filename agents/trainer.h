#pragma once

#include <retain/agents/evaluation.h>
#include <retain/agents/ppo.h>

#include <memory>
#include <optional>
#include <string>

namespace retain {

struct TrainerOptions {
  ActorCriticOptions policy = {};  ///< What acts and learns.
  PPOOptions ppo = {};             ///< How it learns.
  /// Rows a rollout; 0 = whole episodes. > 0 = truncated chunks with carried memory.
  int64_t num_steps = 0;
  uint64_t seed = 1;  ///< Of weights, actions and minibatches; the worlds have their own.
  bool normalize_reward = false;  ///< By the running deviation of the discounted return.
  bool sweep = true;              ///< Roll passive worlds out in one pass over time.
  std::string device = "cpu";     ///< Of the policy: "cpu", "cuda" or "cuda:N".
};

struct TrainMetrics {
  PPOMetrics ppo;
  int64_t env_steps = 0;   ///< So far; actions that count.
  int64_t episodes = 0;    ///< That ended in this update.
  double mean_return = 0;  ///< Of those; NaN if none.
  double rollout_seconds = 0, learn_seconds = 0;
};

/// An actor–learner loop in one process: rollout, update, and everything that is needed to go on
/// exactly from here. The constructor seeds LibTorch's generators with options.seed.
class Trainer {
 public:
  /// Throws c10::Error if env holds no environment, as ActorCritic, Actor and PPO do on their
  /// options, if num_minibatches is above num_envs, and on a device that is not there.
  Trainer(std::unique_ptr<VectorEnv> env, const TrainerOptions& options);

  TrainMetrics update();
  int64_t updates() const { return updates_; }
  int64_t env_steps() const { return env_steps_; }
  ActorCritic& policy() { return *policy_; }
  const EnvironmentSpec& spec() const { return env_->spec(); }

  /// setup/, model/, optimizer/, rng/, progress/, envs/, state/, normalizers/.
  void save(CheckpointWriter& writer) const;

  /// Goes on where save() stood. Throws on a checkpoint of another world, core, activate_encoder,
  /// shape, seed, num_steps or normalize_reward, and then changes nothing.
  void load(const CheckpointReader& reader);

 private:
  void check(const CheckpointReader& reader) const;

  TrainerOptions options_;
  std::unique_ptr<VectorEnv> env_;
  std::shared_ptr<ActorCritic> policy_;
  Actor actor_;
  PPO ppo_;
  std::optional<RewardNormalizer> reward_normalizer_;
  int64_t updates_ = 0;
  int64_t env_steps_ = 0;
};

}  // namespace retain
