#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace retain {

/// A mistake in what the user asked for: one line on stderr, exit code 2.
struct UsageError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// Insertions, deletions, substitutions and swaps of neighbours between two names (Damerau 1964).
int64_t edit_distance(const std::string& a, const std::string& b);

/// Up to three candidates that `name` may have meant, nearest first; none if nothing is near.
std::vector<std::string> nearest(const std::string& name,
                                 const std::vector<std::string>& candidates);

/// Throws UsageError unless `name` is one of `valid`: what it is ("world"), the nearest names, all
/// of them.
void check_name(const std::string& what, const std::string& name,
                const std::vector<std::string>& valid);

/// What to say about an option that is none of `valid`: the nearest ones.
std::string unknown_option(const std::string& name, const std::vector<std::string>& valid);

std::string join(const std::vector<std::string>& words, const std::string& separator = ", ");

}  // namespace retain
