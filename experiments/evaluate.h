#pragma once

#include <retain/agents/evaluation.h>
#include <retain/experiments/run_options.h>

#include <nlohmann/json.hpp>

namespace retain {

using Json = nlohmann::ordered_json;

/// Evaluation plays worlds that no training run with a usual seed has seen.
inline constexpr uint64_t kEvaluationSeed = 1'000'000'000;

/// Greedy play of `episodes` episodes of the run's world.
Evaluation evaluate_run(ActorCritic& policy, const RunOptions& run, int64_t episodes,
                        uint64_t seed);

/// "57.0 to 66.0", in per cent.
std::string interval(const Evaluation& evaluation);
Json to_json(const Evaluation& evaluation);

/// Writes it whole or not at all.
void write_json(const std::string& path, const Json& json);

}  // namespace retain
