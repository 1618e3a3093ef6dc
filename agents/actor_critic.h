#pragma once

#include <retain/envs/environment.h>
#include <retain/lib/cores/registry.h>
#include <retain/lib/nets/encoder.h>
#include <retain/lib/nets/heads.h>

#include <memory>

namespace retain {

struct ActorCriticOptions {
  CoreOptions core;
  bool activate_encoder = false;  ///< ReLU after the encoder's linear map.
};

struct PolicyOutput {
  std::unique_ptr<Distribution> policy;  ///< Over actions at every [T, B].
  Tensor value;                          ///< [T, B]
  State state;
};

/// encoder → core → policy head and value head.
class ActorCritic : public torch::nn::Module {
 public:
  ActorCritic(const EnvironmentSpec& spec, const ActorCriticOptions& options);

  State initial_state(int64_t batch) const;

  /// observation [T, B, observation_size], reset [T, B] bool, legal [T, B, A] bool or undefined.
  PolicyOutput forward(const Tensor& observation, const State& state, const Tensor& reset, const Tensor& legal = {});

  const std::shared_ptr<Core>& core() const { return core_; }

 private:
  std::shared_ptr<Encoder> encoder_;
  std::shared_ptr<Core> core_;
  std::shared_ptr<PolicyHead> policy_head_;
  std::shared_ptr<ValueHead> value_head_;
};

}  // namespace retain
