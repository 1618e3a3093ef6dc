#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <limits>
#include <new>

#include "envs/play.h"
#include "envs/worlds.h"
#include "support/errors.h"

// The driver's doors: what it refuses, and what it keeps.

namespace retain {
namespace {

using namespace retain::testing;
using ::testing::HasSubstr;

TEST(VectorEnv, ActionsOfAnotherShapeTypeOrRangeAreNamed) {
  auto env = vectorize(Catch{}, 3, 1);
  env->reset();
  const auto longs = at::kLong;
  EXPECT_THAT(error_of([&] { env->step({}); }), HasSubstr("catch.step: action is undefined"));
  EXPECT_THAT(error_of([&] { env->step(at::zeros({3})); }),
              HasSubstr("catch.step: action must be int64, got float"));
  EXPECT_THAT(error_of([&] { env->step(at::zeros({4}, longs)); }),
              HasSubstr("catch.step: action must be [3], got [4]"));
  EXPECT_THAT(error_of([&] {
                env->step(at::zeros({3, 1}, longs));
              }),
              HasSubstr("catch.step: action must be [3], got [3, 1]"));
  EXPECT_THAT(error_of([&] { env->sweep(at::zeros({3}, longs)); }),
              HasSubstr("catch.sweep: action must be [3, 3], got [3]"));
  EXPECT_THAT(error_of([&] {
                env->step(at::tensor({0, 3, 0}, at::kLong));
              }),
              HasSubstr("catch.step: actions must be in [0, 3), got 3"));
  EXPECT_THAT(error_of([&] {
                env->step(at::tensor({0, -1, 0}, at::kLong));
              }),
              HasSubstr("catch.step: actions must be in [0, 3), got -1"));
  EXPECT_THAT(error_of([&] { env->step(at::zeros({3}, longs).to("meta")); }),
              HasSubstr("catch.step: action must be on the CPU, got meta"));
}

TEST(VectorEnv, ActionsOfSeveralComponentsAreCheckedEach) {
  auto dials = vectorize(Dials{}, 2, 1);
  dials->reset();
  EXPECT_THAT(error_of([&] { dials->step(at::zeros({2}, at::kLong)); }),
              HasSubstr("dials.step: action must be [2, 2], got [2]"));
  EXPECT_THAT(error_of([&] {
                dials->step(at::tensor({0, 2, 2, 0}, at::kLong).view({2, 2}));
              }),
              HasSubstr("dials.step: actions must be in [0, 2), got 2"));
  auto drift = vectorize(Drift{}, 2, 1);
  drift->reset();
  EXPECT_THAT(error_of([&] {
                drift->step(at::zeros({2, 2}, at::kLong));
              }),
              HasSubstr("drift.step: action must be float32, got"));
  const Tensor nan = at::full({2, 2}, std::numeric_limits<float>::quiet_NaN());
  EXPECT_THAT(error_of([&] { drift->step(nan); }),
              HasSubstr("drift.step: actions must be finite, got nan"));
}

TEST(VectorEnv, AnIllegalActionIsNamedAndChangesNothing) {
  auto env = vectorize(Recall{.horizon = 3}, 2, 1);
  env->reset();
  const std::vector<uint8_t> before = env->save();
  EXPECT_THAT(error_of([&] {
                env->step(at::tensor({0, 2}, at::kLong));
              }),
              HasSubstr("recall.step: action 2 of environment 1 is not legal now"));
  EXPECT_EQ(env->save(), before);
  EXPECT_THAT(error_of([&] {
                env->sweep(at::tensor({0, 0, 0, 0, 1, 0}, at::kLong).view({3, 2}));
              }),
              HasSubstr("recall.sweep: action 1 of environment 0 is not legal at row 2"));
}

TEST(VectorEnv, StridedActionsAreReadAsTheyAre) {
  auto env = vectorize(Catch{}, 4, 1), twin = vectorize(Catch{}, 4, 1);
  env->reset(), twin->reset();
  const Tensor actions =
      at::tensor({0, 2, 1, 2, 2, 0, 0, 1}, at::kLong).view({4, 2}).t();  // [2, 4]
  EXPECT_TRUE(same(env->sweep(actions), twin->sweep(actions.contiguous())));
}

TEST(VectorEnv, ASweepOfNothingChangesNothing) {
  auto env = vectorize(Recall{.horizon = 3}, 2, 1);
  env->reset();
  const std::vector<uint8_t> before = env->save();
  const TimeSteps none = env->sweep(at::zeros({0, 2}, at::kLong));
  EXPECT_EQ(none.observation.sizes(), (std::vector<int64_t>{0, 2, 6}));
  EXPECT_EQ(none.legal_actions.sizes(), (std::vector<int64_t>{0, 2, 4}));
  EXPECT_EQ(env->save(), before);
}

TEST(VectorEnv, BeforeTheFirstResetThereIsNothingCurrentAndAStepBegins) {
  auto env = vectorize(Recall{.horizon = 3}, 2, 1), twin = vectorize(Recall{.horizon = 3}, 2, 1);
  EXPECT_THAT(error_of([&] { env->current(); }), HasSubstr("recall.current: call reset() first"));
  EXPECT_TRUE(same(env->step(at::tensor({3, 3}, at::kLong)), twin->reset()));
}

TEST(VectorEnv, BothDriversGiveTheSame) {
  const TMaze world{.horizon = 4, .oracle_offset = 1};
  auto plain = vectorize(world, 7, 5);
  auto boxed = vectorize([&](int64_t) { return std::make_unique<Boxed<TMaze>>(world); }, 7, 5);
  const Play a = play(*plain, 30), b = play(*boxed, 30);
  for (size_t t = 0; t < a.steps.size(); ++t) EXPECT_TRUE(same(a.steps[t], b.steps[t]));
}

TEST(VectorEnv, EveryEnvironmentIsMadeForItsIndex) {
  std::vector<int64_t> made;
  const auto make = [&](int64_t index) {
    made.push_back(index);
    return std::make_unique<Boxed<Catch>>(Catch{});
  };
  vectorize(make, 3, 1, 10);
  EXPECT_EQ(made, (std::vector<int64_t>{10, 11, 12}));
  EXPECT_THAT(error_of([&] { vectorize([](int64_t) { return nullptr; }, 3, 1); }),
              HasSubstr("vectorize: make(0) gave no environment"));
}

TEST(VectorEnv, NumbersOfEnvironmentsThatCannotBeAreNamed) {
  EXPECT_EQ(error_of([] { vectorize(Catch{}, 0, 1); }), "num_envs must be at least 1, got 0");
  EXPECT_EQ(error_of([] { vectorize(Catch{}, -2, 1); }), "num_envs must be at least 1, got -2");
  EXPECT_EQ(error_of([] { vectorize([](int64_t) { return nullptr; }, 0, 1); }),
            "num_envs must be at least 1, got 0");
  EXPECT_EQ(error_of([] { vectorize(Catch{}, 1, 1, -1); }),
            "first_environment must not be negative, got -1");
  EXPECT_EQ(error_of([] { vectorize(Catch{}, 1, 1, int64_t{1} << 40); }),
            "first_environment + num_envs must be at most 2^40, got 1099511627776 + 1");
  EXPECT_THAT(error_of([] { uniforms(1, Stream::world, int64_t{1} << 48, 1, 1, 1); }),
              HasSubstr("first_step + num_steps must be at most 2^48"));
  EXPECT_EQ(error_of([] { vectorize(Recall{.horizon = 0}, 1, 1); }),
            "recall: horizon must be at least 1, got 0");
}

TEST(VectorEnv, LoadRefusesOtherBytesAndSaysWhatDiffers) {
  const auto saved = [](auto world, int64_t num_envs) {
    auto env = vectorize(world, num_envs, 1);
    env->reset();
    return env->save();
  };
  auto env = vectorize(Recall{.horizon = 3}, 2, 1);
  env->reset();
  const std::vector<uint8_t> before = env->save();
  const auto load = [&](const std::vector<uint8_t>& bytes) {
    return error_of([&] { env->load(bytes); });
  };

  EXPECT_THAT(load(saved(Rewrite{.horizon = 3}, 2)),
              HasSubstr("recall.load: the world differs: recall here, rewrite saved"));
  EXPECT_THAT(load(saved(Recall{.horizon = 4}, 2)), HasSubstr("the options differ: horizon=3"));
  EXPECT_THAT(load(saved(Recall{.horizon = 3}, 3)), HasSubstr("num_envs differs: 2 here, 3 saved"));
  EXPECT_THAT(load({}), HasSubstr("not the bytes of saved environments"));
  EXPECT_THAT(load(std::vector<uint8_t>(200, 255)),
              HasSubstr("not the bytes of saved environments"));
  std::vector<uint8_t> longer = before;
  longer.push_back(0);
  EXPECT_THAT(load(longer), HasSubstr("1 bytes too many"));
  for (size_t size = 0; size < before.size(); size += 7) {
    EXPECT_NE(load({before.begin(), before.begin() + size}), "") << size;
  }
  for (size_t i = 0; i < before.size(); ++i) {
    std::vector<uint8_t> damaged = before;
    damaged[i] ^= 1 << i % 8;
    EXPECT_NE(load(damaged), "") << i;
  }
  EXPECT_EQ(env->save(), before);
}

TEST(VectorEnv, TheSameWorldsGiveTheSameBytes) {  // padding inside a struct says nothing
  const auto saved = [](int junk) {
    alignas(TMaze) unsigned char place[sizeof(TMaze)];
    std::memset(place, junk, sizeof place);
    auto env = vectorize(*new (place) TMaze{.horizon = 3, .recoverable = true}, 4, 1);
    env->reset();
    return env->save();
  };
  EXPECT_EQ(saved(0), saved(255));
}

TEST(VectorEnv, EnvironmentsOfDifferentSpecsAreRefused) {
  const auto make = [](int64_t i) {
    return std::make_unique<Boxed<Catch>>(Catch{.columns = i == 2 ? 7 : 5});
  };
  EXPECT_THAT(error_of([&] { vectorize(make, 3, 1); }),
              HasSubstr("make(2) gave catch with 70 observations"));
  EXPECT_EQ(vectorize(make, 2, 1)->num_envs(), 2);
}

/// Refuses to be loaded when its turn comes.
class Stubborn : public Boxed<Catch> {
 public:
  explicit Stubborn(bool refuses) : Boxed<Catch>(Catch{}), refuses_(refuses) {}
  void load(const std::vector<uint8_t>& bytes) override {
    if (std::exchange(refuses_, false)) throw std::runtime_error("no");
    Boxed<Catch>::load(bytes);
  }

 private:
  bool refuses_;
};

TEST(VectorEnv, ALoadThatFailsHalfwayIsTakenBack) {
  auto env = vectorize([](int64_t i) { return std::make_unique<Stubborn>(i == 2); }, 4, 1);
  auto other = vectorize([](int64_t) { return std::make_unique<Stubborn>(false); }, 4, 2);
  env->reset(), other->reset();
  const std::vector<uint8_t> before = env->save();
  EXPECT_EQ(error_of([&] { env->load(other->save()); }), "no");
  EXPECT_EQ(env->save(), before);
}

}  // namespace
}  // namespace retain
