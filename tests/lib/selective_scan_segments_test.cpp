#include <gtest/gtest.h>

#include "lib/selective_scan_problem.h"
#include "support/cuda.h"
#include "support/errors.h"

namespace retain {
namespace {

using namespace testing;

Tensors states_of(const ScanArguments& a, int64_t every) {
  const auto [y, last, states] =
      selective_scan_states(a.u, a.delta, a.A, a.B, a.C, every, a.D, a.z, a.delta_bias,
                            a.delta_softplus, a.initial_state, a.reset, a.exact);
  return {y, last, states};
}

Tensor decay_of(const ScanArguments& a) {
  return selective_scan_decay(a.delta, a.A, a.delta_bias, a.delta_softplus, a.reset);
}

class SelectiveScanSegments : public OnCpuAndCuda {
 protected:
  ScanArguments arguments(const ScanProblem& p, at::ScalarType dtype = at::kFloat) const {
    const auto reset = reset_of(p);
    return {p.options, here(to(inputs_of(p), dtype)), reset.defined() ? reset.to(device()) : reset};
  }
};
INSTANTIATE_TEST_SUITE_P(On, SelectiveScanSegments, kCpuAndCuda, device_name);

TEST_P(SelectiveScanSegments, StatesAreThoseThatEnterEveryKthStep) {
  for (const int64_t every : {1, 5, 16, 48, 500}) {
    for (const auto& p : {ScanProblem{130, 2, 12, 5}, ScanProblem{33, 1, 20, 16, 2}}) {
      auto a = arguments(p);
      a.exact = true;
      const auto got = states_of(a, every);
      expect_bit_equal({got[0], got[1]}, a.run());
      ASSERT_EQ(got[2].size(0), (p.T + every - 1) / every);
      expect_bit_equal(got[2][0], a.initial_state);
      for (int64_t i = 1; i < got[2].size(0); ++i) {
        auto before = a.steps(0, i * every, a.initial_state);
        expect_bit_equal(got[2][i], before.run()[1]);
      }
    }
  }
}

TEST_P(SelectiveScanSegments, StatesTakeAbsentArgumentsAndNoSteps) {
  const auto bare = arguments({32, 2, 6, 3, 1, kBare});
  EXPECT_EQ(states_of(bare, 16)[2].sizes(), at::IntArrayRef({2, 2, 6, 3}));
  EXPECT_TRUE(at::equal(states_of(bare, 16)[2][0], at::zeros_like(states_of(bare, 16)[1])));
  const auto none = arguments({0, 2, 6, 3});
  for (const int64_t every : {3, 16}) {
    EXPECT_EQ(states_of(none, every)[2].sizes(), at::IntArrayRef({0, 2, 6, 3}));
    expect_bit_equal(states_of(none, every)[1], none.initial_state);
  }
}

TEST_P(SelectiveScanSegments, AStateBeyondTheSequenceIsNotKept) {
  const auto a = arguments({64, 1, 64, 16});
  const auto expected = states_of(a, 64);
  for (const int64_t every : {int64_t{65}, (int64_t{1} << 32) + 16, int64_t{INT64_MAX / 16 * 16}}) {
    expect_bit_equal(states_of(a, every), expected);
  }
}

TEST_P(SelectiveScanSegments, StatesAreWideAndTheirOwn) {
  const auto a = arguments({3, 2, 6, 3}, at::kBFloat16);
  for (const int64_t every : {2, 16}) {
    EXPECT_EQ(states_of(a, every)[2].scalar_type(), at::kFloat) << every;
  }
  for (const auto dtype : {at::kFloat, at::kBFloat16}) {
    const auto none = arguments({0, 2, 6, 3}, dtype);
    for (const int64_t every : {3, 16}) {
      const auto last = states_of(none, every)[1];
      EXPECT_EQ(last.scalar_type(), at::kFloat) << every;
      EXPECT_FALSE(last.is_alias_of(none.initial_state)) << every;
    }
  }
}

TEST_P(SelectiveScanSegments, SegmentsScannedApartJoin) {
  for (const bool with_reset : {false, true}) {
    ScanProblem p{90, 3, 10, 4};
    p.options.reset = with_reset;
    for (const auto& [dtype, tolerance] :
         {std::pair{at::kDouble, 1e-12}, std::pair{at::kFloat, 1e-6}}) {
      const auto whole = arguments(p, dtype);
      auto state = whole.initial_state;
      for (int64_t begin = 0; begin < p.T; begin += 30) {
        const auto part = whole.steps(begin, begin + 30, at::zeros_like(state));
        state = decay_of(part) * state + part.run()[1];
      }
      EXPECT_LE(relative_error(state, whole.run()[1]), tolerance);
    }
  }
}

TEST_P(SelectiveScanSegments, DecayIsTheProductOfDecays) {
  ScanProblem p{200, 2, 6, 3};
  p.options.reset = false;
  const auto exact = arguments(p, at::kDouble), single = arguments(p, at::kFloat);
  auto product = at::ones_like(exact.initial_state);
  for (int64_t t = 0; t < p.T; ++t) {
    const auto step = at::softplus(exact.delta[t] + exact.delta_bias).unsqueeze(-1);
    product = product * (step * exact.A).exp();
  }
  EXPECT_LE(relative_error(decay_of(exact), product), 1e-12);
  EXPECT_LE(relative_error(decay_of(single), product), 1e-4);  // of exponents up to 1e2
  const auto none = arguments({0, 2, 6, 3});
  EXPECT_TRUE(at::equal(decay_of(none), at::ones_like(none.initial_state)));
}

TEST_P(SelectiveScanSegments, StatesAndDecayAreDifferentiable) {
  const ScanProblem p{40, 2, 6, 3};
  const auto loss = [&](bool by_parts) -> Op {
    return [=](const Tensors& in) -> Tensors {
      const ScanArguments a(p.options, in, reset_of(p).to(in[0].device()));
      const auto middle =
          by_parts ? states_of(a, 16)[2][1] : a.steps(0, 16, a.initial_state).run_reference()[1];
      return {a.run()[0], middle, decay_of(a.steps(0, 3, a.initial_state))};
    };
  };
  const auto got = differentiate(on(device(), loss(true)), inputs_of(p));
  const auto expected = differentiate(on(device(), loss(false)), inputs_of(p));
  expect_close(got.outputs, expected.outputs, 1e-12);
  expect_close(got.gradients, expected.gradients, 1e-10);
  expect_matches_reference(on(device(), loss(true)), loss(false), inputs_of(p), at::kFloat, 1e-5,
                           1e-5);
}

TEST(SelectiveScanSegmentsDoor, BadInputIsNamed) {
  const auto a = arguments_of({8, 2, 6, 3});
  expect_error([&] { states_of(a, 0); },
               {"selective_scan_states: every must be at least 1, got 0"});
  auto wrong = a;
  wrong.delta = a.delta.narrow(2, 0, 5);
  expect_error([&] { states_of(wrong, 4); }, {"selective_scan_states: delta must be"});
  expect_error([&] { decay_of(wrong); }, {"selective_scan_decay: A must be", "[5, 3], got [6, 3]"});
}

}  // namespace
}  // namespace retain
