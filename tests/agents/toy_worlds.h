#pragma once

#include <retain/envs/environment.h>
#include <retain/envs/vectorize.h>

namespace retain::testing {

/// Not passive, with both kinds of end: action 1 walks right; cell 4 pays 1 and terminates, step 7
/// truncates. A noise feature makes every observation its own. Action 2 is legal in even cells
/// only.
struct Walk {
  using Action = int64_t;
  int64_t cell = 0, t = 0;

  EnvironmentSpec spec() const {
    return {.name = "walk",
            .observation_size = 3,
            .action = {.num_values = {3}},
            .max_episode_steps = 7};
  }
  void reset(Rng& rng, float* observation) {
    cell = t = 0;
    show(rng, observation);
  }
  Outcome step(Action action, Rng& rng, float* observation) {
    ++t;
    cell += action == 1 || (action == 0 && rng.uniform() < 0.3f);
    show(rng, observation);
    if (cell == 4) return {.reward = 1, .discount = 0, .last = true};
    return {.reward = -0.125f, .discount = 1, .last = t == 7};
  }
  void legal_actions(bool* legal) const {
    legal[0] = legal[1] = true;
    legal[2] = cell % 2 == 0;
  }
  void show(Rng& rng, float* observation) const {
    observation[0] = static_cast<float>(cell) / 4;
    observation[1] = rng.uniform() - 0.5f;
    observation[2] = 1;
  }
};

/// Multi-discrete: name two cues at once; each hit pays 1/2. Passive.
struct Pair {
  using Action = const int64_t*;
  int64_t first = 0, second = 0, t = 0;

  EnvironmentSpec spec() const {
    return {.name = "pair",
            .observation_size = 5,
            .action = {.kind = ActionSpec::Kind::multi_discrete, .num_values = {2, 3}},
            .max_episode_steps = 4,
            .passive = true};
  }
  void reset(Rng& rng, float* observation) {
    t = 0;
    show(rng, observation);
  }
  Outcome step(Action action, Rng& rng, float* observation) {
    const float reward = 0.5f * (action[0] == first) + 0.5f * (action[1] == second);
    show(rng, observation);
    return {.reward = reward, .last = ++t == 4};
  }
  void show(Rng& rng, float* observation) {
    first = rng.uniform_int(2);
    second = rng.uniform_int(3);
    observation[first] = observation[2 + second] = 1;
  }
};

/// Continuous: hit the target shown on the first step, on every step. Passive, of `length` steps.
struct Aim {
  using Action = const float*;
  int64_t length = 5;
  float x = 0, y = 0;
  int64_t t = 0;

  EnvironmentSpec spec() const {
    return {.name = "aim",
            .observation_size = 2,
            .action = {.kind = ActionSpec::Kind::continuous, .size = 2},
            .max_episode_steps = length,
            .passive = true};
  }
  void reset(Rng& rng, float* observation) {
    t = 0;
    observation[0] = x = 2 * rng.uniform() - 1;
    observation[1] = y = 2 * rng.uniform() - 1;
  }
  Outcome step(Action action, Rng& rng, float* observation) {
    observation[0] = 0.1f * rng.uniform();
    return {.reward = x * action[0] + y * action[1], .last = ++t == length};
  }
};

}  // namespace retain::testing
