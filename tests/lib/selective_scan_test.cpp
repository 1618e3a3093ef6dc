#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

#include "lib/selective_scan_problem.h"
#include "support/errors.h"
#include "support/gradcheck.h"

namespace retain {
namespace {

using ::testing::HasSubstr;
using namespace testing;

double softplus(double x) { return x > 20 ? x : std::log1p(std::exp(x)); }

TEST(SelectiveScan, ReferenceIsTheNaiveLoop) {
  const ScanProblem p{6, 3, 8, 3, 2};
  const auto in = arguments_of(p, at::kDouble);
  ASSERT_TRUE(in.reset.any().item<bool>());
  const auto at3 = [](const at::Tensor& t, int64_t i, int64_t j, int64_t k) {
    return t[i][j][k].item<double>();
  };
  auto y = at::zeros_like(in.u), h = in.initial_state.clone();
  for (int64_t t = 0; t < p.T; ++t) {
    for (int64_t b = 0; b < p.B; ++b) {
      for (int64_t d = 0; d < p.D; ++d) {
        const double u = at3(in.u, t, b, d), z = at3(in.z, t, b, d);
        const double delta = softplus(at3(in.delta, t, b, d) + in.delta_bias[d].item<double>());
        const int64_t g = d / (p.D / p.G);
        double sum = in.D[d].item<double>() * u;
        for (int64_t n = 0; n < p.N; ++n) {
          const double before = in.reset[t][b].item<bool>() ? 0 : at3(h, b, d, n);
          const double after = std::exp(delta * in.A[d][n].item<double>()) * before +
                               delta * at3(in.B[t], b, g, n) * u;
          h[b][d][n] = after;
          sum += at3(in.C[t], b, g, n) * after;
        }
        y[t][b][d] = sum * z / (1 + std::exp(-z));
      }
    }
  }
  expect_close(in.run_reference(), {y, h}, 1e-14);
}

TEST(SelectiveScan, KernelAgreesWithReferenceOverShapes) {
  for (const auto& p : odd_shapes()) {
    SCOPED_TRACE(::testing::Message() << p.T << " " << p.B << " " << p.D << " " << p.N);
    expect_matches_reference(kernel(p), reference(p), inputs_of(p), at::kFloat, 1e-6, 1e-5);
    expect_matches_reference(kernel(p), reference(p), inputs_of(p), at::kDouble, 1e-14, 1e-13);
  }
}

TEST(SelectiveScan, KernelAgreesWithReferenceForEveryCombinationOfOptions) {
  for (const auto& options : all_options()) {
    const ScanProblem p{18, 2, 18, 3, 1, options};
    expect_matches_reference(kernel(p), reference(p), inputs_of(p), at::kFloat, 1e-6, 1e-5);
  }
}

TEST(SelectiveScan, HalfTypesKeepTheirPrecision) {
  const ScanProblem p{33, 3, 20, 16};
  expect_half_types_keep_precision(kernel(p), reference(p), inputs_of(p));
}

TEST(SelectiveScan, HalfActivationsTakeFloatWeightsAndState) {
  const ScanProblem p{5, 2, 4, 3};
  auto in = arguments_of(p, at::kHalf);
  const auto expected = in.run();
  for (auto* tensor : {&in.A, &in.D, &in.delta_bias, &in.initial_state}) {
    *tensor = tensor->to(at::kFloat);
  }
  expect_bit_equal(in.run(), expected);
}

TEST(SelectiveScan, GradientsAreTheDifferences) {
  for (const auto& options : {ScanOptions{}, kBare, ScanOptions{.reset = false}}) {
    const ScanProblem p{5, 2, 4, 2, 2, options};
    expect_gradcheck(kernel(p), inputs_of(p));
    expect_gradcheck(reference(p), inputs_of(p));
  }
}

TEST(SelectiveScan, GradientsFlowThroughEitherOutputAlone) {
  for (const int64_t T : {1, 3, 17}) {
    const ScanProblem p{T, 2, 3, 2};
    for (const size_t output : {0, 1}) {
      expect_gradcheck([&](const Tensors& in) { return Tensors{kernel(p)(in)[output]}; },
                       inputs_of(p));
    }
  }
}

TEST(SelectiveScan, OddLengthsCarryGradientsOutOfTheLastState) {
  for (const int64_t T : {1, 3, 127, 129}) {
    const ScanProblem p{T, 2, 5, 3, 1, {.reset = false}};
    const auto last = [](const Op& op) {
      return [=](const Tensors& in) { return Tensors{op(in)[1]}; };
    };
    // C, D and z do not reach the last state, so only the inputs that do are asked.
    const auto run = [&](const Op& op, at::ScalarType dtype) {
      auto in = to(inputs_of(p), dtype);
      const Tensors asked = {in[kU], in[kDelta], in[kA], in[kB], in.back()};
      for (auto tensor : asked) tensor.requires_grad_();
      return torch::autograd::grad({last(op)(in)[0].square().sum()}, asked);
    };
    expect_close(run(kernel(p), at::kFloat), run(reference(p), at::kDouble), 1e-5);
  }
}

TEST(SelectiveScan, SoftplusIsExactFromDeepNegativeToTheIdentity) {
  const std::vector<double> values = {-20, -17, -15, -12, -10, -1, 0, 1, 19.999, 20, 20.001, 60};
  for (const auto dtype : {at::kFloat, at::kDouble}) {
    const double tolerance = dtype == at::kFloat ? 4e-7 : 1e-15;
    auto delta = at::tensor(values, dtype).requires_grad_();
    const auto got = last_size(delta.view({1, 1, -1}), 1).view({-1});
    const auto slope = torch::autograd::grad({got.sum()}, {delta})[0];
    for (size_t i = 0; i < values.size(); ++i) {
      const double x = delta[i].item<double>();
      const double expected_slope = x > 20 ? 1 : 1 / (1 + std::exp(-x));
      EXPECT_NEAR(got[i].item<double>() / softplus(x), 1, tolerance) << x;
      EXPECT_NEAR(slope[i].item<double>() / expected_slope, 1, tolerance) << x;
    }
    EXPECT_EQ(got[10].item<double>(), delta[10].item<double>());
    EXPECT_EQ(slope[11].item<double>(), 1);
  }
}

TEST(SelectiveScan, NonNegativeAIsDefined) {
  const ScanProblem p{9, 2, 5, 3};
  for (const double scale : {0.0, -0.3}) {
    auto inputs = inputs_of(p);
    inputs[kA] = scale * inputs[kA];
    expect_matches_reference(kernel(p), reference(p), inputs, at::kFloat, 1e-6, 1e-5);
  }
}

TEST(SelectiveScan, ExtremeDecaysAreExact) { expect_extreme_decays_are_exact(at::kCPU); }

TEST(SelectiveScan, StateDoesNotDriftOverManySteps) {
  // Slow channels: what a step forgets, 1 - exp(delta A), goes down to 1e-4.
  const ScanProblem p{100000, 1, 16, 4, 1, {.reset = false}};
  auto narrow = to(inputs_of(p), at::kFloat);
  narrow[kDelta] = narrow[kDelta] - at::linspace(0, 6, p.D);
  const auto got = differentiate(kernel(p), narrow);
  const auto expected = differentiate(kernel(p), to(narrow, at::kDouble));
  expect_close(got.outputs, expected.outputs, 1e-6);
  expect_close(got.gradients, expected.gradients, 1e-5);
}

TEST(SelectiveScan, ReadsStridedViews) {
  const ScanProblem p{18, 5, 20, 6, 2};
  const auto in = to(inputs_of(p), at::kFloat);
  const auto expected = differentiate(kernel(p), in);
  const auto batch_first = [](const at::Tensor& x) {
    return x.transpose(0, 1).contiguous().transpose(0, 1);
  };
  const auto within_wider = [](const at::Tensor& x) {
    return at::cat({x, x, x}, -1).narrow(-1, x.size(-1), x.size(-1));
  };
  const auto outside_in = [](const at::Tensor& x) {
    return x.movedim(-1, 0).contiguous().movedim(0, -1);
  };
  for (const auto& view : std::vector<std::function<at::Tensor(const at::Tensor&)>>{
           batch_first, within_wider, outside_in}) {
    auto viewed = in;
    for (const size_t i : {size_t{kU}, size_t{kDelta}, size_t{kB}, size_t{kC}, size_t{kZ}}) {
      viewed[i] = view(in[i]);
      ASSERT_FALSE(viewed[i].is_contiguous());
    }
    viewed[kA] = in[kA].t().contiguous().t();
    const auto got = differentiate(kernel(p), viewed);
    expect_bit_equal(got, expected);
  }
}

TEST(SelectiveScan, ReadsExpandedViews) {
  const ScanProblem p{18, 4, 6, 5, 1, {.initial_state = false}};
  auto in = arguments_of(p);
  in.u = in.u.narrow(0, 0, 1).expand({p.T, p.B, p.D});
  in.delta = in.delta.narrow(2, 0, 1).expand({p.T, p.B, p.D});
  in.B = in.B.narrow(1, 0, 1).expand({p.T, p.B, 1, p.N});
  in.C = in.C.narrow(0, 0, 1).expand({p.T, p.B, 1, p.N});
  in.initial_state = randn({1, p.D, p.N}, 3).expand({p.B, p.D, p.N});
  in.reset = in.reset.narrow(1, 0, 1).expand({p.T, p.B});
  auto dense = in;
  for (auto* tensor : {&dense.u, &dense.delta, &dense.B, &dense.C, &dense.initial_state}) {
    *tensor = tensor->contiguous();
  }
  dense.reset = in.reset.contiguous();
  expect_bit_equal(in.run(), dense.run());
}

TEST(SelectiveScan, EmptySequencesAndBatchesWork) {
  for (const auto& [T, B] : std::vector<std::pair<int64_t, int64_t>>{{0, 3}, {4, 0}, {0, 0}}) {
    for (const auto& options : {ScanOptions{}, kBare}) {
      const ScanProblem p{T, B, 5, 2, 1, options};
      const auto in = to(inputs_of(p), at::kFloat);
      const auto got = differentiate(kernel(p), in);
      const auto start = options.initial_state ? in.back() : at::zeros({B, 5, 2});
      expect_bit_equal(got.outputs, reference(p)(in));
      EXPECT_EQ(got.outputs[0].sizes(), (std::vector<int64_t>{T, B, 5}));
      if (T == 0) expect_bit_equal(got.outputs[1], start);
      EXPECT_TRUE((got.gradients[kA] == 0).all().item<bool>());
    }
  }
}

TEST(SelectiveScan, LastStateIsNotTheInitialState) {
  const ScanProblem p{0, 2, 3, 2};
  const auto in = arguments_of(p);
  in.run()[1].fill_(7);
  in.run_reference()[1].fill_(7);
  EXPECT_FALSE((in.initial_state == 7).any().item<bool>());
}

TEST(SelectiveScan, ChangingASavedInputIsAnError) {
  auto in = arguments_of({3, 2, 4, 2});
  in.A.requires_grad_();
  const auto y = in.run()[0];
  in.u.zero_();
  EXPECT_THAT(error_of([&] { y.sum().backward(); }), HasSubstr("modified by an inplace operation"));
}

TEST(SelectiveScan, SecondDerivativesAreRefused) {
  auto in = arguments_of({3, 2, 4, 2});
  in.A.requires_grad_();
  const auto first = torch::autograd::grad({in.run()[0].sum()}, {in.A}, {}, {}, true)[0];
  EXPECT_THAT(error_of([&] { first.sum().backward(); }), HasSubstr("selective_scan_bwd"));
}

}  // namespace
}  // namespace retain
