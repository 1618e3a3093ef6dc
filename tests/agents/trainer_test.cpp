#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <retain/agents/trainer.h>
#include <unistd.h>

#include <filesystem>

#include "agents/fixtures.h"

namespace retain {
namespace {

using ::testing::HasSubstr;
using testing::recall;
using testing::small;
using ::testing::ThrowsMessage;
using testing::Walk;

class TrainerTest : public ::testing::Test {
 protected:
  TrainerTest()
      : folder_(std::filesystem::temp_directory_path() /
                ("retain_trainer_test_" + std::to_string(getpid()))) {
    std::filesystem::create_directory(folder_);
  }
  ~TrainerTest() override { std::filesystem::remove_all(folder_); }

  std::string path(const std::string& name) const { return folder_ / name; }

  std::string save(const Trainer& trainer, const std::string& name) const {
    CheckpointWriter writer(path(name));
    trainer.save(writer);
    writer.commit();
    return path(name);
  }

 private:
  std::filesystem::path folder_;
};

std::unique_ptr<VectorEnv> walk() { return vectorize(Walk{}, 6, 3); }

TrainerOptions options(const std::string& core, int64_t num_steps) {
  TrainerOptions options{.policy = small(core), .num_steps = num_steps, .normalize_reward = true};
  options.policy.normalize_observation = true;
  options.ppo = {.learning_rate = 0.01,
                 .anneal = true,
                 .num_updates = 10,
                 .update_epochs = 2,
                 .num_minibatches = 3};
  return options;
}

void run(Trainer& trainer, int updates) {
  for (int update = 0; update < updates; ++update) trainer.update();
}

/// Every entry of two checkpoints, whatever its kind, bit for bit.
void expect_equal_files(const std::string& a, const std::string& b) {
  const CheckpointReader left(a), right(b);
  ASSERT_EQ(left.names(), right.names());
  int64_t tensors = 0;
  for (const auto& name : left.names()) {
    SCOPED_TRACE(name);
    if (name.starts_with("envs/")) {
      EXPECT_EQ(left.bytes(name), right.bytes(name));
    } else if (name == "setup/world" || name == "setup/core") {
      EXPECT_EQ(left.text(name), right.text(name));
    } else if (name.starts_with("setup/") || name == "progress/updates" ||
               name == "progress/env_steps" || name == "progress/rows" || name.ends_with("/step")) {
      EXPECT_EQ(left.integer(name), right.integer(name));
    } else {
      EXPECT_TRUE(left.tensor(name).equal(right.tensor(name)));
      ++tensors;
    }
  }
  EXPECT_GT(tensors, 20);
}

TEST_F(TrainerTest, ResumeIsBitEqualToTheUninterruptedRun) {
  for (const auto& core : core_names()) {
    for (const int64_t num_steps : {0, 5}) {
      for (const bool passive : {false, true}) {
        SCOPED_TRACE(core + ", num_steps " + std::to_string(num_steps) +
                     (passive ? ", recall" : ", walk"));
        const auto make_env = [&] { return passive ? recall(9, 6) : walk(); };
        Trainer whole(make_env(), options(core, num_steps));
        run(whole, 3);
        const auto middle = save(whole, "middle.h5");
        run(whole, 3);

        Trainer resumed(make_env(), options(core, num_steps));
        run(resumed, 1);
        at::manual_seed(99);
        resumed.load(CheckpointReader(middle));
        EXPECT_EQ(resumed.updates(), 3);
        run(resumed, 3);
        expect_equal_files(save(whole, "whole.h5"), save(resumed, "resumed.h5"));
      }
    }
  }
}

TEST_F(TrainerTest, CheckpointBeforeTheFirstUpdateResumes) {
  Trainer whole(walk(), options("gru", 5)), resumed(walk(), options("gru", 5));
  const auto start = save(whole, "start.h5");
  run(whole, 2);
  run(resumed, 1);
  resumed.load(CheckpointReader(start));
  run(resumed, 2);
  expect_equal_files(save(whole, "whole.h5"), save(resumed, "resumed.h5"));
}

TEST_F(TrainerTest, ChunkCheckpointHoldsMemoryInTheMiddleOfAnEpisode) {
  Trainer trainer(recall(50, 6), options("mamba", 5));
  run(trainer, 2);
  const CheckpointReader reader(save(trainer, "middle.h5"));
  EXPECT_GT(reader.tensor("state/layers.0.ssm").abs().max().item<double>(), 0);
  EXPECT_EQ(reader.tensor("state/layers.0.ssm").size(0), 6);
}

TEST_F(TrainerTest, SeedDecidesTheRun) {
  const auto file = [&](uint64_t seed, const std::string& name) {
    auto chosen = options("gru", 5);
    chosen.seed = seed;
    Trainer trainer(walk(), chosen);
    run(trainer, 2);
    return save(trainer, name);
  };
  expect_equal_files(file(1, "a.h5"), file(1, "b.h5"));
  const auto weight = [&](uint64_t seed) {
    return CheckpointReader(file(seed, "c.h5")).tensor("model/encoder.linear.weight");
  };
  EXPECT_FALSE(weight(1).equal(weight(2)));
}

TEST_F(TrainerTest, ForeignCheckpointIsRefusedAndChangesNothing) {
  Trainer gru(walk(), options("gru", 5));
  run(gru, 2);
  const auto expect_refused = [&](Trainer& other, const std::string& message) {
    run(other, 1);
    const CheckpointReader reader(save(other, "other.h5"));
    const auto before = save(gru, "before.h5");
    EXPECT_THAT([&] { gru.load(reader); }, ThrowsMessage<c10::Error>(HasSubstr(message)));
    expect_equal_files(before, save(gru, "after.h5"));
  };
  Trainer core(walk(), options("mamba", 5));
  expect_refused(core, "core is \"mamba\", this one's is \"gru\"");
  Trainer world(recall(9, 6), options("gru", 5));
  expect_refused(world, "world is \"recall\", this run's is \"walk\"");
  auto wide = options("gru", 5);
  wide.policy.core.d_model = 12;
  Trainer width(walk(), wide);
  expect_refused(width, "model/encoder.linear.weight must be float32 [8, 3], got float32 [12, 3]");
  auto raw = options("gru", 5);
  raw.policy.normalize_observation = false;
  Trainer statistics(walk(), raw);
  expect_refused(statistics, "no entry \"model/observation_moments.mean\"");
  raw = options("gru", 5);
  raw.normalize_reward = false;
  Trainer rewards(walk(), raw);
  expect_refused(rewards, "normalize_reward is 0, this run's is 1");
  auto chosen = options("gru", 5);
  chosen.seed = 7;
  Trainer seed(walk(), chosen);
  expect_refused(seed, "seed is 7, this run's is 1");
  auto plain = options("gru", 5);
  plain.policy.activate_encoder = !plain.policy.activate_encoder;
  Trainer encoder(walk(), plain);
  expect_refused(encoder, "activate_encoder is ");
  Trainer chunks(walk(), options("gru", 3));
  expect_refused(chunks, "num_steps is 3, this run's is 5");
  auto deep = options("gru", 5);
  deep.policy.core.n_layers = 2;
  Trainer layers(walk(), deep);
  expect_refused(layers, "model has");
}

TEST_F(TrainerTest, MoreMinibatchesThanEnvironmentsAreRefusedAtOnce) {
  auto many = options("gru", 5);
  many.ppo.num_minibatches = 7;
  EXPECT_THAT([&] { Trainer(walk(), many); },
              ThrowsMessage<c10::Error>(HasSubstr("num_minibatches must be at most num_envs = 6")));
}

TEST_F(TrainerTest, CheckpointOfAnotherNumberOfEnvironmentsIsRefused) {
  Trainer six(walk(), options("gru", 5)), four(vectorize(Walk{}, 4, 3), options("gru", 5));
  run(six, 1);
  run(four, 1);
  const auto before = save(six, "before.h5");
  EXPECT_THROW(six.load(CheckpointReader(save(four, "four.h5"))), std::exception);
  expect_equal_files(before, save(six, "after.h5"));
}

TEST_F(TrainerTest, PolicyAloneIsReadBackForEvaluation) {
  Trainer trainer(walk(), options("mamba", 5));
  run(trainer, 3);
  const CheckpointReader reader(save(trainer, "run.h5"));
  ActorCritic policy(walk()->spec(), options("mamba", 5).policy);
  load_policy(reader, policy);
  EXPECT_EQ(evaluate(policy, *walk()).mean_return, evaluate(trainer.policy(), *walk()).mean_return);
  for (const auto& buffer : trainer.policy().named_buffers()) {
    EXPECT_TRUE(policy.named_buffers()[buffer.key()].equal(buffer.value())) << buffer.key();
  }
}

TEST_F(TrainerTest, MetricsCountOnlyActionsThatCount) {
  Trainer trainer(recall(9, 6), options("gru", 0));
  const auto metrics = trainer.update();
  EXPECT_EQ(metrics.episodes, 6);
  EXPECT_GE(metrics.mean_return, 0);
  EXPECT_LE(metrics.ppo.first_ratio_error, 1e-5);
  EXPECT_EQ(metrics.env_steps, trainer.env_steps());
  // A gap of 4 to 9 steps, the cue and the query.
  EXPECT_GE(metrics.env_steps, 6 * 6);
  EXPECT_LE(metrics.env_steps, 6 * 11);
  Trainer chunks(recall(50, 6), options("gru", 3));
  EXPECT_TRUE(std::isnan(chunks.update().mean_return));
}

TEST_F(TrainerTest, ObservationsAreNormalisedOnlyAfterTheyWereLearnedFrom) {
  Trainer trainer(walk(), options("gru", 20));
  for (int update = 0; update < 3; ++update) {
    EXPECT_LE(trainer.update().ppo.first_ratio_error, 1e-5);
  }
  const auto count = trainer.policy().named_buffers()["observation_moments.count"];
  EXPECT_EQ(count.item<double>(), trainer.env_steps());
}

TEST_F(TrainerTest, NoEnvironmentIsAnError) {
  EXPECT_THAT([] { Trainer(nullptr, {}); }, ThrowsMessage<c10::Error>(HasSubstr("env must hold")));
}

}  // namespace
}  // namespace retain
