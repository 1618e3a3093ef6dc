#include <gtest/gtest.h>

#include <cmath>

#include "lib/rms_norm_problem.h"
#include "support/cuda.h"

namespace retain {
namespace {

using namespace testing;

Op norm() { return op_of(rms_norm); }
Op gpu() { return on_cuda(norm()); }
Op reference() { return op_of(rms_norm_reference); }

TEST(RmsNormCuda, AgreesWithReferenceOverShapes) {
  RETAIN_NEEDS_CUDA();
  for (const auto& sizes : std::vector<std::vector<int64_t>>{{1},
                                                             {5},
                                                             {9, 33},
                                                             {3, 5, 64},
                                                             {2, 3, 4, 68},
                                                             {129, 2, 67},
                                                             {9, 128},
                                                             {7, 3, 256},
                                                             {700, 3, 260},
                                                             {5, 512},
                                                             {5, 1000},
                                                             {3, 2, 2048},
                                                             {3, 4096},
                                                             {2, 8192},
                                                             {2, 8196},
                                                             {3, 9001}}) {
    for (const bool residual : {false, true}) {
      SCOPED_TRACE(::testing::Message() << at::IntArrayRef(sizes));
      const auto in = inputs_of(sizes, residual);
      expect_matches_reference(gpu(), reference(), in, at::kFloat, 1e-6, 1e-5);
      expect_half_types_keep_precision(gpu(), reference(), in);
    }
  }
}

TEST(RmsNormCuda, DoubleRunsTheReference) {
  RETAIN_NEEDS_CUDA();
  expect_matches_reference(gpu(), reference(), inputs_of({4, 3, 5}, true), at::kDouble, 1e-14,
                           1e-13);
}

TEST(RmsNormCuda, ResidualStreamStaysInFloat32BesideHalfInputs) {
  RETAIN_NEEDS_CUDA();
  for (const int64_t D : {8, 9, 300}) {
    auto in = cuda(to(inputs_of({4, 3, D}, true), at::kBFloat16));
    in[2] = cuda(randn({4, 3, D}, 5));
    expect_bit_equal(norm()(in)[1], in[0].to(at::kFloat) + in[2]);
    const auto gradients = differentiate(norm(), in).gradients;
    EXPECT_EQ(gradients[0].scalar_type(), at::kBFloat16);
    EXPECT_EQ(gradients[2].scalar_type(), at::kFloat);
  }
}

TEST(RmsNormCuda, GradientsFlowThroughEitherOutputAlone) {
  RETAIN_NEEDS_CUDA();
  for (const size_t output : {0, 1}) {
    for (const int64_t D : {5, 64, 1024}) {
      const auto in = inputs_of({3, 2, D}, true);
      const auto alone = [&](const Op& op) -> Op {
        return [=](const Tensors& values) -> Tensors {
          return {op({values[0], in[1].to(values[0].dtype()), values[1]})[output]};
        };
      };
      expect_matches_reference(alone(gpu()), alone(reference()), {in[0], in[2]}, at::kFloat, 1e-6,
                               1e-5);
    }
  }
}

TEST(RmsNormCuda, ZerosGiveZeros) {
  RETAIN_NEEDS_CUDA();
  const auto got = differentiate(norm(), cuda({at::zeros({2, 3, 8}), randn({8}, 1)}));
  EXPECT_TRUE((got.outputs[0] == 0).all().item<bool>());
  EXPECT_TRUE(at::isfinite(got.gradients[0]).all().item<bool>());
}

TEST(RmsNormCuda, RowAloneEqualsRowInBatch) {
  RETAIN_NEEDS_CUDA();
  for (const int64_t D : {13, 64, 516, 1024}) {
    const auto in = cuda(to(inputs_of({7, 37, D}, true), at::kFloat));
    const auto weights = cuda(randn({7, 37, D}, 9));
    const auto run = [&](int64_t begin, int64_t count) {
      const auto rows = [&](const at::Tensor& tensor) { return tensor.narrow(1, begin, count); };
      const auto x = rows(in[0]).detach().requires_grad_();
      const auto [y, residual_out] = rms_norm(x, in[1], rows(in[2]));
      const auto gradients = torch::autograd::grad({y}, {x}, {rows(weights)});
      return Tensors{y.detach(), residual_out.detach(), gradients[0]};
    };
    const auto batch = run(0, 37);
    for (const int64_t b : {0, 5, 36}) {
      const auto alone = run(b, 1);
      for (size_t i = 0; i < batch.size(); ++i) {
        expect_bit_equal(batch[i].narrow(1, b, 1).contiguous(), alone[i]);
      }
    }
  }
}

TEST(RmsNormCuda, FiveRunsAreTheSameBits) {
  RETAIN_NEEDS_CUDA();
  for (const int64_t D : {65, 256}) {
    const auto in = cuda(to(inputs_of({129, 65, D}, true), at::kFloat));
    const auto first = differentiate(norm(), in);
    for (int again = 1; again < 5; ++again) {
      const auto other = differentiate(norm(), in);
      expect_bit_equal(other.outputs, first.outputs);
      expect_bit_equal(other.gradients, first.gradients);
    }
  }
}

TEST(RmsNormCuda, NaNStaysInItsRow) {
  RETAIN_NEEDS_CUDA();
  for (const int64_t D : {7, 8, 1024}) {
    auto in = cuda(to(inputs_of({4, 3, D}, true), at::kFloat));
    const auto clean = norm()(in);
    in[0] = in[0].clone();
    in[0][1][2][3] = std::nan("");
    const auto poisoned = norm()(in);
    EXPECT_TRUE(at::isnan(poisoned[0][1][2]).all().item<bool>());
    auto others = cuda(at::ones({4, 3}, at::kBool));
    others[1][2] = false;
    expect_bit_equal(poisoned[0].index({others}), clean[0].index({others}));
  }
}

TEST(RmsNormCuda, ReadsStridedViews) {
  RETAIN_NEEDS_CUDA();
  const auto in = cuda(to(inputs_of({6, 5, 12}, true), at::kFloat));
  const auto expected = differentiate(norm(), in);
  const auto wide = at::cat({in[0], in[0]}, -1);
  const Tensors views = {in[0].transpose(0, 1).contiguous().transpose(0, 1), wide.narrow(2, 12, 12),
                         in[0].permute({2, 0, 1}).contiguous().permute({1, 2, 0})};
  for (const auto& view : views) {
    ASSERT_FALSE(view.is_contiguous());
    const auto got = differentiate(norm(), {view, in[1], in[2]});
    expect_bit_equal(got.outputs, expected.outputs);
    expect_bit_equal(got.gradients, expected.gradients);
  }
  // A row that begins anywhere in memory takes another way, with sums in another order.
  const auto shifted = at::cat({in[0].slice(-1, 0, 1), in[0]}, -1).narrow(2, 1, 12);
  const auto got = differentiate(norm(), {shifted, in[1], in[2]});
  expect_close(got.outputs, expected.outputs, 1e-6);
  expect_close(got.gradients, expected.gradients, 1e-5);
  const auto row = in[0].narrow(0, 0, 1);
  expect_bit_equal(std::get<0>(rms_norm(row.expand({6, 5, 12}), in[1])),
                   std::get<0>(rms_norm(row.repeat({6, 1, 1}), in[1])));
}

TEST(RmsNormCuda, EmptyTensorsWork) {
  RETAIN_NEEDS_CUDA();
  for (const auto& sizes :
       std::vector<std::vector<int64_t>>{{0, 3, 8}, {4, 0, 5}, {0, 8}, {2, 0, 3, 8}}) {
    for (const bool residual : {false, true}) {
      const auto got = differentiate(norm(), cuda(to(inputs_of(sizes, residual), at::kFloat)));
      EXPECT_EQ(got.outputs[0].sizes(), sizes);
      EXPECT_TRUE((got.gradients[1] == 0).all().item<bool>());
    }
  }
}

TEST(RmsNormCuda, TheLastRowsOfAHugeTensorAreRight) {
  RETAIN_NEEDS_CUDA();
  const int64_t rows = (1 << 21) + 4099;
  for (const int64_t D : {1024, 1025}) {  // more than 2^31 elements
    const auto x = at::randn({rows, D}, at::TensorOptions(at::kCUDA).dtype(at::kBFloat16));
    const auto weight = cuda(randn({D}, 2)).requires_grad_();
    const auto dy = at::zeros_like(x);
    dy.slice(0, -5).normal_();
    const auto run = [&](int64_t count) {
      const auto part = x.slice(0, rows - count).detach().requires_grad_();
      const auto [y, residual_out] = rms_norm(part, weight);
      const auto gradients = torch::autograd::grad({y}, {part, weight}, {dy.slice(0, -count)});
      return Tensors{y.detach().slice(0, -5), residual_out.detach().slice(0, -5),
                     gradients[0].slice(0, -5), gradients[1]};
    };
    const auto whole = run(rows), alone = run(5);
    for (const size_t i : {0, 1, 2}) expect_bit_equal(whole[i], alone[i]);
    expect_close({whole[3]}, {alone[3]}, 1e-5);
  }
}

TEST(RmsNormCuda, BadInputNamesTheArgument) {
  RETAIN_NEEDS_CUDA();
  expect_bad_input_is_named(at::kCUDA);
}

}  // namespace
}  // namespace retain
