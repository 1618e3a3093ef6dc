#include <retain/experiments/names.h>

#include <algorithm>

namespace retain {

int64_t edit_distance(const std::string& a, const std::string& b) {
  const size_t rows = a.size() + 1;
  const size_t columns = b.size() + 1;
  std::vector<std::vector<int64_t>> cost(rows, std::vector<int64_t>(columns));
  for (size_t i = 0; i < rows; ++i) cost[i][0] = static_cast<int64_t>(i);
  for (size_t j = 0; j < columns; ++j) cost[0][j] = static_cast<int64_t>(j);
  for (size_t i = 1; i < rows; ++i) {
    for (size_t j = 1; j < columns; ++j) {
      const int64_t substitute = cost[i - 1][j - 1] + (a[i - 1] != b[j - 1]);
      cost[i][j] = std::min({cost[i - 1][j] + 1, cost[i][j - 1] + 1, substitute});
      const bool swapped = i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1];
      if (swapped) cost[i][j] = std::min(cost[i][j], cost[i - 2][j - 2] + 1);
    }
  }
  return cost[a.size()][b.size()];
}

std::vector<std::string> nearest(const std::string& name,
                                 const std::vector<std::string>& candidates) {
  std::vector<std::pair<int64_t, std::string>> ranked;
  const int64_t limit = std::max<int64_t>(2, static_cast<int64_t>(name.size()) / 3);
  for (const std::string& candidate : candidates) {
    int64_t distance = edit_distance(name, candidate);
    // A shortened name is near to its whole.
    if (name.size() >= 2 && candidate.starts_with(name)) distance = std::min<int64_t>(distance, 1);
    if (distance <= limit && distance < static_cast<int64_t>(candidate.size())) {
      ranked.emplace_back(distance, candidate);
    }
  }
  std::stable_sort(ranked.begin(), ranked.end(),
                   [](auto& a, auto& b) { return a.first < b.first; });
  std::vector<std::string> names;
  for (size_t i = 0; i < std::min<size_t>(3, ranked.size()); ++i) names.push_back(ranked[i].second);
  return names;
}

void check_name(const std::string& what, const std::string& name,
                const std::vector<std::string>& valid) {
  if (std::find(valid.begin(), valid.end(), name) != valid.end()) return;
  const auto near = nearest(name, valid);
  throw UsageError("unknown " + what + " \"" + name + "\"" +
                   (near.empty() ? "" : "; nearest: " + join(near)) + "; valid: " + join(valid));
}

std::string unknown_option(const std::string& name, const std::vector<std::string>& valid) {
  const auto near = nearest(name, valid);
  return near.empty() ? "unknown option --" + name + "; --help lists the valid ones"
                      : "unknown option --" + name + "; nearest: --" + join(near, ", --");
}

std::string join(const std::vector<std::string>& words, const std::string& separator) {
  std::string text;
  for (const std::string& word : words) text += (text.empty() ? "" : separator) + word;
  return text;
}

}  // namespace retain
