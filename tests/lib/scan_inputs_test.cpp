#include <ATen/autocast_mode.h>
#include <retain/lib/ops/scan_inputs.h>

#include <cmath>
#include <limits>

#include "lib/causal_conv1d_problem.h"
#include "support/cuda.h"

// The convolution and the small projections of a block as one op.
namespace retain {
namespace {

using namespace testing;
using ::testing::HasSubstr;

class ScanInputs : public OnCpuAndCuda {};
INSTANTIATE_TEST_SUITE_P(On, ScanInputs, kCpuAndCuda, device_name);

struct Problem {
  ConvProblem conv;
  int64_t R, N;
};

/// x, the convolution's weight, bias and state, then x_proj and dt_proj.
Tensors inputs_of(const Problem& p) {
  auto inputs = testing::inputs_of(p.conv);
  const int64_t D = p.conv.D, P = p.R + 2 * p.N;
  inputs.push_back(randn({P, D}, 5, at::kDouble) / std::sqrt(D));
  inputs.push_back(randn({D, p.R}, 6, at::kDouble) / std::sqrt(p.R));
  return inputs;
}

/// u, (dt, B, C), delta and the last state.
Tensors outputs(const Tensors& in, const at::Tensor& reset) {
  const auto [u, dt_B_C, delta, last_state] = scan_inputs(
      in[0], in[1], in[2], in[4], in[5], in[3], reset.defined() ? reset.to(in[0].device()) : reset);
  return {u, dt_B_C, delta, last_state};
}

Tensors expected_of(const Tensors& rounded, const at::Tensor& reset) {
  const auto in = to(rounded, at::kDouble);
  const auto [u, last_state] = causal_conv1d_reference(in[0], in[1], in[2], true, in[3], reset);
  const auto dt_B_C = at::matmul(u, in[4].t());
  const auto delta = at::matmul(dt_B_C.narrow(2, 0, in[5].size(1)), in[5].t());
  return {u, dt_B_C, delta, last_state};
}

/// Sizes [T, B, D, K] and [dt_rank, d_state] of the kernel's own, with one tile for a warp and
/// with many, of several rows, and others.
std::vector<Problem> problems() {
  return {{{1, 1, 128, 4}, 8, 16},   {{16, 3, 512, 4}, 16, 16},  {{2, 5, 256, 3}, 8, 5},
          {{47, 2, 256, 4}, 16, 1},  {{33, 7, 128, 2}, 16, 16},  {{5000, 1, 512, 4}, 16, 16},
          {{70, 301, 128, 4}, 8, 8}, {{50, 300, 512, 4}, 8, 20}, {{20, 2, 128, 5}, 8, 16},
          {{20, 2, 96, 4}, 8, 16},   {{20, 2, 128, 4}, 12, 16},  {{20, 2, 128, 4}, 16, 24},
          {{0, 2, 128, 4}, 16, 16}};
}

TEST_P(ScanInputs, MatchConvolutionAndProducts) {
  for (const auto& p : problems()) {
    const auto& c = p.conv;
    SCOPED_TRACE(::testing::Message()
                 << c.T << " " << c.B << " " << c.D << " " << c.K << " " << p.R << " " << p.N);
    const auto in = inputs_of(p);
    for (const auto& [dtype, tolerance] : std::vector<std::pair<at::ScalarType, double>>{
             {at::kFloat, 1e-5}, {at::kHalf, 1e-3}, {at::kBFloat16, 5e-3}}) {
      const auto rounded = to(in, dtype);
      for (const auto& reset : {reset_of(c), at::Tensor()}) {
        expect_close(cpu(outputs(here(rounded), reset)), expected_of(rounded, reset), tolerance);
      }
    }
  }
}

TEST_P(ScanInputs, ConvolveAsTheConvolutionDoes) {
  const Problem p{{200, 6, 256, 4}, 16, 16};
  for (const auto dtype : {at::kHalf, at::kBFloat16}) {
    auto in = here(to(inputs_of(p), dtype));
    in[3] = in[3].to(at::kFloat);
    const auto reset = reset_of(p.conv).to(device());
    const auto got = outputs(in, reset);
    const auto [u, last_state] = causal_conv1d(in[0], in[1], in[2], true, in[3], reset);
    expect_bit_equal({got[0], got[3]}, {u, last_state});
    in[2] = in[3] = at::Tensor();
    const auto bare = outputs(in, reset);
    const auto [bare_u, bare_state] = causal_conv1d(in[0], in[1], in[2], true, in[3], reset);
    expect_bit_equal({bare[0], bare[3]}, {bare_u, bare_state});
  }
}

TEST_P(ScanInputs, ReadXWithinWiderRows) {
  const Problem p{{40, 3, 128, 4}, 8, 16};
  auto in = here(to(inputs_of(p), at::kBFloat16));
  const auto reset = reset_of(p.conv);
  const auto expected = outputs(in, reset);
  const auto x = in[0];
  for (const int64_t before : {128, 3}) {  // on a word's boundary, and not
    const auto wide = at::zeros({40, 3, before + 128 + 8}, x.options());
    in[0] = wide.narrow(2, before, 128);
    in[0].copy_(x);
    expect_bit_equal(outputs(in, reset), expected);
  }
  in[0] = x.transpose(0, 1).contiguous().transpose(0, 1);  // rows first
  expect_bit_equal(outputs(in, reset), expected);
}

TEST_P(ScanInputs, FiveRunsAreTheSameBits) {
  const Problem p{{500, 5, 512, 4}, 16, 16};
  const auto in = here(to(inputs_of(p), at::kBFloat16));
  const auto first = outputs(in, reset_of(p.conv));
  for (int again = 1; again < 5; ++again) {
    expect_bit_equal(outputs(in, reset_of(p.conv)), first);
  }
}

TEST_P(ScanInputs, ARowAloneEqualsTheRowAmongOthers) {
  const Problem p{{150, 40, 256, 4}, 16, 16};
  const auto in = here(to(inputs_of(p), at::kBFloat16));
  const auto reset = reset_of(p.conv);
  const auto all = outputs(in, reset);
  for (const int64_t row : {0, 17, 39}) {
    auto alone = in;
    alone[0] = in[0].narrow(1, row, 1);
    alone[3] = in[3].narrow(0, row, 1);
    const auto got = outputs(alone, reset.narrow(1, row, 1));
    const Tensors among = {all[0].narrow(1, row, 1), all[1].narrow(1, row, 1),
                           all[2].narrow(1, row, 1), all[3].narrow(0, row, 1)};
    if (device().is_cuda()) {
      expect_bit_equal(got, among);
    } else {
      expect_close(got, among, 5e-3);  // two products sum as they like
    }
  }
}

TEST_P(ScanInputs, WhatIsNotFiniteStaysInItsWindow) {
  for (const int64_t R : {8, 16}) {
    const Problem p{{60, 3, 128, 4}, R, 16};
    auto in = here(to(inputs_of(p), at::kBFloat16));
    in[0][20][1][7] = std::numeric_limits<float>::quiet_NaN();
    in[0][40][2][9] = std::numeric_limits<float>::quiet_NaN();
    auto reset = at::zeros({60, 3}, at::kBool);
    reset[42][2] = true;
    const auto got = cpu(outputs(in, reset));
    for (int i = 0; i < 3; ++i) {
      const auto finite = got[i].to(at::kFloat).isfinite().all(2);
      auto expected = at::ones({60, 3}, at::kBool);
      expected.narrow(0, 20, 4).select(1, 1).fill_(false);
      expected.narrow(0, 40, 2).select(1, 2).fill_(false);
      EXPECT_TRUE(finite.equal(expected)) << "output " << i;
    }
  }
}

TEST_P(ScanInputs, AStateThatIsNotFiniteEndsWithItsEpisode) {
  const Problem p{{20, 2, 128, 4}, 8, 16};
  auto in = here(to(inputs_of(p), at::kBFloat16));
  in[3][1].fill_(std::numeric_limits<float>::infinity());
  auto reset = at::zeros({20, 2}, at::kBool);
  reset[0][1] = true;
  for (const auto& output : cpu(outputs(in, reset))) {
    EXPECT_TRUE(output.to(at::kFloat).isfinite().all().item<bool>());
  }
}

TEST_P(ScanInputs, WhatIsNotFiniteInBStaysOutOfDelta) {
  for (const int64_t R : {8, 16}) {
    const Problem p{{20, 2, 128, 4}, R, 16};
    auto in = here(to(inputs_of(p), at::kBFloat16));
    in[4][R].fill_(std::numeric_limits<float>::infinity());  // x_proj's first row of B
    const auto got = cpu(outputs(in, reset_of(p.conv)));
    EXPECT_FALSE(got[1].select(2, R).to(at::kFloat).isfinite().any().item<bool>());
    EXPECT_TRUE(got[2].to(at::kFloat).isfinite().all().item<bool>());
  }
}

TEST_P(ScanInputs, AutocastLeavesItsTypes) {
  const Problem p{{6, 2, 24, 4}, 4, 3};
  const auto in = to(inputs_of(p), at::kFloat);
  at::autocast::set_autocast_enabled(GetParam(), true);
  const auto got = outputs(here(in), reset_of(p.conv));
  at::autocast::set_autocast_enabled(GetParam(), false);
  for (const auto& output : got) EXPECT_EQ(output.scalar_type(), at::kFloat);
  expect_close(cpu(got), expected_of(in, reset_of(p.conv)), 1e-5);
}

TEST_P(ScanInputs, NameWhatDoesNotFit) {
  const Problem p{{3, 2, 24, 4}, 4, 3};
  const auto in = to(inputs_of(p), at::kFloat);
  const auto fails = [&](size_t index, const at::Tensor& value) {
    auto bad = in;
    bad[index] = value;
    return error_of([&] { outputs(here(bad), at::Tensor()); });
  };
  EXPECT_THAT(fails(0, in[0][0]), HasSubstr("x must be [T, B, d_inner], got [2, 24]"));
  EXPECT_THAT(fails(4, in[4].t()),
              HasSubstr("scan_inputs: x_proj must be [dt_rank + 2 d_state, d_inner] = [24, 24]"));
  EXPECT_THAT(fails(4, in[4].to(at::kHalf)),
              HasSubstr("scan_inputs: x_proj must have the dtype of x"));
  EXPECT_THAT(fails(5, in[5].narrow(0, 0, 5)),
              HasSubstr("scan_inputs: dt_proj must be [d_inner, dt_rank] = [24, 4], got [5, 4]"));
  EXPECT_THAT(fails(5, at::zeros({24, 11})),
              HasSubstr("scan_inputs: x_proj must have at least dt_rank = 11 rows, got 10"));
}

}  // namespace
}  // namespace retain
