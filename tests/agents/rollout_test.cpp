#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "agents/fixtures.h"

namespace retain {
namespace {

using testing::Aim;
using testing::distance;
using testing::make_policy;
using testing::Pair;
using testing::recall;
using testing::same;
using testing::Walk;

constexpr int64_t kEnvs = 6;

std::unique_ptr<VectorEnv> walk(int64_t num_envs = kEnvs, int64_t first_environment = 0) {
  return vectorize(Walk{}, num_envs, 3, first_environment);
}

/// Equal in what the worlds show and in the actions; values and log-probabilities up to the GEMM's
/// order of sums.
void expect_same(const Rollout& a, const Rollout& b) {
  EXPECT_TRUE(same(a.observation, b.observation));
  EXPECT_TRUE(same(a.reset, b.reset));
  EXPECT_TRUE(same(a.legal_actions, b.legal_actions));
  EXPECT_TRUE(same(a.action, b.action) || distance(a.action, b.action) < 1e-5);
  EXPECT_TRUE(same(a.reward, b.reward) || distance(a.reward, b.reward) < 1e-5);
  EXPECT_TRUE(same(a.discount, b.discount));
  EXPECT_TRUE(same(a.mask, b.mask));
  EXPECT_TRUE(same(a.decision, b.decision));
  EXPECT_LT(distance(a.log_prob, b.log_prob), 1e-4);
  EXPECT_LT(distance(a.value, b.value), 1e-5);
  EXPECT_LT(distance(a.bootstrap_value, b.bootstrap_value), 1e-5);
  EXPECT_LT(distance(a.episode_return, b.episode_return), 1e-4);
  for (const auto& [name, part] : a.final_state.parts()) {
    EXPECT_LT(distance(part, b.final_state.at(name)), 1e-5) << name;
  }
}

template <class MakeEnv>
void expect_sweep_equals_stepping(const MakeEnv& make_env, int64_t num_steps) {
  for (const auto& core : core_names()) {
    SCOPED_TRACE(core);
    const auto swept_env = make_env(), stepped_env = make_env();
    const auto policy = make_policy(swept_env->spec(), core);
    Actor swept(*swept_env, {.num_steps = num_steps});
    Actor stepped(*stepped_env, {.num_steps = num_steps, .sweep = false});
    for (int update = 0; update < 3; ++update) {
      expect_same(swept.collect(*policy), stepped.collect(*policy));
    }
    EXPECT_TRUE(same(swept_env->current().observation, stepped_env->current().observation));
    EXPECT_TRUE(same(swept_env->reset().observation, stepped_env->reset().observation));
  }
}

TEST(Rollout, SweepEqualsSteppingInChunks) {
  expect_sweep_equals_stepping([] { return recall(9, kEnvs); }, 13);
}

TEST(Rollout, SweepEqualsSteppingOnWholeEpisodes) {
  expect_sweep_equals_stepping([] { return recall(9, kEnvs); }, 0);
}

TEST(Rollout, SweepInSlicesEqualsStepping) {
  expect_sweep_equals_stepping([] { return recall(9, 20000); }, 13);
}

TEST(Rollout, SweepEqualsSteppingWithManyActionsAStep) {
  expect_sweep_equals_stepping([] { return vectorize(Pair{}, kEnvs, 1); }, 7);
  expect_sweep_equals_stepping([] { return vectorize(Aim{}, kEnvs, 1); }, 7);
}

TEST(Rollout, RowHoldsAnObservationItsActionAndWhatThatEarned) {
  const auto env = walk(), twin = walk();
  const auto policy = make_policy(env->spec(), "gru");
  Actor actor(*env, {.num_steps = 30});
  const auto rollout = actor.collect(*policy);
  auto steps = twin->reset();
  for (int64_t t = 0; t < 30; ++t) {
    EXPECT_TRUE(rollout.observation[t].equal(steps.observation));
    EXPECT_TRUE(rollout.reset[t].equal(steps.first()));
    EXPECT_TRUE(rollout.mask[t].equal(steps.last().logical_not()));
    EXPECT_TRUE(rollout.legal_actions[t].equal(steps.legal_actions));
    steps = twin->step(rollout.action[t]);
    EXPECT_TRUE(rollout.reward[t].equal(steps.reward));
    EXPECT_TRUE(rollout.discount[t].equal(steps.discount));
  }
  EXPECT_TRUE(rollout.reset.slice(0, 1).any().item<bool>());
  EXPECT_TRUE((rollout.discount == 0).any().item<bool>());
}

TEST(Rollout, DecisionsAreRowsThatCountAndHaveAChoice) {
  const auto env = recall(9, kEnvs);
  const auto policy = make_policy(env->spec(), "gru");
  const auto rollout = Actor(*env, {}).collect(*policy);
  // One a row of episodes: the query.
  EXPECT_TRUE((rollout.decision.sum(0) == 1).all().item<bool>());
  EXPECT_TRUE(rollout.decision.equal(rollout.mask & (rollout.observation.select(2, 5) == 1)));
  EXPECT_EQ(
      rollout.log_prob.masked_select(rollout.decision.logical_not()).abs().sum().item<double>(), 0);
}

TEST(Rollout, WholeEpisodesBeginTogetherAndAreMaskedAfterTheirLast) {
  const auto env = walk();
  const auto policy = make_policy(env->spec(), "mamba");
  Actor actor(*env, {});
  for (int update = 0; update < 2; ++update) {
    const auto rollout = actor.collect(*policy);
    EXPECT_TRUE(rollout.reset[0].all().item<bool>());
    EXPECT_EQ(rollout.episode_return.numel(), kEnvs);
    EXPECT_NEAR(rollout.episode_return.sum().item<double>(), rollout.reward.sum().item<double>(),
                1e-6);
    const auto length = rollout.mask.sum(0);
    for (int64_t b = 0; b < kEnvs; ++b) {
      // Rows that count form one block from the top, with one FIRST.
      const auto rows = length[b].item<int64_t>();
      EXPECT_TRUE(rollout.mask.select(1, b).slice(0, 0, rows).all().item<bool>());
      EXPECT_EQ(rollout.reset.select(1, b).slice(0, 0, rows).sum().item<int64_t>(), 1);
    }
    EXPECT_EQ(rollout.mask.size(0), length.max().item<int64_t>() + 1);
    EXPECT_LT(length.min().item<int64_t>(), length.max().item<int64_t>());
    EXPECT_FALSE(rollout.reward.masked_select(rollout.mask.logical_not()).any().item<bool>());
  }
}

TEST(Rollout, ChunksCarryTheMemory) {
  for (const auto& core : core_names()) {
    SCOPED_TRACE(core);
    const auto long_env = walk(), short_env = walk();
    const auto policy = make_policy(long_env->spec(), core);
    Actor one(*long_env, {.num_steps = 18}), three(*short_env, {.num_steps = 6});
    const auto whole = one.collect(*policy);
    for (int64_t part = 0; part < 3; ++part) {
      const auto chunk = three.collect(*policy);
      const auto rows = [&](const Tensor& x) { return x.slice(0, 6 * part, 6 * part + 6); };
      EXPECT_TRUE(chunk.action.equal(rows(whole.action)));
      EXPECT_TRUE(chunk.value.equal(rows(whole.value)));
      const auto& next = part < 2 ? whole.value[6 * part + 6] : whole.bootstrap_value;
      EXPECT_TRUE(chunk.bootstrap_value.equal(next));
      EXPECT_TRUE(part < 2 || equal(chunk.final_state, whole.final_state));
    }
  }
}

TEST(Rollout, MemoryStaysWithItsEnvironment) {
  const auto together = walk(4), left = walk(2, 0), right = walk(2, 2);
  const auto policy = make_policy(together->spec(), "mamba");
  const auto collect = [&](VectorEnv& env) {
    return Actor(env, {.num_steps = 12}).collect(*policy);
  };
  const auto all = collect(*together), first = collect(*left), second = collect(*right);
  EXPECT_TRUE(all.action.equal(at::cat({first.action, second.action}, 1)));
  EXPECT_LT(distance(all.value, at::cat({first.value, second.value}, 1)), 1e-5);
  EXPECT_GT(distance(first.value, second.value), 1e-3);
}

TEST(Rollout, MemoryIsClearedAtTheFirstObservationOfAnEpisode) {
  const auto env = walk();
  const auto policy = make_policy(env->spec(), "mamba");
  const auto rollout = Actor(*env, {.num_steps = 20}).collect(*policy);
  const auto fresh = policy->initial_state(kEnvs);
  int64_t resets = 0;
  for (int64_t t = 1; t < 20; ++t) {
    const auto value = policy->forward(rollout.observation.slice(0, t, t + 1), fresh, {}).value[0];
    const auto equal_value = (value - rollout.value[t]).abs() < 1e-6;
    EXPECT_TRUE(equal_value.equal(rollout.reset[t])) << "row " << t;
    resets += rollout.reset[t].sum().item<int64_t>();
  }
  EXPECT_GT(resets, 0);
}

TEST(Rollout, ReturnsOfEpisodesRunOnAcrossChunks) {
  const auto env = walk(), twin = walk();
  const auto policy = make_policy(env->spec(), "gru");
  Actor chunks(*env, {.num_steps = 5}), whole(*twin, {.num_steps = 40});
  std::vector<Tensor> parts;
  for (int part = 0; part < 8; ++part) parts.push_back(chunks.collect(*policy).episode_return);
  EXPECT_TRUE(at::cat(parts).equal(whole.collect(*policy).episode_return));
}

TEST(Rollout, GreedyTakesTheMode) {
  const auto env = recall(5, kEnvs);
  const auto policy = make_policy(env->spec(), "gru");
  const auto rollout = Actor(*env, {.greedy = true}).collect(*policy);
  const auto out = policy->forward(rollout.observation, rollout.initial_state, rollout.reset,
                                   rollout.legal_actions);
  EXPECT_TRUE(rollout.action.equal(out.policy->mode()));
}

TEST(Rollout, CarriesNoGradient) {
  const auto env = walk();
  const auto policy = make_policy(env->spec(), "gru");
  const auto rollout = Actor(*env, {.num_steps = 3}).collect(*policy);
  EXPECT_FALSE(rollout.value.requires_grad() || rollout.log_prob.requires_grad() ||
               rollout.final_state.at("layers.0.hidden").requires_grad());
}

/// Never ends, and says so.
struct Endless : Walk {
  EnvironmentSpec spec() const {
    auto spec = Walk::spec();
    spec.max_episode_steps = 0;
    return spec;
  }
};

/// Says that it is shorter than it is.
struct Liar : Walk {
  EnvironmentSpec spec() const {
    auto spec = Walk::spec();
    spec.max_episode_steps = 2;
    return spec;
  }
};

/// Breaks once.
struct Faulty : Walk {
  static inline int64_t steps_to_go = 0;
  Outcome step(Action action, Rng& rng, float* observation) {
    if (--steps_to_go == 0) throw std::runtime_error("broken");
    return Walk::step(action, rng, observation);
  }
};

TEST(Rollout, AfterAWorldBrokeNewEpisodesBegin) {
  const auto env = vectorize(Faulty{}, 1, 1);
  const auto policy = make_policy(env->spec(), "gru");
  Actor actor(*env, {.num_steps = 3});
  Faulty::steps_to_go = 5;  // in the middle of the second rollout
  actor.collect(*policy);
  EXPECT_THROW(actor.collect(*policy), std::runtime_error);
  const auto rollout = actor.collect(*policy);
  EXPECT_TRUE(rollout.reset[0].all().item<bool>());
  EXPECT_FALSE(actor.collect(*policy).reset[0].all().item<bool>());
}

TEST(Rollout, WholeEpisodesNeedABoundOnTheirLength) {
  const auto endless = vectorize(Endless{}, 2, 1), liar = vectorize(Liar{}, 2, 1);
  EXPECT_THAT([&] { Actor(*endless, {}); },
              ::testing::ThrowsMessage<c10::Error>(::testing::HasSubstr("choose num_steps > 0")));
  EXPECT_THAT([&] { Actor(*endless, {.num_steps = -1}); },
              ::testing::ThrowsMessage<c10::Error>(
                  ::testing::HasSubstr("num_steps must not be negative, got -1")));
  const auto policy = make_policy(liar->spec(), "gru");
  EXPECT_THAT([&] { Actor(*liar, {}).collect(*policy); },
              ::testing::ThrowsMessage<c10::Error>(
                  ::testing::HasSubstr("longer than its max_episode_steps = 2")));
}

}  // namespace
}  // namespace retain
