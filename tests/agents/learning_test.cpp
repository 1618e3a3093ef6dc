#include <gtest/gtest.h>
#include <retain/agents/trainer.h>
#include <retain/envs/catch.h>

#include "agents/fixtures.h"

namespace retain {
namespace {

/// Normalised greedy score after `updates` of A2C on whole episodes.
template <class W>
Evaluation learn(const W& world, const std::string& core, int updates, double learning_rate) {
  TrainerOptions options;
  options.policy.core = {.name = core, .d_model = 16, .d_state = 8};
  options.ppo.learning_rate = learning_rate;
  Trainer trainer(vectorize(world, 64, 1), options);
  for (int update = 0; update < updates; ++update) trainer.update();
  return evaluate(trainer.policy(), *vectorize(world, 256, 2));
}

TEST(Learning, MemoryCoresRecallACue) {
  EXPECT_GE(learn(Recall{.horizon = 8}, "mamba", 60, 0.01).normalized, 0.9);
  EXPECT_GE(learn(Recall{.horizon = 8}, "gru", 60, 0.01).normalized, 0.9);
}

TEST(Learning, MemorylessCoreStaysAtChance) {
  const auto result = learn(Recall{.horizon = 8}, "mlp", 60, 0.01);
  EXPECT_LE(result.low, 0);
  EXPECT_GE(result.high, 0);
}

TEST(Learning, MemorylessCoreCatches) {
  EXPECT_GE(learn(Catch{}, "mlp", 100, 0.01).normalized, 0.9);
}

}  // namespace
}  // namespace retain
