#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include "envs/play.h"
#include "envs/worlds.h"

// What every world and both drivers promise.

namespace retain {
namespace {

using namespace retain::testing;

constexpr uint8_t kFirst = static_cast<uint8_t>(StepType::first);
constexpr uint8_t kLast = static_cast<uint8_t>(StepType::last);

class Conformance : public ::testing::TestWithParam<Case> {
 protected:
  void SetUp() override { at::set_num_threads(1); }
  std::unique_ptr<VectorEnv> make(int64_t num_envs, uint64_t seed = 3, int64_t first = 0) const {
    return GetParam().make(num_envs, seed, first);
  }
  /// Long enough to see at least one whole episode and the beginning of the next.
  int64_t num_steps(const VectorEnv& env) const {
    const int64_t bound = env.spec().max_episode_steps;
    return bound > 0 ? std::min<int64_t>(bound + 5, 400) : 60;
  }
};

class Bounded : public Conformance {};
class Masked : public Conformance {};
class Passive : public Conformance {};
class Scripted : public Conformance {};

TEST_P(Conformance, StepTypesComeInOrder) {
  auto env = make(5);
  const Play p = play(*env, num_steps(*env));
  EXPECT_TRUE((p.steps[0].step_type == kFirst).all().item<bool>());
  int64_t ends = 0;
  for (size_t t = 1; t < p.steps.size(); ++t) {
    EXPECT_TRUE(same(p.steps[t].first(), p.steps[t - 1].last())) << "row " << t;
    ends += p.steps[t].last().sum().item<int64_t>();
  }
  EXPECT_GT(ends, 0);
}

TEST_P(Conformance, SizesAndTypesAreAsTheSpecSays) {
  auto env = make(5);
  const Play p = play(*env, 3);
  const TimeSteps& steps = p.steps.back();
  EXPECT_EQ(steps.observation.sizes(), (std::vector<int64_t>{5, env->spec().observation_size}));
  EXPECT_EQ(steps.observation.scalar_type(), at::kFloat);
  EXPECT_EQ(steps.reward.sizes(), std::vector<int64_t>{5});
  EXPECT_EQ(steps.reward.scalar_type(), at::kFloat);
  EXPECT_EQ(steps.discount.sizes(), std::vector<int64_t>{5});
  EXPECT_EQ(steps.discount.scalar_type(), at::kFloat);
  EXPECT_EQ(steps.step_type.sizes(), std::vector<int64_t>{5});
  EXPECT_EQ(steps.step_type.scalar_type(), at::kByte);
  ASSERT_EQ(steps.legal_actions.defined(), env->spec().action.masked);
  if (!steps.legal_actions.defined()) return;
  EXPECT_EQ(steps.legal_actions.sizes(),
            (std::vector<int64_t>{5, env->spec().action.num_values[0]}));
  EXPECT_EQ(steps.legal_actions.scalar_type(), at::kBool);
}

TEST_P(Conformance, FirstHasNoRewardAndDiscountOne) {
  auto env = make(5);
  for (const TimeSteps& steps : play(*env, num_steps(*env)).steps) {
    EXPECT_TRUE((steps.reward.masked_select(steps.first()) == 0).all().item<bool>());
    EXPECT_TRUE((steps.discount.masked_select(steps.first()) == 1).all().item<bool>());
    const Tensor inside = steps.last().logical_not();
    EXPECT_TRUE((steps.discount.masked_select(inside) == 1).all().item<bool>());
    EXPECT_TRUE(steps.discount.ge(0).logical_and(steps.discount.le(1)).all().item<bool>());
    EXPECT_TRUE(steps.observation.isfinite().all().item<bool>());
    EXPECT_TRUE(steps.reward.isfinite().all().item<bool>());
  }
}

TEST_P(Bounded, EpisodesEndWithinTheirBound) {
  auto env = make(5);
  const int64_t bound = env->spec().max_episode_steps;
  Tensor length = at::zeros({5}, at::kLong);
  Tensor longest = length.clone();
  for (const TimeSteps& steps : play(*env, num_steps(*env)).steps) {
    length = at::where(steps.first(), at::zeros_like(length), length + 1);
    longest = at::maximum(longest, length);
    EXPECT_LE(length.max().item<int64_t>(), bound);
  }
  const bool drawn = env->spec().options.find("log_uniform") != std::string::npos;
  if (!drawn) {
    EXPECT_EQ(longest.min().item<int64_t>(), bound);
  }
}

TEST_P(Masked, SomeActionIsAlwaysLegalAndNoneIsChosenAtTheEnd) {
  auto env = make(5);
  for (const TimeSteps& steps : play(*env, num_steps(*env)).steps) {
    EXPECT_TRUE(steps.legal_actions.any(-1).all().item<bool>());
    if (env->spec().passive) {
      EXPECT_TRUE(steps.legal_actions.select(-1, 0).all().item<bool>());
    }
    const Tensor count = steps.legal_actions.sum(-1);
    EXPECT_TRUE((count.masked_select(steps.last()) == 1).all().item<bool>());
  }
}

TEST_P(Conformance, TheSameSeedGivesTheSameSteps) {
  auto one = make(5), two = make(5);
  const Play a = play(*one, 40), b = play(*two, 40);
  for (size_t t = 0; t < a.steps.size(); ++t) EXPECT_TRUE(same(a.steps[t], b.steps[t]));
}

TEST_P(Conformance, SeedsAndEnvironmentsDiffer) {
  const auto observations = [](VectorEnv& env, int64_t rows) {  // [B, T, F], of four episodes
    std::vector<Tensor> all;
    for (int64_t episode = 0; episode < 4; ++episode) {
      for (const TimeSteps& steps : play(env, rows).steps) all.push_back(steps.observation);
    }
    return at::stack(all, 1);
  };
  auto one = make(16, 3), two = make(16, 4);
  const Tensor a = observations(*one, num_steps(*one)), b = observations(*two, num_steps(*two));
  EXPECT_FALSE(a.equal(b));
  EXPECT_FALSE((a == a[0]).all().item<bool>());
}

TEST_P(Conformance, ASweepEqualsItsSteps) {
  auto env = make(5), twin = make(5);
  const Play p = play(*env, num_steps(*env));
  twin->reset();
  const int64_t cut = p.actions.size(0) / 3;
  const TimeSteps head = twin->sweep(p.actions.slice(0, 0, cut));
  const TimeSteps tail = twin->sweep(p.actions.slice(0, cut));
  for (int64_t t = 0; t < p.actions.size(0); ++t) {
    const TimeSteps row = t < cut ? slice(head, [&](const Tensor& x) { return x[t]; })
                                  : slice(tail, [&](const Tensor& x) { return x[t - cut]; });
    EXPECT_TRUE(same(row, p.steps[t + 1])) << "row " << t;
  }
  EXPECT_TRUE(same(twin->current(), env->current()));
}

TEST_P(Conformance, ThreadsDoNotMatter) {
  auto one = make(70), two = make(70);
  const Play a = play(*one, 40);
  const TimeSteps sweep_a = one->sweep(at::zeros_like(a.actions));
  at::set_num_threads(2);
  const Play b = play(*two, 40);
  const TimeSteps sweep_b = two->sweep(at::zeros_like(a.actions));
  for (size_t t = 0; t < a.steps.size(); ++t) EXPECT_TRUE(same(a.steps[t], b.steps[t]));
  EXPECT_TRUE(same(sweep_a, sweep_b));
}

TEST_P(Conformance, PartsEqualTheWhole) {
  auto whole = make(64), part = make(32, 3, 32);
  EXPECT_EQ(part->first_environment(), 32);
  const Play a = play(*whole, 40), b = play(*part, 40);
  for (size_t t = 0; t < a.steps.size(); ++t) {
    const TimeSteps half = slice(a.steps[t], [](const Tensor& x) { return x.slice(0, 32, 64); });
    EXPECT_TRUE(same(half, b.steps[t])) << "row " << t;
  }
}

TEST_P(Conformance, SavedMidEpisodeItGoesOnTheSame) {
  auto env = make(5), other = make(5, 99);
  const int64_t bound = env->spec().max_episode_steps;
  play(*env, bound > 0 ? std::clamp<int64_t>(bound / 2, 1, 60) : 3);
  const std::vector<uint8_t> bytes = env->save();
  other->load(bytes);
  EXPECT_EQ(other->save(), bytes);
  EXPECT_TRUE(same(other->current(), env->current()));
  for (int64_t t = 0; t < num_steps(*env); ++t) {
    const Tensor actions = random_actions(*env, 11, t);
    ASSERT_TRUE(same(env->step(actions), other->step(actions))) << "row " << t;
  }
}

TEST_P(Passive, InAPassiveWorldActionsDoNotShow) {
  auto one = make(8), two = make(8);
  const int64_t rows = num_steps(*one);
  const Play a = play(*one, rows, 1), b = play(*two, rows, 2);
  EXPECT_FALSE(a.actions.equal(b.actions));
  for (size_t t = 0; t < a.steps.size(); ++t) {
    EXPECT_TRUE(same(a.steps[t].observation, b.steps[t].observation));
    EXPECT_TRUE(same(a.steps[t].step_type, b.steps[t].step_type));
    EXPECT_TRUE(same(a.steps[t].discount, b.steps[t].discount));
    EXPECT_TRUE(same(a.steps[t].legal_actions, b.steps[t].legal_actions));
  }
}

TEST_P(Conformance, TheActionAfterLastIsIgnored) {
  auto one = make(8), two = make(8);
  one->reset(), two->reset();
  for (int64_t t = 0; t < num_steps(*one); ++t) {
    const Tensor actions = random_actions(*one, 5, t);
    const Tensor last = one->current().last().view({-1, 1}).expand_as(actions.view({8, -1}));
    const Tensor other =
        at::where(last, 1 - actions.view({8, -1}).clamp_max(1), actions.view({8, -1}))
            .view_as(actions);
    ASSERT_TRUE(same(one->step(actions), two->step(other.contiguous()))) << "row " << t;
  }
}

TEST_P(Conformance, ResultsAreTheCallers) {
  auto env = make(5);
  const TimeSteps given = env->reset();
  const TimeSteps kept = slice(given, [](const Tensor& x) { return x.clone(); });
  env->current().observation.fill_(17);  // writing into a result changes nothing
  EXPECT_TRUE(same(env->current(), kept));
  const TimeSteps next = env->step(random_actions(*env, 1, 0));
  EXPECT_TRUE(same(given, kept));
  EXPECT_TRUE(same(env->current(), next));
}

TEST_P(Conformance, ResetBeginsANewEpisodeInEveryEnvironment) {
  auto env = make(5);
  play(*env, 3);
  const TimeSteps begun = env->reset();
  EXPECT_TRUE(begun.first().all().item<bool>());
  EXPECT_TRUE((begun.reward == 0).all().item<bool>());
}

TEST_P(Scripted, TheOracleEarnsTheBestReturn) {
  auto env = make(1500);
  const EnvironmentSpec& spec = env->spec();
  env->reset();
  const Tensor returns = first_returns(*env, [&](int64_t) { return env->oracle(); });
  const double error = returns.std().item<double>() / std::sqrt(1500.0);
  EXPECT_NEAR(returns.mean().item<double>(), spec.best_return, 4 * error + 1e-5);
  EXPECT_LE(returns.max().item<double>(), 1 + 1e-5);
}

TEST_P(Bounded, RandomPlayEarnsTheChanceReturn) {
  auto env = make(1500);
  const EnvironmentSpec& spec = env->spec();
  const Tensor returns = first_returns(*env, [&](int64_t t) { return random_actions(*env, 5, t); });
  const double error = returns.std().item<double>() / std::sqrt(1500.0);
  EXPECT_NEAR(returns.mean().item<double>(), spec.chance_return, 4 * error + 1e-5);
}

/// The cases of which something is true.
auto cases_that(const std::function<bool(const VectorEnv&)>& keep) {
  std::vector<Case> kept;
  for (const Case& c : cases()) {
    const auto env = c.make(1, 1, 0);
    env->reset();
    if (keep(*env)) kept.push_back(c);
  }
  return ::testing::ValuesIn(kept);
}

std::string case_name(const ::testing::TestParamInfo<Case>& info) {
  std::string name = info.param.name;
  for (char& c : name) c = std::isalnum(static_cast<unsigned char>(c)) ? c : '_';
  return name;
}

const auto kAny = [](const VectorEnv&) { return true; };
const auto kBounded = [](const VectorEnv& env) { return env.spec().max_episode_steps > 0; };
const auto kMasked = [](const VectorEnv& env) { return env.spec().action.masked; };
const auto kPassive = [](const VectorEnv& env) { return env.spec().passive; };
const auto kScripted = [](const VectorEnv& env) { return env.oracle().defined(); };

INSTANTIATE_TEST_SUITE_P(Worlds, Conformance, cases_that(kAny), case_name);
INSTANTIATE_TEST_SUITE_P(Worlds, Bounded, cases_that(kBounded), case_name);
INSTANTIATE_TEST_SUITE_P(Worlds, Masked, cases_that(kMasked), case_name);
INSTANTIATE_TEST_SUITE_P(Worlds, Passive, cases_that(kPassive), case_name);
INSTANTIATE_TEST_SUITE_P(Worlds, Scripted, cases_that(kScripted), case_name);

}  // namespace
}  // namespace retain
