#include "lib/mamba_problem.h"

#include <gtest/gtest.h>

#include <limits>

#include "support/cuda.h"
#include "support/errors.h"

namespace retain {
namespace {

using namespace testing;

class MambaUpdate : public OnCpuAndCuda {};
INSTANTIATE_TEST_SUITE_P(On, MambaUpdate, kCpuAndCuda, device_name);

TEST_P(MambaUpdate, StepsFollowTheSequenceInFp64) {
  const at::NoGradGuard no_grad;
  for (const auto& p : odd_mamba_shapes()) {
    SCOPED_TRACE(::testing::Message() << p.B << " " << p.D << " " << p.N << " " << p.R);
    const auto exact = [&](at::ScalarType dtype) {
      return sequence(p)(to(to(inputs_of(p), dtype), at::kDouble));
    };
    const auto steps = [&](at::ScalarType dtype) {
      return on(device(), updates(p))(to(inputs_of(p), dtype));
    };
    expect_close(steps(at::kFloat), exact(at::kFloat), 1e-6);
    expect_close(steps(at::kBFloat16), exact(at::kBFloat16), 8e-3);  // rounded between the ops
    expect_close(steps(at::kHalf), exact(at::kHalf), 1.2e-3);
    expect_close(steps(at::kDouble), exact(at::kDouble), 1e-13);
  }
}

TEST_P(MambaUpdate, InPlaceIsTheSameBits) {
  const at::NoGradGuard no_grad;
  for (const auto& p : odd_mamba_shapes()) {
    for (const auto dtype : {at::kFloat, at::kDouble}) {
      const auto inputs = to(inputs_of(p), dtype);
      expect_bit_equal(on(device(), updates(p, true))(inputs), on(device(), updates(p))(inputs));
    }
  }
}

TEST_P(MambaUpdate, WeightsOfAnyTypeAreThoseWidened) {
  const at::NoGradGuard no_grad;
  for (const auto& p : odd_mamba_shapes()) {
    SCOPED_TRACE(::testing::Message() << p.B << " " << p.D << " " << p.N << " " << p.R);
    for (const auto dtype : {at::kBFloat16, at::kHalf}) {
      const auto narrow = to(inputs_of(p), dtype);
      auto wide = narrow, mixed = narrow;
      for (size_t i = 3; i < wide.size(); ++i) wide[i] = narrow[i].to(at::kFloat);
      mixed[6] = wide[6];
      const auto expected = on(device(), updates(p))(wide);
      expect_bit_equal(on(device(), updates(p))(narrow), expected);
      expect_bit_equal(on(device(), updates(p))(mixed), expected);
    }
  }
}

TEST_P(MambaUpdate, WritesStatesOfAnyLayoutWhereTheyLie) {
  const at::NoGradGuard no_grad;
  const MambaProblem p{1, 3, 20, 8, 4};
  const auto in = here(to(inputs_of(p), at::kFloat));
  const auto conv = in[1].transpose(1, 2).contiguous().transpose(1, 2);
  const auto ssm = at::zeros({3, 20, 16}, in[2].options()).slice(2, 0, std::nullopt, 2);
  ssm.copy_(in[2]);
  const auto y = mamba_update_(in[0][0], conv, ssm, weights_of(p, in));
  const auto [expected, new_conv, new_ssm] =
      mamba_update(in[0][0], in[1], in[2], weights_of(p, in));
  expect_bit_equal({y, conv, ssm}, {expected, new_conv, new_ssm});
}

TEST_P(MambaUpdate, WritesStatesThatShareRowsOfMemory) {
  const at::NoGradGuard no_grad;
  const MambaProblem p{1, 3, 32, 16, 4};
  const auto in = here(to(inputs_of(p), at::kFloat));
  const int64_t taps = 3 * p.D, states = p.D * p.N;
  for (const bool ssm_first : {false, true}) {
    const auto memory = at::zeros({p.B, taps + states}, in[0].options());
    const auto conv = memory.narrow(1, ssm_first ? states : 0, taps).view({p.B, 3, p.D});
    const auto ssm = memory.narrow(1, ssm_first ? 0 : taps, states).view({p.B, p.D, p.N});
    conv.copy_(in[1]);
    ssm.copy_(in[2]);
    const auto y = mamba_update_(in[0][0], conv, ssm, weights_of(p, in));
    const auto [expected, new_conv, new_ssm] =
        mamba_update(in[0][0], in[1], in[2], weights_of(p, in));
    expect_bit_equal({y, conv, ssm}, {expected, new_conv, new_ssm});
  }
}

TEST_P(MambaUpdate, AResetForgetsEvenNaN) {
  const at::NoGradGuard no_grad;
  const MambaProblem p{1, 3, 20, 8, 4, 4, false};
  const auto in = here(to(inputs_of(p), at::kFloat));
  const auto weights = weights_of(p, in);
  const auto poisoned = [&](const Tensor& state) {
    return at::full_like(state, std::numeric_limits<float>::quiet_NaN());
  };
  const auto reset = at::ones({3}, at::TensorOptions(device()).dtype(at::kBool));
  const auto got = mamba_update(in[0][0], poisoned(in[1]), poisoned(in[2]), weights, reset);
  const auto fresh = mamba_update(in[0][0], at::zeros_like(in[1]), at::zeros_like(in[2]), weights);
  expect_bit_equal(std::get<0>(got), std::get<0>(fresh));
  expect_bit_equal(std::get<1>(got), std::get<1>(fresh));
  expect_bit_equal(std::get<2>(got), std::get<2>(fresh));
}

TEST_P(MambaUpdate, GradientsAreThoseOfTheSequence) {
  const MambaProblem p{3, 2, 10, 4, 3};
  const auto got = differentiate(on(device(), updates(p)), inputs_of(p));
  const auto expected = differentiate(sequence(p), inputs_of(p));
  expect_close(got.outputs, expected.outputs, 1e-12);
  expect_close(got.gradients, expected.gradients, 1e-11);
  expect_matches_reference(on(device(), updates(p)), sequence(p), inputs_of(p), at::kFloat, 1e-6,
                           1e-5);
}

TEST_P(MambaUpdate, StepSizesAreRightFarFromZero) {
  const at::NoGradGuard no_grad;
  const MambaProblem p{1, 5, 64, 16, 4};
  for (const double bias : {-20., -17., -12., 15., 20., 25.}) {
    auto inputs = to(inputs_of(p), at::kFloat);
    inputs[2].zero_();  // so that the new state is the step's size times what comes in
    inputs[5] = 0.01 * inputs[5];
    inputs[8] = 0.01 * inputs[8] + bias;
    const auto got = on(device(), updates(p))(inputs);
    EXPECT_LE(relative_error(got[2], sequence(p)(to(inputs, at::kDouble))[2]), 1e-6) << bias;
  }
}

TEST_P(MambaUpdate, RowAloneIsTheRowInABatch) {
  const at::NoGradGuard no_grad;
  for (const auto& p : odd_mamba_shapes()) {
    if (p.B == 1) continue;
    SCOPED_TRACE(::testing::Message() << p.B << " " << p.D << " " << p.N << " " << p.R);
    auto one = p;
    one.B = 1;
    one.options = false;  // no resets, which go by the row
    auto all = p;
    all.options = false;
    const auto inputs = to(inputs_of(all), at::kFloat);
    auto alone = inputs;
    alone[0] = inputs[0].narrow(1, p.B - 1, 1);
    for (const size_t i : {1, 2}) alone[i] = inputs[i].narrow(0, p.B - 1, 1);
    const auto whole = on(device(), updates(all))(inputs), got = on(device(), updates(one))(alone);
    // A product of matrices may depend on their size.
    expect_close(got,
                 {whole[0].narrow(1, p.B - 1, 1), whole[1].narrow(0, p.B - 1, 1),
                  whole[2].narrow(0, p.B - 1, 1)},
                 2e-6);
  }
}

TEST_P(MambaUpdate, FiveRunsAreTheSameBits) {
  const at::NoGradGuard no_grad;
  for (const auto& p : {MambaProblem{3, 7, 20, 8, 3}, MambaProblem{3, 301, 512, 16, 16}}) {
    for (const auto dtype : {at::kFloat, at::kBFloat16}) {
      const auto inputs = here(to(inputs_of(p), dtype));
      const auto first = updates(p)(inputs);
      for (int again = 1; again < 5; ++again) expect_bit_equal(updates(p)(inputs), first);
    }
  }
}

TEST(MambaUpdateCuda, ARowAloneIsTheRowInABatchBitForBit) {
  RETAIN_NEEDS_CUDA();
  const at::NoGradGuard no_grad;
  for (const int64_t N : {16, 32}) {
    for (const int64_t D : {32, 64, 128, 192, 256, 384, 512, 768, 1024}) {
      if (N == 32 && D > 512) continue;  // no kernel
      const MambaProblem p{1, 9, D, N, (D + 31) / 32, 4, false};
      for (const auto dtype : {at::kFloat, at::kBFloat16}) {
        const auto in = cuda(to(inputs_of(p), dtype));
        const auto rows = [&](int64_t first, int64_t count) {
          const auto part = [&](const Tensor& x) { return x.narrow(0, first, count); };
          const auto [y, conv, ssm] =
              mamba_update(part(in[0][0]), part(in[1]), part(in[2]), weights_of(p, in));
          return Tensors{y, conv, ssm};
        };
        const auto batch = rows(0, p.B);
        for (const int64_t b : {0, 3, 8}) {
          SCOPED_TRACE(::testing::Message() << D << " " << N << " row " << b);
          const auto alone = rows(b, 1);
          for (size_t i = 0; i < 3; ++i) expect_bit_equal(alone[i], batch[i].narrow(0, b, 1));
        }
      }
    }
  }
}

TEST(MambaUpdateCuda, TheLastRowOfAHugeStateIsRight) {
  RETAIN_NEEDS_CUDA();
  const at::NoGradGuard no_grad;
  const MambaProblem p{1, 1, 32, 16, 2, 4, false};
  const auto in = cuda(to(inputs_of(p), at::kFloat));
  const auto weights = weights_of(p, in);
  // As many rows as have states within 31 bits, and more: one kernel, and op by op.
  const int64_t most = (int64_t{1} << 31) / (p.D * p.N) - 1;
  for (const int64_t rows : {most, most + 6}) {
    SCOPED_TRACE(rows);
    const auto xz = at::randn({rows, 2 * p.D}, in[0].options());
    const auto conv = at::randn({rows, p.K - 1, p.D}, in[0].options());
    const auto ssm = at::randn({rows, p.D, p.N}, in[0].options());
    const auto last = [](const Tensor& x) { return x.slice(0, -1); };
    const auto [y, new_conv, new_ssm] = mamba_update(xz, conv, ssm, weights);
    const auto [row_y, row_conv, row_ssm] = mamba_update(last(xz), last(conv), last(ssm), weights);
    expect_bit_equal(last(new_conv), row_conv);
    // A product of matrices may depend on their size.
    expect_close({last(y), last(new_ssm)}, {row_y, row_ssm}, 2e-6);
  }
}

TEST_P(MambaUpdate, InPlaceBumpsVersionsAndRefusesGradients) {
  const MambaProblem p{1, 2, 8, 4, 2};
  const auto in = here(to(inputs_of(p), at::kFloat));
  const auto conv_version = in[1]._version(), ssm_version = in[2]._version();
  mamba_update_(in[0][0], in[1], in[2], weights_of(p, in));
  EXPECT_GT(in[1]._version(), conv_version);
  EXPECT_GT(in[2]._version(), ssm_version);
  in[4].requires_grad_();
  expect_error([&] { mamba_update_(in[0][0], in[1], in[2], weights_of(p, in)); },
               {"mamba_update_: the states are written in place, without gradients"});
}

TEST_P(MambaUpdate, InPlaceBumpsVersionsInInferenceModeToo) {
  for (const auto& p : {MambaProblem{1, 2, 8, 4, 2}, MambaProblem{1, 5, 64, 16, 4}}) {
    const auto in = here(to(inputs_of(p), at::kFloat));
    const auto conv_version = in[1]._version(), ssm_version = in[2]._version();
    const c10::InferenceMode inference;
    mamba_update_(in[0][0], in[1], in[2], weights_of(p, in));
    EXPECT_GT(in[1]._version(), conv_version);
    EXPECT_GT(in[2]._version(), ssm_version);
  }
}

TEST_P(MambaUpdate, BadInputIsNamed) {
  const MambaProblem p{1, 2, 8, 4, 2};
  const auto in = here(to(inputs_of(p), at::kFloat));
  const auto weights = weights_of(p, in);
  const auto xz = in[0][0];
  expect_error([&] { mamba_update(xz.narrow(1, 0, 15), in[1], in[2], weights); },
               {"mamba_update: xz must be [B, 2 d_inner] = [2, 16], got [2, 15]"});
  expect_error([&] { mamba_update(xz, in[2], in[2], weights); },
               {"conv_state must be [B, d_conv - 1, d_inner] = [2, 3, 8], got [2, 8, 4]"});
  expect_error([&] { mamba_update_(xz, in[1], in[2].to(at::kDouble), weights); },
               {"mamba_update_: ssm_state must have the dtype of xz, float32"});
  expect_error([&] { mamba_update_(xz, in[1], in[2].to(at::kMeta), weights); },
               {"mamba_update_: ssm_state must be on the device of xz"});
  const auto expanded = in[2].narrow(0, 0, 1).expand_as(in[2]);
  expect_error([&] { mamba_update_(xz, in[1], expanded, weights); },
               {"mamba_update_: ssm_state must not overlap itself", "got strides [0, 4, 1]"});
  const auto memory = at::zeros({2, 56}, in[0].options());
  const auto interleaved = memory.as_strided({2, 8, 4}, {2, 4, 1});
  expect_error([&] { mamba_update_(xz, in[1], interleaved, weights); },
               {"mamba_update_: ssm_state must not overlap itself", "got strides [2, 4, 1]"});
  const auto conv = memory.narrow(1, 0, 24).view({2, 3, 8});
  const auto ssm = memory.narrow(1, 20, 32).view({2, 8, 4});
  expect_error([&] { mamba_update_(xz, conv, ssm, weights); },
               {"mamba_update_: conv_state and ssm_state must not overlap or interleave in memory",
                "got strides [56, 8, 1] and [56, 4, 1] of one storage"});
  const auto of_conv = in[1].view({2, 24}).narrow(1, 0, 16);
  expect_error([&] { mamba_update_(of_conv, in[1], in[2], weights); },
               {"mamba_update_: xz and conv_state must not overlap or interleave in memory"});
  const auto narrow = to(in, at::kBFloat16);
  expect_error([&] { mamba_update_(narrow[0][0], in[1], narrow[2], weights_of(p, narrow)); },
               {"mamba_update_: ssm_state must be float32 to be written in place, got bfloat16"});
  auto wrong = weights;
  wrong.x_proj_weight = in[4].narrow(0, 0, 9);
  expect_error([&] { mamba_update(xz, in[1], in[2], wrong); },
               {"x_proj_weight must be [dt_rank + 2 d_state, d_inner] = [10, 8], got [9, 8]"});
  expect_error([&] { mamba_update(xz, in[1], in[2], weights, at::zeros({2}, device())); },
               {"reset must be bool"});
  expect_error([&] { mamba_update(Tensor(), in[1], in[2], weights); },
               {"xz must be a tensor, got an undefined one"});
}

}  // namespace
}  // namespace retain
