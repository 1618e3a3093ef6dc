#pragma once

#include <ATen/core/Tensor.h>
#include <retain/envs/environment.h>

#include <cstdint>
#include <vector>

namespace retain {
using at::Tensor;

/// Steps of many environments: [B, …], or [T, B, …] from sweep().
struct TimeSteps {
  Tensor observation;    ///< float32 [.., observation_size]
  Tensor reward;         ///< float32 [..]; 0 on FIRST
  Tensor discount;       ///< float32 [..]; 1 on FIRST
  Tensor step_type;      ///< uint8 [..], StepType
  Tensor legal_actions;  ///< bool [.., num_values], or undefined where every action is always legal

  Tensor first() const;  ///< bool [..]: the memory must be cleared before this observation
  Tensor last() const;   ///< bool [..]: the action after this step is ignored
};

/// Many environments stepped together. Actions are int64 [B] (categorical), int64 [B, K]
/// (multi-discrete) or float32 [B, K] (continuous), on the CPU. Episodes depend only on (seed,
/// environment index, steps since the start). Results are the caller's: never overwritten later.
/// A bad action (shape, dtype, out of range, not finite, illegal now) throws, says what came and
/// changes nothing; only one found illegal inside a sweep leaves the environments part-way: reset()
/// or load() them.
class VectorEnv {
 public:
  virtual ~VectorEnv() = default;
  virtual const EnvironmentSpec& spec() const = 0;
  virtual int64_t num_envs() const = 0;

  /// The index of row 0: rows [32, 64) of a batch of 64 equal a batch of 32 whose first is 32.
  virtual int64_t first_environment() const { return 0; }

  /// The steps that the last reset(), step() or sweep() ended with. [B, …]. Throws before the
  /// first.
  virtual TimeSteps current() const = 0;

  /// Begins a new episode in every environment.
  virtual TimeSteps reset() = 0;

  /// One step of every environment; an environment at LAST ignores its action and gives FIRST
  /// (reward 0, discount 1, one legal action on LAST: no decision). Before the first reset() all
  /// give FIRST.
  virtual TimeSteps step(const Tensor& action) = 0;

  /// T steps in one pass with actions [T, B, …]: row t is what step(action[t]) would have given.
  virtual TimeSteps sweep(const Tensor& action) = 0;

  /// The best action now by the world's scripted player, [B] or [B, K] as step() takes it (zeros on
  /// LAST); undefined where the world has none.
  virtual Tensor oracle() const { return {}; }

  /// Everything needed to go on exactly here (seed and first environment included), and back.
  /// load() throws, and changes nothing, if the bytes are of another world, other options or
  /// another number of environments, or are damaged.
  virtual std::vector<uint8_t> save() const = 0;
  virtual void load(const std::vector<uint8_t>& bytes) = 0;
};

/// Uniform numbers in (0, 1), float32 [num_steps, num_envs, count] on the CPU: entry [t, b, i] is
/// draw i of Rng(seed, stream, first_environment + b, first_step + t), so that the same
/// (environment, step) gets the same numbers in any batch. Samples actions, for one step or for all
/// T at once.
Tensor uniforms(uint64_t seed, Stream stream, int64_t first_step, int64_t num_steps,
                int64_t num_envs, int64_t count, int64_t first_environment = 0);

}  // namespace retain
