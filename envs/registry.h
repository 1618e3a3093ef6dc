#pragma once

#include <retain/envs/vector_env.h>

#include <map>
#include <memory>
#include <string>
#include <vector>

namespace retain {

/// Option name → value as text: {"horizon", "300"}, {"num_cues", "4"}, {"lengths", "log_uniform"}.
using WorldOptions = std::map<std::string, std::string>;

struct WorldInfo {
  std::string name;
  std::string summary;                                          ///< One line.
  std::vector<std::pair<std::string, std::string>> options;     ///< Name and default.
};

std::vector<WorldInfo> worlds();

/// Throws std::invalid_argument on an unknown world or option (listing the valid ones) or a bad value (naming it).
std::unique_ptr<VectorEnv> make_vector_env(const std::string& world, const WorldOptions& options,
                                           int64_t num_envs, uint64_t seed);

}  // namespace retain
