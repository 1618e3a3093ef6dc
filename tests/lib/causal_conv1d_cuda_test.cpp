#include <gtest/gtest.h>

#include <array>
#include <limits>

#include "lib/causal_conv1d_problem.h"
#include "support/cuda.h"

namespace retain {
namespace {

using namespace testing;

/// The kernels, with inputs and outputs on the CPU.
Op gpu(const ConvProblem& p) { return on_cuda(kernel(p)); }

/// Outputs and gradients where the tensors lie.
Outcome run(const ConvProblem& p, const Tensors& inputs, const at::Tensor& reset) {
  return differentiate(op_of(causal_conv1d, p, reset), inputs);
}

TEST(CausalConv1dCuda, AgreesWithReferenceOverShapesAndOptions) {
  RETAIN_NEEDS_CUDA();
  for (const auto& [T, B, D, K] : std::vector<std::array<int64_t, 4>>{{1, 1, 1, 4},
                                                                      {1, 17, 8, 2},
                                                                      {2, 3, 68, 4},
                                                                      {2, 3, 67, 4},
                                                                      {3, 2, 20, 3},
                                                                      {33, 1, 5, 1},
                                                                      {33, 9, 132, 3},
                                                                      {129, 2, 64, 4},
                                                                      {127, 5, 260, 2},
                                                                      {300, 2, 23, 9},
                                                                      {2049, 3, 40, 4}}) {
    for (const auto& p : variants({T, B, D, K})) {
      SCOPED_TRACE(::testing::Message() << T << " " << B << " " << D << " " << K);
      expect_matches_reference(gpu(p), reference(p), inputs_of(p), at::kFloat, 1e-6, 1e-5);
      expect_half_types_keep_precision(gpu(p), reference(p), inputs_of(p));
    }
  }
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
  expect_matches_reference(gpu(p), reference(p), inputs_of(p), at::kDouble, 1e-14, 1e-13);
}

TEST(CausalConv1dCuda, GradientsFlowThroughEitherOutputAlone) {
  RETAIN_NEEDS_CUDA();
  for (const size_t output : {0, 1}) {
    for (const auto& p :
         {ConvProblem{2, 3, 8, 4}, ConvProblem{19, 3, 8, 4}, ConvProblem{2, 3, 8, 5}}) {
      const auto in = inputs_of(p);
      const auto alone = [&](const Op& op) -> Op {
        return [=](const Tensors& values) -> Tensors {
          return {op({values[0], in[1].to(values[0].dtype()), in[2].to(values[0].dtype()),
                      values[1]})[output]};
        };
      };
      expect_matches_reference(alone(gpu(p)), alone(reference(p)), {in[0], in[3]}, at::kFloat, 1e-6,
                               1e-5);
    }
  }
}

TEST(CausalConv1dCuda, AnyByteButZeroIsAReset) {
  RETAIN_NEEDS_CUDA();
  const ConvProblem p{37, 3, 12, 4};
  const auto reset = cuda(random_mask({p.T, p.B}, 0.2, 5));
  const auto twos = (reset.to(at::kByte) * 2).view(at::kBool);
  const auto in = cuda(to(inputs_of(p), at::kFloat));
  const auto expected = run(p, in, reset), got = run(p, in, twos);
  expect_bit_equal(got.outputs, expected.outputs);
  expect_bit_equal(got.gradients, expected.gradients);
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

TEST(CausalConv1dCuda, SequenceIsItsStepsBitForBit) {
  RETAIN_NEEDS_CUDA();
  for (const int64_t K : {1, 2, 3, 4, 7}) {
    for (const auto dtype : {at::kFloat, at::kBFloat16}) {
      const ConvProblem p{43, 5, 72, K};
      const auto in = cuda(to(inputs_of(p), dtype));
      const auto reset = cuda(reset_of(p));
      const auto whole = op_of(causal_conv1d, p, reset)(in);
      auto state = in[3].to(at::kFloat);
      for (int64_t t = 0; t < p.T; ++t) {
        auto [y, next] =
            causal_conv1d(in[0].narrow(0, t, 1), in[1], in[2], true, state, reset.narrow(0, t, 1));
        expect_bit_equal(y[0], whole[0][t]);
        state = next;
      }
      expect_bit_equal(state, whole[1]);
    }
  }
}

TEST(CausalConv1dCuda, CutAnywhereAndCarryTheState) {
  RETAIN_NEEDS_CUDA();
  for (const int64_t D : {12, 13}) {
    const ConvProblem p{35, 5, D, 4};
    const auto in = cuda(to(inputs_of(p), at::kFloat));
    const auto reset = cuda(reset_of(p));
    const auto whole = op_of(causal_conv1d, p, reset)(in);
    for (int64_t cut = 0; cut <= p.T; ++cut) {
      const auto part = [&](int64_t begin, int64_t end, const at::Tensor& state) {
        return causal_conv1d(in[0].slice(0, begin, end), in[1], in[2], true, state,
                             reset.slice(0, begin, end));
      };
      const auto [first, middle] = part(0, cut, in[3]);
      const auto [second, last] = part(cut, p.T, middle);
      expect_bit_equal({at::cat({first, second}), last}, whole);
    }
  }
}

TEST(CausalConv1dCuda, ShortSequenceShiftsTheOldStateIn) {
  RETAIN_NEEDS_CUDA();
  for (const int64_t K : {4, 6}) {
    const auto x = cuda(randn({2, 3, 8}, 1)), weight = cuda(randn({8, K}, 2));
    const auto state = cuda(randn({3, K - 1, 8}, 3));
    const auto last = std::get<1>(causal_conv1d(x, weight, {}, false, state));
    expect_bit_equal(last, at::cat({state.slice(1, 2), x.transpose(0, 1)}, 1));
  }
}

TEST(CausalConv1dCuda, ResetEqualsFreshState) {
  RETAIN_NEEDS_CUDA();
  const ConvProblem p{29, 4, 12, 4};
  const auto in = cuda(to(inputs_of(p), at::kFloat));
  for (const int64_t t : {0, 1, 8, 14, 28}) {
    auto reset = at::zeros({p.T, p.B}, in[0].options().dtype(at::kBool));
    reset[t].fill_(true);
    const auto [y, last] = causal_conv1d(in[0], in[1], in[2], true, in[3], reset);
    const auto [fresh_y, fresh_last] = causal_conv1d(in[0].slice(0, t), in[1], in[2], true);
    expect_bit_equal({y.slice(0, t), last}, {fresh_y, fresh_last});
  }
}

TEST(CausalConv1dCuda, NaNBeforeAResetReachesNothingAfterIt) {
  RETAIN_NEEDS_CUDA();
  for (const int64_t K : {2, 4, 5}) {
    const ConvProblem p{21, 3, 8, K};
    const auto clean = cuda(to(inputs_of(p), at::kFloat));
    auto reset = at::zeros({p.T, p.B}, clean[0].options().dtype(at::kBool));
    reset[9].fill_(true);
    for (const bool silu : {false, true}) {
      const auto seen_from_reset = [&](const Tensors& values) {
        Tensors in;
        for (const auto& value : values) in.push_back(value.detach().clone().requires_grad_());
        const auto [y, last] = causal_conv1d(in[0], in[1], in[2], silu, in[3], reset);
        const auto seen = Tensors{y.slice(0, 9), last};
        auto results =
            torch::autograd::grad(seen, in, {at::ones_like(seen[0]), at::ones_like(last)});
        for (const auto& output : seen) results.push_back(output.detach());
        return results;
      };
      auto poisoned = clean;
      poisoned[0] = clean[0].clone();
      poisoned[0].slice(0, 0, 9).fill_(std::numeric_limits<double>::quiet_NaN());
      poisoned[0][1][2].fill_(std::numeric_limits<double>::infinity());
      poisoned[3] = at::full_like(clean[3], std::numeric_limits<double>::quiet_NaN());
      expect_bit_equal(seen_from_reset(poisoned), seen_from_reset(clean));
    }
  }
}

TEST(CausalConv1dCuda, RowAloneEqualsRowInBatch) {
  RETAIN_NEEDS_CUDA();
  const ConvProblem p{40, 19, 12, 4};
  const auto in = cuda(to(inputs_of(p), at::kFloat));
  const auto reset = cuda(reset_of(p)), weights = cuda(randn({p.T, p.B, p.D}, 9));
  const auto rows = [&](int64_t begin, int64_t count) {
    const auto x = in[0].narrow(1, begin, count).detach().requires_grad_();
    const auto state = in[3].narrow(0, begin, count).detach().requires_grad_();
    const auto [y, last] =
        causal_conv1d(x, in[1], in[2], true, state, reset.narrow(1, begin, count));
    const auto gradients =
        torch::autograd::grad({y}, {x, state}, {weights.narrow(1, begin, count)});
    return Tensors{y.detach(), last.detach().transpose(0, 1), gradients[0],
                   gradients[1].transpose(0, 1)};
  };
  const auto batch = rows(0, p.B);
  for (const int64_t b : {0, 3, 7, 18}) {
    const auto alone = rows(b, 1);
    for (size_t i = 0; i < batch.size(); ++i) {
      expect_bit_equal(batch[i].narrow(1, b, 1).contiguous(), alone[i].contiguous());
    }
  }
}

TEST(CausalConv1dCuda, FiveRunsAreTheSameBits) {
  RETAIN_NEEDS_CUDA();
  for (const int64_t K : {4, 6}) {
    const ConvProblem p{513, 33, 132, K};
    const auto in = cuda(to(inputs_of(p), at::kFloat));
    const auto reset = cuda(reset_of(p));
    const auto first = run(p, in, reset);
    for (int again = 1; again < 5; ++again) {
      const auto other = run(p, in, reset);
      expect_bit_equal(other.outputs, first.outputs);
      expect_bit_equal(other.gradients, first.gradients);
    }
  }
}

TEST(CausalConv1dCuda, ReadsStridedViews) {
  RETAIN_NEEDS_CUDA();
  const ConvProblem p{26, 5, 12, 4};
  const auto in = cuda(to(inputs_of(p), at::kFloat));
  const auto reset = cuda(reset_of(p));
  const auto expected = run(p, in, reset);
  const auto wide = at::cat({in[0], in[0]}, -1);
  const Tensors views = {in[0].transpose(0, 1).contiguous().transpose(0, 1), wide.narrow(2, 12, 12),
                         in[0].permute({2, 0, 1}).contiguous().permute({1, 2, 0})};
  for (const auto& view : views) {
    ASSERT_FALSE(view.is_contiguous());
    auto with_view = in;
    with_view[0] = view;
    const auto got = run(p, with_view, reset);
    expect_bit_equal(got.outputs, expected.outputs);
    expect_bit_equal(got.gradients, expected.gradients);
  }
  // A row that begins anywhere in memory takes another way to the same outputs.
  auto shifted = in;
  shifted[0] = at::cat({in[0].slice(-1, 0, 1), in[0], in[0].slice(-1, 0, 2)}, -1).narrow(2, 1, 12);
  const auto got = run(p, shifted, reset);
  expect_bit_equal(got.outputs, expected.outputs);
  expect_close(got.gradients, expected.gradients, 1e-6);
  const auto step = in[0].narrow(0, 0, 1);
  expect_bit_equal(std::get<0>(causal_conv1d(step.expand({30, p.B, p.D}), in[1])),
                   std::get<0>(causal_conv1d(step.repeat({30, 1, 1}), in[1])));
}

TEST(CausalConv1dCuda, EmptySequencesAndBatchesWork) {
  RETAIN_NEEDS_CUDA();
  for (const auto& [T, B] : std::vector<std::pair<int64_t, int64_t>>{{0, 3}, {4, 0}, {0, 0}}) {
    for (const int64_t K : {4, 5}) {
      for (const auto& p : variants({T, B, 8, K})) {
        const auto in = cuda(to(inputs_of(p), at::kFloat));
        const auto got = run(p, in, reset_of(p));
        EXPECT_EQ(got.outputs[0].sizes(), (std::vector<int64_t>{T, B, 8}));
        const auto start = p.initial_state ? in.back() : at::zeros({B, K - 1, 8}, in[0].options());
        if (T == 0) expect_bit_equal(got.outputs[1], start);
        EXPECT_TRUE((got.gradients[1] == 0).all().item<bool>());
      }
    }
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

TEST(CausalConv1dCuda, BadInputNamesTheArgument) {
  RETAIN_NEEDS_CUDA();
  expect_bad_input_is_named(at::kCUDA);
}

}  // namespace
}  // namespace retain
