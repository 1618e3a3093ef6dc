#include <gtest/gtest.h>
#include <retain/agents/evaluation.h>

#include "agents/fixtures.h"
#include "support/random_tensors.h"

namespace retain {
namespace {

using testing::Aim;
using testing::make_policy;
using testing::randn;
using testing::recall;
using testing::Walk;

TEST(Summarize, ZerosAndOnesGetWilsonsInterval) {
  const auto returns = at::cat({at::ones({8}), at::zeros({2})});
  const auto result = summarize(returns, 0, 1);
  EXPECT_EQ(result.episodes, 10);
  EXPECT_DOUBLE_EQ(result.mean_return, 0.8);
  EXPECT_NEAR(result.low, 0.4901625, 1e-6);  // the textbook interval of 8 in 10
  EXPECT_NEAR(result.high, 0.9433178, 1e-6);
  const auto scaled = summarize(returns, 0.25, 1);
  EXPECT_NEAR(scaled.normalized, (0.8 - 0.25) / 0.75, 1e-12);
  EXPECT_NEAR(scaled.low, (result.low - 0.25) / 0.75, 1e-12);
}

TEST(Summarize, AllRightLeavesRoomForDoubt) {
  const auto result = summarize(at::ones({50}), 0.25, 1);
  EXPECT_DOUBLE_EQ(result.normalized, 1);
  EXPECT_LT(result.low, 0.95);
  EXPECT_NEAR(result.high, 1, 1e-12);
}

TEST(Summarize, WonOrLostWorldsGetTheIntervalOfTheirShare) {
  const auto won = at::cat({at::ones({8}), at::zeros({2})});
  const auto half = summarize(won, 0.5, 1), whole = summarize(2 * won - 1, 0, 1, -1);
  EXPECT_NEAR(whole.normalized, half.normalized, 1e-12);
  EXPECT_NEAR(whole.low, half.low, 1e-12);
  EXPECT_NEAR(whole.high, half.high, 1e-12);
  EXPECT_NEAR(summarize(at::ones({20}), 0, 1, -1).low, 0.6777497, 1e-6);  // 2 x 0.8388748 - 1
}

TEST(Summarize, OtherReturnsGetTheIntervalOfTheMean) {
  const auto returns = randn({400}, 1, at::kDouble) * 2 + 3;
  const auto result = summarize(returns, 1, 5);
  const double half = 1.959964 * returns.std().item<double>() / 20;
  EXPECT_NEAR(result.high - result.normalized, half / 4, 1e-9);
  EXPECT_NEAR(result.normalized - result.low, half / 4, 1e-9);
}

TEST(Summarize, ReturnsThatSayNothingAreAnError) {
  EXPECT_THROW(summarize(at::ones({3}), 1, 1), c10::Error);
  EXPECT_THROW(summarize(at::ones({3}), 0, 1, 1), c10::Error);
}

TEST(Summarize, NoEpisodeIsAnError) { EXPECT_THROW(summarize(at::zeros({0}), 0, 1), c10::Error); }

double played_whole(ActorCritic& policy, VectorEnv& env) {
  return Actor(env, {.greedy = true}).collect(policy).episode_return.mean().item<double>();
}

TEST(Evaluate, CarriesTheMemoryFromFirstToLast) {
  // 2,600 steps are three passes; rewards follow the cue of the first step.
  const auto make_env = [] { return vectorize(Aim{.length = 2600}, 3, 1); };
  for (const auto& core : core_names()) {
    SCOPED_TRACE(core);
    const auto policy = make_policy(make_env()->spec(), core);
    const auto result = evaluate(*policy, *make_env());
    EXPECT_EQ(result.episodes, 3);
    EXPECT_NEAR(result.mean_return, played_whole(*policy, *make_env()), 1e-2);
    EXPECT_NEAR(result.normalized, result.mean_return, 1e-9);
  }
}

TEST(Evaluate, PlaysOneEpisodeInEachEnvironment) {
  const auto expect_whole = [](const std::function<std::unique_ptr<VectorEnv>()>& make_env) {
    const auto policy = make_policy(make_env()->spec(), "gru");
    const auto result = evaluate(*policy, *make_env());
    EXPECT_NEAR(result.mean_return, played_whole(*policy, *make_env()), 1e-6);
  };
  expect_whole([] { return vectorize(Walk{}, 5, 2); });
  expect_whole([] { return recall(30, 40); });
}

/// Never ends, whatever it says.
struct Endless {
  using Action = int64_t;
  EnvironmentSpec spec() const {
    return {.name = "endless", .observation_size = 1, .max_episode_steps = 9};
  }
  void reset(Rng&, float*) {}
  Outcome step(Action, Rng&, float*) { return {}; }
};

TEST(Evaluate, AnEpisodeThatDoesNotEndIsAnError) {
  const auto env = vectorize(Endless{}, 3, 1);
  const auto policy = make_policy(env->spec(), "gru");
  EXPECT_THROW(evaluate(*policy, *env), c10::Error);
}

TEST(Evaluate, IsTheSameTwice) {
  const auto policy = make_policy(recall(30, 40)->spec(), "mamba");
  EXPECT_EQ(evaluate(*policy, *recall(30, 40)).mean_return,
            evaluate(*policy, *recall(30, 40)).mean_return);
}

}  // namespace
}  // namespace retain
