#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <retain/lib/cores/load_parameters.h>
#include <retain/lib/cores/mamba1.h>
#include <retain/lib/cores/stack.h>

#include "support/golden.h"
#include "support/random_tensors.h"

namespace retain {
namespace {

using testing::GoldenFile;
using testing::relative_error;

struct Golden {
  const char* file;
  double tolerance;
  bool public_cache;  // conv_state is [B, d_inner, d_conv], the last d_conv inputs
};

void PrintTo(const Golden& golden, std::ostream* out) { *out << golden.file; }

class GoldenTest : public ::testing::TestWithParam<Golden> {
 protected:
  GoldenTest() : file_(GetParam().file), x_(file_.tensor("input").requires_grad_()) {
    const auto number = [&](const char* name) {
      return file_.integer(std::string("config/") + name);
    };
    std::vector<std::shared_ptr<Core>> layers;
    for (int64_t i = 0; i < number("n_layers"); ++i) {
      layers.push_back(std::make_shared<Mamba1>(Mamba1Options{.d_model = number("d_model"),
                                                              .d_state = number("d_state"),
                                                              .d_conv = number("d_conv"),
                                                              .expand = number("expand"),
                                                              .dt_rank = number("dt_rank")}));
    }
    stack_ = std::make_shared<Stack>(layers);
    stack_->to(x_.scalar_type());
    load_parameters(*stack_, file_.group("weights"));
  }

  bool has_resets() const {
    return std::string(GetParam().file).find("reset") != std::string::npos;
  }
  Tensor reset() const { return has_resets() ? file_.tensor("reset").to(at::kBool) : Tensor(); }

  State initial_state() const {
    if (!has_resets()) return stack_->initial_state(x_.size(1));
    State state(x_.size(1));
    for (const auto& [name, part] : file_.group("initial_state"))
      state.insert(name, part.requires_grad_());
    return state;
  }

  void expect_near(const Tensor& value, const Tensor& golden, const std::string& name) const {
    EXPECT_EQ(value.sizes(), golden.sizes()) << name;
    EXPECT_LE(relative_error(value, golden), GetParam().tolerance) << name;
  }

  void expect_cache(const State& state) const {
    const auto cache = file_.group("cache");
    ASSERT_EQ(state.parts().size(), cache.size());
    for (const auto& [name, golden] : cache) {
      const bool transposed = GetParam().public_cache && golden.size(2) == stack_options().d_conv;
      expect_near(state.at(name), transposed ? golden.slice(2, 1).transpose(1, 2) : golden, name);
    }
  }

  const Mamba1Options& stack_options() const {
    return std::dynamic_pointer_cast<Mamba1>(stack_->layer(0))->options();
  }

  GoldenFile file_;
  Tensor x_;
  std::shared_ptr<Stack> stack_;
};

TEST_P(GoldenTest, SequenceMatches) {
  const auto [y, state] = stack_->forward(x_, initial_state(), reset());
  expect_near(y, file_.tensor("output"), "output");
  expect_cache(state);
}

TEST_P(GoldenTest, StepsMatch) {
  at::NoGradGuard no_grad;
  std::vector<Tensor> ys;
  auto state = initial_state();
  for (int64_t t = 0; t < x_.size(0); ++t) {
    auto output = stack_->forward(x_.slice(0, t, t + 1), state,
                                  has_resets() ? reset().slice(0, t, t + 1) : Tensor());
    ys.push_back(output.y);
    state = output.state;
  }
  expect_near(at::cat(ys), file_.tensor("output"), "output");
  expect_cache(state);
}

TEST_P(GoldenTest, GradientsMatch) {
  const auto initial = initial_state();
  const auto [y, state] = stack_->forward(x_, initial, reset());
  auto loss = (y * file_.tensor("weighting")).sum();
  if (has_resets()) {
    for (const auto& [name, weighting] : file_.group("cache_weighting")) {
      loss = loss + (state.at(name) * weighting).sum();
    }
  }
  loss.backward();
  expect_near(x_.grad(), file_.tensor("input_gradient"), "input");
  const auto golden = file_.group("gradients");
  const auto parameters = stack_->named_parameters();
  ASSERT_EQ(parameters.size(), golden.size());
  for (const auto& parameter : parameters) {
    expect_near(parameter.value().grad(), golden.at(parameter.key()), parameter.key());
  }
  if (!has_resets()) return;
  const auto of_states = file_.group("initial_state_gradients");
  ASSERT_EQ(of_states.size(), initial.parts().size());
  for (const auto& [name, gradient] : of_states) {
    expect_near(initial.at(name).grad(), gradient, "initial " + name);
  }
}

INSTANTIATE_TEST_SUITE_P(Mamba1, GoldenTest,
                         ::testing::Values(Golden{"mamba_fp32.h5", 1e-5, true},
                                           Golden{"mamba_fp64.h5", 1e-10, false},
                                           Golden{"mamba_fp64_reset.h5", 1e-10, false}),
                         [](const auto& test) {
                           const std::string file = test.param.file;
                           return file.substr(6, file.size() - 9);
                         });

}  // namespace
}  // namespace retain
