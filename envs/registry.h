#pragma once

#include <retain/envs/options.h>
#include <retain/envs/vector_env.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace retain {

struct WorldInfo {
  std::string name;
  std::string summary;                                       ///< One line.
  std::vector<std::pair<std::string, std::string>> options;  ///< Name and default.
};

/// Every world there is, by name.
std::vector<WorldInfo> worlds();

/// Throws std::invalid_argument on an unknown world or option (listing the valid ones) or a bad
/// value (naming it). Options left out keep their defaults.
std::unique_ptr<VectorEnv> make_vector_env(const std::string& world, const WorldOptions& options,
                                           int64_t num_envs, uint64_t seed,
                                           int64_t first_environment = 0);

}  // namespace retain
