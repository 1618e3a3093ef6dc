#include <retain/envs/registry.h>
#include <retain/experiments/commands.h>
#include <retain/experiments/options.h>
#include <retain/experiments/text.h>

#include <iostream>

namespace retain {
namespace {

std::string actions(const ActionSpec& action) {
  if (action.kind == ActionSpec::Kind::continuous) return std::to_string(action.size) + " reals";
  std::string text;
  for (int64_t count : action.num_values)
    text += (text.empty() ? "" : " x ") + std::to_string(count);
  return text;
}

std::vector<std::string> row(const EnvironmentSpec& spec) {
  return {spec.name,
          std::to_string(spec.memory_length),
          std::to_string(spec.credit_length),
          fixed(spec.chance_return, 3),
          fixed(spec.memoryless_return, 3),
          fixed(spec.best_return, 3),
          std::to_string(spec.observation_size),
          actions(spec.action),
          spec.passive ? "yes" : "no"};
}

}  // namespace

int worlds_command(const Arguments& arguments) {
  Options options(
      "retain worlds",
      "Lists the worlds at their default options: how far back the best policy must look and "
      "how late an action shows in the return (steps), the returns of chance, of the best policy "
      "without "
      "memory and of the best policy, and whether observations ignore the actions (passive).");
  if (!options.parse(arguments)) return 0;
  std::vector<std::vector<std::string>> rows = {{"world", "memory", "credit", "chance",
                                                 "memoryless", "best", "observation", "actions",
                                                 "passive"}};
  std::string details;
  for (const WorldInfo& info : worlds()) {
    rows.push_back(row(make_vector_env(info.name, {}, 1, 1)->spec()));
    details += "\n" + info.name + ": " + info.summary + "\n ";
    for (const auto& [name, value] : info.options) details += " " + name + "=" + value;
    details += "\n";
  }
  std::cout << table(rows) << details
            << "\nOptions go to retain train as --horizon H and --world_option name=value.\n";
  return 0;
}

}  // namespace retain
