#pragma once

#include <retain/agents/trainer.h>
#include <retain/envs/registry.h>
#include <retain/experiments/options.h>

#include <memory>
#include <optional>
#include <string>

namespace retain {

/// One run: a world, a policy, an algorithm, a budget and a seed. What a run folder's config.ini
/// holds.
struct RunOptions {
  std::string world = "recall";    ///< One of worlds().
  std::optional<int64_t> horizon;  ///< Unset: the world's own.
  WorldOptions world_option;       ///< The world's other options.
  int64_t num_envs = 64;           ///< Environments stepped together.
  int64_t updates = 300;           ///< Rollouts and updates to do.
  int64_t checkpoint_every = 25;   ///< Updates.
  int64_t threads = 0;  ///< 0 = as many as LibTorch would take; LibTorch's sums depend on it.
  bool tf32 = false;    ///< What use_tf32() is told.
  /// Numbers that may follow the horizon: "0.001", "1/horizon", "horizon".
  std::string dt_min = "0.001", dt_max = "0.1", dt_init_floor = "0.0001", chrono_horizon = "1000";
  TrainerOptions trainer;  ///< Policy, algorithm, seed and device.
};

/// Declares all of them, grouped for --help; or the policy's alone.
void add_run_options(Options& options, RunOptions& run);
void add_core_options(Options& options, RunOptions& run);

/// Whether the run's world has a horizon. Throws UsageError if there is no such world.
bool has_horizon(const RunOptions& run);

/// Checks the names, fills in what the world's defaults say and works out what follows the horizon,
/// so that the options say all there is to say about the run. Throws UsageError.
void complete(RunOptions& run);

/// The complete run that a config.ini describes; `where` opens the message of a UsageError.
RunOptions read_run(const std::string& ini, const std::string& where);

/// What config.ini holds for it.
std::string to_ini(const RunOptions& run);

std::unique_ptr<VectorEnv> make_env(const RunOptions& run, int64_t num_envs, uint64_t seed);
std::unique_ptr<Trainer> make_trainer(const RunOptions& run);

/// "recall 300 mamba seed 1"
std::string title(const RunOptions& run);

int64_t num_parameters(const torch::nn::Module& module);

/// Declares --threads.
void add_threads(Options& options, int64_t& threads);
void use_threads(int64_t threads);  ///< 0 changes nothing.

/// Whether a GPU may round the factors of fp32 matrix products to TF32, 10 bits after the point.
void use_tf32(bool tf32);

/// Throws UsageError unless it is a device of this machine.
void check_device(const std::string& device);

}  // namespace retain
