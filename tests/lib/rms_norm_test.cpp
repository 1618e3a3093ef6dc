#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

#include "lib/rms_norm_problem.h"
#include "support/files.h"
#include "support/gradcheck.h"

namespace retain {
namespace {

using ::testing::HasSubstr;
using namespace testing;

TEST(RmsNorm, ReferenceIsTheNaiveLoop) {
  const auto in = inputs_of({3, 2, 5}, true);
  auto y = at::zeros({3, 2, 5}, at::kDouble), sum = at::zeros({3, 2, 5}, at::kDouble);
  for (int64_t row = 0; row < 6; ++row) {
    double square = 0;
    for (int64_t d = 0; d < 5; ++d) {
      const double s = (in[0].view({6, 5})[row][d] + in[2].view({6, 5})[row][d]).item<double>();
      sum.view({6, 5})[row][d] = s;
      square += s * s;
    }
    for (int64_t d = 0; d < 5; ++d)
      y.view({6, 5})[row][d] = sum.view({6, 5})[row][d].item<double>() /
                               std::sqrt(square / 5 + 0.1) * in[1][d].item<double>();
  }
  expect_close(op_of(rms_norm_reference, 0.1)(in), {y, sum}, 1e-14);
}

TEST(RmsNorm, AgreesWithLibTorchsNorm) {
  const auto in = inputs_of({4, 3, 7}, false);
  const Op theirs = [](const Tensors& values) -> Tensors {
    return {at::rms_norm(values[0], {7}, values[1], 1e-5), values[0].clone()};
  };
  expect_matches_reference(op_of(rms_norm), theirs, in, at::kDouble, 1e-14, 1e-13);
}

TEST(RmsNorm, KernelAgreesWithReference) {
  for (const auto& sizes : std::vector<std::vector<int64_t>>{
           {1}, {5}, {1, 1, 1}, {9, 33}, {3, 5, 64}, {129, 2, 67}, {2, 3, 4, 257}}) {
    for (const bool residual : {false, true}) {
      SCOPED_TRACE(::testing::Message() << at::IntArrayRef(sizes));
      const auto in = inputs_of(sizes, residual);
      const auto op = op_of(rms_norm), reference = op_of(rms_norm_reference);
      expect_matches_reference(op, reference, in, at::kFloat, 1e-6, 1e-5);
      expect_matches_reference(op, reference, in, at::kDouble, 1e-14, 1e-13);
    }
  }
}

TEST(RmsNorm, HalfTypesKeepTheirPrecision) {
  for (const bool residual : {false, true}) {
    expect_half_types_keep_precision(op_of(rms_norm), op_of(rms_norm_reference),
                                     inputs_of({17, 5, 20}, residual));
  }
}

TEST(RmsNorm, ResidualStreamStaysInFloat32BesideHalfInputs) {
  auto in = to(inputs_of({4, 3, 8}, true), at::kBFloat16);
  in[2] = randn({4, 3, 8}, 5);
  const auto got = op_of(rms_norm)(in);
  expect_bit_equal(got[1], in[0].to(at::kFloat) + in[2]);
  const auto gradients = differentiate(op_of(rms_norm), in).gradients;
  EXPECT_EQ(gradients[0].scalar_type(), at::kBFloat16);
  EXPECT_EQ(gradients[2].scalar_type(), at::kFloat);
}

TEST(RmsNorm, GradientsAreTheDifferences) {
  for (const bool residual : {false, true}) {
    for (const auto& function : {op_of(rms_norm, 0.1), op_of(rms_norm_reference, 0.1)}) {
      expect_gradcheck(function, inputs_of({3, 2, 5}, residual));
    }
  }
}

TEST(RmsNorm, GradientsFlowThroughEitherOutputAlone) {
  for (const size_t output : {0, 1}) {
    const auto in = inputs_of({3, 2, 5}, true);
    const Op alone = [&](const Tensors& values) -> Tensors {
      return {op_of(rms_norm)({values[0], in[1], values[1]})[output]};
    };
    expect_gradcheck(alone, {in[0], in[2]});
  }
}

TEST(RmsNorm, ZerosGiveZeros) {
  const auto in = Tensors{at::zeros({2, 3, 8}), randn({8}, 1)};
  const auto got = differentiate(op_of(rms_norm), in);
  EXPECT_TRUE((got.outputs[0] == 0).all().item<bool>());
  EXPECT_TRUE(at::isfinite(got.gradients[0]).all().item<bool>());
}

TEST(RmsNorm, RowAloneEqualsRowInBatch) {
  const auto in = to(inputs_of({7, 37, 13}, true), at::kFloat);
  const auto weights = randn({7, 37, 13}, 9);
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
    for (size_t i = 0; i < batch.size(); ++i)
      expect_bit_equal(batch[i].narrow(1, b, 1).contiguous(), alone[i]);
  }
}

TEST(RmsNorm, ThreadsDoNotChangeAnyBit) {
  expect_same_with_any_threads(op_of(rms_norm), to(inputs_of({129, 65, 77}, true), at::kFloat));
}

TEST(RmsNorm, NaNStaysInItsRow) {
  auto in = to(inputs_of({4, 3, 8}, true), at::kFloat);
  const auto clean = op_of(rms_norm)(in);
  in[0] = in[0].clone();
  in[0][1][2][3] = std::nan("");
  const auto poisoned = op_of(rms_norm)(in);
  EXPECT_TRUE(at::isnan(poisoned[0][1][2]).all().item<bool>());
  auto others = at::ones({4, 3}, at::kBool);
  others[1][2] = false;
  expect_bit_equal(poisoned[0].index({others}), clean[0].index({others}));
}

TEST(RmsNorm, ReadsStridedViews) {
  const auto in = to(inputs_of({6, 5, 12}, true), at::kFloat);
  const auto expected = differentiate(op_of(rms_norm), in);
  const auto wide = at::cat({in[0], in[0]}, -1);
  const Tensors views = {in[0].transpose(0, 1).contiguous().transpose(0, 1), wide.narrow(2, 12, 12),
                         in[0].permute({2, 0, 1}).contiguous().permute({1, 2, 0})};
  for (const auto& view : views) {
    ASSERT_FALSE(view.is_contiguous());
    const auto got = differentiate(op_of(rms_norm), {view, in[1], in[2]});
    expect_bit_equal(got.outputs, expected.outputs);
    expect_bit_equal(got.gradients, expected.gradients);
  }
}

TEST(RmsNorm, EmptyTensorsWork) {
  for (const auto& sizes : std::vector<std::vector<int64_t>>{{0, 3, 5}, {4, 0, 5}, {0, 5}}) {
    for (const bool residual : {false, true}) {
      const auto got = differentiate(op_of(rms_norm), to(inputs_of(sizes, residual), at::kFloat));
      EXPECT_EQ(got.outputs[0].sizes(), sizes);
      EXPECT_TRUE((got.gradients[1] == 0).all().item<bool>());
    }
  }
}

TEST(RmsNorm, SecondDerivativesAreRefused) {
  const auto x = randn({3, 2, 4}, 1).requires_grad_(), weight = randn({4}, 2).requires_grad_();
  const auto y = std::get<0>(rms_norm(x, weight));
  const auto first = torch::autograd::grad({y.square().sum()}, {x}, {}, /*retain_graph=*/true,
                                           /*create_graph=*/true);
  EXPECT_THAT(error_of([&] { torch::autograd::grad({first[0].sum()}, {x}); }),
              HasSubstr("not implemented"));
}

TEST(RmsNorm, BadInputNamesTheArgument) { expect_bad_input_is_named(at::kCPU); }

TEST(RmsNorm, MetaTensorsGiveTheShapes) {
  auto in = to(inputs_of({6, 3, 10}, true), at::kFloat);
  for (auto& input : in) input = input.to(at::kMeta);
  const auto meta = differentiate(op_of(rms_norm), in);
  for (const auto& output : meta.outputs) EXPECT_EQ(output.sizes(), in[0].sizes());
  for (size_t i = 0; i < in.size(); ++i) EXPECT_EQ(meta.gradients[i].sizes(), in[i].sizes());
}

TEST(RmsNorm, AnyOtherDeviceRunsTheReference) {
  const auto in = inputs_of({4, 3, 5}, true);
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("retain::rms_norm", "");
  for (const auto key : {c10::DispatchKey::CUDA, c10::DispatchKey::XPU}) {
    torch::jit::Stack stack = {in[0], in[1], in[2], 1e-5};
    op.redispatchBoxed(c10::DispatchKeySet(key), &stack);
    expect_bit_equal({stack[0].toTensor(), stack[1].toTensor()}, op_of(rms_norm_reference)(in));
  }
}

}  // namespace
}  // namespace retain
