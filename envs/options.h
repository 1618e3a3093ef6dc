#pragma once

#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>

namespace retain {

/// Option name → value as text: {"horizon", "300"}, {"num_cues", "4"}, {"lengths", "log_uniform"}.
using WorldOptions = std::map<std::string, std::string>;

/// How long the gaps of a world's episodes are.
enum class Lengths {
  fixed,       ///< All `horizon`.
  log_uniform  ///< An integer of [4, horizon] with probability proportional to 1/length.
};

// A world names its options once, in `template <class V> void visit_options(V&& visit)`, which
// calls visit("name", field) for each; fields are int64_t, bool or Lengths.

inline std::string option_text(int64_t value) { return std::to_string(value); }
inline std::string option_text(bool value) { return value ? "on" : "off"; }
inline std::string option_text(Lengths value) {
  return value == Lengths::fixed ? "fixed" : "log_uniform";
}

/// The options of a world as text.
template <class W>
WorldOptions options_of(W world) {
  WorldOptions options;
  world.visit_options([&](const char* name, auto& field) { options[name] = option_text(field); });
  return options;
}

/// The same in one line, "horizon=300 lengths=fixed", as EnvironmentSpec::options has it.
template <class W>
std::string options_line(const W& world) {
  std::string line;
  for (const auto& [name, value] : options_of(world)) {
    line += (line.empty() ? "" : " ") + name + "=" + value;
  }
  return line;
}

/// Throws std::invalid_argument unless low <= value <= high.
inline void check_option(const char* world, const char* name, int64_t value, int64_t low,
                         int64_t high = INT64_MAX) {
  if (value >= low && value <= high) return;
  const bool small = value < low;
  throw std::invalid_argument(std::string(world) + ": " + name + " must be at " +
                              (small ? "least " : "most ") + std::to_string(small ? low : high) +
                              ", got " + std::to_string(value));
}

}  // namespace retain
