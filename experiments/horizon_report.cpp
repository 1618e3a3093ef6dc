#include <retain/experiments/horizon_report.h>
#include <retain/experiments/text.h>

#include <spawn.h>
#include <sys/wait.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>

extern char** environ;

namespace retain {
namespace {

namespace fs = std::filesystem;

/// The results in groups of one horizon and one arm, in the order of their first member.
std::vector<std::vector<HorizonResult>> grouped(const std::vector<HorizonResult>& results) {
  std::vector<std::vector<HorizonResult>> groups;
  for (const HorizonResult& result : results) {
    const auto group = std::find_if(groups.begin(), groups.end(), [&](const auto& other) {
      return other[0].horizon == result.horizon && other[0].arm == result.arm;
    });
    (group == groups.end() ? groups.emplace_back() : *group).push_back(result);
  }
  return groups;
}

std::vector<std::string> row(const std::vector<HorizonResult>& group) {
  std::string seeds;
  double sum = 0, seconds = 0;
  int64_t solved = 0;
  for (const HorizonResult& result : group) {
    const std::string accuracy = fixed(100 * result.evaluation.normalized, 1);
    seeds += std::string(accuracy.size() < 6 ? 6 - accuracy.size() : 1, ' ') + accuracy;
    sum += result.evaluation.normalized;
    seconds += result.train_seconds;
    solved += result.evaluation.normalized >= kSolved;
  }
  const auto count = static_cast<double>(group.size());
  return {group[0].arm,
          std::to_string(group[0].horizon),
          std::to_string(group[0].parameters),
          std::to_string(group[0].state_bytes),
          seeds,
          fixed(100 * sum / count, 1),
          std::to_string(solved) + "/" + std::to_string(group.size()),
          short_time(seconds / count)};
}

fs::path program_folder() { return fs::read_symlink("/proc/self/exe").parent_path(); }

std::string first_existing(const std::vector<fs::path>& paths) {
  for (const fs::path& path : paths) {
    if (fs::exists(path)) return path;
  }
  return "";
}

/// $RETAIN_PYTHON, the Python of the build, or the one on PATH.
std::string python() {
  const char* chosen = std::getenv("RETAIN_PYTHON");
  if (chosen && *chosen) return chosen;
  const std::string built = first_existing({program_folder() / "venv/bin/python"});
  return built.empty() ? "python3" : built;
}

/// The exit code of a program that takes no input; 127 if it cannot be started.
int run_process(std::vector<std::string> words) {
  std::vector<char*> arguments;
  for (std::string& word : words) arguments.push_back(word.data());
  arguments.push_back(nullptr);
  pid_t child = 0;
  int status = 0;
  if (posix_spawnp(&child, arguments[0], nullptr, nullptr, arguments.data(), environ) != 0)
    return 127;
  while (waitpid(child, &status, 0) < 0 && errno == EINTR) {
  }
  return WIFEXITED(status) ? WEXITSTATUS(status) : 127;
}

}  // namespace

std::string horizon_table(const std::vector<HorizonResult>& results) {
  std::vector<std::vector<std::string>> rows = {{"core", "horizon", "parameters", "state bytes",
                                                 "accuracy % of each seed", "mean", "solved",
                                                 "time a run"}};
  for (const auto& group : grouped(results)) rows.push_back(row(group));
  return table(rows);
}

Json horizon_json(const RunOptions& base, const std::vector<HorizonResult>& results) {
  const EnvironmentSpec spec = make_env(base, 1, 0)->spec();
  Json rows = Json::array();
  for (const HorizonResult& result : results) {
    Json row = {{"arm", result.arm}, {"horizon", result.horizon}, {"seed", result.seed}};
    row.update(to_json(result.evaluation));
    row.update({{"updates", result.updates},
                {"env_steps", result.env_steps},
                {"parameters", result.parameters},
                {"state_bytes", result.state_bytes},
                {"train_seconds", result.train_seconds},
                {"folder", result.folder}});
    rows.push_back(row);
  }
  return {{"format", 1},
          {"world", base.world},
          {"num_envs", base.num_envs},
          {"updates", base.updates},
          {"chance_return", spec.chance_return},
          {"best_return", spec.best_return},
          {"solved_from", kSolved},
          {"results", rows}};
}

std::string draw_horizon(const std::string& json, const std::string& picture) {
  const fs::path here = program_folder();
  const std::string script = first_existing({here / "include/retain/experiments/plot_horizon.py",
                                             here / "../share/retain/plot_horizon.py"});
  if (script.empty()) return "plot_horizon.py does not lie beside the program";
  const std::string interpreter = python();
  const int code = run_process({interpreter, script, json, picture});
  if (code == 0) return "";
  return "draw it later with: " + interpreter + " " + script + " " + json + " " + picture;
}

}  // namespace retain
