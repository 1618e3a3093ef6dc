#pragma once

#include <ATen/ATen.h>
#include <retain/envs/vector_env.h>

#include <functional>
#include <vector>

namespace retain::testing {

/// Uniform random legal actions for every environment, as step() takes them.
inline Tensor random_actions(const VectorEnv& env, uint64_t seed, int64_t step) {
  const ActionSpec& action = env.spec().action;
  const int64_t count = action.kind == ActionSpec::Kind::categorical ? 1
                        : action.kind == ActionSpec::Kind::continuous
                            ? action.size
                            : static_cast<int64_t>(action.num_values.size());
  const Tensor uniform =
      uniforms(seed, Stream::action, step, 1, env.num_envs(), count, env.first_environment())[0];
  if (action.kind == ActionSpec::Kind::continuous) return uniform * 2 - 1;
  if (action.masked) {
    const Tensor legal = env.current().legal_actions.to(at::kLong);
    const Tensor rank = (uniform * legal.sum(-1, true)).to(at::kLong);  // the rank-th legal one
    return (legal.cumsum(-1) <= rank).sum(-1);
  }
  const Tensor actions = (uniform * at::tensor(std::vector<double>(action.num_values.begin(),
                                                                   action.num_values.end())))
                             .to(at::kLong);
  return count == 1 && action.kind == ActionSpec::Kind::categorical ? actions.squeeze(-1) : actions;
}

/// The steps of `num_steps` rows played at random after a reset(), and the actions that led to
/// them.
struct Play {
  std::vector<TimeSteps> steps;  ///< reset() and then one a row of `actions`
  Tensor actions;                ///< [T, B, …]
};

inline Play play(VectorEnv& env, int64_t num_steps, uint64_t seed = 7) {
  Play result{{env.reset()}, {}};
  std::vector<Tensor> actions;
  for (int64_t t = 0; t < num_steps; ++t) {
    actions.push_back(random_actions(env, seed, t));
    result.steps.push_back(env.step(actions.back()));
  }
  result.actions = at::stack(actions);
  return result;
}

/// Undiscounted returns [B] of the first episode of every environment.
inline Tensor first_returns(VectorEnv& env, const std::function<Tensor(int64_t step)>& policy) {
  TimeSteps now = env.reset();
  Tensor returns = at::zeros({env.num_envs()}, at::kDouble);
  Tensor running = at::ones({env.num_envs()}, at::kBool);
  for (int64_t t = 0; running.any().item<bool>(); ++t) {
    now = env.step(policy(t));
    returns += now.reward.to(at::kDouble) * running;
    running = running.logical_and(now.last().logical_not());
  }
  return returns;
}

inline bool same(const Tensor& a, const Tensor& b) {
  return a.defined() == b.defined() && (!a.defined() || a.equal(b));
}

/// Bit for bit.
inline bool same(const TimeSteps& a, const TimeSteps& b) {
  return same(a.observation, b.observation) && same(a.reward, b.reward) &&
         same(a.discount, b.discount) && same(a.step_type, b.step_type) &&
         same(a.legal_actions, b.legal_actions);
}

/// Row t of a sweep, or a part of a batch.
inline TimeSteps slice(const TimeSteps& steps, const std::function<Tensor(const Tensor&)>& cut) {
  return {cut(steps.observation), cut(steps.reward), cut(steps.discount), cut(steps.step_type),
          steps.legal_actions.defined() ? cut(steps.legal_actions) : Tensor()};
}

}  // namespace retain::testing
