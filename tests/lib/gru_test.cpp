#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <retain/lib/ops/gru.h>
#include <torch/nn/modules/rnn.h>

#include <cmath>
#include <limits>

#include "support/errors.h"
#include "support/gradcheck.h"
#include "support/op_checks.h"

namespace retain {
namespace {

using ::testing::HasSubstr;
using namespace testing;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

/// Which optional arguments are there.
struct Present {
  bool biases = true, initial_state = true, reset = true;
};

struct Problem {
  int64_t T, B, I, H;
  Present present = {};
};

/// x, w_ih, w_hh, then the optional arguments that are there.
Tensors inputs_of(const Problem& p, uint64_t seed = 1) {
  const double scale = 1 / std::sqrt(static_cast<double>(p.H));
  Tensors inputs = {randn({p.T, p.B, p.I}, seed, at::kDouble),
                    scale * randn({3 * p.H, p.I}, seed + 1, at::kDouble),
                    scale * randn({3 * p.H, p.H}, seed + 2, at::kDouble)};
  if (p.present.biases) {
    inputs.push_back(scale * randn({3 * p.H}, seed + 3, at::kDouble));
    inputs.push_back(scale * randn({3 * p.H}, seed + 4, at::kDouble));
  }
  if (p.present.initial_state) inputs.push_back(randn({p.B, p.H}, seed + 5, at::kDouble));
  return inputs;
}

at::Tensor reset_of(const Problem& p) {
  return p.present.reset ? random_mask({p.T, p.B}, 0.3, 77) : at::Tensor();
}

template <typename Function>
Op op_of(const Function& function, const Present& present, const at::Tensor& reset) {
  return [=](const Tensors& inputs) -> Tensors {
    const size_t state = present.biases ? 5 : 3;
    const auto [y, last_state] =
        function(inputs[0], inputs[1], inputs[2], present.biases ? inputs[3] : at::Tensor(),
                 present.biases ? inputs[4] : at::Tensor(),
                 present.initial_state ? inputs[state] : at::Tensor(), reset);
    return {y, last_state};
  };
}

Op kernel(const Problem& p) { return op_of(gru, p.present, reset_of(p)); }
Op reference(const Problem& p) { return op_of(gru_reference, p.present, reset_of(p)); }

const std::vector<Present> kPresents = {
    {}, {.biases = false}, {.initial_state = false}, {.reset = false}, {false, false, false}};

TEST(Gru, ReferenceIsTheNaiveLoop) {
  const Problem p{5, 3, 2, 4};
  const auto in = inputs_of(p);
  const auto reset = reset_of(p);
  ASSERT_TRUE(reset.any().item<bool>());
  auto h = in[5].clone();
  auto y = at::zeros({p.T, p.B, p.H}, at::kDouble);
  const auto row = [&](int64_t t, int64_t b, int64_t j) {
    double gates[2][3];
    for (int64_t gate = 0; gate < 3; ++gate) {
      const int64_t unit = gate * p.H + j;
      gates[0][gate] = in[3][unit].item<double>();
      gates[1][gate] = in[4][unit].item<double>();
      for (int64_t k = 0; k < p.I; ++k)
        gates[0][gate] += (in[1][unit][k] * in[0][t][b][k]).item<double>();
      for (int64_t k = 0; k < p.H; ++k) gates[1][gate] += (in[2][unit][k] * h[b][k]).item<double>();
    }
    const double r = 1 / (1 + std::exp(-gates[0][0] - gates[1][0]));
    const double z = 1 / (1 + std::exp(-gates[0][1] - gates[1][1]));
    const double n = std::tanh(gates[0][2] + r * gates[1][2]);
    return (1 - z) * n + z * h[b][j].item<double>();
  };
  for (int64_t t = 0; t < p.T; ++t) {
    for (int64_t b = 0; b < p.B; ++b) {
      if (reset[t][b].item<bool>()) h[b].zero_();
      for (int64_t j = 0; j < p.H; ++j) y[t][b][j] = row(t, b, j);
    }
    h = y[t].clone();
  }
  expect_close(reference(p)(in), {y, h}, 1e-14);
}

TEST(Gru, AgreesWithLibTorchsLayer) {
  const Problem p{7, 3, 5, 6, {.reset = false}};
  const auto in = inputs_of(p);
  torch::nn::GRU layer(p.I, p.H);
  layer->to(at::kDouble);
  const Op theirs = [&](const Tensors& values) -> Tensors {
    const auto [y, last] =
        at::gru(values[0], values[5].unsqueeze(0), {values[1], values[2], values[3], values[4]},
                /*has_biases=*/true,
                /*num_layers=*/1, /*dropout=*/0, /*train=*/false,
                /*bidirectional=*/false, /*batch_first=*/false);
    return {y, last.squeeze(0)};
  };
  {
    at::NoGradGuard no_grad;
    const auto parameters = layer->named_parameters();
    parameters["weight_ih_l0"].copy_(in[1]);
    parameters["weight_hh_l0"].copy_(in[2]);
    parameters["bias_ih_l0"].copy_(in[3]);
    parameters["bias_hh_l0"].copy_(in[4]);
  }
  expect_close({kernel(p)(in)[0]}, {std::get<0>(layer->forward(in[0], in[5].unsqueeze(0)))}, 1e-13);
  expect_matches_reference(kernel(p), theirs, in, at::kDouble, 1e-13, 1e-12);
}

TEST(Gru, KernelAgreesWithReference) {
  for (const auto& present : kPresents) {
    for (const auto& [T, B, I, H] : std::vector<std::array<int64_t, 4>>{
             {1, 1, 1, 1}, {1, 17, 8, 8}, {9, 1, 3, 5}, {3, 2, 5, 33}, {33, 19, 12, 64}}) {
      const Problem p{T, B, I, H, present};
      SCOPED_TRACE(::testing::Message() << T << " " << B << " " << I << " " << H);
      expect_matches_reference(kernel(p), reference(p), inputs_of(p), at::kFloat, 1e-6, 1e-5);
      expect_matches_reference(kernel(p), reference(p), inputs_of(p), at::kDouble, 1e-14, 1e-13);
    }
  }
}

TEST(Gru, HalfTypesKeepTheirPrecision) {
  const Problem p{17, 5, 6, 20};
  expect_half_types_keep_precision(kernel(p), reference(p), inputs_of(p));
}

TEST(Gru, GradientsAreTheDifferences) {
  for (const auto& present : kPresents) {
    const Problem p{4, 2, 3, 5, present};
    expect_gradcheck(kernel(p), inputs_of(p));
    expect_gradcheck(reference(p), inputs_of(p));
  }
}

TEST(Gru, GradientsOfLongSequencesLoseNothing) {
  const Problem p{131072, 16, 2, 2};
  auto in = to(inputs_of(p), at::kFloat);
  const auto gradients = [&](at::ScalarType dtype) {
    Tensors values;
    for (const auto& x : in) values.push_back(x.to(dtype).requires_grad_());
    return torch::autograd::grad({kernel(p)(values)[0].sum()},
                                 {values[1], values[2], values[3], values[4]});
  };
  expect_close(gradients(at::kFloat), gradients(at::kDouble), 1e-6);
}

TEST(Gru, GradientsFlowThroughEitherOutputAlone) {
  const Problem p{3, 2, 3, 5};
  for (const size_t output : {0, 1}) {
    expect_gradcheck([&](const Tensors& in) { return Tensors{kernel(p)(in)[output]}; },
                     inputs_of(p));
  }
}

TEST(Gru, SequenceIsItsStepsBitForBit) {
  for (const int64_t B : {1, 6, 19}) {
    const Problem p{11, B, 7, 21};
    const auto in = to(inputs_of(p), at::kFloat);
    const auto reset = reset_of(p);
    const auto whole = kernel(p)(in);
    auto state = in[5];
    for (int64_t t = 0; t < p.T; ++t) {
      auto [y, next] =
          gru(in[0].narrow(0, t, 1), in[1], in[2], in[3], in[4], state, reset.narrow(0, t, 1));
      expect_bit_equal(y[0], whole[0][t]);
      state = next;
    }
    expect_bit_equal(state, whole[1]);
  }
}

TEST(Gru, TrainingAndActingGiveTheSameBits) {
  const Problem p{9, 5, 7, 21};
  const auto in = to(inputs_of(p), at::kFloat);
  expect_bit_equal(kernel(p)(in), differentiate(kernel(p), in).outputs);
}

TEST(Gru, CutAnywhereAndCarryTheState) {
  const Problem p{8, 5, 4, 10};
  const auto in = to(inputs_of(p), at::kFloat);
  const auto reset = reset_of(p);
  const auto whole = kernel(p)(in);
  for (int64_t cut = 0; cut <= p.T; ++cut) {
    const auto part = [&](int64_t begin, int64_t end, const at::Tensor& state) {
      return gru(in[0].slice(0, begin, end), in[1], in[2], in[3], in[4], state,
                 reset.slice(0, begin, end));
    };
    const auto [first, middle] = part(0, cut, in[5]);
    const auto [second, last] = part(cut, p.T, middle);
    expect_bit_equal({at::cat({first, second}), last}, whole);
  }
}

TEST(Gru, ResetEqualsFreshState) {
  const Problem p{9, 4, 3, 10};
  const auto in = to(inputs_of(p), at::kFloat);
  for (const int64_t t : {0, 1, 4, 8}) {
    auto reset = at::zeros({p.T, p.B}, at::kBool);
    reset[t].fill_(true);
    const auto [y, last] = gru(in[0], in[1], in[2], in[3], in[4], in[5], reset);
    const auto [fresh_y, fresh_last] = gru(in[0].slice(0, t), in[1], in[2], in[3], in[4]);
    expect_bit_equal({y.slice(0, t), last}, {fresh_y, fresh_last});
  }
}

TEST(Gru, ResetCutsGradients) {
  const Problem p{6, 2, 3, 5};
  auto in = to(inputs_of(p), at::kFloat);
  for (auto& input : in) input.requires_grad_();
  auto reset = at::zeros({p.T, p.B}, at::kBool);
  reset[3].fill_(true);
  const auto [y, last] = gru(in[0], in[1], in[2], in[3], in[4], in[5], reset);
  const auto gradients = torch::autograd::grad({y.slice(0, 3).sum() + last.sum()}, {in[0], in[5]});
  EXPECT_TRUE((gradients[0].slice(0, 0, 3) == 0).all().item<bool>());
  EXPECT_TRUE((gradients[1] == 0).all().item<bool>());
  EXPECT_TRUE((gradients[0].slice(0, 3) != 0).all().item<bool>());
}

TEST(Gru, RowAloneEqualsRowInBatch) {
  const Problem p{7, 37, 5, 13};
  const auto in = to(inputs_of(p), at::kFloat);
  const auto reset = reset_of(p);
  const auto weights = randn({p.T, p.B, p.H}, 9);
  const auto run = [&](int64_t begin, int64_t count) {
    const auto x = in[0].narrow(1, begin, count).detach().requires_grad_();
    const auto state = in[5].narrow(0, begin, count).detach().requires_grad_();
    const auto [y, last] = gru(x, in[1], in[2], in[3], in[4], state, reset.narrow(1, begin, count));
    const auto gradients =
        torch::autograd::grad({y}, {x, state}, {weights.narrow(1, begin, count)});
    return Tensors{y.detach(), last.detach().unsqueeze(0), gradients[0], gradients[1].unsqueeze(0)};
  };
  const auto batch = run(0, p.B);
  for (const int64_t b : {0, 3, 15, 16, 36}) {
    const auto alone = run(b, 1);
    for (size_t i = 0; i < batch.size(); ++i) {
      expect_bit_equal(batch[i].narrow(1, b, 1).contiguous(), alone[i]);
    }
  }
}

TEST(Gru, ThreadsDoNotChangeAnyBit) {
  const Problem p{9, 67, 6, 24};
  expect_same_with_any_threads(kernel(p), to(inputs_of(p), at::kFloat));
}

TEST(Gru, NaNBeforeAResetReachesNothingAfterIt) {
  const Problem p{7, 3, 4, 9};
  auto clean = to(inputs_of(p), at::kFloat);
  auto reset = at::zeros({p.T, p.B}, at::kBool);
  reset[3].fill_(true);
  const auto run = [&](const Tensors& values) {
    Tensors in;
    for (const auto& value : values) in.push_back(value.detach().clone().requires_grad_());
    const auto [y, last] = gru(in[0], in[1], in[2], in[3], in[4], in[5], reset);
    auto seen = Tensors{y.slice(0, 3), last};
    auto gradients = torch::autograd::grad(seen, in, {at::ones_like(seen[0]), at::ones_like(last)});
    for (const auto& output : seen) gradients.push_back(output.detach());
    return gradients;
  };
  const auto expected = run(clean);
  auto poisoned = clean;
  poisoned[0] = clean[0].clone();
  poisoned[0].slice(0, 0, 3).fill_(kNaN);
  poisoned[0][1][2].fill_(std::numeric_limits<double>::infinity());
  poisoned[5] = at::full_like(clean[5], kNaN);
  expect_bit_equal(run(poisoned), expected);
}

TEST(Gru, ReadsStridedViews) {
  const Problem p{6, 5, 4, 12};
  const auto in = to(inputs_of(p), at::kFloat);
  const auto expected = differentiate(kernel(p), in);
  const auto wide = at::cat({in[0], in[0]}, -1);
  const Tensors views = {in[0].transpose(0, 1).contiguous().transpose(0, 1), wide.narrow(2, 4, 4),
                         in[0].permute({2, 0, 1}).contiguous().permute({1, 2, 0})};
  for (const auto& view : views) {
    ASSERT_FALSE(view.is_contiguous());
    auto with_view = in;
    with_view[0] = view;
    const auto got = differentiate(kernel(p), with_view);
    expect_bit_equal(got, expected);
  }
  const auto reset = reset_of(p).t().contiguous().t();
  const auto [y, last] = gru(in[0], in[1].t().contiguous().t(), in[2], in[3], in[4], in[5], reset);
  expect_bit_equal({y, last}, expected.outputs);
  const auto step = in[0].narrow(0, 0, 1);
  const auto expanded = std::get<0>(gru(step.expand({3, p.B, p.I}), in[1], in[2], {}, {}));
  expect_bit_equal(expanded, std::get<0>(gru(step.repeat({3, 1, 1}), in[1], in[2], {}, {})));
}

TEST(Gru, EmptySequencesAndBatchesWork) {
  for (const auto& [T, B] : std::vector<std::pair<int64_t, int64_t>>{{0, 3}, {4, 0}, {0, 0}}) {
    for (const auto& present : kPresents) {
      const Problem p{T, B, 2, 5, present};
      const auto in = to(inputs_of(p), at::kFloat);
      const auto got = differentiate(kernel(p), in);
      EXPECT_EQ(got.outputs[0].sizes(), (std::vector<int64_t>{T, B, 5}));
      const auto start = present.initial_state ? in.back() : at::zeros({B, 5});
      if (T == 0) expect_bit_equal(got.outputs[1], start);
      EXPECT_TRUE((got.gradients[1] == 0).all().item<bool>());
    }
  }
}

TEST(Gru, SecondDerivativesAreRefused) {
  auto in = to(inputs_of({3, 2, 4, 5}), at::kFloat);
  in[0].requires_grad_();
  const auto y = std::get<0>(gru(in[0], in[1], in[2], in[3], in[4]));
  const auto first = torch::autograd::grad({y.square().sum()}, {in[0]}, {}, /*retain_graph=*/true,
                                           /*create_graph=*/true);
  EXPECT_THAT(error_of([&] { torch::autograd::grad({first[0].sum()}, {in[0]}); }),
              HasSubstr("not implemented"));
}

TEST(Gru, BadInputNamesTheArgument) {
  const Problem p{3, 2, 4, 5};
  const auto in = to(inputs_of(p), at::kFloat);
  const auto reset = reset_of(p);
  const auto fails = [&](size_t index, const at::Tensor& value) {
    auto bad = in;
    bad.push_back(reset);
    bad[index] = value;
    return error_of([&] { gru(bad[0], bad[1], bad[2], bad[3], bad[4], bad[5], bad[6]); });
  };
  EXPECT_THAT(fails(0, in[0][0]), HasSubstr("gru: x must be [T, B, I], got [2, 4]"));
  EXPECT_THAT(fails(0, in[0].to(at::kInt)), HasSubstr("gru: x must be float"));
  EXPECT_THAT(fails(0, at::Tensor()), HasSubstr("gru: x must be a tensor"));
  EXPECT_THAT(fails(1, at::zeros({15, 3})),
              HasSubstr("gru: w_ih must be [3H, I] = [15, 4], got [15, 3]"));
  EXPECT_THAT(fails(2, at::zeros({5})), HasSubstr("gru: w_hh must be [3H, H]"));
  EXPECT_THAT(fails(2, at::zeros({14, 5})),
              HasSubstr("gru: w_hh must be [3H, H] = [15, 5], got [14, 5]"));
  EXPECT_THAT(fails(3, at::zeros({5})), HasSubstr("gru: b_ih must be [3H] = [15], got [5]"));
  EXPECT_THAT(fails(4, at::zeros({15}, at::kDouble)), HasSubstr("gru: b_hh must have the dtype"));
  EXPECT_THAT(fails(5, at::zeros({3, 5})),
              HasSubstr("gru: initial_state must be [B, H] = [2, 5], got [3, 5]"));
  EXPECT_THAT(fails(6, at::zeros({2, 3}, at::kBool)),
              HasSubstr("gru: reset must be [T, B] = [3, 2], got [2, 3]"));
  EXPECT_THAT(fails(6, at::zeros({3, 2})), HasSubstr("gru: reset must be bool"));
  EXPECT_THAT(fails(5, at::zeros({2, 5}, at::kMeta)), HasSubstr("gru: initial_state must be on"));
}

TEST(Gru, MetaTensorsGiveTheShapes) {
  const Problem p{6, 3, 4, 10};
  auto in = to(inputs_of(p), at::kFloat);
  const auto real = differentiate(kernel(p), in);
  for (auto& input : in) input = input.to(at::kMeta);
  const auto meta = differentiate(op_of(gru, p.present, reset_of(p).to(at::kMeta)), in);
  for (size_t i = 0; i < 2; ++i) EXPECT_EQ(meta.outputs[i].sizes(), real.outputs[i].sizes());
  for (size_t i = 0; i < in.size(); ++i)
    EXPECT_EQ(meta.gradients[i].sizes(), real.gradients[i].sizes());
  const auto y = std::get<0>(gru(in[0].to(at::kHalf), in[1], in[2], {}, {}));
  EXPECT_EQ(y.scalar_type(), at::kHalf);
}

TEST(Gru, AnyOtherDeviceRunsTheReference) {
  const Problem p{4, 3, 2, 5};
  const auto in = inputs_of(p);
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("retain::gru", "");
  for (const auto key : {c10::DispatchKey::CUDA, c10::DispatchKey::XPU}) {
    torch::jit::Stack stack(in.begin(), in.end());
    stack.emplace_back(reset_of(p));
    op.redispatchBoxed(c10::DispatchKeySet(key), &stack);
    expect_bit_equal({stack[0].toTensor(), stack[1].toTensor()}, reference(p)(in));
  }
}

}  // namespace
}  // namespace retain
