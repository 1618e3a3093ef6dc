#include <retain/agents/evaluation.h>
#include <retain/agents/rollout.h>

#include <cmath>

namespace retain {
namespace {

constexpr double kZ95 = 1.959964;           // two-sided 95 % quantile of the normal distribution
constexpr int64_t kRowsInFlight = 1 << 17;  // rows × environments of one pass

struct Interval {
  double low, high;
};

/// Wilson 1927: of a proportion.
Interval wilson(double proportion, double n) {
  const double z2 = kZ95 * kZ95 / n;
  const double centre = proportion + z2 / 2;
  const double half = kZ95 * std::sqrt(proportion * (1 - proportion) / n + z2 / (4 * n));
  return {(centre - half) / (1 + z2), (centre + half) / (1 + z2)};
}

/// Of returns that are 1 or `wrong`.
Interval of_won_or_lost(const Tensor& x, double wrong) {
  const double span = 1 - wrong;
  const auto share =
      wilson((x.mean().item<double>() - wrong) / span, static_cast<double>(x.numel()));
  return {wrong + span * share.low, wrong + span * share.high};
}

Interval of_mean(const Tensor& x) {
  const double mean = x.mean().item<double>();
  const auto n = static_cast<double>(x.numel());
  const double half = n > 1 ? kZ95 * x.std().item<double>() / std::sqrt(n) : INFINITY;
  return {mean - half, mean + half};
}

}  // namespace

Evaluation summarize(const Tensor& episode_return, double chance_return, double best_return,
                     double wrong_return) {
  TORCH_CHECK(episode_return.numel() > 0, "summarize: episode_return must hold an episode, got ",
              episode_return.sizes());
  TORCH_CHECK(best_return != chance_return,
              "summarize: best_return must differ from chance_return, got ", best_return,
              " for both");
  TORCH_CHECK(wrong_return != 1, "summarize: wrong_return must differ from 1, got ", wrong_return);
  const auto returns = episode_return.to(at::kDouble);
  const double mean = returns.mean().item<double>();
  const bool won_or_lost = ((returns == wrong_return) | (returns == 1)).all().item<bool>();
  const auto interval = won_or_lost ? of_won_or_lost(returns, wrong_return) : of_mean(returns);
  const auto scaled = [&](double x) { return (x - chance_return) / (best_return - chance_return); };
  return {.episodes = returns.numel(),
          .mean_return = mean,
          .normalized = scaled(mean),
          .low = scaled(interval.low),
          .high = scaled(interval.high)};
}

Evaluation evaluate(ActorCritic& policy, VectorEnv& env) {
  const auto num_envs = env.num_envs();
  TORCH_CHECK(num_envs > 0, "evaluate: env must hold an environment");
  const auto num_steps = std::clamp<int64_t>(kRowsInFlight / num_envs, 1, 1024);
  Actor actor(env, {.num_steps = num_steps, .greedy = true});
  auto episode_return = at::zeros({num_envs}, at::kDouble);
  auto open = at::ones({num_envs}, at::kBool);
  const int64_t longest = env.spec().max_episode_steps;
  for (int64_t rows = 0; open.any().item<bool>(); rows += num_steps) {
    TORCH_CHECK(longest == 0 || rows <= longest, "evaluate: an episode of the world \"",
                env.spec().name, "\" is longer than its max_episode_steps = ", longest);
    const auto rollout = actor.collect(policy);
    const auto last = rollout.mask.logical_not().to(at::kCPU);
    const auto counts = open & (last.cumsum(0) == 0);
    episode_return += at::where(counts, rollout.reward.to(at::kCPU), 0).sum(0, false, at::kDouble);
    open &= last.any(0).logical_not();
  }
  const auto& spec = env.spec();
  return summarize(episode_return, spec.chance_return, spec.best_return, spec.wrong_return);
}

}  // namespace retain
