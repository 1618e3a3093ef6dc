#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <retain/lib/cores/registry.h>
#include <torch/csrc/autograd/autograd.h>

#include "support/errors.h"
#include "support/random_tensors.h"

namespace retain {
namespace {

using testing::expect_error;
using testing::randn;
using testing::relative_error;

constexpr int64_t kT = 9, kB = 3, kWidth = 8;

CoreOptions options_of(const std::string& name) {
  // Steps near 1 let the memory of these short sequences matter.
  return {.name = name,
          .d_model = kWidth,
          .n_layers = 2,
          .d_state = 4,
          .dt_min = 0.1,
          .dt_max = 1,
          .chrono_horizon = 5};
}

Tensor reset_at(std::initializer_list<std::pair<int64_t, int64_t>> places, int64_t T = kT) {
  auto reset = at::zeros({T, kB}, at::kBool);
  for (const auto& [t, b] : places) reset[t][b] = true;
  return reset;
}

std::vector<Tensor> gradients(const Core& core) {
  std::vector<Tensor> result;
  for (const auto& p : core.parameters()) {
    result.push_back(p.grad().defined() ? p.grad().clone() : at::zeros_like(p));
    p.mutable_grad().reset();
  }
  return result;
}

void expect_close(const Tensor& a, const Tensor& b, double tolerance = 1e-5) {
  ASSERT_EQ(a.sizes(), b.sizes());
  EXPECT_LE(relative_error(a, b), tolerance);
}

void expect_close(const std::vector<Tensor>& a, const std::vector<Tensor>& b,
                  double tolerance = 1e-5) {
  ASSERT_EQ(a.size(), b.size());
  for (size_t i = 0; i < a.size(); ++i) expect_close(a[i], b[i], tolerance);
}

void expect_close(const State& a, const State& b) {
  ASSERT_EQ(a.parts().size(), b.parts().size());
  for (const auto& [name, part] : a.parts()) expect_close(part, b.at(name));
}

class EveryCore : public ::testing::TestWithParam<std::string> {
 protected:
  EveryCore() {
    at::manual_seed(7);
    core_ = make_core(options_of(GetParam()));
    x_ = randn({kT, kB, kWidth}, 1);
  }

  bool remembers() const { return GetParam() != "mlp"; }

  State random_state(uint64_t seed = 20) const {
    State state(kB);
    for (const auto& [name, part] : core_->initial_state(kB).parts()) {
      state.insert(name, randn(part.sizes(), ++seed, part.scalar_type()));
    }
    return state;
  }

  // The core alone on some steps of one row, from zero memory.
  Tensor episode(int64_t row, int64_t begin, int64_t end) const {
    return core_->forward(x_.slice(0, begin, end).slice(1, row, row + 1), core_->initial_state(1))
        .y;
  }

  std::shared_ptr<Core> core_;
  Tensor x_;
};

TEST_P(EveryCore, SequenceEqualsSteps) {
  at::NoGradGuard no_grad;
  const auto reset = reset_at({{0, 1}, {4, 0}, {5, 0}, {8, 2}});
  const auto whole = core_->forward(x_, random_state(), reset);
  std::vector<Tensor> ys;
  auto state = random_state();
  for (int64_t t = 0; t < kT; ++t) {
    auto output = core_->forward(x_.slice(0, t, t + 1), state, reset.slice(0, t, t + 1));
    ys.push_back(output.y);
    state = output.state;
  }
  expect_close(at::cat(ys), whole.y);
  expect_close(state, whole.state);
}

TEST_P(EveryCore, ResetEqualsFreshState) {
  at::NoGradGuard no_grad;
  const auto reset = reset_at({{4, 0}, {4, 1}, {4, 2}});
  const auto whole = core_->forward(x_, random_state(), reset);
  const auto fresh = core_->forward(x_.slice(0, 4), core_->initial_state(kB));
  expect_close(whole.y.slice(0, 4), fresh.y);
  expect_close(whole.state, fresh.state);
}

TEST_P(EveryCore, RemembersUnlessReset) {
  at::NoGradGuard no_grad;
  const auto from_zero = core_->forward(x_, core_->initial_state(kB)).y;
  const auto from_random = core_->forward(x_, random_state()).y;
  EXPECT_EQ(relative_error(from_random[3], from_zero[3]) > 1e-3, remembers());
}

TEST_P(EveryCore, NaNBeforeAResetLeavesLaterValuesAndInputGradientsClean) {
  const auto reset = reset_at({{4, 0}});
  const auto run = [&](const Tensor& x, const State& state) {
    auto input = x.clone().requires_grad_();
    auto output = core_->forward(input, state, reset);
    const auto later = output.y.slice(0, 4);
    (later * randn(later.sizes(), 5)).sum().backward();
    return std::make_tuple(later.detach(), output.state.detach(), input.grad().slice(0, 4));
  };
  auto poisoned = x_.clone();
  poisoned.slice(0, 0, 4).select(1, 0).fill_(std::numeric_limits<double>::quiet_NaN());
  auto state = random_state();
  for (const auto& [name, part] : state.parts())
    part[0].fill_(std::numeric_limits<double>::infinity());
  const auto [y, last, dx] = run(poisoned, state);
  const auto [clean_y, clean_last, clean_dx] = run(x_, random_state());
  EXPECT_TRUE(at::equal(y, clean_y));
  EXPECT_TRUE(equal(last, clean_last));
  expect_close(dx, clean_dx);
}

TEST_P(EveryCore, NaNInAMemoryThatIsResetLeavesParameterGradientsClean) {
  const auto reset = reset_at({{0, 0}, {0, 1}, {0, 2}});
  const auto run = [&](State state) {
    for (auto& [name, part] : state.parts()) part.requires_grad_();
    core_->forward(x_, state, reset).y.square().slice(2, 0, 3).sum().backward();
    for (const auto& [name, part] : state.parts()) {
      EXPECT_TRUE(at::equal(part.grad(), at::zeros_like(part))) << name;
    }
    return gradients(*core_);
  };
  auto poisoned = random_state();
  for (const auto& [name, part] : poisoned.parts())
    part.fill_(std::numeric_limits<double>::quiet_NaN());
  const auto clean = run(core_->initial_state(kB));
  const auto result = run(poisoned);
  for (size_t i = 0; i < clean.size(); ++i) EXPECT_TRUE(at::equal(result[i], clean[i])) << i;
}

TEST_P(EveryCore, PackedEpisodesEqualSeparateOnes) {
  const auto weights = randn({kT, kB, kWidth}, 5);
  const auto reset = reset_at({{0, 0}, {0, 1}, {0, 2}, {3, 0}, {4, 0}, {6, 1}});
  const auto packed = core_->forward(x_, core_->initial_state(kB), reset).y;
  (packed * weights).sum().backward();
  const auto packed_gradients = gradients(*core_);

  const std::tuple<int64_t, int64_t, int64_t> episodes[] = {{0, 0, 3}, {0, 3, 4},  {0, 4, kT},
                                                            {1, 0, 6}, {1, 6, kT}, {2, 0, kT}};
  for (const auto& [row, begin, end] : episodes) {
    const auto y = episode(row, begin, end).squeeze(1);
    expect_close(y, packed.slice(0, begin, end).select(1, row));
    (y * weights.slice(0, begin, end).select(1, row)).sum().backward();
  }
  expect_close(packed_gradients, gradients(*core_));
}

TEST_P(EveryCore, CutAndCarriedEqualsWhole) {
  const auto weights = randn({kT, kB, kWidth}, 5);
  const auto reset = reset_at({{2, 0}, {6, 2}});
  const auto whole = core_->forward(x_, random_state(), reset);
  (whole.y * weights).sum().backward();
  const auto whole_gradients = gradients(*core_);
  for (const int64_t cut : {1, 6, 8}) {
    const auto first = core_->forward(x_.slice(0, 0, cut), random_state(), reset.slice(0, 0, cut));
    const auto second = core_->forward(x_.slice(0, cut), first.state, reset.slice(0, cut));
    const auto y = at::cat({first.y, second.y});
    expect_close(y, whole.y);
    expect_close(second.state, whole.state);
    (y * weights).sum().backward();
    expect_close(gradients(*core_), whole_gradients);
  }
}

TEST_P(EveryCore, RowsDoNotLeakIntoEachOther) {
  at::NoGradGuard no_grad;
  const auto reset = reset_at({{3, 1}});
  auto other_x = x_.clone();
  other_x.select(1, 1).fill_(100);
  auto other_state = random_state();
  for (const auto& [name, part] : other_state.parts()) part[1].fill_(-50);
  const auto a = core_->forward(x_, random_state(), reset);
  const auto b = core_->forward(other_x, other_state);
  for (const int64_t row : {0, 2}) {
    EXPECT_TRUE(at::equal(a.y.select(1, row), b.y.select(1, row)));
    EXPECT_TRUE(equal(a.state.rows(at::tensor({row})), b.state.rows(at::tensor({row}))));
  }
  EXPECT_FALSE(at::equal(a.y.select(1, 1), b.y.select(1, 1)));
}

// Along a random direction through input, initial state and parameters at once, and back through
// the last state.
TEST_P(EveryCore, GradientsAgreeWithDifferences) {
  core_->to(at::kDouble);
  const auto reset = reset_at({{0, 1}, {4, 0}});
  std::vector<Tensor> inputs{x_.to(at::kDouble).requires_grad_()};
  auto state = random_state();
  for (const auto& [name, part] : state.parts()) inputs.push_back(part.requires_grad_());
  for (const auto& p : core_->parameters()) inputs.push_back(p);
  const auto loss = [&] {
    const auto output = core_->forward(inputs[0], state, reset);
    auto total = (output.y * randn(output.y.sizes(), 5, at::kDouble)).sum();
    for (const auto& [name, part] : output.state.parts()) {
      total = total + (part * randn(part.sizes(), 6, at::kDouble)).sum();
    }
    return total;
  };
  const auto gradient = torch::autograd::grad({loss()}, inputs);
  for (size_t i = 0; i < inputs.size(); ++i) {
    at::NoGradGuard no_grad;
    const auto direction = randn(inputs[i].sizes(), 30 + i, at::kDouble);
    const double step = 1e-6;
    inputs[i] += step * direction;
    const double above = loss().item<double>();
    inputs[i] -= 2 * step * direction;
    const double below = loss().item<double>();
    inputs[i] += step * direction;
    const double slope = (gradient[i] * direction).sum().item<double>();
    EXPECT_NEAR(slope, (above - below) / (2 * step), 1e-6 * std::max(1.0, std::abs(slope))) << i;
  }
}

TEST_P(EveryCore, GradientsFlowIntoTheInitialState) {
  const auto state = random_state();
  for (const auto& [name, part] : state.parts()) part.requires_grad_();
  core_->forward(x_, state, reset_at({{0, 1}})).y.square().slice(2, 0, 3).sum().backward();
  EXPECT_EQ(state.parts().empty(), !remembers());
  for (const auto& [name, part] : state.parts()) {
    EXPECT_GT(part.grad()[0].abs().max().item<double>(), 0) << name;
    EXPECT_EQ(part.grad()[1].abs().max().item<double>(), 0) << name;
  }
}

TEST_P(EveryCore, AcceptsNoStepsAndNoRows) {
  const auto no_steps = core_->forward(x_.slice(0, 0, 0), random_state());
  EXPECT_EQ(no_steps.y.sizes(), (std::vector<int64_t>{0, kB, kWidth}));
  EXPECT_TRUE(equal(no_steps.state, random_state()));
  const auto no_rows =
      core_->forward(x_.slice(1, 0, 0), core_->initial_state(0), at::zeros({kT, 0}, at::kBool));
  EXPECT_EQ(no_rows.y.sizes(), (std::vector<int64_t>{kT, 0, kWidth}));
  EXPECT_EQ(no_rows.state.batch_size(), 0);
}

TEST_P(EveryCore, WrongStatesThrowAndAreNamed) {
  const auto other = make_core(options_of(remembers() ? "mlp" : "gru"));
  expect_error([&] { core_->forward(x_, other->initial_state(kB)); }, {"state"});
  expect_error([&] { core_->forward(x_, core_->initial_state(kB + 1)); }, {"state", "4"});
  if (!remembers()) return;
  auto options = options_of(GetParam());
  options.n_layers = 1;
  expect_error([&] { core_->forward(x_, make_core(options)->initial_state(kB)); },
               {"state has no part"});
  options.n_layers = 3;
  expect_error([&] { core_->forward(x_, make_core(options)->initial_state(kB)); },
               {"Stack: state", "layers.2."});
  State half(kB);
  for (const auto& [name, part] : core_->initial_state(kB).parts())
    half.insert(name, part.to(at::kHalf));
  expect_error([&] { core_->forward(x_, half); }, {"state part", "float32", "float16"});
}

TEST_P(EveryCore, WrongInputsThrowAndAreNamed) {
  auto state = core_->initial_state(kB);
  expect_error([&] { core_->forward({}, state); }, {"x must be a tensor, got an undefined one"});
  expect_error([&] { core_->forward(x_[0], state); }, {"x must be [T, B, d_model], got [3, 8]"});
  expect_error([&] { core_->step(x_, state); }, {"x must be [B, d_model], got [9, 3, 8]"});
  expect_error([&] { core_->initial_state(-1); }, {"must be at least 0, got -1"});
  expect_error([&] { core_->forward(x_.slice(2, 1), state); },
               {"x must be [T, B, d_model] = [9, 3, 8], got [9, 3, 7]"});
  expect_error([&] { core_->forward(x_.to(at::kDouble), state); },
               {"x must be float32", "got float64"});
  expect_error([&] { core_->forward(x_, state, reset_at({}, kT + 1)); },
               {"reset must be [T, B] = [9, 3], got [10, 3]"});
  expect_error(
      [&] {
        core_->forward(x_, state, at::zeros({kT, kB}));
      },
      {"reset must be bool, got float32"});
}

TEST_P(EveryCore, TheSeedDecidesTheParameters) {
  const auto parameters = core_->named_parameters();
  const auto make = [&](uint64_t seed) {
    at::manual_seed(seed);
    return make_core(options_of(GetParam()))->named_parameters();
  };
  const auto same = make(7), other = make(8);
  bool differs = false;
  for (const auto& p : parameters) {
    EXPECT_TRUE(at::equal(p.value(), same[p.key()])) << p.key();
    differs |= !at::equal(p.value(), other[p.key()]);
  }
  EXPECT_TRUE(differs);
}

TEST_P(EveryCore, MemoryIsFp32ForHalfParametersAndFp64ForDouble) {
  core_->to(at::kBFloat16);
  for (const auto& [name, part] : core_->initial_state(kB).parts())
    EXPECT_EQ(part.scalar_type(), at::kFloat) << name;
  core_->to(at::kDouble);
  for (const auto& [name, part] : core_->initial_state(kB).parts())
    EXPECT_EQ(part.scalar_type(), at::kDouble) << name;
}

INSTANTIATE_TEST_SUITE_P(Cores, EveryCore, ::testing::ValuesIn(core_names()),
                         [](const auto& test) { return test.param; });

TEST(Registry, UnknownNamesListTheValidOnes) {
  expect_error([] { make_core({.name = "mamab"}); },
               {"unknown core \"mamab\"; valid: mamba, gru, gru_chrono, mlp"});
}

TEST(Registry, OptionsOutOfRangeThrowAndAreNamed) {
  expect_error([] { make_core({.n_layers = 0}); }, {"n_layers must be at least 1, got 0"});
  expect_error([] { make_core({.name = "gru_chrono", .chrono_horizon = 1}); },
               {"chrono_horizon must be at least 2, got 1"});
  for (const auto& name : core_names()) {
    expect_error([&] { make_core({.name = name, .d_model = 0}); },
                 {"d_model must be at least 1, got 0"});
  }
}

}  // namespace
}  // namespace retain
