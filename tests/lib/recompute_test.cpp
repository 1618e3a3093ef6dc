#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <gtest/gtest.h>
#include <retain/lib/cores/recompute.h>
#include <retain/lib/cores/registry.h>

#include <array>
#include <optional>

#include "support/cuda.h"
#include "support/errors.h"
#include "support/op_checks.h"

namespace retain {
namespace {

using namespace testing;

constexpr int64_t kSteps = 21, kBatch = 3, kWidth = 8;

/// bf16 autocast while it lives.
struct Autocast {
  Autocast() {
    at::autocast::set_autocast_dtype(at::kCPU, at::kBFloat16);
    at::autocast::set_autocast_enabled(at::kCPU, true);
  }
  ~Autocast() {
    at::autocast::set_autocast_enabled(at::kCPU, false);
    at::autocast::clear_cache();
  }
  Autocast(const Autocast&) = delete;
  Autocast& operator=(const Autocast&) = delete;
};

/// Outputs, last state, and gradients of x, of the initial state and of every weight.
Tensors everything(const std::shared_ptr<Core>& core, bool recompute, bool autocast = false) {
  auto x = randn({kSteps, kBatch, kWidth}, 1).requires_grad_();
  State state(kBatch);
  Tensors inputs = {x};
  for (const auto& [name, part] : core->initial_state(kBatch).parts()) {
    inputs.push_back(randn(part.sizes(), 2).requires_grad_());
    state.insert(name, inputs.back());
  }
  const auto reset = random_mask({kSteps, kBatch}, 0.1, 3);
  CoreOutput output;
  {
    std::optional<Autocast> narrow;
    if (autocast) narrow.emplace();
    output = recompute ? recomputed_forward(core, x, state, reset) : core->forward(x, state, reset);
  }
  Tensors outputs = {output.y}, weights = {randn(output.y.sizes(), 4, output.y.scalar_type())};
  for (const auto& part : output.state.parts()) {
    outputs.push_back(part.second);
    weights.push_back(randn(part.second.sizes(), 5));
  }
  for (const auto& parameter : core->parameters()) inputs.push_back(parameter);
  auto result = torch::autograd::grad(outputs, inputs, weights);
  for (const auto& y : outputs) result.push_back(y.detach());
  return result;
}

class RecomputedForward : public ::testing::TestWithParam<std::string> {
 protected:
  std::shared_ptr<Core> core() const {
    at::manual_seed(1);
    return make_core({.name = GetParam(), .d_model = kWidth, .n_layers = 2, .d_state = 4});
  }
};

INSTANTIATE_TEST_SUITE_P(Every, RecomputedForward, ::testing::ValuesIn(core_names()),
                         [](const auto& test) { return test.param; });

TEST_P(RecomputedForward, GivesTheSameBits) {
  expect_bit_equal(everything(core(), true), everything(core(), false));
}

TEST_P(RecomputedForward, AsAnOptionOfTheStackGivesTheSameBits) {
  at::manual_seed(1);
  const auto stack = make_core(
      {.name = GetParam(), .d_model = kWidth, .n_layers = 2, .recompute = true, .d_state = 4});
  expect_bit_equal(everything(stack, false), everything(core(), false));
}

TEST(RecomputedForwardCuda, GivesTheSameBitsInSegmentsAndInOneStep) {
  RETAIN_NEEDS_CUDA();
  for (const auto& [T, d_model, d_state] :
       std::vector<std::array<int64_t, 3>>{{1000, 64, 32}, {3000, 32, 16}, {1, 128, 16}}) {
    for (const auto dtype : {at::kFloat, at::kBFloat16}) {
      SCOPED_TRACE(::testing::Message() << T << " " << d_model << " " << dtype);
      const auto core = make_core({.d_model = d_model, .d_state = d_state});
      core->to(at::kCUDA, dtype);
      const auto run = [&](bool recompute) {
        const auto x = cuda(randn({T, 1, d_model}, 1)).to(dtype).requires_grad_();
        const auto state = core->initial_state(1);
        const auto y = (recompute ? recomputed_forward(core, x, state) : core->forward(x, state)).y;
        auto inputs = core->parameters();
        inputs.push_back(x);
        auto results = torch::autograd::grad({y}, inputs, {at::ones_like(y)});
        results.push_back(y.detach());
        return results;
      };
      expect_bit_equal(run(true), run(false));
    }
  }
}

/// Counts its calls.
class CountingCore : public Core {
 public:
  explicit CountingCore(std::shared_ptr<Core> core)
      : core_(register_module("core", std::move(core))) {}
  int64_t d_model() const override { return core_->d_model(); }
  State initial_state(int64_t batch) const override { return core_->initial_state(batch); }
  CoreOutput forward(const Tensor& x, const State& state, const Tensor& reset = {}) override {
    ++calls;
    with_graph += at::GradMode::is_enabled() ? 1 : 0;
    return core_->forward(x, state, reset);
  }
  int calls = 0, with_graph = 0;

 private:
  std::shared_ptr<Core> core_;
};

TEST(RecomputedForwardCost, TheGraphIsBuiltInTheBackwardOnly) {
  const auto core = std::make_shared<CountingCore>(make_core({.d_model = kWidth}));
  const auto x = randn({kSteps, kBatch, kWidth}, 1);
  auto output = recomputed_forward(core, x, core->initial_state(kBatch));
  EXPECT_EQ(core->calls, 1);
  EXPECT_EQ(core->with_graph, 0);
  output.y.sum().backward();
  EXPECT_EQ(core->calls, 2);
  EXPECT_EQ(core->with_graph, 1);
  EXPECT_GT(core->parameters()[0].grad().abs().sum().item<double>(), 0);
  const at::NoGradGuard no_grad;
  recomputed_forward(core, x, core->initial_state(kBatch));
  EXPECT_EQ(core->calls, 3);
}

TEST(RecomputedForwardCost, RefusesWeightsChangedBeforeTheBackward) {
  const auto core = make_core({.d_model = kWidth});
  const auto x = randn({kSteps, kBatch, kWidth}, 1);
  const auto output = recomputed_forward(core, x, core->initial_state(kBatch));
  {
    const at::NoGradGuard no_grad;
    core->parameters()[0].add_(1);
  }
  expect_error([&] { output.y.sum().backward(); }, {"modified by an inplace operation"});
}

TEST(RecomputedForwardCost, RefusesResetsChangedBeforeTheBackward) {
  const auto core = make_core({.d_model = kWidth});
  const auto x = randn({kSteps, kBatch, kWidth}, 1);
  const auto reset = random_mask({kSteps, kBatch}, 0.1, 3);
  const auto output = recomputed_forward(core, x, core->initial_state(kBatch), reset);
  reset.zero_();
  expect_error([&] { output.y.sum().backward(); }, {"modified by an inplace operation"});
}

TEST(RecomputedForwardCost, GradientsOfGradientsAreRefused) {
  const auto core = make_core({.d_model = kWidth});
  const auto x = randn({kSteps, kBatch, kWidth}, 1).requires_grad_();
  const auto output = recomputed_forward(core, x, core->initial_state(kBatch));
  expect_error([&] { torch::autograd::grad({output.y.sum()}, {x}, {}, {}, true); },
               {"recompute: gradients of its gradients are not implemented"});
}

TEST(RecomputedForwardCost, ABackwardLeavesAutocastNoCopiesOfWeights) {
  const auto core = make_core({.d_model = kWidth, .d_state = 4});
  const auto x = randn({kSteps, kBatch, kWidth}, 1);
  const auto run = [&](bool recompute) {
    const Autocast narrow;
    const auto state = core->initial_state(kBatch);
    return (recompute ? recomputed_forward(core, x, state) : core->forward(x, state)).y;
  };
  run(true).sum().backward();
  for (auto weight : core->parameters()) weight.detach().mul_(1.5);
  const auto got = run(true).detach();
  expect_bit_equal(got, run(false).detach());
}

TEST(RecomputedForwardCost, RunsAgainUnderTheAutocastOfTheForward) {
  const auto core = [] {
    at::manual_seed(1);
    return make_core({.d_model = kWidth, .n_layers = 2, .d_state = 4});
  };
  const auto narrow = everything(core(), false, true), wide = everything(core(), false);
  expect_bit_equal(everything(core(), true, true), narrow);
  for (size_t i = 0; i < narrow.size(); ++i) {
    EXPECT_FALSE(at::equal(narrow[i].to(at::kFloat), wide[i])) << i;
    EXPECT_LE(relative_error(narrow[i], wide[i]), 0.05) << i;
  }
}

}  // namespace
}  // namespace retain
