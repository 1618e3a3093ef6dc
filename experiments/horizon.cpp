#include <retain/experiments/commands.h>
#include <retain/experiments/horizon_report.h>
#include <retain/experiments/text.h>
#include <retain/experiments/training.h>
#include <retain/lib/io/atomic_file.h>
#include <retain/lib/io/run_log.h>

#include <filesystem>
#include <iostream>
#include <set>

namespace retain {
namespace {

struct HorizonOptions {
  RunOptions base;
  std::vector<int64_t> horizons = {100, 300};
  std::vector<int64_t> seeds = {1, 2};
  std::vector<std::string> arms = {"mamba", "gru"};
  std::map<std::string, std::map<std::string, std::string>> overrides;  ///< Of an arm.
  int64_t episodes = 1024;
  uint64_t evaluation_seed = kEvaluationSeed;
  std::string out = "runs/horizon", config;
  bool resume = false, configured = false;  ///< configured: by an INI file.
};

/// Throws unless `values` has members, each once.
template <class T>
void check_set(const std::string& name, const std::vector<T>& values) {
  if (values.empty()) throw UsageError("--" + name + " must name at least one");
  if (std::set<T>(values.begin(), values.end()).size() != values.size()) {
    throw UsageError("--" + name + " names one twice");
  }
}

bool parse(const Arguments& arguments, HorizonOptions& horizon) {
  Options options("retain horizon --config FILE [options]",
                  "Trains every arm at every horizon with every seed and the same budget, "
                  "evaluates each greedily at its "
                  "horizon, and writes table.txt, table.json and horizon.png. An arm is a core, or "
                  "any name with a "
                  "section [arm.NAME] of its own options in the INI file. --resume goes on with "
                  "what was stopped, with the options it was begun with and what is given now.");
  options.group("Experiment");
  options.add("horizons", horizon.horizons, {.min = 1}, "Trained and evaluated at.");
  options.add("seeds", horizon.seeds, {.min = 0}, "One run each.");
  options.add("arms", horizon.arms, "What is compared.");
  options.add("episodes", horizon.episodes, {.min = 1}, "Of each evaluation.");
  options.add("evaluation_seed", horizon.evaluation_seed, "Of the evaluation's worlds.");
  options.add("out", horizon.out, "Folder of the table, the picture and the runs.");
  options.exclude_from_config("out");
  options.add_flag(
      "resume", horizon.resume,
      "Go on with the experiment in --out: finished runs stay, the others are finished.");
  add_run_options(options, horizon.base);
  for (const char* name : {"horizon", "seed", "core"}) options.remove(name);  // the lists above say
  options.allow_config("arm");
  if (!options.parse(arguments)) return false;
  horizon.configured = options.given("config");
  check_set("horizons", horizon.horizons);
  check_set("seeds", horizon.seeds);
  check_set("arms", horizon.arms);
  horizon.config = options.ini();
  for (const auto& [arm, overrides] : options.sections()) {
    check_name("arm", arm, horizon.arms);
    horizon.overrides[arm] = overrides;
    horizon.config += "\n[arm." + arm + "]\n";
    for (const auto& [name, value] : overrides) horizon.config += name + " = " + value + "\n";
  }
  return true;
}

/// The run of one arm, horizon and seed. The budget, the world and the arithmetic are the same for
/// all arms.
RunOptions arm_run(const HorizonOptions& horizon, const std::string& arm, int64_t steps,
                   int64_t seed) {
  RunOptions run = horizon.base;
  const auto overrides = horizon.overrides.find(arm);
  const bool names_core = overrides != horizon.overrides.end() && overrides->second.count("core");
  if (!names_core) run.trainer.policy.core.name = arm;
  if (overrides != horizon.overrides.end()) {
    Options options("", "");
    add_run_options(options, run);
    for (const char* name : {"world", "world_option", "horizon", "num_envs", "num_steps", "updates",
                             "seed", "threads", "tf32"})
      options.remove(name);
    try {
      for (const auto& [name, value] : overrides->second) options.set(name, {value});
    } catch (const UsageError& error) {
      throw UsageError("[arm." + arm + "]: " + error.what());
    }
  }
  run.horizon = steps;
  run.trainer.seed = static_cast<uint64_t>(seed);
  complete(run);
  return run;
}

HorizonResult measure(const HorizonOptions& horizon, const RunOptions& run, const std::string& arm,
                      const std::string& folder, Trainer& trainer) {
  HorizonResult result{
      .horizon = *run.horizon, .arm = arm, .seed = run.trainer.seed, .folder = folder};
  result.parameters = num_parameters(trainer.policy());
  result.state_bytes = trainer.policy().initial_state(1).num_bytes();
  result.updates = trainer.updates();
  result.env_steps = trainer.env_steps();
  for (const auto& row : read_metrics(folder)) {
    for (const auto& [name, value] : row.second) {
      if (name.ends_with("_seconds")) result.train_seconds += value;
    }
  }
  result.evaluation =
      evaluate_run(trainer.policy(), run, horizon.episodes, horizon.evaluation_seed);
  return result;
}

struct Job {
  RunOptions run;
  std::string arm, folder;
};

/// Every run of the experiment; all are checked before the first begins.
std::vector<Job> plan(const HorizonOptions& horizon) {
  std::vector<Job> jobs;
  for (int64_t steps : horizon.horizons) {
    for (const std::string& arm : horizon.arms) {
      for (int64_t seed : horizon.seeds) {
        const std::string name =
            arm + "-" + std::to_string(steps) + "-seed-" + std::to_string(seed);
        jobs.push_back({arm_run(horizon, arm, steps, seed), arm, horizon.out + "/runs/" + name});
        const Job& job = jobs.back();
        make_trainer(job.run);
        if (holds_run(job.folder)) check_resumable(job.folder, stored_run(job.folder), job.run);
      }
    }
  }
  return jobs;
}

std::vector<HorizonResult> run_all(const HorizonOptions& horizon, const std::vector<Job>& jobs) {
  const StopSignal stop;
  std::vector<HorizonResult> results;
  for (const Job& job : jobs) {
    const std::string number =
        std::to_string(results.size() + 1) + "/" + std::to_string(jobs.size());
    const std::string title = number + " " + job.arm + " " + std::to_string(*job.run.horizon) +
                              " seed " + std::to_string(job.run.trainer.seed);
    const auto trainer = train(job.run, job.folder, title, stop);
    results.push_back(measure(horizon, job.run, job.arm, job.folder, *trainer));
  }
  return results;
}

}  // namespace

int horizon_command(const Arguments& arguments) {
  HorizonOptions horizon;
  if (!parse(arguments, horizon)) return 0;
  const std::string config = config_path(horizon.out);
  if (std::filesystem::exists(config)) {
    if (!horizon.resume) {
      throw UsageError("--out " + horizon.out +
                       " holds an experiment: --resume goes on with it, or choose another folder");
    }
    if (!horizon.configured) {
      Arguments stored = {"--config", config};
      stored.insert(stored.end(), arguments.begin(), arguments.end());
      horizon = {};
      parse(stored, horizon);
    }
  }
  use_threads(horizon.base.threads);
  use_tf32(horizon.base.tf32);
  horizon.base.horizon = horizon.horizons.front();
  complete(horizon.base);
  const auto jobs = plan(horizon);
  make_folder(horizon.out);
  write_file(config, {horizon.config});
  const auto results = run_all(horizon, jobs);
  const std::string text = horizon_table(results);
  const std::string json = horizon.out + "/table.json", picture = horizon.out + "/horizon.png";
  write_file(horizon.out + "/table.txt", {text});
  write_json(json, horizon_json(horizon.base, results));
  std::cout << text << "\ntable:   " << horizon.out << "/table.txt, " << json << "\n" << std::flush;
  const std::string problem = draw_horizon(json, picture);
  std::cout << "picture: " << (problem.empty() ? picture : "none; " + problem) << "\n";
  return 0;
}

}  // namespace retain
