#include <ATen/autocast_mode.h>
#include <gtest/gtest.h>
#include <retain/lib/ops/thin_linear.h>

#include <limits>

#include "support/cuda.h"
#include "support/errors.h"

// The pass back of a product with few inputs.
namespace retain {
namespace {

using namespace testing;

class ThinLinear : public OnCpuAndCuda {
 protected:
  /// dy, x and weight; x lies within wider rows, from `before` on.
  Tensors inputs(int64_t rows, int64_t in, int64_t out, at::ScalarType dtype, int64_t before = 8) {
    const auto wide = randn({rows, before + in + 8}, 2, at::kDouble).to(dtype).to(device());
    return {randn({rows, out}, 1, at::kDouble).to(dtype).to(device()), wide.narrow(1, before, in),
            (randn({out, in}, 3, at::kDouble) / std::sqrt(out)).to(dtype).to(device())};
  }
};
INSTANTIATE_TEST_SUITE_P(On, ThinLinear, kCpuAndCuda, device_name);

/// dx, within wider rows, and dcolumns.
Tensors gradients(const Tensors& in) {
  const auto wide = at::full({in[1].size(0), in[1].size(1) + 8}, -1, in[1].options());
  const auto dx = wide.narrow(1, 0, in[1].size(1));
  const auto dcolumns = thin_linear_bwd_into(in[0], in[1], columns_of(in[2]), dx);
  EXPECT_TRUE(wide.narrow(1, in[1].size(1), 8).eq(-1).all().item<bool>());
  return {dx, dcolumns};
}

Tensors expected_of(const Tensors& in) {
  const auto dy = in[0].cpu().to(at::kDouble), x = in[1].cpu().to(at::kDouble),
             weight = in[2].cpu().to(at::kDouble);
  return {at::mm(dy, weight), at::mm(x.t(), dy)};
}

TEST_P(ThinLinear, MatchesTwoProducts) {
  for (const auto& [rows, in, out] : std::vector<std::array<int64_t, 3>>{{1, 16, 64},
                                                                         {31, 8, 128},
                                                                         {32, 16, 512},
                                                                         {33, 16, 512},
                                                                         {1000, 16, 192},
                                                                         {13000, 16, 512},
                                                                         {9001, 8, 64},
                                                                         {70, 24, 128},
                                                                         {70, 16, 576},
                                                                         {70, 4, 96},
                                                                         {0, 16, 128}}) {
    for (const auto& [dtype, tolerance] : std::vector<std::pair<at::ScalarType, double>>{
             {at::kFloat, 1e-5}, {at::kHalf, 1e-3}, {at::kBFloat16, 5e-3}}) {
      for (const int64_t before : {8, 3}) {  // on a word's boundary, and not
        SCOPED_TRACE(::testing::Message() << rows << " " << in << " " << out << " " << dtype);
        const auto given = inputs(rows, in, out, dtype, before);
        expect_close(cpu(gradients(given)), expected_of(given), tolerance);
      }
    }
  }
}

TEST_P(ThinLinear, FiveRunsAreTheSameBits) {
  const auto given = inputs(5000, 16, 512, at::kBFloat16);
  const auto first = gradients(given);
  for (int again = 1; again < 5; ++again) expect_bit_equal(gradients(given), first);
}

TEST_P(ThinLinear, ARowAloneEqualsTheRowAmongOthers) {
  const auto given = inputs(5000, 16, 512, at::kBFloat16);
  const auto all = gradients(given)[0];
  for (const int64_t row : {0, 31, 32, 4999}) {
    const auto alone =
        gradients({given[0].narrow(0, row, 1), given[1].narrow(0, row, 1), given[2]})[0];
    if (given[0].is_cuda()) {
      expect_bit_equal(alone, all.narrow(0, row, 1));
    } else {
      expect_close({alone}, {all.narrow(0, row, 1)}, 5e-3);  // two products sum as they like
    }
  }
}

TEST_P(ThinLinear, WhatIsNotFiniteStaysInItsRow) {
  const auto given = inputs(100, 16, 128, at::kBFloat16);
  given[0][40][7] = std::numeric_limits<float>::infinity();
  const auto got = cpu(gradients(given));
  const auto finite = got[0].to(at::kFloat).isfinite().all(1);
  EXPECT_FALSE(finite[40].item<bool>());
  EXPECT_EQ(finite.sum().item<int64_t>(), 99);
  const auto whole = got[1].to(at::kFloat).isfinite().all(0);
  EXPECT_FALSE(whole[7].item<bool>());
  EXPECT_EQ(whole.sum().item<int64_t>(), 127);
}

TEST_P(ThinLinear, AutocastLeavesItsTypes) {
  const auto given = inputs(6, 4, 64, at::kFloat);
  at::autocast::set_autocast_enabled(GetParam(), true);
  const auto got = gradients(given);
  at::autocast::set_autocast_enabled(GetParam(), false);
  for (const auto& gradient : got) EXPECT_EQ(gradient.scalar_type(), at::kFloat);
  expect_close(cpu(got), expected_of(given), 1e-5);
}

TEST_P(ThinLinear, NamesWhatDoesNotFit) {
  const auto in = inputs(6, 16, 64, at::kFloat);
  const auto dx = at::empty({6, 16}, in[0].options());
  const auto expect = [&](const char* words, const at::Tensor& dy, const at::Tensor& x,
                          const at::Tensor& columns, const at::Tensor& into) {
    expect_error([&] { thin_linear_bwd_into(dy, x, columns, into); }, {words});
  };
  const auto columns = in[2].t();
  EXPECT_NO_THROW(thin_linear_bwd_into(in[0], in[1], columns, dx));
  expect("x must be [rows, in]", in[0], in[1].narrow(0, 0, 5), columns, dx);
  expect("columns must be [in, out]", in[0], in[1], in[2], dx);
  expect("dx must be [rows, in]", in[0], in[1], columns, dx.t());
  expect("dx", in[0], in[1], columns, dx.narrow(0, 0, 1).expand({6, 16}));
  expect("dx and x must not overlap", in[0], dx, columns, dx);
  expect("x must have the dtype of dy", in[0].to(at::kHalf), in[1], columns, dx);
}

}  // namespace
}  // namespace retain
