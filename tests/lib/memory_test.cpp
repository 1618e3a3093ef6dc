#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <retain/lib/cores/registry.h>
#include <retain/lib/memory.h>
#include <torch/utils.h>

#include <limits>

#include "support/cuda.h"
#include "support/errors.h"
#include "support/random_tensors.h"

namespace retain {
namespace {

using testing::error_of;
using ::testing::HasSubstr;
using testing::randn;

/// h_t = tanh(w h_{t-1} + x_t), y_t = h_t; and a part that counts the steps since the reset.
class ToyCore : public Core {
 public:
  explicit ToyCore(int64_t d_model) : weight_(register_parameter("weight", randn({d_model}, 1))) {}
  int64_t d_model() const override { return weight_.size(0); }
  State initial_state(int64_t batch) const override {
    return State(batch,
                 {{"hidden", at::zeros({batch, d_model()}, weight_.options().requires_grad(false))},
                  {"age", at::zeros({batch}, at::kLong)}});
  }
  CoreOutput forward(const Tensor& x, const State& state, const Tensor& reset = {}) override {
    check_state("ToyCore", state, initial_state(x.size(1)));
    auto hidden = state.at("hidden"), age = state.at("age");
    std::vector<Tensor> y;
    for (int64_t t = 0; t < x.size(0); ++t) {
      if (reset.defined()) {
        hidden = hidden.masked_fill(reset[t].unsqueeze(1), 0);
        age = age.masked_fill(reset[t], 0);
      }
      hidden = at::tanh(weight_ * hidden + x[t]);
      age = age + 1;
      y.push_back(hidden);
    }
    return {at::stack(y), State(x.size(1), {{"hidden", hidden}, {"age", age}})};
  }

 private:
  Tensor weight_;
};

constexpr int64_t kSteps = 9, kBatch = 3, kModel = 4;

Tensor some_resets() {
  auto generator = at::detail::createCPUGenerator(4);
  return at::rand({kSteps, kBatch}, generator) < 0.3;
}

TEST(Memory, StepsEqualOneForwardOverTheSequence) {
  const auto core = std::make_shared<ToyCore>(kModel);
  const auto x = randn({kSteps, kBatch, kModel}, 2), reset = some_resets();
  ASSERT_TRUE(reset.any().item<bool>() && !reset.all().item<bool>());
  const auto whole = core->forward(x, core->initial_state(kBatch), reset);
  Memory memory(core, kBatch);
  for (int64_t t = 0; t < kSteps; ++t) {
    const auto y = memory.step(x[t], reset[t]);
    EXPECT_TRUE(at::equal(y, whole.y[t])) << t;
    EXPECT_FALSE(y.requires_grad());
  }
  EXPECT_TRUE(equal(memory.get(), whole.state.detach()));
}

TEST(Memory, WithoutResetNothingIsCleared) {
  const auto core = std::make_shared<ToyCore>(kModel);
  const auto x = randn({kSteps, kBatch, kModel}, 2);
  Memory memory(core, kBatch);
  for (int64_t t = 0; t < kSteps; ++t) memory.step(x[t]);
  EXPECT_TRUE(equal(memory.get(), core->forward(x, core->initial_state(kBatch)).state.detach()));
}

TEST(Memory, StepsOfEveryCoreFollowItsSequence) {
  const auto x = randn({kSteps, kBatch, 8}, 2), reset = some_resets();
  for (const auto& name : core_names()) {
    at::manual_seed(1);
    const auto core = make_core({.name = name, .d_model = 8, .n_layers = 2, .d_state = 4});
    at::NoGradGuard no_grad;
    const auto whole = core->forward(x, core->initial_state(kBatch), reset);
    Memory memory(core, kBatch);
    std::vector<Tensor> y;
    for (int64_t t = 0; t < kSteps; ++t) y.push_back(memory.step(x[t], reset[t]));
    EXPECT_LE(testing::relative_error(at::stack(y), whole.y), 1e-6) << name;
    const auto last = memory.get();
    for (const auto& [part, value] : whole.state.parts()) {
      EXPECT_LE(testing::relative_error(last.at(part), value), 1e-6) << name << " " << part;
    }
  }
}

TEST(Memory, GetIsACopyAndSetGoesBackToIt) {
  Memory memory(std::make_shared<ToyCore>(kModel), kBatch);
  const auto x = randn({2, kBatch, kModel}, 3);
  memory.step(x[0]);
  const auto saved = memory.get();
  const auto copy = saved.clone();
  const auto y = memory.step(x[1]);
  EXPECT_TRUE(equal(saved, copy));
  EXPECT_FALSE(equal(memory.get(), saved));
  memory.set(saved);
  EXPECT_TRUE(equal(memory.get(), saved));
  EXPECT_TRUE(at::equal(memory.step(x[1]), y));
  EXPECT_TRUE(equal(saved, copy));  // set() copied in
}

TEST(Memory, ACopyGoesItsOwnWay) {
  const auto x = randn({2, kBatch, kModel}, 3);
  std::vector<Memory> memories(3, Memory(std::make_shared<ToyCore>(kModel), kBatch));
  memories[0].step(x[0]);
  EXPECT_FALSE(equal(memories[0].get(), memories[1].get()));
  memories[2] = memories[0];
  EXPECT_TRUE(equal(memories[0].get(), memories[2].get()));
  memories[2].step(x[1]);
  EXPECT_FALSE(equal(memories[0].get(), memories[2].get()));
}

TEST(Memory, ZeroForgetsTheMaskedRows) {
  Memory memory(std::make_shared<ToyCore>(kModel), kBatch);
  memory.set(State(kBatch,
                   {{"hidden", at::full({kBatch, kModel}, std::numeric_limits<float>::quiet_NaN())},
                    {"age", at::full({kBatch}, 5, at::kLong)}}));
  memory.zero(at::tensor({1, 0, 1}).to(at::kBool));
  EXPECT_TRUE(at::equal(memory.get().at("age"), at::tensor({0, 5, 0}, at::kLong)));
  EXPECT_TRUE(at::equal(memory.get().at("hidden")[2], at::zeros({kModel})));
  memory.zero();
  EXPECT_TRUE(equal(memory.get(), ToyCore(kModel).initial_state(kBatch)));
}

TEST(Memory, AResetStepEqualsAFreshStep) {
  const auto core = std::make_shared<ToyCore>(kModel);
  const auto x = randn({kBatch, kModel}, 6);
  Memory used(core, kBatch), fresh(core, kBatch);
  used.set(
      State(kBatch, {{"hidden", at::full({kBatch, kModel}, std::numeric_limits<float>::infinity())},
                     {"age", at::full({kBatch}, 9, at::kLong)}}));
  EXPECT_TRUE(at::equal(used.step(x, at::ones({kBatch}, at::kBool)), fresh.step(x)));
  EXPECT_TRUE(equal(used.get(), fresh.get()));
}

/// Hands its own state on, so that a test sees which storage Memory passes in.
class SpyCore : public ToyCore {
 public:
  using ToyCore::ToyCore;
  CoreOutput forward(const Tensor& x, const State& state, const Tensor& reset = {}) override {
    seen.push_back(state.at("hidden").data_ptr());
    return ToyCore::forward(x, state, reset);
  }
  std::vector<void*> seen;
};

TEST(Memory, StorageStaysWhereItIs) {
  const auto core = std::make_shared<SpyCore>(kModel);
  Memory memory(core, kBatch);
  const auto x = randn({kBatch, kModel}, 6);
  memory.step(x);
  memory.step(x, at::ones({kBatch}, at::kBool));
  memory.set(core->initial_state(kBatch));
  memory.step(x);
  memory.zero();
  memory.zero(at::ones({kBatch}, at::kBool));
  memory.to(at::kCPU);
  memory.step(x);
  EXPECT_THAT(core->seen, ::testing::Each(core->seen.front()));
  EXPECT_NE(memory.get().at("hidden").data_ptr(), core->seen.front());
}

TEST(Memory, AnEmptyBatchSteps) {
  Memory memory(std::make_shared<ToyCore>(kModel), 0);
  EXPECT_EQ(memory.step(at::zeros({0, kModel})).sizes(), at::IntArrayRef({0, kModel}));
}

TEST(Memory, SetRefusesAStateOfAnotherCoreOrBatch) {
  Memory memory(std::make_shared<ToyCore>(kModel), kBatch);
  EXPECT_EQ(error_of([&] {
              memory.set(State(kBatch, {{"ssm", at::zeros({kBatch, 2, 2})}}));
            }),
            "Memory::set: state has no part \"hidden\"; it has: ssm");
  EXPECT_EQ(error_of([&] { memory.set(ToyCore(kModel).initial_state(2)); }),
            "Memory::set: state part \"hidden\" must be [3, 4], got [2, 4]");
  EXPECT_THAT(error_of([&] { memory.set(ToyCore(5).initial_state(kBatch)); }),
              HasSubstr("got [3, 5]"));
  EXPECT_THAT(error_of([&] { memory.set(memory.get().to(at::kMeta)); }),
              HasSubstr("must be on cpu, got meta"));
}

TEST(Memory, BadArgumentsAreNamed) {
  const auto core = std::make_shared<ToyCore>(kModel);
  Memory memory(core, kBatch);
  EXPECT_EQ(error_of([&] {
              memory.step(at::zeros({kBatch, 5}));
            }),
            "Memory::step: x must be [B, d_model] = [3, 4], got [3, 5]");
  EXPECT_THAT(error_of([&] {
                memory.step(at::zeros({1, kBatch, kModel}));
              }),
              HasSubstr("got [1, 3, 4]"));
  EXPECT_THAT(error_of([&] { memory.step(Tensor()); }), HasSubstr("x must be [B, d_model]"));
  const auto x = at::zeros({kBatch, kModel});
  EXPECT_EQ(error_of([&] { memory.step(x, at::zeros({kBatch})); }),
            "Memory::step: reset must be [B] = [3] bool, got [3] float32");
  EXPECT_THAT(error_of([&] { memory.step(x, at::zeros({2}, at::kBool)); }),
              HasSubstr("got [2] bool"));
  EXPECT_THAT(error_of([&] { Memory(nullptr, 1); }), HasSubstr("core must not be null"));
  EXPECT_THAT(error_of([&] { Memory(core, -1); }),
              HasSubstr("batch_size must be 0 or more, got -1"));
}

TEST(Memory, DifferentDevicesAreNamed) {
  Memory memory(std::make_shared<ToyCore>(kModel), kBatch);
  memory.to(at::kMeta);
  EXPECT_THAT(error_of([&] {
                memory.step(at::zeros({kBatch, kModel}));
              }),
              HasSubstr("Memory::step: x is on cpu and the memory on meta"));
  EXPECT_THAT(error_of([&] {
                memory.step(at::zeros({kBatch, kModel}, at::kMeta));
              }),
              HasSubstr("ToyCore: state part \"hidden\" must be on cpu, got meta"));
}

TEST(MemoryCuda, GetSetAndZeroAreThoseOfTheCpu) {
  RETAIN_NEEDS_CUDA();
  for (const int64_t width : {8, 9}) {
    for (const auto& name : core_names()) {
      const auto make = [&] {
        at::manual_seed(1);
        return make_core({.name = name, .d_model = width, .n_layers = 40, .d_state = 3});
      };
      const auto core = make(), twin = make();
      const auto x = randn({2, kBatch, width}, 2), mask = at::tensor({1, 0, 1}).to(at::kBool);
      Memory there(twin, kBatch);
      there.step(x[0]);
      const auto taken = there.get();
      core->to(at::kCUDA);
      Memory here(core, kBatch);
      here.set(taken.to(at::kCUDA));
      EXPECT_TRUE(equal(here.get().to(at::kCPU), taken)) << name;
      here.zero(mask.to(at::kCUDA));
      there.zero(mask);
      EXPECT_TRUE(equal(here.get().to(at::kCPU), there.get())) << name;
      here.step(x[1].to(at::kCUDA));
      there.step(x[1]);
      const auto got = here.get().to(at::kCPU), expected = there.get();
      for (const auto& [part, value] : expected.parts())
        EXPECT_LE(testing::relative_error(got.at(part), value), 1e-5) << name << " " << part;
    }
  }
}

}  // namespace
}  // namespace retain
