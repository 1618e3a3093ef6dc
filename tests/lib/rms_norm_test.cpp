#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

#include "lib/rms_norm_problem.h"
#include "support/cuda.h"
#include "support/errors.h"
#include "support/gradcheck.h"

namespace retain {
namespace {

using ::testing::HasSubstr;
using namespace testing;

class RmsNorm : public OnCpuAndCuda {};
INSTANTIATE_TEST_SUITE_P(On, RmsNorm, kCpuAndCuda, device_name);

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

TEST_P(RmsNorm, AgreesWithReferenceOverShapesAndTypes) {
  std::vector<std::vector<int64_t>> shapes = {
      {1},           {5},          {1, 1, 1}, {9, 33},     {17, 5, 20},    {3, 5, 64},
      {2, 3, 4, 68}, {129, 2, 67}, {9, 128},  {7, 3, 256}, {2, 3, 4, 257}, {5, 512},
      {5, 1000},     {3, 2, 2048}, {3, 4096}, {2, 8192},   {2, 8196},      {3, 9001}};
  if (device().is_cuda()) shapes.push_back({700, 3, 260});  // takes long on a CPU
  for (const auto& sizes : shapes) {
    for (const bool residual : {false, true}) {
      SCOPED_TRACE(::testing::Message() << at::IntArrayRef(sizes));
      const auto in = inputs_of(sizes, residual);
      const auto op = on(device(), op_of(rms_norm)), reference = op_of(rms_norm_reference);
      expect_matches_reference(op, reference, in, at::kFloat, 1e-6, 1e-5);
      expect_half_types_keep_precision(op, reference, in);
      if (device().is_cuda()) continue;  // fp64 runs the reference there
      expect_matches_reference(op, reference, in, at::kDouble, 1e-14, 1e-13);
    }
  }
}

TEST_P(RmsNorm, ResidualStreamStaysInFloat32BesideHalfInputs) {
  for (const int64_t D : {8, 9, 300}) {
    auto in = here(to(inputs_of({4, 3, D}, true), at::kBFloat16));
    in[2] = randn({4, 3, D}, 5).to(device());
    expect_bit_equal(op_of(rms_norm)(in)[1], in[0].to(at::kFloat) + in[2]);
    const auto gradients = differentiate(op_of(rms_norm), in).gradients;
    EXPECT_EQ(gradients[0].scalar_type(), at::kBFloat16);
    EXPECT_EQ(gradients[2].scalar_type(), at::kFloat);
  }
}

TEST(RmsNorm, GradientsAreTheDifferences) {
  for (const bool residual : {false, true}) {
    for (const auto& function : {op_of(rms_norm, 0.1), op_of(rms_norm_reference, 0.1)}) {
      expect_gradcheck(function, inputs_of({3, 2, 5}, residual));
    }
  }
}

TEST_P(RmsNorm, GradientsFlowThroughEitherOutputAlone) {
  for (const int64_t D : {5, 64, 1024}) {
    const auto in = inputs_of({3, 2, D}, true);
    for (const size_t output : {0, 1}) {
      const auto alone = [&](const Op& op) -> Op {
        return [=](const Tensors& values) -> Tensors {
          return {op({values[0], in[1].to(values[0].dtype()), values[1]})[output]};
        };
      };
      expect_matches_reference(alone(on(device(), op_of(rms_norm))),
                               alone(op_of(rms_norm_reference)), {in[0], in[2]}, at::kFloat, 1e-6,
                               1e-5);
      if (device().is_cuda()) continue;  // fp64 runs the reference there
      if (D == 5) expect_gradcheck(alone(op_of(rms_norm)), {in[0], in[2]});  // others take long
    }
  }
}

TEST_P(RmsNorm, ZerosGiveZeros) {
  const auto got = differentiate(op_of(rms_norm), here({at::zeros({2, 3, 8}), randn({8}, 1)}));
  EXPECT_TRUE((got.outputs[0] == 0).all().item<bool>());
  EXPECT_TRUE(at::isfinite(got.gradients[0]).all().item<bool>());
}

TEST_P(RmsNorm, RowAloneEqualsRowInBatch) {
  for (const int64_t D : {13, 64, 516, 1024}) {
    const auto in = here(to(inputs_of({7, 37, D}, true), at::kFloat));
    const auto weights = randn({7, 37, D}, 9).to(device());
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
}

TEST(RmsNorm, ThreadsDoNotChangeAnyBit) {
  expect_same_with_any_threads(op_of(rms_norm), to(inputs_of({129, 65, 77}, true), at::kFloat));
  expect_same_with_any_threads(op_of(rms_norm), to(inputs_of({3000000, 1}, false), at::kFloat));
}

TEST_P(RmsNorm, NaNStaysInItsRow) {
  for (const int64_t D : {7, 8, 1024}) {
    auto in = here(to(inputs_of({4, 3, D}, true), at::kFloat));
    const auto clean = op_of(rms_norm)(in);
    in[0] = in[0].clone();
    in[0][1][2][3] = std::nan("");
    const auto poisoned = op_of(rms_norm)(in);
    EXPECT_TRUE(at::isnan(poisoned[0][1][2]).all().item<bool>());
    auto others = at::ones({4, 3}, in[0].options().dtype(at::kBool));
    others[1][2] = false;
    expect_bit_equal(poisoned[0].index({others}), clean[0].index({others}));
  }
}

TEST_P(RmsNorm, ReadsStridedViews) {
  const auto in = here(to(inputs_of({6, 5, 12}, true), at::kFloat));
  const auto expected = differentiate(op_of(rms_norm), in);
  const auto wide = at::cat({in[0], in[0]}, -1);
  const Tensors views = {in[0].transpose(0, 1).contiguous().transpose(0, 1), wide.narrow(2, 12, 12),
                         in[0].permute({2, 0, 1}).contiguous().permute({1, 2, 0})};
  for (const auto& view : views) {
    ASSERT_FALSE(view.is_contiguous());
    const auto got = differentiate(op_of(rms_norm), {view, in[1], in[2]});
    expect_bit_equal(got, expected);
  }
  // A row that begins anywhere in memory takes another way on a GPU, with sums in another order.
  const auto shifted = at::cat({in[0].slice(-1, 0, 1), in[0]}, -1).narrow(2, 1, 12);
  const auto got = differentiate(op_of(rms_norm), {shifted, in[1], in[2]});
  expect_close(got.outputs, expected.outputs, 1e-6);
  expect_close(got.gradients, expected.gradients, 1e-5);
  const auto row = in[0].narrow(0, 0, 1);
  expect_bit_equal(std::get<0>(rms_norm(row.expand({6, 5, 12}), in[1])),
                   std::get<0>(rms_norm(row.repeat({6, 1, 1}), in[1])));
}

TEST_P(RmsNorm, EmptyTensorsWork) {
  for (const auto& sizes : std::vector<std::vector<int64_t>>{
           {0, 3, 5}, {0, 3, 8}, {4, 0, 5}, {0, 5}, {0, 8}, {2, 0, 3, 8}}) {
    for (const bool residual : {false, true}) {
      const auto got =
          differentiate(op_of(rms_norm), here(to(inputs_of(sizes, residual), at::kFloat)));
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

TEST_P(RmsNorm, BadInputNamesTheArgument) { expect_bad_input_is_named(device()); }

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
