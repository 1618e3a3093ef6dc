#pragma once

#include <retain/envs/random.h>

#include <cstdint>
#include <string>
#include <vector>

namespace retain {

// The contract between worlds and agents, on dm_env's time axis.
//
// An episode is the steps FIRST, MID, …, MID, LAST. Each step carries an observation; every step
// but FIRST also carries the reward and the discount that the action before it earned. After LAST
// comes FIRST of the next episode, whatever the action was: that action is not part of any episode
// and is never trained on.
//   discount cuts value: 0 on a termination, 1 otherwise; LAST with discount 1 is a truncation.
//   FIRST cuts memory: the agent's state is cleared before it reads that observation.
//
// A world draws all its chance from the Rng it is handed, which is made anew for every step from
// (seed, environment, step): it keeps no generator. It may assume that an action is in range and
// legal.

enum class StepType : uint8_t { first = 0, mid = 1, last = 2 };

struct ActionSpec {
  enum class Kind { categorical, multi_discrete, continuous };
  Kind kind = Kind::categorical;
  /// Categorical: one entry; multi-discrete: one a component.
  std::vector<int64_t> num_values = {2};
  int64_t size = 1;  ///< Continuous: components; a world's range is [-1, 1].
  /// Categorical: not every action is always legal. A plain struct's driver sets it.
  bool masked = false;
};

struct EnvironmentSpec {
  std::string name = {};
  int64_t observation_size = 0;  ///< float32 features an observation.
  ActionSpec action = {};
  int64_t max_episode_steps = 0;  ///< Most actions an episode can take; 0 = no bound.
  /// How far back the optimal policy must look, in steps (Ni et al. 2023).
  int64_t memory_length = 0;
  /// How long after an action its effect on the return shows, in steps.
  int64_t credit_length = 1;
  double chance_return = 0;      ///< Expected return of uniform random legal actions.
  double memoryless_return = 0;  ///< Best expected return without memory.
  double best_return = 1;        ///< Best expected return.
  double wrong_return = 0;       ///< Of an episode that is lost, where one that is won returns 1.
  bool passive = false;  ///< Observations, episode ends and legal actions do not depend on actions.
  std::string options = {};  ///< The world's options as text; load() refuses other options.
};

/// What an action led to.
struct Outcome {
  float reward = 0;
  float discount = 1;
  bool last = false;
};

// A world is a plain, trivially copyable struct; vectorize.h makes of it a vectorised driver.
// It has
//
//   using Action = int64_t;          categorical; const int64_t* for multi-discrete (one a
//                                    component) and const float* for continuous actions
//   EnvironmentSpec spec() const;    throws std::invalid_argument on options out of range
//   void reset(Rng& rng, float* observation);
//                                    the first observation of a new episode
//   Outcome step(Action action, Rng& rng, float* observation);
//                                    the next observation, reward and discount
//
// and, where not every action is always legal (categorical only),
//
//   void legal_actions(bool* legal) const;
//                                    for the observation just given
//
// `observation` comes filled with zeros. In a passive world action 0 is always legal. Mark reset,
// step and legal_actions RETAIN_HOST_DEVICE and the same struct runs on a GPU. A scripted player
// for the tests is `Action oracle() const`: the best action now; it may look at hidden state.

/// One environment's action, as a driver hands it to a virtual Environment.
struct Action {
  const int64_t* discrete = nullptr;  ///< Categorical: one value; multi-discrete: one a component.
  const float* continuous = nullptr;  ///< Continuous: one value a component.
};

/// The same contract for a world that is not a plain struct: a simulator behind a pointer, say.
/// Different environments are stepped from different threads.
class Environment {
 public:
  virtual ~Environment() = default;
  virtual EnvironmentSpec spec() const = 0;
  virtual void reset(Rng& rng, float* observation) = 0;
  virtual Outcome step(const Action& action, Rng& rng, float* observation) = 0;

  /// Called only if spec().action.masked. All legal unless overridden.
  virtual void legal_actions(bool* legal) const {
    for (int64_t a = 0; a < spec().action.num_values.at(0); ++a) legal[a] = true;
  }

  /// Everything needed to go on exactly here, and back; load() throws on bytes that are not its
  /// own.
  virtual std::vector<uint8_t> save() const = 0;
  virtual void load(const std::vector<uint8_t>& bytes) = 0;
};

}  // namespace retain
