#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <retain/agents/returns.h>

#include <limits>

namespace retain {
namespace {

Tensor column(std::vector<double> values) { return at::tensor(values, at::kDouble).unsqueeze(1); }
Tensor flags(std::vector<double> values) { return column(values).to(at::kBool); }

void expect_column(const Tensor& actual, const std::vector<double>& expected) {
  ASSERT_EQ(actual.size(0), static_cast<int64_t>(expected.size()));
  for (int64_t t = 0; t < actual.size(0); ++t) {
    EXPECT_NEAR(actual[t][0].item<double>(), expected[t], 1e-12) << "row " << t;
  }
}

// γ = .5, λ = .5 throughout, so that every figure below is exact in decimal.
Advantages half(const Tensor& reward, const Tensor& discount, const Tensor& value,
                const Tensor& bootstrap, const Tensor& mask) {
  return gae(reward, discount, value, bootstrap, mask, 0.5, 0.5);
}

TEST(Gae, OpenChunkBootstrapsFromTheNextValue) {
  // δ = [1 + .5·4 − 2, 2 + .5·8 − 4] = [1, 2]; A_1 = 2, A_0 = 1 + .25·2.
  const auto out = half(column({1, 2}), column({1, 1}), column({2, 4}),
                        at::tensor({8.0}, at::kDouble), flags({1, 1}));
  expect_column(out.advantage, {1.5, 2});
  expect_column(out.returns, {3.5, 6});
}

TEST(Gae, TerminationCutsTheValueBehindIt) {
  // Row 1 earns 2 and ends the episode; row 2 is its LAST; row 3 opens the next episode.
  const auto out = half(column({1, 2, 0, 3}), column({1, 0, 1, 1}), column({2, 4, 100, 6}),
                        at::tensor({8.0}, at::kDouble), flags({1, 1, 0, 1}));
  // δ_1 = 2 − 4; A_0 = 1 + .5·4 − 2 + .25·(−2); A_3 = 3 + .5·8 − 6.
  expect_column(out.advantage, {0.5, -2, 0, 1});
  expect_column(out.returns, {2.5, 2, 100, 7});
}

TEST(Gae, TruncationBootstrapsFromTheStateBeforeTheReset) {
  const auto advantage = [](double last_value, double first_value) {
    return half(column({1, 2, 0, 3}), column({1, 1, 1, 1}), column({2, 4, last_value, first_value}),
                at::tensor({8.0}, at::kDouble), flags({1, 1, 0, 1}))
        .advantage;
  };
  // δ_1 = 2 + .5·16 − 4 = 6; A_0 = 1 + .25·6.
  expect_column(advantage(16, 6), {2.5, 6, 0, 1});
  EXPECT_TRUE(advantage(16, 6).slice(0, 0, 3).equal(advantage(16, 60).slice(0, 0, 3)));
  expect_column(advantage(20, 6), {3, 8, 0, 1});
}

TEST(Gae, NothingFlowsOutOfPadding) {
  const auto nan = std::numeric_limits<double>::quiet_NaN();
  const auto out = half(column({1, 2, nan, nan}), column({1, 0, nan, nan}), column({2, 4, 16, nan}),
                        at::tensor({nan}, at::kDouble), flags({1, 1, 0, 0}));
  expect_column(out.advantage, {0.5, -2, 0, 0});
}

TEST(Gae, WhatIsNotFiniteDoesNotPassAnEnd) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const auto column = [](std::vector<float> x) { return at::tensor(x).unsqueeze(1); };
  // Row 2 does not count; the next episode's reward is infinite.
  const auto mask = column({1, 1, 0, 1}).to(at::kBool);
  const auto gaps = gae(column({1, 2, 0, kInfinity}), at::ones({4, 1}), at::zeros({4, 1}),
                        at::zeros({1}), mask, 0.5, 0.5);
  EXPECT_EQ(gaps.advantage[0].item<float>(), 1.5);
  EXPECT_EQ(gaps.advantage[2].item<float>(), 0);
  // Behind a termination a value says nothing.
  const auto ended = gae(column({1, 2}), column({1, 0}), column({0, 0}), at::full({1}, NAN),
                         at::ones({2, 1}, at::kBool), 0.5, 0.5);
  EXPECT_EQ(ended.advantage[1].item<float>(), 2);
}

TEST(Gae, LambdaOneIsTheReturnMinusTheValue) {
  const auto out = gae(column({1, 2, 4}), column({1, 1, 0}), column({3, 5, 7}),
                       at::tensor({9.0}, at::kDouble), flags({1, 1, 1}), 1, 1);
  expect_column(out.returns, {7, 6, 4});
}

TEST(Gae, EnvironmentsDoNotMix) {
  const auto a = half(column({1, 2}), column({1, 0}), column({2, 4}),
                      at::tensor({8.0}, at::kDouble), flags({1, 1}));
  const auto beside = [](std::vector<double> x, std::vector<double> y) {
    return at::cat({column(x), column(y)}, 1);
  };
  const auto both = half(beside({1, 2}, {7, 8}), beside({1, 0}, {1, 1}), beside({2, 4}, {9, 3}),
                         at::tensor({8.0, 5.0}, at::kDouble), flags({1, 1}).expand({2, 2}));
  EXPECT_TRUE(both.advantage.select(1, 0).equal(a.advantage.select(1, 0)));
}

TEST(Gae, NoRowsGiveNoAdvantages) {
  const auto none = at::zeros({0, 3});
  const auto out = gae(none, none, none, at::zeros({3}), none.to(at::kBool), 1, 1);
  EXPECT_EQ(out.advantage.sizes(), at::IntArrayRef({0, 3}));
}

TEST(Gae, WrongShapeNamesTheArgument) {
  const auto x = at::zeros({4, 2});
  const auto mask = at::ones({4, 2}, at::kBool);
  const auto message = [&](auto&&... arguments) -> std::string {
    try {
      gae(arguments..., 1, 1);
    } catch (const c10::Error& error) {
      return error.what_without_backtrace();
    }
    return "";
  };
  EXPECT_EQ(message(x[0], x, x, at::zeros({2}), mask), "gae: reward must be [4, 2], got [2]");
  EXPECT_EQ(message(x, x, x, at::zeros({3}), mask), "gae: bootstrap_value must be [2], got [3]");
  EXPECT_EQ(message(x, x, x, at::zeros({2}), x), "gae: mask must be bool, got float32");
}

}  // namespace
}  // namespace retain
