#include "envs/worlds.h"

#include <gtest/gtest.h>

#include <cmath>

#include "envs/play.h"

// What the rules of single worlds say beyond what all worlds share.

namespace retain {
namespace {

using namespace retain::testing;

/// The mean of n draws with this standard deviation is nearer than this, but for one time in 10^4.
double bound(double deviation, int64_t n) { return 4 * deviation / std::sqrt(n); }

TEST(Gap, LogUniformLengthsAreAsLikelyAsTheyAreShort) {
  const int64_t horizon = 21, draws = 40000;
  std::vector<int64_t> count(horizon + 1, 0);
  for (int64_t i = 0; i < draws; ++i) {
    Rng rng(1, Stream::world, i, 0);
    ++count.at(draw_gap(rng, horizon, Lengths::log_uniform));
  }
  double weights = 0;
  for (int64_t length = 4; length <= horizon; ++length) weights += 1.0 / length;
  for (int64_t length = 0; length <= horizon; ++length) {
    const double p = length < 4 ? 0 : 1.0 / length / weights;
    EXPECT_NEAR(count[length] / double(draws), p, bound(std::sqrt(p * (1 - p)), draws)) << length;
  }
}

TEST(Gap, TheShortestHorizonHasOneLength) {
  Rng rng(1, Stream::world, 0, 0);
  EXPECT_EQ(draw_gap(rng, 4, Lengths::log_uniform), 4);
  EXPECT_EQ(draw_gap(rng, 9, Lengths::fixed), 9);
}

TEST(Recall, TheQuerySaysNothingAboutTheCue) {
  auto env = vectorize(Recall{.horizon = 4}, 50, 2);
  const TimeSteps begin = env->reset();
  const TimeSteps steps = env->sweep(at::zeros({5, 50}, at::kLong));
  EXPECT_GT(begin.observation.std(0).slice(0, 0, 4).min().item<float>(), 0);  // all cues are there
  const Tensor query = steps.observation[4];
  EXPECT_TRUE(query.equal(at::tensor({0.f, 0.f, 0.f, 0.f, 0.f, 1.f}).expand({50, 6})));
  const Tensor noise = steps.observation.slice(0, 0, 4);
  EXPECT_TRUE((noise.select(-1, 4).abs() == 1).all().item<bool>());
  EXPECT_NEAR(noise.select(-1, 4).mean().item<float>(), 0, bound(1, 200));
}

TEST(Recall, WithoutNoiseTheGapIsSilent) {
  auto env = vectorize(Recall{.horizon = 4, .noise = false}, 5, 2);
  env->reset();
  EXPECT_TRUE((env->sweep(at::zeros({4, 5}, at::kLong)).observation == 0).all().item<bool>());
}

TEST(Rewrite, CuesComeAtEveryStepOfTheGapAlike) {
  const int64_t num_envs = 8000, horizon = 6;
  auto env = vectorize(Rewrite{.horizon = horizon, .rewrites = 2}, num_envs, 4);
  env->reset();
  const TimeSteps gap = env->sweep(at::zeros({horizon, num_envs}, at::kLong));
  const Tensor shown = gap.observation.slice(-1, 0, 4).sum(-1);  // [T, B]
  EXPECT_TRUE((shown.sum(0) == 2).all().item<bool>());
  const Tensor share = shown.mean(1);
  const double deviation = std::sqrt(2.0 / 9);
  EXPECT_LE((share - 2.0 / 6).abs().max().item<double>(), bound(deviation, num_envs));
}

TEST(RepeatPrevious, ADeckHasThirteenOfEverySuit) {
  auto env = vectorize(RepeatPrevious{.decks = 2, .k = 4}, 20, 4);
  Tensor seen = env->reset().observation.clone();
  seen += env->sweep(at::zeros({103, 20}, at::kLong)).observation.sum(0);
  EXPECT_TRUE((seen == 26).all().item<bool>());
  EXPECT_TRUE(env->current().last().all().item<bool>());
}

TEST(RepeatPrevious, WithoutMemoryAnyOtherSuitIsTheBestAnswer) {
  auto env = vectorize(RepeatPrevious{}, 3000, 4);
  const Tensor returns = first_returns(
      *env, [&](int64_t) { return (env->current().observation.argmax(-1) + 1).remainder(4); });
  EXPECT_NEAR(returns.mean().item<double>(), env->spec().memoryless_return,
              bound(returns.std().item<double>(), 3000));
  EXPECT_GT(env->spec().memoryless_return, env->spec().chance_return);
}

TEST(MemoryChain, EveryBitIsAskedFor) {
  auto env = vectorize(MemoryChain{.horizon = 3, .num_bits = 5}, 400, 4);
  const TimeSteps begin = env->reset();
  EXPECT_TRUE((begin.observation.slice(-1, 2).abs() == 1).all().item<bool>());
  const Tensor query = env->sweep(at::zeros({2, 400}, at::kLong)).observation[1].select(-1, 1);
  for (int64_t q = 0; q < 5; ++q) EXPECT_GT((query == q).sum().item<int64_t>(), 40);
}

TEST(TMaze, WithoutMemoryHalfTheGoalsAreMet) {
  auto env = vectorize(TMaze{.horizon = 4, .oracle_offset = 1}, 3000, 4);
  const Tensor returns = first_returns(*env, [&](int64_t) {  // right, and up where there is an up
    return env->current().observation.select(-1, 0).to(at::kLong);
  });
  EXPECT_NEAR(returns.mean().item<double>(), env->spec().memoryless_return, bound(0.5, 3000));
}

TEST(TMaze, ChanceReturnsAreTheOnesWorkedOutByHand) {
  // L = 1: right, then up or down the right way, has the chance 1/4 · 1/4; 3/4 pay the penalty of
  // one.
  EXPECT_DOUBLE_EQ(TMaze{.horizon = 1}.chance_return(), 1.0 / 16 - 3.0 / 4);
  // L = 2: 1/16 · 1/4; behind after one step 3/4, after two 15/16.
  EXPECT_DOUBLE_EQ(TMaze{.horizon = 2}.chance_return(), 1.0 / 64 - (3.0 / 4 + 15.0 / 16) / 2);
  EXPECT_DOUBLE_EQ((TMaze{.horizon = 2, .recoverable = true}.chance_return()), 1.0 / 64 - 3.0 / 4);
  EXPECT_NEAR(TMaze{.horizon = 1000000}.chance_return(), -1, 1e-5);
}

TEST(Catch, TheBallFallsAStraightLine) {
  auto env = vectorize(Catch{}, 30, 4);
  Tensor board = env->reset().observation.view({30, 10, 5});
  const Tensor column = board.select(1, 0).argmax(-1);
  for (int64_t row = 1; row < 9; ++row) {
    board = env->step(at::ones({30}, at::kLong)).observation.view({30, 10, 5});
    EXPECT_TRUE(board.select(1, row).argmax(-1).equal(column));
    EXPECT_TRUE(board.select(1, 9).argmax(-1).eq(2).all().item<bool>());
  }
  for (int64_t c = 0; c < 5; ++c) EXPECT_TRUE((column == c).any().item<bool>());
}

TEST(Catch, ABoardTooShortForThePaddleHasALowerBest) {
  EXPECT_DOUBLE_EQ((Catch{.rows = 3, .columns = 9}.spec().best_return), 2 * 5.0 / 9 - 1);
  EXPECT_DOUBLE_EQ(Catch{}.spec().best_return, 1);
}

}  // namespace
}  // namespace retain
