#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include "agents/fixtures.h"
#include "support/random_tensors.h"

namespace retain {
namespace {

using testing::make_policy;
using testing::randn;
using testing::relative_error;
using testing::small;
using testing::Walk;

/// Value and gradient of a fixed function of the outputs.
std::vector<Tensor> gradients(ActorCritic& policy, const std::vector<Tensor>& outputs,
                              const Tensor& weight) {
  const auto loss = (at::cat(outputs) * weight).sum();
  return torch::autograd::grad({loss}, policy.parameters(), {}, true, false, true);
}

TEST(ActorCritic, PackedEpisodesEqualSeparateOnes) {
  for (const auto& core : core_names()) {
    SCOPED_TRACE(core);
    const auto policy = make_policy(Walk{}.spec(), core);
    policy->to(at::kDouble);
    const std::vector<int64_t> lengths = {5, 1, 7, 3};
    const auto x = randn({16, 2, 3}, 1, at::kDouble);
    const auto action = (randn({16, 2}, 2) > 0).to(at::kLong);
    const auto weight = randn({16, 2}, 3, at::kDouble);
    const auto run = [&](const Tensor& part, const Tensor& taken, const Tensor& reset) {
      auto out = policy->forward(part, policy->initial_state(2), reset);
      return out.value + out.policy->log_prob(taken);
    };

    auto reset = at::zeros({16, 2}, at::kBool);
    std::vector<Tensor> separate;
    int64_t begin = 0;
    for (const auto length : lengths) {
      reset[begin] = true;
      const auto part = x.narrow(0, begin, length);
      separate.push_back(run(part, action.narrow(0, begin, length), {}));
      begin += length;
    }
    const std::vector<Tensor> packed = {run(x, action, reset)};
    EXPECT_LT(relative_error(packed[0], at::cat(separate)), 1e-12);
    const auto expected = gradients(*policy, separate, weight);
    const auto actual = gradients(*policy, packed, weight);
    for (size_t i = 0; i < actual.size(); ++i) {
      ASSERT_EQ(actual[i].defined(), expected[i].defined());
      if (!actual[i].defined()) continue;
      EXPECT_LT((actual[i] - expected[i]).abs().max().item<double>(), 1e-10);
    }
  }
}

TEST(ActorCritic, OneRowBeforeAResetReachesNothingBehindIt) {
  for (const auto& core : core_names()) {
    SCOPED_TRACE(core);
    const auto policy = make_policy(Walk{}.spec(), core);
    auto x = randn({6, 2, 3}, 1);
    auto reset = at::zeros({6, 2}, at::kBool);
    reset[3][0] = true;
    const auto clean = policy->forward(x, policy->initial_state(2), reset);
    x[1][0].fill_(std::numeric_limits<float>::quiet_NaN());
    const auto dirty = policy->forward(x, policy->initial_state(2), reset);
    EXPECT_TRUE(dirty.value.slice(0, 3).equal(clean.value.slice(0, 3)));
    EXPECT_TRUE(dirty.value.select(1, 1).equal(clean.value.select(1, 1)));
    EXPECT_TRUE(dirty.value[1][0].isnan().item<bool>());
  }
}

TEST(ActorCritic, ObservationStatisticsChangeTheInputOnly) {
  auto options = small("gru");
  options.normalize_observation = true;
  at::manual_seed(1);
  ActorCritic policy(Walk{}.spec(), options);
  const auto x = randn({4, 2, 3}, 1);
  const auto reset = at::zeros({4, 2}, at::kBool);
  const auto value = [&](const Tensor& input) {
    return policy.forward(input, policy.initial_state(2), reset).value;
  };
  const auto before = value(x);
  const auto rows = randn({1000, 3}, 2) * 3 + 5;
  policy.observe(rows);
  const auto deviation = rows.std(0, false);
  EXPECT_LT((value(x * deviation + rows.mean(0)) - before).abs().max().item<double>(), 1e-5);
  EXPECT_GT((value(x) - before).abs().max().item<double>(), 1e-2);
}

TEST(ActorCritic, BadObservationNamesTheArgument) {
  const auto policy = make_policy(Walk{}.spec(), "gru");
  EXPECT_THROW(policy->forward(at::zeros({4, 2, 5}), policy->initial_state(2), {}), c10::Error);
  EXPECT_THROW(policy->forward(at::zeros({4, 2, 3}), policy->initial_state(3), {}), c10::Error);
  auto spec = Walk{}.spec();
  spec.observation_size = 0;
  EXPECT_THROW(ActorCritic(spec, small("gru")), c10::Error);
}

}  // namespace
}  // namespace retain
