#pragma once

#include <retain/experiments/evaluate.h>

#include <string>
#include <vector>

namespace retain {

/// One trained and evaluated run of a horizon experiment.
struct HorizonResult {
  int64_t horizon = 0;
  std::string arm;
  uint64_t seed = 0;
  std::string folder;
  int64_t parameters = 0;   ///< Of the whole policy.
  int64_t state_bytes = 0;  ///< Of one environment's memory.
  int64_t updates = 0, env_steps = 0;
  double train_seconds = 0;
  Evaluation evaluation = {};
};

/// From this normalised accuracy on a seed counts as solved.
inline constexpr double kSolved = 0.8;

/// One row for each horizon and arm: every seed's accuracy, their mean and how many are solved.
std::string horizon_table(const std::vector<HorizonResult>& results);

/// What table.json holds: see experiments/horizon/README.md.
Json horizon_json(const RunOptions& base, const std::vector<HorizonResult>& results);

/// Draws table.json with plot_horizon.py. Returns "" or why there is no picture.
std::string draw_horizon(const std::string& json, const std::string& picture);

}  // namespace retain
