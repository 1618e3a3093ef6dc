#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <retain/lib/cores/gru.h>
#include <retain/lib/cores/mamba1.h>
#include <torch/nn/modules/rnn.h>

#include <cmath>

#include "support/errors.h"
#include "support/random_tensors.h"

namespace retain {
namespace {

using testing::expect_error;
using testing::randn;
using testing::relative_error;

Tensor parameter(const Core& core, const std::string& name) {
  return core.named_parameters()[name].detach();
}

double smallest(const Tensor& t) { return t.min().item<double>(); }
double largest(const Tensor& t) { return t.max().item<double>(); }

// Uniform numbers on [low, high]: inside it, near its ends, and centred.
void expect_uniform(const Tensor& t, double low, double high) {
  const double width = high - low;
  EXPECT_GE(smallest(t), low - 1e-4 * width);
  EXPECT_LE(largest(t), high + 1e-4 * width);
  EXPECT_LE(smallest(t), low + 0.05 * width);
  EXPECT_GE(largest(t), high - 0.05 * width);
  EXPECT_NEAR(t.to(at::kDouble).mean().item<double>(), (low + high) / 2, 0.05 * width);
}

TEST(Mamba1, HasThePublicModelsParameters) {
  const Mamba1 core({.d_model = 24, .d_state = 5, .d_conv = 3, .expand = 2});
  const std::vector<std::pair<std::string, std::vector<int64_t>>> expected = {
      {"A_log", {48, 5}},           {"D", {48}},
      {"in_proj.weight", {96, 24}}, {"conv1d.weight", {48, 1, 3}},
      {"conv1d.bias", {48}},        {"x_proj.weight", {2 + 10, 48}},
      {"dt_proj.weight", {48, 2}},  {"dt_proj.bias", {48}},
      {"out_proj.weight", {24, 48}}};
  EXPECT_EQ(core.named_parameters().size(), expected.size());
  for (const auto& [name, sizes] : expected)
    EXPECT_EQ(parameter(core, name).sizes(), sizes) << name;
}

TEST(Mamba1, DtRankIsASixteenthRoundedUp) {
  EXPECT_EQ(Mamba1({.d_model = 16}).options().dt_rank, 1);
  EXPECT_EQ(Mamba1({.d_model = 17}).options().dt_rank, 2);
  EXPECT_EQ(Mamba1({.d_model = 17, .dt_rank = 5}).options().dt_rank, 5);
}

TEST(Mamba1, InitialStepsAreLogUniformBetweenTheirBounds) {
  at::manual_seed(3);
  const Mamba1 core({.d_model = 1000, .d_state = 1, .dt_rank = 4, .dt_min = 1e-3, .dt_max = 1e-1});
  const auto dt = at::softplus(parameter(core, "dt_proj.bias").to(at::kDouble));
  expect_uniform(dt.log(), std::log(1e-3), std::log(1e-1));
  expect_uniform(parameter(core, "dt_proj.weight"), -0.5, 0.5);
}

TEST(Mamba1, InitialStepsAreClampedAtTheFloor) {
  at::manual_seed(3);
  const Mamba1 core(
      {.d_model = 500, .d_state = 1, .dt_min = 1e-6, .dt_max = 1e-2, .dt_init_floor = 1e-4});
  const auto dt = at::softplus(parameter(core, "dt_proj.bias").to(at::kDouble));
  EXPECT_NEAR(smallest(dt) / 1e-4, 1, 1e-4);
  EXPECT_GT((dt < 1.001e-4).sum().item<int64_t>(), 400);  // half of them in expectation
}

TEST(Mamba1, DecayRatesAreOneToDStateAndTheSkipIsOne) {
  const Mamba1 core({.d_model = 4, .d_state = 3});
  const auto rates = parameter(core, "A_log").exp();
  EXPECT_LE(relative_error(rates, at::tensor({1.0, 2.0, 3.0}).expand({8, 3})), 1e-6);
  EXPECT_TRUE(at::equal(parameter(core, "D"), at::ones({8})));
}

TEST(Mamba1, StateHoldsTheLastInputsOfTheConvolutionAndTheScan) {
  const Mamba1 core({.d_model = 6, .d_state = 5, .d_conv = 4, .expand = 3});
  const auto state = core.initial_state(2);
  EXPECT_EQ(state.at("conv").sizes(), (std::vector<int64_t>{2, 3, 18}));
  EXPECT_EQ(state.at("ssm").sizes(), (std::vector<int64_t>{2, 18, 5}));
  EXPECT_EQ(state.num_bytes(), 4 * 2 * 18 * (3 + 5));
  for (const auto& [name, part] : state.parts()) EXPECT_EQ(part.count_nonzero().item<int64_t>(), 0);
}

TEST(Mamba1, WorksWithOneTap) {
  at::manual_seed(1);
  Mamba1 core({.d_model = 4, .d_conv = 1});
  const auto output = core.forward(randn({3, 2, 4}, 1), core.initial_state(2));
  EXPECT_EQ(output.y.sizes(), (std::vector<int64_t>{3, 2, 4}));
  EXPECT_EQ(output.state.at("conv").sizes(), (std::vector<int64_t>{2, 0, 8}));
}

TEST(Mamba1, ReadsABatchFirstViewOfItsInput) {
  at::manual_seed(1);
  Mamba1 core({.d_model = 4});
  const auto x = randn({5, 3, 4}, 1);
  const auto batch_first = x.transpose(0, 1).contiguous();
  const auto expected = core.forward(x, core.initial_state(3)).y;
  EXPECT_LE(
      relative_error(core.forward(batch_first.transpose(0, 1), core.initial_state(3)).y, expected),
      1e-6);
}

TEST(Mamba1, OptionsOutOfRangeThrowAndAreNamed) {
  const auto make = [](Mamba1Options options) { return [options] { Mamba1 core(options); }; };
  expect_error(make({.d_model = 0}), {"Mamba1: d_model must be at least 1, got 0"});
  expect_error(make({.d_state = -1}), {"d_state must be at least 1, got -1"});
  expect_error(make({.d_conv = 0}), {"d_conv must be at least 1"});
  expect_error(make({.expand = 0}), {"expand must be at least 1"});
  expect_error(make({.dt_rank = -2}), {"dt_rank must be", "got -2"});
  expect_error(make({.dt_min = 0}), {"dt_min must be positive, got 0"});
  expect_error(make({.dt_min = 0.2, .dt_max = 0.1}),
               {"dt_max must be at least dt_min = 0.2, got 0.1"});
  expect_error(make({.dt_init_floor = NAN}), {"dt_init_floor must be at least 0"});
}

TEST(GRU, EqualsLibTorchsGRU) {
  at::manual_seed(1);
  GRU core({.d_model = 6});
  torch::nn::GRU theirs(6, 6);
  for (auto& p : theirs->named_parameters()) {
    at::NoGradGuard no_grad;
    p.value().copy_(parameter(core, p.key().substr(0, p.key().size() - 3)));  // without "_l0"
  }
  const auto x = randn({7, 3, 6}, 1), h = randn({3, 6}, 2);
  const auto [y, last] = theirs->forward(x, h.unsqueeze(0));
  const auto ours = core.forward(x, State(3, {{"hidden", h}}));
  EXPECT_LE(relative_error(ours.y, y), 1e-5);
  EXPECT_LE(relative_error(ours.state.at("hidden"), last[0]), 1e-5);
}

TEST(GRU, WeightsAreUniformAsLibTorchs) {
  at::manual_seed(1);
  const GRU core({.d_model = 100});
  for (const auto& p : core.named_parameters()) {
    SCOPED_TRACE(p.key());
    expect_uniform(p.value().detach(), -0.1, 0.1);
  }
}

TEST(GRU, ChronoBiasesSpreadTheMemoryUpToTheHorizon) {
  at::manual_seed(1);
  constexpr int64_t kH = 1000;
  const GRU core({.d_model = kH, .chrono_horizon = 500});
  const auto gate = [&](const char* name, int64_t index) {
    return parameter(core, name).narrow(0, index * kH, kH);
  };
  expect_uniform(gate("bias_ih", 1).exp(), 1, 499);
  EXPECT_EQ(largest(gate("bias_hh", 1).abs()), 0);
  const double bound = 1 / std::sqrt(double{kH});
  for (const int64_t other : {0, 2}) {
    expect_uniform(gate("bias_ih", other), -bound, bound);
    expect_uniform(gate("bias_hh", other), -bound, bound);
  }
}

TEST(GRU, OptionsOutOfRangeThrowAndAreNamed) {
  expect_error([] { GRU core({.d_model = 0}); }, {"GRU: d_model must be at least 1, got 0"});
  expect_error([] { GRU core({.chrono_horizon = 1}); },
               {"chrono_horizon must be at least 2", "got 1"});
}

}  // namespace
}  // namespace retain
