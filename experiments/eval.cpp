#include <retain/experiments/commands.h>
#include <retain/experiments/evaluate.h>
#include <retain/experiments/text.h>

#include <iostream>

namespace retain {
namespace {

struct EvalOptions {
  std::string checkpoint, json, device = "cpu";
  std::vector<int64_t> horizons;
  WorldOptions world_option;
  int64_t episodes = 1024, threads = 0;
  uint64_t seed = kEvaluationSeed;
};

bool parse(const Arguments& arguments, EvalOptions& eval) {
  Options options(
      "retain eval --checkpoint FILE [--horizons H ...] [options]",
      "Plays a checkpoint's policy greedily on worlds of fixed seeds and prints the mean return "
      "and the "
      "normalised accuracy (mean return - chance) / (best - chance) with its 95 % interval.");
  options.add("checkpoint", eval.checkpoint, "A run's checkpoint.h5.");
  options.add("horizons", eval.horizons, {.min = 1},
              "One row each; default: the horizon it was trained at.");
  options.add("episodes", eval.episodes, {.min = 1}, "Played at each horizon.");
  options.add("seed", eval.seed, "Of the worlds.");
  options.add("world_option", eval.world_option,
              "name=value: another option of the world than in training.");
  options.add("json", eval.json, "Write the table to this file, too.");
  options.add("device", eval.device, "cpu, cuda or cuda:N.");
  add_threads(options, eval.threads);
  if (!options.parse(arguments)) return false;
  if (eval.checkpoint.empty()) throw UsageError("--checkpoint is missing: which file?");
  return true;
}

/// The run at other horizons: one copy each.
std::vector<RunOptions> variants(RunOptions run, const EvalOptions& eval) {
  if (eval.world_option.count("horizon"))
    throw UsageError("--world_option horizon: give it as --horizons");
  for (const auto& [name, value] : eval.world_option) run.world_option[name] = value;
  if (eval.horizons.empty()) {
    complete(run);
    return {run};
  }
  std::vector<RunOptions> runs;
  for (int64_t horizon : eval.horizons) {
    run.horizon = horizon;
    complete(run);
    runs.push_back(run);
  }
  return runs;
}

/// Throws UsageError unless a policy for worlds of one kind can play those of another.
void check_playable(const EnvironmentSpec& trained, const EnvironmentSpec& played) {
  if (trained.observation_size == played.observation_size &&
      trained.action.num_values == played.action.num_values) {
    return;
  }
  throw UsageError("--world_option: the policy was trained with " + trained.options +
                   ", whose observations or actions are others than with " + played.options);
}

}  // namespace

int eval_command(const Arguments& arguments) {
  EvalOptions eval;
  if (!parse(arguments, eval)) return 0;
  check_device(eval.device);
  use_threads(eval.threads);
  const CheckpointReader reader(eval.checkpoint);
  const RunOptions run = read_run(reader.text("config"), eval.checkpoint);
  const auto runs = variants(run, eval);
  const EnvironmentSpec spec = make_env(run, 1, 0)->spec();
  for (const RunOptions& variant : runs) check_playable(spec, make_env(variant, 1, 0)->spec());
  ActorCritic policy(spec, run.trainer.policy);
  load_policy(reader, policy);
  policy.to(at::Device(eval.device));

  std::cout << title(run) << ", " << reader.integer("progress/updates") << " updates\n"
            << std::flush;
  std::vector<std::vector<std::string>> rows = {
      {"horizon", "episodes", "return", "accuracy %", "95 % interval"}};
  Json results = Json::array();
  for (const RunOptions& variant : runs) {
    const Evaluation evaluation = evaluate_run(policy, variant, eval.episodes, eval.seed);
    const Json horizon = variant.horizon ? Json(*variant.horizon) : Json();
    rows.push_back({variant.horizon ? std::to_string(*variant.horizon) : "-",
                    std::to_string(evaluation.episodes), fixed(evaluation.mean_return, 3),
                    fixed(100 * evaluation.normalized, 1), interval(evaluation)});
    results.push_back({{"horizon", horizon}});
    results.back().update(to_json(evaluation));
  }
  std::cout << table(rows, 0);
  if (!eval.json.empty()) {
    write_json(eval.json, {{"format", 1},
                           {"checkpoint", eval.checkpoint},
                           {"world", run.world},
                           {"core", run.trainer.policy.core.name},
                           {"trained_horizon", run.horizon ? Json(*run.horizon) : Json()},
                           {"updates", reader.integer("progress/updates")},
                           {"env_steps", reader.integer("progress/env_steps")},
                           {"seed", eval.seed},
                           {"results", results}});
  }
  return 0;
}

}  // namespace retain
