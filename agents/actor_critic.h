#pragma once

#include <retain/agents/normalizers.h>
#include <retain/envs/environment.h>
#include <retain/lib/cores/registry.h>
#include <retain/lib/io/checkpoint.h>
#include <retain/lib/nets/encoder.h>
#include <retain/lib/nets/heads.h>

#include <memory>

namespace retain {

struct ActorCriticOptions {
  CoreOptions core = {};               ///< The memory; its d_model is every part's width.
  bool activate_encoder = false;       ///< ReLU after the encoder's linear map.
  double policy_gain = 0.01;           ///< Of the policy head's initialisation.
  bool normalize_observation = false;  ///< By running mean and variance, saved with the weights.
};

struct PolicyOutput {
  std::unique_ptr<Distribution> policy;  ///< Over actions at every [T, B].
  Tensor value;                          ///< [T, B]
  State state;                           ///< After the last step.
};

/// encoder → core → policy head and value head.
class ActorCritic : public torch::nn::Module {
 public:
  /// Throws c10::Error if spec.observation_size is below 1, and as make_core() and PolicyHead do on
  /// options.core and spec.action.
  ActorCritic(const EnvironmentSpec& spec, const ActorCriticOptions& options);

  State initial_state(int64_t batch) const { return core_->initial_state(batch); }
  at::Device device() const;

  /// observation [T, B, observation_size], reset [T, B] bool, legal [T, B, A] bool or undefined.
  PolicyOutput forward(const Tensor& observation, const State& state, const Tensor& reset,
                       const Tensor& legal = {});

  /// The pieces of forward(): y [T, B, d_model] and the heads on any rows [.., d_model] of it.
  CoreOutput features(const Tensor& observation, const State& state, const Tensor& reset);
  std::unique_ptr<Distribution> policy(const Tensor& features, const Tensor& legal = {});
  Tensor value(const Tensor& features) { return value_head_->forward(features); }

  /// Takes observations [N, observation_size] into the running statistics; nothing if these are
  /// off.
  void observe(const Tensor& observation);

  const std::shared_ptr<Core>& core() const { return core_; }
  const std::string& core_name() const { return core_name_; }
  bool activates_encoder() const { return activates_encoder_; }

 private:
  std::string core_name_;
  bool activates_encoder_;
  std::shared_ptr<RunningMoments> observation_moments_;  ///< Null where the option is off.
  std::shared_ptr<Encoder> encoder_;
  std::shared_ptr<Core> core_;
  std::shared_ptr<PolicyHead> policy_head_;
  std::shared_ptr<ValueHead> value_head_;
};

/// Writes the core's name and every parameter and buffer, as "model/<path>".
void save_policy(CheckpointWriter& writer, const ActorCritic& policy);

/// Throws if the file's policy has another core or activate_encoder, or names, shapes or dtypes
/// that differ; changes nothing.
void check_policy(const CheckpointReader& reader, const ActorCritic& policy);

/// Copies the file's weights in after check_policy().
void load_policy(const CheckpointReader& reader, ActorCritic& policy);

}  // namespace retain
