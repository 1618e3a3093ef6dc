#include <gtest/gtest.h>
#include <retain/agents/trainer.h>
#include <retain/envs/catch.h>
#include <retain/envs/repeat_previous.h>

#include "agents/fixtures.h"

namespace retain {
namespace {

/// Greedy score after training on whole episodes of 64 environments.
template <class W>
Evaluation learn(const W& world, const std::string& core, int updates, const PPOOptions& ppo) {
  TrainerOptions options{.policy = {.core = {.name = core, .d_model = 16, .d_state = 8}},
                         .ppo = ppo};
  Trainer trainer(vectorize(world, 64, 1), options);
  for (int update = 0; update < updates; ++update) trainer.update();
  return evaluate(trainer.policy(), *vectorize(world, 256, 2));
}

const PPOOptions kA2C{.learning_rate = 0.01};
const PPOOptions kFourSteps{.learning_rate = 0.005, .num_minibatches = 4};

TEST(Learning, MambaRepeatsThePreviousCard) {
  EXPECT_GE(learn(RepeatPrevious{.k = 3}, "mamba", 100, kFourSteps).normalized, 0.9);
}

TEST(Learning, GRURecallsACue) {
  EXPECT_GE(learn(Recall{.horizon = 8, .num_cues = 2}, "gru", 120, kA2C).normalized, 0.9);
}

TEST(Learning, MemorylessCoreStaysAtChance) {
  const auto result = learn(Recall{.horizon = 8, .num_cues = 2}, "mlp", 120, kA2C);
  EXPECT_LE(result.low, 0);
  EXPECT_GE(result.high, 0);
}

TEST(Learning, MemorylessCoreCatches) {
  EXPECT_GE(learn(Catch{}, "mlp", 100, kA2C).normalized, 0.9);
}

}  // namespace
}  // namespace retain
