#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <limits>

#include "lib/causal_conv1d_problem.h"
#include "support/cuda.h"
#include "support/errors.h"
#include "support/gradcheck.h"

namespace retain {
namespace {

using ::testing::HasSubstr;
using namespace testing;

class CausalConv1d : public OnCpuAndCuda {};
INSTANTIATE_TEST_SUITE_P(On, CausalConv1d, kCpuAndCuda, device_name);

TEST(CausalConv1d, ReferenceIsTheNaiveLoop) {
  for (const auto& p : variants({7, 3, 2, 4})) {
    const auto in = inputs_of(p);
    const auto reset = reset_of(p);
    auto y = at::zeros({p.T, p.B, p.D}, at::kDouble);
    auto last = at::zeros({p.B, p.K - 1, p.D}, at::kDouble);
    // The input at time s as time t sees it.
    const auto seen = [&](int64_t s, int64_t t, int64_t b, int64_t d) {
      for (int64_t r = std::max<int64_t>(s + 1, 0); r <= t; ++r)
        if (p.reset && reset[r][b].item<bool>()) return 0.0;
      if (s >= 0) return in[0][s][b][d].item<double>();
      return p.initial_state ? in.back()[b][p.K - 1 + s][d].item<double>() : 0.0;
    };
    for (int64_t b = 0; b < p.B; ++b) {
      for (int64_t d = 0; d < p.D; ++d) {
        for (int64_t t = 0; t < p.T; ++t) {
          double sum = p.bias ? in[2][d].item<double>() : 0;
          for (int64_t k = 0; k < p.K; ++k)
            sum += in[1][d][k].item<double>() * seen(t - (p.K - 1) + k, t, b, d);
          y[t][b][d] = p.silu ? sum / (1 + std::exp(-sum)) : sum;
        }
        for (int64_t k = 0; k < p.K - 1; ++k)
          last[b][k][d] = seen(p.T - (p.K - 1) + k, p.T - 1, b, d);
      }
    }
    expect_close(reference(p)(in), {y, last}, 1e-14);
  }
}

TEST(CausalConv1d, AgreesWithLibTorchsConvolution) {
  const ConvProblem p{9, 3, 5, 4, true, false, false, false};
  const Op theirs = [&](const Tensors& in) -> Tensors {
    const auto y = at::conv1d(in[0].permute({1, 2, 0}), in[1].unsqueeze(1), in[2], /*stride=*/1,
                              /*padding=*/p.K - 1, /*dilation=*/1, /*groups=*/p.D);
    return {y.narrow(2, 0, p.T).permute({2, 0, 1}), in[0].slice(0, p.T - p.K + 1).transpose(0, 1)};
  };
  expect_matches_reference(kernel(p), theirs, inputs_of(p), at::kDouble, 1e-14, 1e-13);
}

TEST_P(CausalConv1d, AgreesWithReferenceOverShapesTypesAndOptions) {
  std::vector<std::array<int64_t, 4>> shapes = {{1, 1, 1, 4},    {1, 17, 8, 2},   {2, 3, 67, 4},
                                                {2, 3, 68, 4},   {3, 2, 20, 3},   {17, 5, 20, 4},
                                                {33, 1, 5, 1},   {33, 9, 130, 3}, {33, 9, 132, 3},
                                                {129, 2, 64, 4}, {300, 2, 3, 9},  {300, 2, 23, 9}};
  if (device().is_cuda()) {  // takes long on a CPU
    shapes.insert(shapes.end(), {{127, 5, 260, 2}, {2049, 3, 40, 4}});
  }
  for (const auto& [T, B, D, K] : shapes) {
    for (const auto& p : variants({T, B, D, K})) {
      SCOPED_TRACE(::testing::Message() << T << " " << B << " " << D << " " << K);
      const auto op = on(device(), kernel(p));
      expect_matches_reference(op, reference(p), inputs_of(p), at::kFloat, 1e-6, 1e-5);
      expect_half_types_keep_precision(op, reference(p), inputs_of(p));
      if (device().is_cuda()) continue;  // fp64 runs the reference there
      expect_matches_reference(op, reference(p), inputs_of(p), at::kDouble, 1e-14, 1e-13);
    }
  }
}

TEST(CausalConv1d, GradientsAreTheDifferences) {
  for (const auto& p : variants({5, 2, 3, 4})) {
    expect_gradcheck(kernel(p), inputs_of(p));
    expect_gradcheck(reference(p), inputs_of(p));
  }
}

TEST_P(CausalConv1d, GradientsFlowThroughEitherOutputAlone) {
  // Mostly shorter than the state, so that the initial one comes out again.
  for (const auto& p :
       {ConvProblem{2, 2, 3, 4}, ConvProblem{2, 2, 3, 4, true, true, true, /*reset=*/false},
        ConvProblem{2, 3, 8, 4}, ConvProblem{19, 3, 8, 4}, ConvProblem{2, 3, 8, 5}}) {
    const auto in = inputs_of(p);
    for (const size_t output : {0, 1}) {
      const auto alone = [&](const Op& op) -> Op {
        return [=](const Tensors& values) -> Tensors {
          return {op({values[0], in[1].to(values[0].dtype()), in[2].to(values[0].dtype()),
                      values[1]})[output]};
        };
      };
      expect_matches_reference(alone(on(device(), kernel(p))), alone(reference(p)), {in[0], in[3]},
                               at::kFloat, 1e-6, 1e-5);
      if (device().is_cuda()) continue;  // fp64 runs the reference there
      expect_gradcheck(alone(kernel(p)), {in[0], in[3]});
    }
  }
}

TEST_P(CausalConv1d, SequenceIsItsStepsBitForBit) {
  for (const int64_t K : {1, 2, 3, 4, 7}) {
    for (const auto& p : {ConvProblem{11, 5, 70, K}, ConvProblem{43, 5, 72, K}}) {
      for (const auto dtype : {at::kFloat, at::kBFloat16}) {
        const auto in = here(to(inputs_of(p), dtype));
        const auto reset = reset_of(p).to(device());
        const auto whole = kernel(p)(in);
        auto state = in[3].to(at::kFloat);
        for (int64_t t = 0; t < p.T; ++t) {
          auto [y, next] = causal_conv1d(in[0].narrow(0, t, 1), in[1], in[2], true, state,
                                         reset.narrow(0, t, 1));
          expect_bit_equal(y[0], whole[0][t]);
          state = next;
        }
        expect_bit_equal(state, whole[1]);
      }
    }
  }
}

TEST_P(CausalConv1d, CutAnywhereAndCarryTheState) {
  for (const auto& p :
       {ConvProblem{8, 5, 10, 4}, ConvProblem{35, 5, 12, 4}, ConvProblem{35, 5, 13, 4}}) {
    const auto in = here(to(inputs_of(p), at::kFloat));
    const auto reset = reset_of(p).to(device());
    const auto whole = kernel(p)(in);
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

TEST_P(CausalConv1d, ShortSequenceShiftsTheOldStateIn) {
  for (const auto& [D, K] : std::vector<std::array<int64_t, 2>>{{5, 6}, {8, 4}, {8, 6}}) {
    const auto in = here({randn({2, 3, D}, 1), randn({D, K}, 2), randn({3, K - 1, D}, 3)});
    const auto last = std::get<1>(causal_conv1d(in[0], in[1], {}, false, in[2]));
    expect_bit_equal(last, at::cat({in[2].slice(1, 2), in[0].transpose(0, 1)}, 1));
  }
}

TEST_P(CausalConv1d, ResetEqualsFreshState) {
  for (const auto& p : {ConvProblem{9, 4, 10, 4}, ConvProblem{29, 4, 12, 4}}) {
    const auto in = here(to(inputs_of(p), at::kFloat));
    for (const int64_t t : {0, 1, 4, 7, 8, 14, 28}) {
      if (t >= p.T) break;
      auto reset = at::zeros({p.T, p.B}, in[0].options().dtype(at::kBool));
      reset[t].fill_(true);
      const auto [y, last] = causal_conv1d(in[0], in[1], in[2], true, in[3], reset);
      const auto [fresh_y, fresh_last] = causal_conv1d(in[0].slice(0, t), in[1], in[2], true);
      expect_bit_equal({y.slice(0, t), last}, {fresh_y, fresh_last});
    }
  }
}

TEST(CausalConv1d, ResetCutsGradients) {
  const ConvProblem p{6, 2, 5, 4};
  auto in = to(inputs_of(p), at::kFloat);
  for (auto& input : in) input.requires_grad_();
  auto reset = at::zeros({p.T, p.B}, at::kBool);
  reset[2].fill_(true);
  const auto [y, last] = causal_conv1d(in[0], in[1], in[2], true, in[3], reset);
  const auto gradients = torch::autograd::grad({y.slice(0, 2).sum() + last.sum()}, {in[0], in[3]});
  EXPECT_TRUE((gradients[0].slice(0, 0, 2) == 0).all().item<bool>());
  EXPECT_TRUE((gradients[1] == 0).all().item<bool>());
  EXPECT_TRUE((gradients[0].slice(0, 2) != 0).all().item<bool>());
}

TEST_P(CausalConv1d, RowAloneEqualsRowInBatch) {
  for (const auto& p : {ConvProblem{7, 19, 13, 4}, ConvProblem{40, 19, 12, 4}}) {
    const auto in = here(to(inputs_of(p), at::kFloat));
    const auto reset = reset_of(p).to(device()), weights = randn({p.T, p.B, p.D}, 9).to(device());
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
    for (const int64_t b : {0, 3, 7, 8, 18}) {
      const auto alone = rows(b, 1);
      for (size_t i = 0; i < batch.size(); ++i) {
        expect_bit_equal(batch[i].narrow(1, b, 1).contiguous(), alone[i].contiguous());
      }
    }
  }
}

TEST(CausalConv1d, ThreadsDoNotChangeAnyBit) {
  const ConvProblem p{65, 161, 77, 4};
  expect_same_with_any_threads(kernel(p), to(inputs_of(p), at::kFloat));
}

TEST_P(CausalConv1d, NaNBeforeAResetReachesNothingAfterIt) {
  struct Case {
    ConvProblem p;
    int64_t at;  ///< the reset
  };
  for (const auto& [p, at] : {Case{{7, 3, 9, 4}, 3}, Case{{21, 3, 8, 2}, 9}, Case{{21, 3, 8, 4}, 9},
                              Case{{21, 3, 8, 5}, 9}}) {
    const auto clean = here(to(inputs_of(p), at::kFloat));
    auto reset = at::zeros({p.T, p.B}, clean[0].options().dtype(at::kBool));
    reset[at].fill_(true);
    for (const bool silu : {false, true}) {
      const auto seen_from_reset = [&](const Tensors& values) {
        Tensors in;
        for (const auto& value : values) in.push_back(value.detach().clone().requires_grad_());
        const auto [y, last] = causal_conv1d(in[0], in[1], in[2], silu, in[3], reset);
        const auto seen = Tensors{y.slice(0, at), last};
        auto results =
            torch::autograd::grad(seen, in, {at::ones_like(seen[0]), at::ones_like(last)});
        for (const auto& output : seen) results.push_back(output.detach());
        return results;
      };
      auto poisoned = clean;
      poisoned[0] = clean[0].clone();
      poisoned[0].slice(0, 0, at).fill_(std::numeric_limits<double>::quiet_NaN());
      poisoned[0][1][2].fill_(std::numeric_limits<double>::infinity());
      poisoned[3] = at::full_like(clean[3], std::numeric_limits<double>::quiet_NaN());
      expect_bit_equal(seen_from_reset(poisoned), seen_from_reset(clean));
    }
  }
}

TEST_P(CausalConv1d, ReadsStridedViews) {
  for (const int64_t T : {6, 26}) {
    const ConvProblem p{T, 5, 12, 4};
    const auto in = here(to(inputs_of(p), at::kFloat));
    const auto expected = differentiate(kernel(p), in);
    const auto with = [&](const at::Tensor& view) {
      auto with_view = in;
      with_view[0] = view;
      return differentiate(kernel(p), with_view);
    };
    const auto wide = at::cat({in[0], in[0]}, -1);
    const Tensors views = {in[0].transpose(0, 1).contiguous().transpose(0, 1),
                           wide.narrow(2, 12, 12),
                           in[0].permute({2, 0, 1}).contiguous().permute({1, 2, 0})};
    for (const auto& view : views) {
      ASSERT_FALSE(view.is_contiguous());
      const auto got = with(view);
      expect_bit_equal(got, expected);
    }
    // A row that begins anywhere in memory takes another way to the same outputs.
    const auto got =
        with(at::cat({in[0].slice(-1, 0, 1), in[0], in[0].slice(-1, 0, 2)}, -1).narrow(2, 1, 12));
    expect_bit_equal(got.outputs, expected.outputs);
    expect_close(got.gradients, expected.gradients, 1e-6);
    const auto reset = reset_of(p).to(device()).t().contiguous().t();
    const auto state = in[3].transpose(0, 1).contiguous().transpose(0, 1);
    const auto [y, last] =
        causal_conv1d(in[0], in[1].t().contiguous().t(), in[2], true, state, reset);
    expect_bit_equal({y, last}, expected.outputs);
    const auto step = in[0].narrow(0, 0, 1);
    for (const int64_t steps : {3, 30}) {
      expect_bit_equal(std::get<0>(causal_conv1d(step.expand({steps, p.B, p.D}), in[1])),
                       std::get<0>(causal_conv1d(step.repeat({steps, 1, 1}), in[1])));
    }
  }
}

TEST_P(CausalConv1d, EmptySequencesAndBatchesWork) {
  for (const auto& [T, B] : std::vector<std::pair<int64_t, int64_t>>{{0, 3}, {4, 0}, {0, 0}}) {
    for (const auto& [D, K] : std::vector<std::pair<int64_t, int64_t>>{{5, 4}, {8, 4}, {8, 5}}) {
      for (const auto& p : variants({T, B, D, K})) {
        const auto in = here(to(inputs_of(p), at::kFloat));
        const auto got = differentiate(kernel(p), in);
        EXPECT_EQ(got.outputs[0].sizes(), (std::vector<int64_t>{T, B, D}));
        const auto start = p.initial_state ? in.back() : at::zeros({B, K - 1, D}, in[0].options());
        if (T == 0) expect_bit_equal(got.outputs[1], start);
        EXPECT_TRUE((got.gradients[1] == 0).all().item<bool>());
      }
    }
  }
}

TEST(CausalConv1d, SecondDerivativesAreRefused) {
  const auto x = randn({3, 2, 4}, 1).requires_grad_(), weight = randn({4, 2}, 2).requires_grad_();
  const auto y = std::get<0>(causal_conv1d(x, weight));
  const auto first = torch::autograd::grad({y.square().sum()}, {x}, {}, /*retain_graph=*/true,
                                           /*create_graph=*/true);
  EXPECT_THAT(error_of([&] { torch::autograd::grad({first[0].sum()}, {x}); }),
              HasSubstr("not implemented"));
}

TEST_P(CausalConv1d, BadInputNamesTheArgument) { expect_bad_input_is_named(device()); }

TEST(CausalConv1d, MetaTensorsGiveTheShapes) {
  const ConvProblem p{6, 3, 10, 4};
  auto in = to(inputs_of(p), at::kFloat);
  const auto real = differentiate(kernel(p), in);
  for (auto& input : in) input = input.to(at::kMeta);
  const auto meta = differentiate(op_of(causal_conv1d, p, reset_of(p).to(at::kMeta)), in);
  for (size_t i = 0; i < 2; ++i) EXPECT_EQ(meta.outputs[i].sizes(), real.outputs[i].sizes());
  for (size_t i = 0; i < in.size(); ++i)
    EXPECT_EQ(meta.gradients[i].sizes(), real.gradients[i].sizes());
}

TEST(CausalConv1d, AnyOtherDeviceRunsTheReference) {
  const ConvProblem p{4, 3, 5, 4};
  const auto in = inputs_of(p);
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("retain::causal_conv1d", "");
  for (const auto key : {c10::DispatchKey::CUDA, c10::DispatchKey::XPU}) {
    torch::jit::Stack stack = {in[0], in[1], in[2], true, in[3], reset_of(p)};
    op.redispatchBoxed(c10::DispatchKeySet(key), &stack);
    expect_bit_equal({stack[0].toTensor(), stack[1].toTensor()}, reference(p)(in));
  }
}

}  // namespace
}  // namespace retain
