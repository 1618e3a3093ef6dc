#include <gtest/gtest.h>
#include <retain/lib/ops/causal_conv1d_tensors.h>

#include <cmath>
#include <limits>

#include "lib/causal_conv1d_problem.h"
#include "support/cuda.h"

// The backward pass with a product that adds to dy.
namespace retain {
namespace {

using namespace testing;

class CausalConv1dProduct : public OnCpuAndCuda {};
INSTANTIATE_TEST_SUITE_P(On, CausalConv1dProduct, kCpuAndCuda, device_name);

/// x, weight, bias, initial_state, then dy, dlast_state, rows and columns.
Tensors inputs_of(const ConvProblem& p, int64_t P) {
  auto inputs = testing::inputs_of(p);
  inputs.push_back(randn({p.T, p.B, p.D}, 11, at::kDouble));
  inputs.push_back(randn({p.B, p.K - 1, p.D}, 12, at::kDouble));
  inputs.push_back(randn({p.T, p.B, P}, 13, at::kDouble));
  inputs.push_back(randn({P, p.D}, 14, at::kDouble) / std::sqrt(P));
  return inputs;
}

/// dx, dweight, dbias and dinitial_state.
Tensors gradients(const Tensors& in, const at::Tensor& reset, bool silu = true) {
  const auto dx = at::empty(in[0].sizes(), in[0].options());
  const auto [dweight, dbias, dinitial_state] = causal_conv1d_bwd_into(
      in[4], in[5], in[0], in[1], in[2], silu, in[3], reset.to(in[0].device()), in[6], in[7], dx);
  return {dx, dweight, dbias, dinitial_state};
}

/// Sizes [T, B, D, K, P] in which it is added on the way, by whole tiles of time and by parts of
/// them, and others.
std::vector<std::pair<ConvProblem, int64_t>> problems() {
  return {{{1, 1, 128, 4}, 40},  {{3, 2, 128, 4}, 48},   {{17, 3, 256, 3}, 64},
          {{33, 2, 128, 2}, 8},  {{150, 2, 384, 4}, 96}, {{40, 5, 128, 4}, 128},
          {{64, 1, 128, 4}, 48}, {{21, 2, 96, 4}, 48},   {{20, 2, 128, 4}, 44},
          {{19, 2, 128, 5}, 48}, {{18, 2, 128, 4}, 136}};
}

TEST_P(CausalConv1dProduct, AddsToDy) {
  for (const auto& [p, P] : problems()) {
    SCOPED_TRACE(::testing::Message() << p.T << " " << p.B << " " << p.D << " " << p.K << " " << P);
    const auto in = inputs_of(p, P);
    for (const auto& [dtype, tolerance] : std::vector<std::pair<at::ScalarType, double>>{
             {at::kFloat, 1e-5}, {at::kHalf, 1e-3}, {at::kBFloat16, 5e-3}}) {
      const auto rounded = to(in, dtype);
      const auto got = gradients(here(rounded), reset_of(p));
      expect_close(cpu(got), gradients(to(rounded, at::kDouble), reset_of(p)), tolerance);
    }
    // What the fp64 pass gives is dy with the product.
    auto sum = in;
    sum[4] = in[4] + at::matmul(in[6], in[7]);
    sum[6] = sum[7] = at::Tensor();
    expect_close(gradients(in, reset_of(p)), gradients(sum, reset_of(p)), 1e-14);
  }
}

TEST_P(CausalConv1dProduct, OfZerosChangesNoBit) {
  for (const bool silu : {true, false}) {
    const ConvProblem p{70, 3, 256, 4};
    auto in = here(to(inputs_of(p, 48), at::kBFloat16));
    in[6].zero_();
    const auto got = gradients(in, reset_of(p), silu);
    in[6] = in[7] = at::Tensor();
    expect_bit_equal(got, gradients(in, reset_of(p), silu));
  }
}

TEST_P(CausalConv1dProduct, ReadsRowsWithinWiderOnes) {
  const ConvProblem p{35, 2, 128, 4};
  auto in = here(to(inputs_of(p, 48), at::kBFloat16));
  const auto expected = gradients(in, reset_of(p));
  const auto rows = in[6];
  for (const int64_t before : {8, 3}) {  // on a word's boundary, and not
    in[6] = at::cat({rows.slice(-1, 0, before), rows, rows.slice(-1, 0, 16 - before)}, -1)
                .narrow(-1, before, 48);
    expect_close(gradients(in, reset_of(p)), expected, before == 8 ? 0 : 5e-3);
  }
}

TEST_P(CausalConv1dProduct, NaNBehindAResetReachesNothingBeforeIt) {
  const ConvProblem p{90, 2, 128, 4};
  auto in = here(to(inputs_of(p, 48), at::kBFloat16));
  for (const int64_t at : {1, 15, 16, 17, 64, 89}) {
    const auto reset = at::zeros({p.T, p.B}, at::kBool);
    reset[at].fill_(true);
    const auto clean = gradients(in, reset);
    auto poisoned = in;
    poisoned[6] = in[6].clone();
    poisoned[6].slice(0, at).fill_(std::numeric_limits<float>::quiet_NaN());
    const auto got = gradients(poisoned, reset);
    expect_bit_equal(got[0].slice(0, 0, at), clean[0].slice(0, 0, at));
    expect_bit_equal(got[3], clean[3]);
    EXPECT_TRUE(got[0].slice(0, at).isnan().all().item<bool>());
  }
}

TEST_P(CausalConv1dProduct, RowAloneEqualsRowInBatchInFiveRuns) {
  const ConvProblem p{140, 6, 256, 4};
  const auto in = here(to(inputs_of(p, 64), at::kBFloat16));
  const auto reset = reset_of(p);
  const auto whole = gradients(in, reset);
  for (int run = 0; run < 5; ++run) expect_bit_equal(gradients(in, reset), whole);
  auto one = in;
  for (const size_t i : {0, 4, 6}) one[i] = in[i].narrow(1, 4, 1);
  for (const size_t i : {3, 5}) one[i] = in[i].narrow(0, 4, 1);
  const auto alone = gradients(one, reset.narrow(1, 4, 1));
  const Tensors got = {alone[0], alone[3]}, expected = {whole[0].narrow(1, 4, 1).contiguous(),
                                                        whole[3].narrow(0, 4, 1).contiguous()};
  if (device().is_cuda()) {
    expect_bit_equal(got, expected);
  } else {  // a CPU's product of matrices may depend on their size
    expect_close(got, expected, 5e-3);
  }
}

}  // namespace
}  // namespace retain
