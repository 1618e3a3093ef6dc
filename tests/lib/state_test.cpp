#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <retain/lib/io/checkpoint.h>
#include <retain/lib/state.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>
#include <limits>

#include "support/errors.h"
#include "support/files.h"
#include "support/random_tensors.h"

namespace retain {
namespace {

using ::testing::ElementsAre;
using testing::error_of;
using ::testing::HasSubstr;
using testing::randn;
using testing::TemporaryFolder;

State mamba_state(int64_t batch, uint64_t seed = 1) {
  return State(batch,
               {{"conv", randn({batch, 3, 8}, seed)}, {"ssm", randn({batch, 8, 4}, seed + 1)}});
}

State stack_state(int64_t batch) {
  State state(batch);
  state.insert_layer(0, mamba_state(batch, 1));
  state.insert_layer(1, mamba_state(batch, 5));
  return state;
}

std::vector<std::string> names_of(const State& state) {
  std::vector<std::string> names;
  for (const auto& part : state.parts()) names.push_back(part.first);
  return names;
}

Tensor mask_of(std::initializer_list<bool> rows) {
  auto mask = at::zeros({static_cast<int64_t>(rows.size())}, at::kBool);
  std::copy(rows.begin(), rows.end(), mask.mutable_data_ptr<bool>());
  return mask;
}

TEST(State, TellsItsSizes) {
  const auto state = mamba_state(5);
  EXPECT_EQ(state.batch_size(), 5);
  EXPECT_EQ(state.dim(), 8);
  EXPECT_EQ(state.d_state(), 4);
  EXPECT_EQ(state.num_bytes(), 5 * (3 * 8 + 8 * 4) * 4);
  EXPECT_EQ(State(7).batch_size(), 7);
  EXPECT_EQ(State(7).num_bytes(), 0);
  EXPECT_EQ(stack_state(2).layer(1).dim(), 8);
}

TEST(State, DimNeedsOneSsmPart) {
  EXPECT_EQ(error_of([] {
              State(2, {{"hidden", at::zeros({2, 3})}}).dim();
            }),
            "State::dim: state has no part \"ssm\" [B, d_inner, d_state]; it has: hidden");
  EXPECT_THAT(error_of([] { stack_state(2).d_state(); }),
              HasSubstr("State::d_state: state has more than one"));
  State one_layer(2);
  one_layer.insert_layer(0, mamba_state(2));
  EXPECT_EQ(one_layer.d_state(), 4);
}

TEST(State, NamesItsPartsInOrder) {
  auto state = mamba_state(2);
  EXPECT_TRUE(state.contains("ssm"));
  EXPECT_FALSE(state.contains("ss"));
  state.insert("a", at::zeros({2}));
  EXPECT_THAT(names_of(state), ElementsAre("conv", "ssm", "a"));
  EXPECT_EQ(error_of([&] { state.at("hidden"); }),
            "State::at: no part \"hidden\"; there are: conv, ssm, a");
}

TEST(State, RefusesAPartThatDoesNotFit) {
  auto state = mamba_state(2);
  EXPECT_EQ(error_of([&] {
              state.insert("x", at::zeros({3, 4}));
            }),
            "State::insert: part \"x\" must be [2, ...], got [3, 4]");
  EXPECT_THAT(error_of([&] { state.insert("x", at::zeros({})); }),
              HasSubstr("must be [2, ...], got []"));
  EXPECT_THAT(error_of([&] { state.insert("x", Tensor()); }), HasSubstr("is undefined"));
  EXPECT_THAT(error_of([&] { state.insert("ssm", at::zeros({2})); }),
              HasSubstr("there is a part \"ssm\" already"));
  EXPECT_THAT(error_of([&] { state.insert("", at::zeros({2})); }),
              HasSubstr("name must not be empty"));
  EXPECT_THAT(error_of([&] {
                State(1, {{"x", at::zeros({2})}});
              }),
              HasSubstr("must be [1, ...], got [2]"));
  EXPECT_THAT(names_of(state), ElementsAre("conv", "ssm"));
}

TEST(State, LayersComeBackAsTheyWentIn) {
  const auto state = stack_state(3);
  EXPECT_THAT(names_of(state),
              ElementsAre("layers.0.conv", "layers.0.ssm", "layers.1.conv", "layers.1.ssm"));
  EXPECT_TRUE(equal(state.layer(1), mamba_state(3, 5)));
  EXPECT_EQ(state.layer(2).parts().size(), 0u);
  State ten(1);
  for (int64_t i = 0; i < 11; ++i) ten.insert_layer(i, State(1, {{"h", at::full({1}, i)}}));
  EXPECT_EQ(ten.layer(1).at("h").item<int64_t>(), 1);  // not layer 10's
  EXPECT_EQ(ten.layer(1).parts().size(), 1u);
  EXPECT_THAT(error_of([&] { ten.insert_layer(11, State(2)); }),
              HasSubstr("must have batch size 1, got 2"));
}

TEST(State, CopiesShareCloneAndGetDoNot) {
  const auto state = mamba_state(2);
  State copy = state, clone = state.clone(), detached = state.detach();
  copy.zero();
  EXPECT_EQ(state.at("ssm").abs().max().item<double>(), 0);
  EXPECT_EQ(detached.at("ssm").abs().max().item<double>(), 0);
  EXPECT_TRUE(equal(clone, mamba_state(2)));
}

TEST(State, DetachCutsTheGraphAndCloneKeepsIt) {
  auto leaf = randn({2, 3}, 1).requires_grad_();
  const State state(2, {{"hidden", leaf * 2}});
  EXPECT_FALSE(state.detach().at("hidden").requires_grad());
  const auto gradient = torch::autograd::grad({state.clone().at("hidden").sum()}, {leaf})[0];
  EXPECT_TRUE(at::equal(gradient, at::full({2, 3}, 2.0)));
}

TEST(State, CloneOfAnExpandedPartOwnsEveryRow) {
  auto clone = State(3, {{"hidden", at::ones({1, 2}).expand({3, 2})}}).clone();
  clone.zero(mask_of({true, false, false}));
  EXPECT_EQ(clone.at("hidden").sum().item<double>(), 4);
}

TEST(State, ZeroClearsTheMaskedRowsAndNoOther) {
  auto state = mamba_state(3);
  const auto before = state.clone();
  state.zero(mask_of({false, true, false}));
  const auto kept = at::tensor({0, 2}, at::kLong);
  EXPECT_TRUE(equal(state.rows(kept), before.rows(kept)));
  for (const auto& [name, part] : state.parts())
    EXPECT_EQ(part[1].abs().max().item<double>(), 0) << name;
  state.zero();
  for (const auto& [name, part] : state.parts())
    EXPECT_EQ(part.abs().max().item<double>(), 0) << name;
}

TEST(State, ZeroClearsNanAndInf) {
  for (const double poison :
       {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
    for (const auto& mask : {Tensor(), mask_of({true, true})}) {
      State state(2, {{"hidden", at::full({2, 3}, poison)},
                      {"half", at::full({2, 1, 1}, poison, at::kHalf)}});
      state.zero(mask);
      EXPECT_TRUE(at::equal(state.at("hidden"), at::zeros({2, 3})));
      EXPECT_TRUE(at::equal(state.at("half"), at::zeros({2, 1, 1}, at::kHalf)));
    }
  }
}

TEST(State, ZeroCutsTheGradientOfTheMaskedRows) {
  auto leaf = at::tensor({1.0, std::numeric_limits<double>::quiet_NaN(), 3.0}).requires_grad_();
  State state(3, {{"hidden", leaf * 2}});
  state.zero(mask_of({false, true, false}));
  const auto gradient = torch::autograd::grad({state.at("hidden").sum()}, {leaf})[0];
  EXPECT_TRUE(at::equal(gradient, at::tensor({2.0, 0.0, 2.0})));
}

TEST(State, ZeroRefusesABadMask) {
  auto state = mamba_state(3);
  EXPECT_EQ(error_of([&] { state.zero(at::zeros({3})); }),
            "State::zero: mask must be bool, got float32");
  EXPECT_EQ(error_of([&] { state.zero(mask_of({true})); }),
            "State::zero: mask must be [B] = [3], got [1]");
  EXPECT_THAT(error_of([&] {
                state.zero(mask_of({true, true, true}).view({3, 1}));
              }),
              HasSubstr("got [3, 1]"));
  EXPECT_THAT(error_of([&] { state.zero(at::empty({3}, at::device(at::kMeta).dtype(at::kBool))); }),
              HasSubstr("mask must be on cpu, got meta"));
  EXPECT_TRUE(equal(state, mamba_state(3)));
}

TEST(State, RowsPicksAndSetRowsPutsBack) {
  const auto state = mamba_state(4);
  const auto index = at::tensor({3, 0, 3}, at::kLong);
  const auto picked = state.rows(index);
  EXPECT_EQ(picked.batch_size(), 3);
  EXPECT_TRUE(at::equal(picked.at("ssm")[0], state.at("ssm")[3]));
  EXPECT_TRUE(at::equal(picked.at("conv")[1], state.at("conv")[0]));

  auto target = mamba_state(4, 9);
  const auto untouched = target.rows(at::tensor({1, 2}, at::kLong));
  target.set_rows(at::tensor({3, 0}, at::kLong), picked.rows(at::tensor({0, 1}, at::kLong)));
  EXPECT_TRUE(
      equal(target.rows(at::tensor({0, 3}, at::kLong)), state.rows(at::tensor({0, 3}, at::kLong))));
  EXPECT_TRUE(equal(target.rows(at::tensor({1, 2}, at::kLong)), untouched));
}

TEST(State, RowsOfNoneAreAnEmptyBatch) {
  const auto none = at::zeros({0}, at::kLong);
  auto state = mamba_state(2);
  const auto picked = state.rows(none);
  EXPECT_EQ(picked.batch_size(), 0);
  EXPECT_EQ(picked.at("ssm").sizes(), at::IntArrayRef({0, 8, 4}));
  state.set_rows(none, picked);
  EXPECT_TRUE(equal(state, mamba_state(2)));
  EXPECT_EQ(State(5).rows(at::tensor({4, 4, 1}, at::kLong)).batch_size(), 3);
}

TEST(State, RowsRefusesABadIndex) {
  auto state = mamba_state(3);
  const auto two = state.rows(at::tensor({0, 1}, at::kLong));
  EXPECT_EQ(error_of([&] {
              state.rows(at::tensor({0, 3}, at::kLong));
            }),
            "State::rows: index must be in [0, 3), got 3");
  EXPECT_THAT(error_of([&] { state.rows(at::tensor({-1}, at::kLong)); }), HasSubstr("got -1"));
  EXPECT_EQ(error_of([&] {
              state.rows(at::tensor({0, 1}, at::kInt));
            }),
            "State::rows: index must be [M] int64, got int32 [2]");
  EXPECT_THAT(error_of([&] {
                state.rows(at::zeros({1, 1}, at::kLong));
              }),
              HasSubstr("got int64 [1, 1]"));
  EXPECT_THAT(error_of([&] { state.rows(Tensor()); }),
              HasSubstr("index must be [M] int64, got undefined"));
  EXPECT_EQ(error_of([&] {
              state.set_rows(at::tensor({1, 1}, at::kLong), two);
            }),
            "State::set_rows: index must name a row once, got 1 again");
  EXPECT_EQ(error_of([&] { state.set_rows(at::tensor({1}, at::kLong), two); }),
            "State::set_rows: state part \"conv\" must be [1, 3, 8], got [2, 3, 8]");
  EXPECT_THAT(error_of([&] { state.set_rows(at::tensor({1}, at::kLong), State(1)); }),
              HasSubstr("no part \"conv\""));
  EXPECT_TRUE(equal(state, mamba_state(3)));
}

TEST(State, ToMovesEveryPartAndKeepsDtypes) {
  const State state(2,
                    {{"a", at::zeros({2}, at::kDouble)}, {"b", at::zeros({2, 3}, at::kBFloat16)}});
  const auto moved = state.to(at::kMeta);
  EXPECT_EQ(moved.batch_size(), 2);
  for (const auto& [name, part] : moved.parts()) EXPECT_TRUE(part.is_meta()) << name;
  EXPECT_EQ(moved.at("a").scalar_type(), at::kDouble);
  EXPECT_EQ(moved.at("b").scalar_type(), at::kBFloat16);
  EXPECT_EQ(state.to(at::kCPU).at("a").const_data_ptr(), state.at("a").const_data_ptr());
}

TEST(State, EqualComparesBits) {
  const auto nan = std::numeric_limits<float>::quiet_NaN();
  const auto one = [](const Tensor& part) { return State(part.size(0), {{"x", part}}); };
  EXPECT_TRUE(equal(one(at::full({2}, nan)), one(at::full({2}, nan))));
  EXPECT_FALSE(equal(one(at::full({2}, 0.0)), one(at::full({2}, -0.0))));
  EXPECT_FALSE(equal(one(at::zeros({2})), one(at::zeros({2}, at::kDouble))));
  EXPECT_FALSE(equal(one(at::zeros({2})), one(at::zeros({2, 1}))));
  EXPECT_FALSE(equal(State(2), State(3)));
  EXPECT_FALSE(equal(State(2, {{"x", at::zeros({2})}}), State(2, {{"y", at::zeros({2})}})));
  EXPECT_FALSE(equal(State(2, {{"x", at::zeros({2})}}), State(2)));
  EXPECT_TRUE(equal(one(at::ones({3, 2}).t().contiguous().t()), one(at::ones({3, 2}))));
  EXPECT_TRUE(equal(State(2), State(2)));
}

TEST(State, SaveAndLoadKeepEveryBit) {
  TemporaryFolder folder;
  auto state = stack_state(3);
  state.insert(
      "odd",
      at::full({3, 2}, std::numeric_limits<double>::quiet_NaN(), at::kDouble).t().contiguous().t());
  for (const auto& saved : {state, State(5), mamba_state(0), mamba_state(1)}) {
    saved.save(folder / "state.h5");
    const auto loaded = State::load(folder / "state.h5");
    EXPECT_TRUE(equal(loaded, saved));
    EXPECT_EQ(names_of(loaded), names_of(saved));
  }
}

TEST(State, SavesInsideALargerFile) {
  TemporaryFolder folder;
  const auto first = stack_state(2), second = mamba_state(3);
  CheckpointWriter writer(folder / "a.h5");
  first.save(writer, "state");
  second.save(writer, "workers/1");
  writer.commit();
  const CheckpointReader reader(folder / "a.h5");
  EXPECT_TRUE(equal(State::load(reader, "state"), first));
  EXPECT_TRUE(equal(State::load(reader, "workers/1"), second));
  EXPECT_THAT(error_of([&] { State::load(reader, "other"); }), HasSubstr("\"other/batch_size\""));
}

TEST(State, AStateFileIsNoCheckpointAndViceVersa) {
  TemporaryFolder folder;
  mamba_state(2).save(folder / "state.h5");
  CheckpointWriter writer(folder / "checkpoint.h5");
  mamba_state(2).save(writer, "state");
  writer.commit();
  EXPECT_THAT(error_of([&] { State::load(folder / "checkpoint.h5"); }),
              HasSubstr("checkpoint.h5\": it is a checkpoint file, not a state file"));
  EXPECT_THAT(error_of([&] { CheckpointReader(folder / "state.h5"); }),
              HasSubstr("state.h5\": it is a state file, not a checkpoint file"));
}

TEST(CheckState, NamesThePartTheRuleAndWhatCame) {
  const auto expected = mamba_state(64);
  const auto message = [&](const State& state) {
    return error_of([&] { check_state("Mamba1", state, expected); });
  };
  check_state("Mamba1", mamba_state(64, 7), expected);
  EXPECT_EQ(message(State(64, {{"hidden", at::zeros({64, 8})}})),
            "Mamba1: state has no part \"conv\"; it has: hidden");
  EXPECT_EQ(message(State(64)), "Mamba1: state has no part \"conv\"; it has: none");
  EXPECT_EQ(message(mamba_state(32)),
            "Mamba1: state part \"conv\" must be [64, 3, 8], got [32, 3, 8]");
  EXPECT_EQ(message(State(64, {{"conv", expected.at("conv")}, {"ssm", at::zeros({64, 8, 5})}})),
            "Mamba1: state part \"ssm\" must be [64, 8, 4], got [64, 8, 5]");
  EXPECT_EQ(message(State(
                64, {{"conv", expected.at("conv")}, {"ssm", expected.at("ssm").to(at::kDouble)}})),
            "Mamba1: state part \"ssm\" must be float32, got float64");
  EXPECT_EQ(message(expected.to(at::kMeta)),
            "Mamba1: state part \"conv\" must be on cpu, got meta");
  auto extra = mamba_state(64);
  extra.insert("hidden", at::zeros({64}));
  EXPECT_EQ(message(extra),
            "Mamba1: state has a part \"hidden\" that does not belong here; its parts must be: "
            "conv, ssm");
  EXPECT_EQ(error_of([] { check_state("MLP", State(3), State(2)); }),
            "MLP: state must have batch size 2, got 3");
}

}  // namespace
}  // namespace retain
