#pragma once

#include <retain/envs/catch.h>
#include <retain/envs/memory_chain.h>
#include <retain/envs/recall.h>
#include <retain/envs/registry.h>
#include <retain/envs/repeat_previous.h>
#include <retain/envs/rewrite.h>
#include <retain/envs/t_maze.h>
#include <retain/envs/vectorize.h>

#include <cstring>
#include <functional>
#include <memory>
#include <ostream>
#include <string>
#include <vector>

namespace retain::testing {

/// A plain world behind the virtual interface.
template <class W>
class Boxed : public Environment {
 public:
  explicit Boxed(const W& world) : world_(world) {}
  EnvironmentSpec spec() const override {
    EnvironmentSpec spec = world_.spec();
    spec.action.masked = requires(bool* legal) { world_.legal_actions(legal); };
    return spec;
  }
  void reset(Rng& rng, float* observation) override { world_.reset(rng, observation); }
  Outcome step(const Action& action, Rng& rng, float* observation) override {
    if constexpr (std::is_same_v<typename W::Action, int64_t>) {
      return world_.step(*action.discrete, rng, observation);
    } else if constexpr (std::is_same_v<typename W::Action, const int64_t*>) {
      return world_.step(action.discrete, rng, observation);
    } else {
      return world_.step(action.continuous, rng, observation);
    }
  }
  void legal_actions(bool* legal) const override {
    if constexpr (requires { world_.legal_actions(legal); }) world_.legal_actions(legal);
  }
  std::vector<uint8_t> save() const override {
    std::vector<uint8_t> bytes(sizeof(W));
    std::memcpy(bytes.data(), &world_, sizeof(W));
    return bytes;
  }
  void load(const std::vector<uint8_t>& bytes) override {
    if (bytes.size() != sizeof(W)) throw std::invalid_argument("not the bytes of this world");
    std::memcpy(static_cast<void*>(&world_), bytes.data(), sizeof(W));
  }

 private:
  W world_;
};

/// Two dials to be set to what was shown: multi-discrete actions, truncated after 6 steps.
struct Dials {
  using Action = const int64_t*;
  int64_t t = 0, left = 0, right = 0;

  EnvironmentSpec spec() const {
    return {.name = "dials",
            .observation_size = 2,
            .action = {.kind = ActionSpec::Kind::multi_discrete, .num_values = {2, 3}},
            .max_episode_steps = 6,
            .chance_return = 1,
            .memoryless_return = 6,
            .best_return = 6,
            .passive = true};
  }
  void show(Rng& rng, float* observation) {
    observation[0] = static_cast<float>(left = rng.uniform_int(2));
    observation[1] = static_cast<float>(right = rng.uniform_int(3));
  }
  void reset(Rng& rng, float* observation) {
    t = 0;
    show(rng, observation);
  }
  Outcome step(Action action, Rng& rng, float* observation) {
    const float reward = action[0] == left && action[1] == right ? 1.0f : 0.0f;
    show(rng, observation);
    return {.reward = reward, .discount = 1, .last = ++t == 6};
  }
};

/// A point pushed about the plane: continuous actions, ends where it leaves the unit circle.
struct Drift {
  using Action = const float*;
  float x = 0, y = 0;

  EnvironmentSpec spec() const {
    return {.name = "drift",
            .observation_size = 2,
            .action = {.kind = ActionSpec::Kind::continuous, .size = 2}};
  }
  void reset(Rng& rng, float* observation) {
    observation[0] = x = rng.uniform() - 0.5f;
    observation[1] = y = rng.uniform() - 0.5f;
  }
  Outcome step(Action action, Rng& rng, float* observation) {
    observation[0] = x += 0.2f * action[0] + 0.05f * (rng.uniform() - 0.5f);
    observation[1] = y += 0.2f * action[1];
    const bool out = x * x + y * y > 1;
    return {.reward = x, .discount = out ? 0.0f : 1.0f, .last = out};
  }
};

/// A way to make one world's driver.
struct Case {
  std::string name;
  std::function<std::unique_ptr<VectorEnv>(int64_t num_envs, uint64_t seed, int64_t first)> make;
};

inline std::ostream& operator<<(std::ostream& out, const Case& c) { return out << c.name; }

template <class W>
void add_both(std::vector<Case>& cases, const W& world) {
  const EnvironmentSpec spec = world.spec();
  cases.push_back(
      {spec.name + " " + spec.options, [world](int64_t num_envs, uint64_t seed, int64_t first) {
         return vectorize(world, num_envs, seed, first);
       }});
  cases.push_back({"boxed " + spec.name + " " + spec.options,
                   [world](int64_t num_envs, uint64_t seed, int64_t first) {
                     return vectorize(
                         [world](int64_t) { return std::make_unique<Boxed<W>>(world); }, num_envs,
                         seed, first);
                   }});
}

/// Every registered world with its defaults, and every world in several sizes by both drivers.
inline std::vector<Case> cases() {
  std::vector<Case> all;
  for (const WorldInfo& info : worlds()) {
    all.push_back({info.name, [name = info.name](int64_t num_envs, uint64_t seed, int64_t first) {
                     return make_vector_env(name, {}, num_envs, seed, first);
                   }});
  }
  add_both(all, Recall{.horizon = 1});
  add_both(all, Recall{.horizon = 7, .num_cues = 16, .noise = false});
  add_both(all, Recall{.horizon = 21, .lengths = Lengths::log_uniform});
  add_both(all, Rewrite{.horizon = 3, .rewrites = 3});
  add_both(all, Rewrite{.horizon = 12, .rewrites = 4, .lengths = Lengths::log_uniform});
  add_both(all, RepeatPrevious{.decks = 1, .k = 1});
  add_both(all, RepeatPrevious{.decks = 2, .k = 32});
  add_both(all, MemoryChain{.horizon = 1});
  add_both(all, MemoryChain{.horizon = 6, .num_bits = 5});
  add_both(all, TMaze{.horizon = 1});
  add_both(all, TMaze{.horizon = 5, .oracle_offset = 2});
  add_both(all, TMaze{.horizon = 3, .oracle_offset = 4, .recoverable = true});
  add_both(all, Catch{.rows = 4, .columns = 7});
  add_both(all, Dials{});
  add_both(all, Drift{});
  return all;
}

}  // namespace retain::testing
