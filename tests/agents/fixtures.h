#pragma once

#include <ATen/Context.h>
#include <retain/agents/rollout.h>
#include <retain/envs/recall.h>
#include <retain/envs/vectorize.h>

#include "agents/toy_worlds.h"

namespace retain::testing {

inline ActorCriticOptions small(const std::string& core) {
  return {.core = {.name = core, .d_model = 8, .d_state = 4, .chrono_horizon = 20}};
}

inline std::shared_ptr<ActorCritic> make_policy(const EnvironmentSpec& spec,
                                                const std::string& core, uint64_t seed = 1) {
  at::manual_seed(seed);
  auto policy = std::make_shared<ActorCritic>(spec, small(core));
  // The policy head begins near 0: make what it says depend on what it reads.
  at::NoGradGuard no_grad;
  for (auto& parameter : policy->named_parameters()) {
    if (parameter.key().starts_with("policy_head")) parameter.value().mul_(100);
  }
  return policy;
}

inline std::unique_ptr<VectorEnv> recall(int64_t horizon, int64_t num_envs, uint64_t seed = 1,
                                         int64_t first_environment = 0) {
  return vectorize(Recall{.horizon = horizon, .lengths = Lengths::log_uniform}, num_envs, seed,
                   first_environment);
}

/// Two tensors, both undefined or equal in every bit.
inline bool same(const Tensor& a, const Tensor& b) {
  return a.defined() ? b.defined() && a.equal(b) : !b.defined();
}

/// The largest difference.
inline double distance(const Tensor& a, const Tensor& b) {
  return a.numel() == 0 ? 0 : (a - b).abs().max().item<double>();
}

}  // namespace retain::testing
