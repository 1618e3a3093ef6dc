#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <retain/lib/nets/distributions.h>
#include <retain/lib/nets/encoder.h>
#include <retain/lib/nets/heads.h>

#include <cmath>
#include <numbers>

#include "support/errors.h"
#include "support/gradcheck.h"
#include "support/random_tensors.h"

namespace retain {
namespace {

using testing::expect_error;
using testing::expect_gradcheck;
using testing::randn;
using testing::relative_error;

Tensor uniforms(at::IntArrayRef sizes, uint64_t seed) {
  return at::rand(sizes, at::detail::createCPUGenerator(seed),
                  at::TensorOptions().dtype(at::kDouble))
      .clamp(1e-12, 1 - 1e-12);
}

// Two thousand evenly spread numbers: what they select has a frequency of its probability within
// 1/2000.
constexpr int64_t kGrid = 2000;
Tensor grid() { return (at::arange(kGrid, at::kDouble) + 0.5) / kGrid; }

Tensor legal_rows() {
  return at::tensor({1, 0, 1, 1, 0, 0, 1, 0, 1, 1, 1, 1}).view({3, 4}).to(at::kBool);
}

TEST(Categorical, LogProbAndEntropyAreSoftmaxs) {
  const auto policy =
      make_categorical(at::tensor({0.0, std::log(2.0), std::log(5.0)}).view({1, 3}));
  const double p[] = {1 / 8.0, 2 / 8.0, 5 / 8.0};
  double entropy = 0;
  for (int64_t a = 0; a < 3; ++a) {
    EXPECT_NEAR(policy->log_prob(at::tensor({a})).item<double>(), std::log(p[a]), 1e-6);
    entropy -= p[a] * std::log(p[a]);
  }
  EXPECT_NEAR(policy->entropy().item<double>(), entropy, 1e-6);
  EXPECT_EQ(policy->mode().item<int64_t>(), 2);
}

TEST(Categorical, FrequenciesAreTheProbabilities) {
  const auto logits = randn({5}, 1, at::kDouble);
  const auto action = make_categorical(logits.expand({kGrid, 5}))->sample(grid().unsqueeze(-1));
  const auto frequency = at::bincount(action, {}, 5).to(at::kDouble) / kGrid;
  EXPECT_LE((frequency - logits.softmax(-1)).abs().max().item<double>(), 1.5 / kGrid);
}

TEST(Categorical, IllegalActionsHaveNoPart) {
  const auto legal = legal_rows();
  const auto logits = randn({3, 4}, 2, at::kDouble);
  const auto policy = make_categorical(logits, legal);
  // The same numbers over the legal actions of row 0 alone.
  const auto alone = make_categorical(logits[0].index_select(0, at::tensor({0, 2, 3}, at::kLong)));
  EXPECT_NEAR(policy->entropy()[0].item<double>(), alone->entropy().item<double>(), 1e-12);
  EXPECT_NEAR(policy->log_prob(at::tensor({2, 2, 0}, at::kLong))[0].item<double>(),
              alone->log_prob(at::scalar_tensor(1, at::kLong)).item<double>(), 1e-12);
  EXPECT_EQ(policy->log_prob(at::tensor({1, 2, 0}, at::kLong))[0].item<double>(), -INFINITY);
}

TEST(Categorical, OneLegalActionGivesExactZeros) {
  const auto legal = at::tensor({0, 0, 1, 0}).to(at::kBool).expand({64, 4});
  for (const auto dtype : {at::kFloat, at::kDouble}) {
    auto logits = (10 * randn({64, 4}, 3, dtype)).requires_grad_();
    const auto policy = make_categorical(logits, legal);
    const auto log_prob = policy->log_prob(at::full({64}, 2, at::kLong)),
               entropy = policy->entropy();
    EXPECT_EQ(log_prob.abs().max().item<double>(), 0);
    EXPECT_EQ(entropy.abs().max().item<double>(), 0);
    (log_prob + entropy).sum().backward();
    EXPECT_EQ(logits.grad().abs().max().item<double>(), 0);
  }
}

TEST(Categorical, IllegalLogitsAreInertWhateverTheyAre) {
  auto logits = randn({3, 4}, 2);
  const auto clean = make_categorical(logits, legal_rows());
  auto poisoned_logits = logits.masked_fill(legal_rows().logical_not(), NAN).requires_grad_();
  const auto poisoned = make_categorical(poisoned_logits, legal_rows());
  const auto action = at::tensor({0, 2, 3}, at::kLong), uniform = uniforms({3, 1}, 1);
  EXPECT_TRUE(at::equal(poisoned->log_prob(action), clean->log_prob(action)));
  EXPECT_TRUE(at::equal(poisoned->entropy(), clean->entropy()));
  EXPECT_TRUE(at::equal(poisoned->mode(), clean->mode()));
  EXPECT_TRUE(at::equal(poisoned->sample(uniform), clean->sample(uniform)));
  (poisoned->log_prob(action) + poisoned->entropy()).sum().backward();
  EXPECT_TRUE(poisoned_logits.grad().isfinite().all().item<bool>());
}

TEST(Categorical, SamplesAndModesAreLegalAtTheEdgesToo) {
  const auto logits = at::tensor({50.0, -50.0, 0.0, 50.0}).expand({3, 4});
  const auto legal = legal_rows();
  const auto policy = make_categorical(logits, legal);
  const auto is_legal = [&](const Tensor& action) {
    return legal.gather(-1, action.unsqueeze(-1)).all().item<bool>();
  };
  EXPECT_TRUE(is_legal(policy->mode()));
  for (const double u : {1e-300, 1e-12, 0.3, 0.5, 0.999999, 1 - 1e-16, std::nextafter(1.0, 0.0)}) {
    EXPECT_TRUE(is_legal(policy->sample(at::full({3, 1}, u, at::kDouble)))) << u;
  }
  for (const float u : {std::nextafter(0.0f, 1.0f), std::nextafter(1.0f, 0.0f)}) {
    EXPECT_TRUE(is_legal(policy->sample(at::full({3, 1}, u, at::kFloat)))) << u;
  }
}

TEST(Categorical, GradientsAgreeWithDifferences) {
  const auto action = at::tensor({0, 2, 3}, at::kLong);
  expect_gradcheck(
      [&](const std::vector<Tensor>& inputs) {
        const auto policy = make_categorical(inputs[0], legal_rows());
        return std::vector<Tensor>{policy->log_prob(action), policy->entropy()};
      },
      {randn({3, 4}, 4, at::kDouble)});
}

TEST(Categorical, HalfLogitsAreWidened) {
  const auto logits = randn({3, 4}, 2).to(at::kHalf);
  const auto policy = make_categorical(logits);
  EXPECT_EQ(policy->entropy().scalar_type(), at::kFloat);
  EXPECT_TRUE(at::equal(policy->entropy(), make_categorical(logits.to(at::kFloat))->entropy()));
}

TEST(Categorical, WrongArgumentsThrowAndAreNamed) {
  const auto logits = randn({3, 4}, 2);
  const auto policy = make_categorical(logits);
  expect_error(
      [&] {
        make_categorical(logits, at::ones({3, 5}, at::kBool));
      },
      {"legal must be [3, 4]", "got [3, 5]"});
  expect_error(
      [&] {
        make_categorical(logits, at::ones({3, 4}));
      },
      {"legal must be bool, got float32"});
  expect_error(
      [&] {
        make_categorical(logits, at::zeros({3, 4}, at::kBool));
      },
      {"legal must allow at least one action"});
  expect_error([&] { policy->log_prob(at::zeros({4}, at::kLong)); },
               {"action must be [3], got [4]"});
  expect_error([&] { policy->log_prob(at::zeros({3})); }, {"action must be int64, got float32"});
  expect_error([&] { policy->sample(at::zeros({3})); }, {"uniform must be [3, 1], got [3]"});
}

TEST(Categorical, AcceptsNoRows) {
  const auto policy = make_categorical(at::zeros({5, 0, 3}), at::ones({5, 0, 3}, at::kBool));
  EXPECT_EQ(policy->sample(at::zeros({5, 0, 1})).sizes(), (std::vector<int64_t>{5, 0}));
  EXPECT_EQ(policy->entropy().sizes(), (std::vector<int64_t>{5, 0}));
}

TEST(MultiDiscrete, IsItsComponentsTogether) {
  const auto logits = randn({2, 3, 5}, 1);
  const auto policy = make_multi_discrete(logits, {2, 3});
  const auto a = make_categorical(logits.slice(-1, 0, 2)),
             b = make_categorical(logits.slice(-1, 2));
  const auto uniform = uniforms({2, 3, 2}, 1);
  const auto action = policy->sample(uniform);
  EXPECT_EQ(policy->uniforms(), 2);
  EXPECT_TRUE(at::equal(
      action,
      at::stack({a->sample(uniform.slice(-1, 0, 1)), b->sample(uniform.slice(-1, 1))}, -1)));
  EXPECT_TRUE(at::equal(policy->mode(), at::stack({a->mode(), b->mode()}, -1)));
  EXPECT_LE(relative_error(policy->log_prob(action),
                           a->log_prob(action.select(-1, 0)) + b->log_prob(action.select(-1, 1))),
            1e-6);
  EXPECT_LE(relative_error(policy->entropy(), a->entropy() + b->entropy()), 1e-6);
  expect_error(
      [&] {
        make_multi_discrete(logits, {2, 2});
      },
      {"[..., sum(num_values)] = [..., 4], got [2, 3, 5]"});
  expect_error([&] { make_multi_discrete(logits, {}); }, {"num_values is empty"});
  expect_error(
      [&] {
        make_multi_discrete(logits, {6, -1});
      },
      {"make_multi_discrete: num_values must be at least 1, got -1"});
}

TEST(Gaussian, LogProbAndEntropyAreTheFormulas) {
  const auto mean = at::tensor({1.0, -2.0}).view({1, 2}), log_std = at::tensor({0.5, -1.0});
  const auto policy = make_gaussian(mean, log_std);
  const double action[] = {0.25, -1.5};
  double log_prob = 0, entropy = 0;
  for (int i = 0; i < 2; ++i) {
    const double s = std::exp(log_std[i].item<double>()),
                 d = (action[i] - mean[0][i].item<double>()) / s;
    log_prob += std::log(std::exp(-d * d / 2) / (s * std::sqrt(2 * std::numbers::pi)));
    entropy += 0.5 * std::log(2 * std::numbers::pi * std::numbers::e * s * s);
  }
  EXPECT_NEAR(policy->log_prob(at::tensor({0.25, -1.5}).view({1, 2})).item<double>(), log_prob,
              1e-6);
  EXPECT_NEAR(policy->entropy().item<double>(), entropy, 1e-6);
  EXPECT_TRUE(at::equal(policy->mode(), mean));
}

TEST(Gaussian, SamplesHaveItsMomentsAndNoCorrelation) {
  constexpr int64_t kN = 20000;
  const auto mean = at::tensor({1.0, -2.0}), log_std = at::tensor({0.5, -1.0});
  const auto sample =
      make_gaussian(mean.expand({kN, 2}), log_std)->sample(uniforms({kN, 4}, 1)).to(at::kDouble);
  const auto z = (sample - mean) / log_std.exp();
  EXPECT_LE(z.mean(0).abs().max().item<double>(), 0.03);
  EXPECT_LE((z.square().mean(0) - 1).abs().max().item<double>(), 0.05);
  EXPECT_LE((z.pow(4).mean(0) - 3).abs().max().item<double>(), 0.3);
  EXPECT_LE((z.select(1, 0) * z.select(1, 1)).mean().abs().item<double>(), 0.03);
}

TEST(Gaussian, GradientsAgreeWithDifferences) {
  const auto action = randn({3, 2}, 9, at::kDouble);
  expect_gradcheck(
      [&](const std::vector<Tensor>& inputs) {
        const auto policy = make_gaussian(inputs[0], inputs[1]);
        return std::vector<Tensor>{policy->log_prob(action), policy->entropy()};
      },
      {randn({3, 2}, 4, at::kDouble), randn({2}, 5, at::kDouble)});
}

TEST(Gaussian, WrongArgumentsThrowAndAreNamed) {
  expect_error(
      [] {
        make_gaussian(at::zeros({3, 2}), at::zeros({3}));
      },
      {"log_std must be [A] = [2], got [3]"});
  const auto policy = make_gaussian(at::zeros({3, 2}), at::zeros({2}));
  expect_error([&] { policy->log_prob(at::zeros({3})); }, {"action must be [3, 2], got [3]"});
  expect_error([&] { policy->sample(at::zeros({3, 2})); }, {"uniform must be [3, 4], got [3, 2]"});
}

TEST(Samples, DoNotDependOnTheBatch) {
  const auto logits = randn({4, 6, 5}, 1), uniform = uniforms({4, 6, 1}, 1);
  const auto whole = make_categorical(logits)->sample(uniform);
  EXPECT_TRUE(at::equal(whole.slice(1, 2, 3),
                        make_categorical(logits.slice(1, 2, 3))->sample(uniform.slice(1, 2, 3))));
  const auto mean = randn({4, 6, 2}, 2), log_std = randn({2}, 3), pairs = uniforms({4, 6, 4}, 2);
  const auto normal = make_gaussian(mean, log_std)->sample(pairs);
  EXPECT_TRUE(at::equal(normal[1], make_gaussian(mean[1], log_std)->sample(pairs[1])));
}

// An orthogonal matrix of gain g has W Wᵀ (or Wᵀ W, the smaller) = g² I.
void expect_orthogonal(const torch::nn::Module& module, double gain) {
  const auto weight = module.named_parameters()["linear.weight"].detach().to(at::kDouble);
  const auto product =
      weight.size(0) <= weight.size(1) ? weight.mm(weight.t()) : weight.t().mm(weight);
  EXPECT_LE(
      (product - gain * gain * at::eye(product.size(0), at::kDouble)).abs().max().item<double>(),
      1e-5 * gain);
  EXPECT_EQ(module.named_parameters()["linear.bias"].abs().max().item<double>(), 0);
}

TEST(Encoder, IsOrthogonalAndActivatesOnDemand) {
  Encoder plain(7, 16), active(7, 16, true);
  expect_orthogonal(plain, std::sqrt(2.0));
  const auto x = randn({3, 2, 7}, 1);
  EXPECT_EQ(plain.forward(x).sizes(), (std::vector<int64_t>{3, 2, 16}));
  EXPECT_LT(plain.forward(x).min().item<double>(), 0);
  EXPECT_EQ(active.forward(x).min().item<double>(), 0);
  expect_error([&] { plain.forward(x.slice(2, 1)); },
               {"[..., observation_size] = [..., 7], got [3, 2, 6]"});
  expect_error([] { Encoder(0, 4); }, {"observation_size must be at least 1, got 0"});
}

TEST(Heads, AreOrthogonalWithTheirGains) {
  const PolicyHead policy({.d_model = 16, .num_values = {4}});
  ValueHead value(16);
  expect_orthogonal(policy, 0.01);
  expect_orthogonal(value, 1.0);
  EXPECT_EQ(value.forward(randn({3, 2, 16}, 1)).sizes(), (std::vector<int64_t>{3, 2}));
}

TEST(Heads, GiveEveryKindOfAction) {
  const auto x = randn({3, 2, 16}, 1);
  const auto action = [&](PolicyHead& head) { return head.forward(x)->mode(); };
  PolicyHead categorical({.d_model = 16, .num_values = {4}});
  PolicyHead multi({.d_model = 16, .kind = ActionKind::multi_discrete, .num_values = {2, 3, 4}});
  PolicyHead gaussian({.d_model = 16, .kind = ActionKind::gaussian, .action_size = 5});
  EXPECT_EQ(action(categorical).sizes(), (std::vector<int64_t>{3, 2}));
  EXPECT_EQ(action(multi).sizes(), (std::vector<int64_t>{3, 2, 3}));
  EXPECT_EQ(action(gaussian).sizes(), (std::vector<int64_t>{3, 2, 5}));
  gaussian.forward(x)->entropy().sum().backward();
  EXPECT_TRUE(at::equal(gaussian.named_parameters()["log_std"].grad(), at::full({5}, 6.0)));
  const auto legal = at::tensor({0, 0, 0, 1}).to(at::kBool).expand({3, 2, 4});
  EXPECT_TRUE(categorical.forward(x, legal)->mode().eq(3).all().item<bool>());
  expect_error([&] { multi.forward(x, legal); }, {"legal is for categorical actions only"});
}

TEST(Heads, OptionsOutOfRangeThrowAndAreNamed) {
  expect_error([] { PolicyHead({.d_model = 0}); }, {"d_model must be at least 1"});
  expect_error(
      [] {
        PolicyHead({.num_values = {2, 3}});
      },
      {"num_values of a categorical must hold one number, got [2, 3]"});
  expect_error([] { PolicyHead({.kind = ActionKind::multi_discrete, .num_values = {}}); },
               {"num_values must hold"});
  expect_error([] { PolicyHead({.kind = ActionKind::gaussian, .action_size = 0}); },
               {"action_size must be at least 1, got 0"});
}

}  // namespace
}  // namespace retain
