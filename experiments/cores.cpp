#include <retain/experiments/commands.h>
#include <retain/experiments/run_options.h>
#include <retain/experiments/text.h>

#include <iostream>

namespace retain {
namespace {

/// "ssm [128, 16]" for every part, one row of the batch.
std::string state_parts(const State& state) {
  std::string text;
  for (const auto& [name, part] : state.parts()) {
    text += text.empty() ? name + " [" : ", " + name + " [";
    for (int64_t axis = 1; axis < part.dim(); ++axis)
      text += (axis > 1 ? ", " : "") + std::to_string(part.size(axis));
    text += "]";
  }
  return text.empty() ? "none" : text;
}

}  // namespace

int cores_command(const Arguments& arguments) {
  RunOptions run;
  Options options("retain cores [options]",
                  "Lists the memory cores with the size of their parameters and of their state "
                  "for one environment, at the options given.");
  add_core_options(options, run);
  for (const char* name : {"core", "activate_encoder", "policy_gain", "normalize_observation"})
    options.remove(name);
  if (!options.parse(arguments)) return 0;
  std::vector<std::vector<std::string>> rows = {{"core", "parameters", "state bytes", "  state"}};
  for (const std::string& name : core_names()) {
    run.trainer.policy.core.name = name;
    complete(run);
    const auto core = make_core(run.trainer.policy.core);
    const State state = core->initial_state(1);
    rows.push_back({name, std::to_string(num_parameters(*core)), std::to_string(state.num_bytes()),
                    "  " + state_parts(state)});
  }
  // The last column reads from the left.
  size_t widest = 0;
  for (const auto& row : rows) widest = std::max(widest, row.back().size());
  for (auto& row : rows) row.back().resize(widest, ' ');
  std::cout << table(rows) << "\nretain cores --help lists the options.\n";
  return 0;
}

}  // namespace retain
