#pragma once

#include <ATen/core/Tensor.h>
#include <retain/envs/environment.h>

#include <cstdint>
#include <functional>
#include <memory>
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

/// Many environments stepped together. Actions are int64 [B] (categorical), int64 [B, K] (multi-discrete) or
/// float32 [B, K] (continuous). Episodes depend only on (seed, environment index, steps since the start).
class VectorEnv {
 public:
  virtual ~VectorEnv() = default;
  virtual const EnvironmentSpec& spec() const = 0;
  virtual int64_t num_envs() const = 0;

  /// The steps that the last reset(), step() or sweep() ended with. [B, …]. Owned by the caller: never overwritten.
  virtual TimeSteps current() const = 0;

  /// Begins a new episode in every environment.
  virtual TimeSteps reset() = 0;

  /// One step of every environment; an environment at LAST ignores its action and gives FIRST.
  virtual TimeSteps step(const Tensor& action) = 0;

  /// T steps in one pass with actions [T, B, …]: row t is what step(action[t]) would have given.
  virtual TimeSteps sweep(const Tensor& action) = 0;

  /// Everything needed to go on exactly here, and back. load() throws if the bytes are of another world,
  /// other options or another number of environments.
  virtual std::vector<uint8_t> save() const = 0;
  virtual void load(const std::vector<uint8_t>& bytes) = 0;
};

/// How the drivers of lib-less code make an environment again, as evaluation does: (num_envs, seed) → VectorEnv.
using EnvFactory = std::function<std::unique_ptr<VectorEnv>(int64_t num_envs, uint64_t seed)>;

}  // namespace retain
