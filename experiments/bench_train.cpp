#include <ATen/Parallel.h>
#include <retain/experiments/bench.h>
#include <retain/experiments/evaluate.h>
#include <retain/experiments/text.h>

#include <iostream>

namespace retain {
namespace {

struct Measurement {
  std::string core;
  int64_t parameters = 0, env_steps = 0;  ///< env_steps of one update.
  Sample steps_per_second = {}, rollout_seconds = {}, learn_seconds = {};
};

Measurement measure(const RunOptions& run, int64_t repetitions) {
  const auto trainer = make_trainer(run);
  trainer->update();  // warms caches and the allocator
  Measurement measurement{.core = run.trainer.policy.core.name,
                          .parameters = num_parameters(trainer->policy())};
  std::vector<double> speed, rollout, learn;
  for (int64_t i = 0; i < repetitions; ++i) {
    const int64_t before = trainer->env_steps();
    const TrainMetrics metrics = trainer->update();
    measurement.env_steps = metrics.env_steps - before;
    rollout.push_back(metrics.rollout_seconds);
    learn.push_back(metrics.learn_seconds);
    speed.push_back(static_cast<double>(measurement.env_steps) / (rollout.back() + learn.back()));
  }
  measurement.steps_per_second = summarize(speed);
  measurement.rollout_seconds = summarize(rollout);
  measurement.learn_seconds = summarize(learn);
  return measurement;
}

std::vector<std::string> row(const Measurement& measurement) {
  const Sample& speed = measurement.steps_per_second;
  const double rollout = measurement.rollout_seconds.median,
               learn = measurement.learn_seconds.median;
  return {measurement.core,
          std::to_string(measurement.parameters),
          short_count(speed.median),
          short_count(speed.low) + " to " + short_count(speed.high),
          fixed(1000 * rollout, 1),
          fixed(1000 * learn, 1),
          percent(rollout / (rollout + learn))};
}

Json to_json(const Measurement& measurement) {
  return {{"core", measurement.core},
          {"parameters", measurement.parameters},
          {"env_steps", measurement.env_steps},
          {"steps_per_second", to_json(measurement.steps_per_second)},
          {"rollout_seconds", to_json(measurement.rollout_seconds)},
          {"learn_seconds", to_json(measurement.learn_seconds)}};
}

}  // namespace

int bench_train_command(const Arguments& arguments) {
  RunOptions run;
  run.num_envs = 256;
  std::vector<std::string> cores = {"gru", "mamba"};
  std::string json;
  int64_t repetitions = 7;
  bool smoke = false;
  Options options("retain bench train [options]",
                  "Measures training, world and learner included, in env steps a second: for each "
                  "core one update to warm "
                  "up, then one a repetition. Prints the median, the slowest and fastest, and how "
                  "the time splits.");
  options.add("cores", cores, "Measured one after the other.");
  options.add("repetitions", repetitions, {.min = 1}, "Updates measured.");
  options.add_flag("smoke", smoke, "A size that takes no time: does it run at all?");
  options.add("json", json, "Write the figures to this file, too.");
  add_run_options(options, run);
  for (const char* name : {"core", "updates", "checkpoint_every"}) options.remove(name);
  options.allow_config();
  if (!options.parse(arguments)) return 0;
  if (smoke) {
    run.num_envs = 4;
    repetitions = 2;
  }
  if (has_horizon(run) && (smoke || !run.horizon)) run.horizon = smoke ? 8 : 128;
  for (const std::string& core : cores) check_name("core", core, core_names());
  use_threads(run.threads);
  use_tf32(run.tf32);
  complete(run);
  std::cout << run.world << " " << (run.horizon ? std::to_string(*run.horizon) : "") << ", "
            << run.num_envs << " environments, d_model " << run.trainer.policy.core.d_model << ", "
            << at::get_num_threads() << " threads, " << repetitions << " repetitions\n"
            << std::flush;
  std::vector<std::vector<std::string>> rows = {{"core", "parameters", "steps/s",
                                                 "slowest to fastest", "rollout ms", "learn ms",
                                                 "rollout share"}};
  Json results = Json::array();
  for (const std::string& core : cores) {
    run.trainer.policy.core.name = core;
    complete(run);
    const Measurement measurement = measure(run, repetitions);
    rows.push_back(row(measurement));
    results.push_back(to_json(measurement));
  }
  std::cout << table(rows);
  if (!json.empty()) {
    write_json(json, {{"format", 1},
                      {"benchmark", "train"},
                      {"config", to_ini(run)},
                      {"threads", at::get_num_threads()},
                      {"repetitions", repetitions},
                      {"results", results}});
  }
  return 0;
}

}  // namespace retain
