#pragma once

#include <retain/envs/vector_env.h>

#include <algorithm>
#include <concepts>
#include <cstring>
#include <functional>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

namespace retain {

/// What environment.h asks of a plain struct.
template <class W>
concept World = std::copy_constructible<W> &&
    requires(W world, const W& constant, typename W::Action action, Rng& rng, float* observation) {
  { constant.spec() } -> std::same_as<EnvironmentSpec>;
  world.reset(rng, observation);
  { world.step(action, rng, observation) } -> std::same_as<Outcome>;
};

/// What one pass over the environments reads and writes: row t of environment e is t * num_envs +
/// e.
struct Pass {
  bool begin = false;  ///< Every environment begins an episode, whatever its action.
  int64_t num_steps = 0, num_envs = 0, observation_size = 0, action_size = 0, num_values = 0;
  const int64_t* discrete = nullptr;
  const float* continuous = nullptr;
  const uint8_t* previous_type = nullptr;  ///< [B], of the step before row 0.
  uint64_t seed = 0, first_environment = 0, first_step = 0;
  float* observation = nullptr;
  float* reward = nullptr;
  float* discount = nullptr;
  uint8_t* step_type = nullptr;
  bool* legal = nullptr;  ///< Null where every action is always legal.
};

/// The part of the CPU driver that does not depend on the world: checks, batches, threads, bytes.
class BatchDriver : public VectorEnv {
 public:
  const EnvironmentSpec& spec() const final { return spec_; }
  int64_t num_envs() const final { return num_envs_; }
  int64_t first_environment() const final { return first_environment_; }
  TimeSteps current() const final;
  TimeSteps reset() final;
  TimeSteps step(const Tensor& action) final;
  TimeSteps sweep(const Tensor& action) final;
  std::vector<uint8_t> save() const final;
  void load(const std::vector<uint8_t>& bytes) final;

 protected:
  /// `tile` environments at a time go to one thread, and a thread gets at least `grain` steps of
  /// work.
  BatchDriver(EnvironmentSpec spec, int64_t num_envs, uint64_t seed, int64_t first_environment,
              int64_t tile, int64_t grain);
  virtual void advance(const Pass& pass, int64_t begin, int64_t end) = 0;
  virtual std::vector<uint8_t> save_worlds() const = 0;
  virtual void load_worlds(const uint8_t* bytes, size_t size) = 0;
  /// Throws if row t - 1 masks out row t's action.
  void check_legal(const Pass& pass, int64_t t, int64_t environment) const;
  bool at_last(int64_t environment) const;
  Tensor no_actions() const;                              // int64 [B] zeros
  void check_size(size_t size, size_t world_size) const;  // of what load_worlds() is given

 private:
  Tensor checked(const char* function, const Tensor& action, std::vector<int64_t> shape) const;
  void check_first_row(const char* function, const Tensor& action) const;
  void run(TimeSteps& steps, const Tensor& action, int64_t num_steps, bool begin);
  void keep_last(const TimeSteps& steps);

  EnvironmentSpec spec_;
  int64_t num_envs_, first_environment_, tile_, grain_;
  uint64_t seed_, step_ = 0;
  TimeSteps current_;  // [B, …], private: results are copies of it
};

/// Throws std::invalid_argument if num_envs < 1.
void check_num_envs(int64_t num_envs);

/// Steps many copies of a world on the CPU. Use vectorize().
template <class W>
class WorldVectorEnv final : public BatchDriver {
  static constexpr bool kPlain = std::is_trivially_copyable_v<W>;
  static constexpr bool kMasks = requires(const W& world, bool* legal) {
    world.legal_actions(legal);
  };
  static constexpr bool kOracle = requires(const W& world) { world.oracle(); };

 public:
  WorldVectorEnv(std::vector<W> worlds, EnvironmentSpec spec, uint64_t seed,
                 int64_t first_environment)
      : BatchDriver(std::move(spec), static_cast<int64_t>(worlds.size()), seed, first_environment,
                    kPlain ? 32 : 1, kPlain ? 2048 : 1),
        worlds_(std::move(worlds)) {}

  Tensor oracle() const override;

 protected:
  void advance(const Pass& pass, int64_t begin, int64_t end) override {
    for (int64_t t = 0; t < pass.num_steps; ++t) {
      for (int64_t e = begin; e < end; ++e) advance_one(pass, t, e);
    }
  }

  std::vector<uint8_t> save_worlds() const override;
  void load_worlds(const uint8_t* bytes, size_t size) override;

 private:
  void advance_one(const Pass& pass, int64_t t, int64_t e);
  static typename W::Action action_at(const Pass& pass, int64_t row);

  std::vector<W> worlds_;
};

/// `num_envs` copies of a world, stepped together on the CPU. `first_environment` shifts the
/// indices that key the randomness, so that parts of a batch can live in different drivers. Throws
/// std::invalid_argument if num_envs < 1, an index is beyond what Rng tells apart or the world
/// refuses its options.
template <World W>
std::unique_ptr<VectorEnv> vectorize(const W& world, int64_t num_envs, uint64_t seed,
                                     int64_t first_environment = 0);

/// The same for a virtual Environment: `make(index)` gives the one of that index. All must have one
/// spec.
std::unique_ptr<VectorEnv> vectorize(
    const std::function<std::unique_ptr<Environment>(int64_t index)>& make, int64_t num_envs,
    uint64_t seed, int64_t first_environment = 0);

// The templates.

template <class W>
typename W::Action WorldVectorEnv<W>::action_at(const Pass& pass, int64_t row) {
  using A = typename W::Action;
  if constexpr (std::is_same_v<A, int64_t>) {
    return pass.discrete[row];
  } else if constexpr (std::is_same_v<A, const int64_t*>) {
    return pass.discrete + row * pass.action_size;
  } else if constexpr (std::is_same_v<A, const float*>) {
    return pass.continuous + row * pass.action_size;
  } else {
    static_assert(std::is_same_v<A, retain::Action>,
                  "a world's Action is int64_t, const int64_t* or const float*");
    return {pass.discrete ? pass.discrete + row * pass.action_size : nullptr,
            pass.continuous ? pass.continuous + row * pass.action_size : nullptr};
  }
}

template <class W>
void WorldVectorEnv<W>::advance_one(const Pass& pass, int64_t t, int64_t e) {
  const int64_t row = t * pass.num_envs + e;
  const uint8_t previous = t > 0 ? pass.step_type[row - pass.num_envs] : pass.previous_type[e];
  Rng rng(pass.seed, Stream::world, pass.first_environment + e, pass.first_step + t);
  float* observation = pass.observation + row * pass.observation_size;
  std::fill_n(observation, pass.observation_size, 0.0f);
  Outcome outcome;
  StepType type = StepType::first;
  if (pass.begin || previous == static_cast<uint8_t>(StepType::last)) {
    worlds_[e].reset(rng, observation);
  } else {
    if (pass.legal && t > 0) check_legal(pass, t, e);
    outcome = worlds_[e].step(action_at(pass, row), rng, observation);
    type = outcome.last ? StepType::last : StepType::mid;
  }
  pass.reward[row] = outcome.reward;
  pass.discount[row] = outcome.discount;
  pass.step_type[row] = static_cast<uint8_t>(type);
  if constexpr (kMasks) {
    if (!pass.legal) return;
    bool* legal = pass.legal + row * pass.num_values;
    std::fill_n(legal, pass.num_values, false);
    if (type == StepType::last) {
      legal[0] = true;
    } else {
      worlds_[e].legal_actions(legal);
    }
  }
}

template <class W>
Tensor WorldVectorEnv<W>::oracle() const {
  if constexpr (kOracle) {
    static_assert(std::is_same_v<typename W::Action, int64_t>, "an oracle's action is categorical");
    Tensor action = no_actions();
    int64_t* out = action.template data_ptr<int64_t>();
    for (int64_t e = 0; e < num_envs(); ++e) {
      if (!at_last(e)) out[e] = worlds_[e].oracle();
    }
    return action;
  } else {
    return {};
  }
}

template <class W>
std::vector<uint8_t> WorldVectorEnv<W>::save_worlds() const {
  std::vector<uint8_t> bytes(worlds_.size() * sizeof(W));
  for (size_t e = 0; e < worlds_.size(); ++e) {
    W world = worlds_[e];
#if defined(__has_builtin) && __has_builtin(__builtin_clear_padding)
    __builtin_clear_padding(&world);  // the same worlds give the same bytes
#endif
    std::memcpy(bytes.data() + e * sizeof(W), &world, sizeof(W));
  }
  return bytes;
}

template <class W>
void WorldVectorEnv<W>::load_worlds(const uint8_t* bytes, size_t size) {
  check_size(size, sizeof(W));
  std::memcpy(static_cast<void*>(worlds_.data()), bytes, size);
}

template <World W>
std::unique_ptr<VectorEnv> vectorize(const W& world, int64_t num_envs, uint64_t seed,
                                     int64_t first_environment) {
  static_assert(std::is_trivially_copyable_v<W>,
                "a world is a plain struct; derive from Environment for one that is not");
  constexpr bool masks = requires(bool* legal) { world.legal_actions(legal); };
  EnvironmentSpec spec = world.spec();
  spec.action.masked = masks;
  check_num_envs(num_envs);
  return std::make_unique<WorldVectorEnv<W>>(std::vector<W>(num_envs, world), std::move(spec), seed,
                                             first_environment);
}

}  // namespace retain
