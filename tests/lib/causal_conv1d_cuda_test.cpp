#include <gtest/gtest.h>

#include <array>

#include "lib/causal_conv1d_problem.h"
#include "support/cuda.h"

namespace retain {
namespace {

using namespace testing;

/// Outputs and gradients where the tensors lie.
Outcome run(const ConvProblem& p, const Tensors& inputs, const at::Tensor& reset) {
  return differentiate(op_of(causal_conv1d, p, reset), inputs);
}

TEST(CausalConv1dCuda, AgreesWithReferenceWhereverResetsLie) {
  RETAIN_NEEDS_CUDA();
  for (const auto& [D, K] : std::vector<std::array<int64_t, 2>>{{36, 4}, {20, 2}, {7, 3}, {8, 6}}) {
    const ConvProblem p{37, 3, D, K};
    for (const int64_t at : {0, 1, 2, 7, 8, 9, 18, 35, 36, -1}) {
      SCOPED_TRACE(::testing::Message() << D << " " << K << " reset at " << at);
      auto reset = at::zeros({p.T, p.B}, at::kBool);
      if (at < 0) {
        reset.fill_(true);
      } else {
        reset[at][1].fill_(true);
      }
      expect_matches_reference(on_cuda(op_of(causal_conv1d, p, reset)),
                               op_of(causal_conv1d_reference, p, reset), inputs_of(p), at::kFloat,
                               1e-6, 1e-5);
    }
  }
}

TEST(CausalConv1dCuda, DoubleRunsTheReference) {
  RETAIN_NEEDS_CUDA();
  const ConvProblem p{9, 2, 6, 4};
  expect_matches_reference(on_cuda(kernel(p)), reference(p), inputs_of(p), at::kDouble, 1e-14,
                           1e-13);
}

TEST(CausalConv1dCuda, AnyByteButZeroIsAReset) {
  RETAIN_NEEDS_CUDA();
  const ConvProblem p{37, 3, 12, 4};
  const auto reset = cuda(random_mask({p.T, p.B}, 0.2, 5));
  const auto twos = (reset.to(at::kByte) * 2).view(at::kBool);
  const auto in = cuda(to(inputs_of(p), at::kFloat));
  const auto expected = run(p, in, reset), got = run(p, in, twos);
  expect_bit_equal(got, expected);
}

TEST(CausalConv1dCuda, HalfActivationsTakeFloatWeightsAndState) {
  RETAIN_NEEDS_CUDA();
  const ConvProblem p{11, 2, 12, 4};
  auto in = cuda(to(inputs_of(p), at::kBFloat16));
  const auto expected = op_of(causal_conv1d, p, reset_of(p))(in);
  for (size_t i = 1; i < in.size(); ++i) in[i] = in[i].to(at::kFloat);
  expect_bit_equal(op_of(causal_conv1d, p, reset_of(p))(in), expected);
  const auto gradients = run(p, in, reset_of(p)).gradients;
  for (size_t i = 0; i < in.size(); ++i) {
    EXPECT_EQ(gradients[i].scalar_type(), in[i].scalar_type());
  }
}

TEST(CausalConv1dCuda, FiveRunsAreTheSameBits) {
  RETAIN_NEEDS_CUDA();
  for (const int64_t K : {4, 6}) {
    const ConvProblem p{513, 33, 132, K};
    const auto in = cuda(to(inputs_of(p), at::kFloat));
    const auto reset = cuda(reset_of(p));
    expect_same_in_five_runs(op_of(causal_conv1d, p, reset), in);
  }
}

TEST(CausalConv1dCuda, MoreRowsThanAGridIsWide) {
  RETAIN_NEEDS_CUDA();
  const auto x = cuda(randn({2, 70001, 8}, 1)).requires_grad_(), weight = cuda(randn({8, 4}, 2));
  const auto [y, last] = causal_conv1d(x, weight, {}, true);
  const auto dx = torch::autograd::grad({y.sum()}, {x})[0];
  const auto tail = x.detach().narrow(1, 70000, 1).requires_grad_();
  const auto [tail_y, tail_last] = causal_conv1d(tail, weight, {}, true);
  const auto tail_dx = torch::autograd::grad({tail_y.sum()}, {tail})[0];
  expect_bit_equal(y.narrow(1, 70000, 1).contiguous(), tail_y);
  expect_bit_equal(dx.narrow(1, 70000, 1).contiguous(), tail_dx);
}

TEST(CausalConv1dCuda, TheLastStepsOfAHugeTensorAreRight) {
  RETAIN_NEEDS_CUDA();
  const int64_t T = 2100, B = 1025, D = 1024;  // more than 2^31 elements
  const auto x = at::randn({T, B, D}, at::TensorOptions(at::kCUDA).dtype(at::kBFloat16));
  const auto dy = at::zeros_like(x);
  dy.narrow(0, T - 5, 5).normal_();
  for (const int64_t K : {4, 6}) {
    const auto weight = cuda(randn({D, K}, 2)).requires_grad_();
    const auto run = [&](int64_t steps) {
      const auto part = x.slice(0, T - steps).detach().requires_grad_();
      const auto [y, last] = causal_conv1d(part, weight, {}, true);
      const auto gradients = torch::autograd::grad({y}, {part, weight}, {dy.slice(0, T - steps)});
      return Tensors{y.detach().slice(0, -5), last.detach(), gradients[0].slice(0, -10),
                     gradients[1]};
    };
    const auto whole = run(T), alone = run(20);
    for (const size_t i : {0, 1, 2}) expect_bit_equal(whole[i], alone[i]);
    expect_close({whole[3]}, {alone[3]}, 1e-5);
  }
}

}  // namespace
}  // namespace retain
