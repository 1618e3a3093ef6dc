#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <retain/lib/cores/gru.h>
#include <retain/lib/cores/load_parameters.h>
#include <retain/lib/cores/mlp.h>
#include <retain/lib/cores/registry.h>
#include <retain/lib/cores/stack.h>
#include <retain/lib/nets/heads.h>
#include <torch/optim/adam.h>

#include "support/errors.h"
#include "support/random_tensors.h"

namespace retain {
namespace {

using testing::expect_error;
using testing::randn;
using testing::relative_error;

Tensor normed(const Tensor& x) { return x / (x.square().mean(-1, true) + 1e-5).sqrt(); }

TEST(Stack, IsNormCoreResidualTwiceAndAFinalNorm) {
  at::manual_seed(1);
  const auto first = std::make_shared<GRU>(GRUOptions{.d_model = 5});
  const auto second = std::make_shared<MLP>(MLPOptions{.d_model = 5});
  Stack stack({first, second});
  const auto x = randn({4, 2, 5}, 1);
  const auto output = stack.forward(x, stack.initial_state(2));
  const auto middle = first->forward(normed(x), first->initial_state(2));
  const auto h = x + middle.y;
  const auto y = normed(h + second->forward(normed(h), State(2)).y);
  EXPECT_LE(relative_error(output.y, y), 1e-5);
  EXPECT_LE(relative_error(output.state.at("layers.0.hidden"), middle.state.at("hidden")), 1e-5);
  EXPECT_EQ(output.state.parts().size(), 1u);
}

TEST(Stack, WithoutInputNormTheFirstLayerSeesTheScale) {
  at::manual_seed(1);
  const auto core = make_core({.name = "gru", .d_model = 5, .norm_input = false});
  const auto plain = make_core({.name = "gru", .d_model = 5});
  const auto x = randn({4, 2, 5}, 1);
  const auto hidden = [&](Core& c, double scale) {
    return c.forward(scale * x, c.initial_state(2)).state.at("layers.0.hidden");
  };
  EXPECT_GT(relative_error(hidden(*core, 10), hidden(*core, 1)), 0.1);
  EXPECT_LT(relative_error(hidden(*plain, 10), hidden(*plain, 1)), 1e-3);
  EXPECT_FALSE(core->named_parameters().contains("layers.0.norm.weight"));
}

TEST(Stack, ACoreMayBeItsOwnNextLayer) {
  const auto core_of = [] {
    at::manual_seed(1);
    return std::make_shared<GRU>(GRUOptions{.d_model = 5});
  };
  const auto core = core_of();
  Stack tied({core, core}, {.norm_input = false}),
      apart({core_of(), core_of()}, {.norm_input = false});
  const auto x = randn({4, 2, 5}, 1);
  const auto y = [&](Stack& stack) { return stack.forward(x, stack.initial_state(2)).y; };
  EXPECT_TRUE(at::equal(y(tied), y(apart)));
}

TEST(Stack, NamesItsParametersAsThePublicBackbone) {
  const auto names = make_core({.d_model = 4, .n_layers = 2})->named_parameters().keys();
  const std::set<std::string> set(names.begin(), names.end());
  EXPECT_EQ(set.size(), 2 * 10 + 1u);
  for (const char* name : {"layers.0.norm.weight", "layers.1.mixer.in_proj.weight",
                           "layers.1.mixer.A_log", "norm_f.weight"}) {
    EXPECT_EQ(set.count(name), 1u) << name;
  }
}

TEST(Stack, DeepMambaStacksShrinkTheirResidualBranches) {
  const auto bound = [](int64_t n_layers) {
    at::manual_seed(1);
    const auto core = make_core({.d_model = 32, .n_layers = n_layers});
    return core->named_parameters()["layers.0.mixer.out_proj.weight"].abs().max().item<double>();
  };
  EXPECT_NEAR(bound(1) / bound(4), 2, 1e-3);
}

TEST(Stack, CoresThatDoNotFitThrow) {
  const auto gru = [](int64_t d_model) {
    return std::make_shared<GRU>(GRUOptions{.d_model = d_model});
  };
  expect_error([&] { Stack({}); }, {"Stack: cores must hold at least one core"});
  expect_error(
      [&] {
        Stack({gru(4), gru(5)});
      },
      {"Stack: every core's d_model must be the first one's, 4, got 5"});
}

TEST(LoadParameters, FillsEveryParameterInItsOwnType) {
  const auto source = make_core({.name = "gru", .d_model = 4}),
             target = make_core({.name = "gru", .d_model = 4});
  std::map<std::string, Tensor> tensors;
  for (const auto& p : source->named_parameters())
    tensors.emplace(p.key(), p.value().detach().to(at::kDouble));
  load_parameters(*target, tensors);
  for (const auto& p : target->named_parameters()) {
    EXPECT_EQ(p.value().scalar_type(), at::kFloat);
    EXPECT_TRUE(p.value().requires_grad());
    EXPECT_TRUE(at::equal(p.value(), source->named_parameters()[p.key()])) << p.key();
  }
}

TEST(LoadParameters, ListsEveryFaultAndChangesNothing) {
  MLP core({.d_model = 2});
  const auto before = core.named_parameters()["fc1.bias"].clone();
  expect_error(
      [&] {
        load_parameters(core, {{"fc1.bias", at::ones({4})},
                               {"fc1.weight", at::ones({2, 4})},
                               {"fc2.bias", at::ones({2})},
                               {"extra", at::ones({1})}});
      },
      {"mis-shaped: fc1.weight must be [4, 2], got [2, 4]", "missing: fc2.weight",
       "unexpected: extra"});
  EXPECT_TRUE(at::equal(core.named_parameters()["fc1.bias"], before));
}

// One of four symbols is shown at the first step; after seven blank steps the head must name it.
double recall_accuracy(const std::string& name) {
  constexpr int64_t kT = 8, kB = 32, kWidth = 16, kSymbols = 4;
  at::manual_seed(1);
  const auto core = make_core({.name = name, .d_model = kWidth, .dt_max = 1, .chrono_horizon = kT});
  PolicyHead head({.d_model = kWidth, .num_values = {kSymbols}});
  auto parameters = core->parameters();
  for (const auto& p : head.parameters()) parameters.push_back(p);
  torch::optim::Adam optimizer(parameters, 1e-2);
  double accuracy = 0;
  for (int step = 0; step < 80; ++step) {
    const auto symbol = at::randint(kSymbols, {kB});
    auto x = at::zeros({kT, kB, kWidth});
    x[0] = at::one_hot(symbol, kWidth).to(at::kFloat);
    x.slice(0, 1).select(2, kSymbols).fill_(1);
    const auto policy = head.forward(core->forward(x, core->initial_state(kB)).y[kT - 1]);
    accuracy = policy->mode().eq(symbol).to(at::kDouble).mean().item<double>();
    optimizer.zero_grad();
    (-policy->log_prob(symbol).mean()).backward();
    optimizer.step();
  }
  return accuracy;
}

TEST(Learning, RecurrentCoresRecallAndTheMLPCannot) {
  for (const char* name : {"mamba", "gru", "gru_chrono"})
    EXPECT_GE(recall_accuracy(name), 0.95) << name;
  EXPECT_LE(recall_accuracy("mlp"), 0.6);
}

}  // namespace
}  // namespace retain
