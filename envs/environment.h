#pragma once

#include <retain/envs/random.h>

#include <cstdint>
#include <string>
#include <vector>

namespace retain {

// The contract between worlds and agents, on dm_env's time axis.
//
// An episode is the steps FIRST, MID, …, MID, LAST. Each step carries an observation; every step but FIRST also
// carries the reward and the discount that the action before it earned. After LAST comes FIRST of the next
// episode, whatever the action was: that action is not part of any episode and is never trained on.
//   discount cuts value: 0 on a termination, 1 otherwise; LAST with discount 1 is a truncation.
//   FIRST cuts memory: the agent's state is cleared before it reads that observation.

enum class StepType : uint8_t { first = 0, mid = 1, last = 2 };

struct ActionSpec {
  enum class Kind { categorical, multi_discrete, continuous };
  Kind kind = Kind::categorical;
  std::vector<int64_t> num_values = {2};  ///< Categorical: one entry; multi-discrete: one a component.
  int64_t size = 1;                       ///< Continuous: components, each in [-1, 1].
};

struct EnvironmentSpec {
  std::string name;
  int64_t observation_size = 0;     ///< float32 features an observation.
  ActionSpec action;
  int64_t max_episode_steps = 0;    ///< Most actions an episode can take; 0 = no bound.
  int64_t memory_length = 0;        ///< How far back the optimal policy must look, in steps (Ni et al. 2023).
  int64_t credit_length = 1;        ///< How long after an action its effect on the return shows, in steps.
  double chance_return = 0;         ///< Expected return of uniform random legal actions.
  double memoryless_return = 0;     ///< Best expected return without memory.
  double best_return = 1;           ///< Best expected return.
  bool passive = false;             ///< Observations, episode ends and legal actions do not depend on actions.
};

/// What an action led to.
struct Outcome {
  float reward = 0;
  float discount = 1;
  bool last = false;
};

/// A world is a plain copyable struct; vector_env.h makes of it a vectorised driver. It has
///   using Action = int64_t;                                       (categorical; see vector_env.h for the others)
///   EnvironmentSpec spec() const;
///   void    reset(Rng& rng, float* observation);                  first observation of a new episode
///   Outcome step(Action action, Rng& rng, float* observation);    next observation, reward, discount
/// and, where not every action is always legal,
///   void    legal_actions(bool* legal) const;                     for the observation just given
/// A scripted player for the tests is `int64_t oracle() const`: the best action now.

}  // namespace retain
