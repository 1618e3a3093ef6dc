#include <retain/experiments/evaluate.h>
#include <retain/experiments/text.h>
#include <retain/lib/io/atomic_file.h>

namespace retain {

Evaluation evaluate_run(ActorCritic& policy, const RunOptions& run, int64_t episodes,
                        uint64_t seed) {
  const auto env = make_env(run, episodes, seed);
  return evaluate(policy, *env);
}

std::string interval(const Evaluation& evaluation) {
  return fixed(100 * evaluation.low, 1) + " to " + fixed(100 * evaluation.high, 1);
}

Json to_json(const Evaluation& evaluation) {
  return {{"episodes", evaluation.episodes},
          {"mean_return", evaluation.mean_return},
          {"normalized_accuracy", evaluation.normalized},
          {"low", evaluation.low},
          {"high", evaluation.high}};
}

void write_json(const std::string& path, const Json& json) {
  write_file(path, {json.dump(2), "\n"});
}

}  // namespace retain
