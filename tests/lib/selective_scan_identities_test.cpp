#include <ATen/core/dispatch/Dispatcher.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include "lib/selective_scan_problem.h"
#include "support/errors.h"

namespace retain {
namespace {

using ::testing::HasSubstr;
using namespace testing;

TEST(SelectiveScan, SequenceIsItsStepsBitForBit) {
  for (const auto dtype : {at::kFloat, at::kDouble}) {
    for (const ScanProblem& p : {ScanProblem{37, 3, 21, 5}, ScanProblem{5, 1, 140, 17, 2}}) {
      const auto in = arguments_of(p, dtype);
      const auto whole = in.run();
      auto state = in.initial_state;
      for (int64_t t = 0; t < p.T; ++t) {
        const auto [y, next] =
            selective_scan_update(in.u[t], in.delta[t], in.A, in.B[t], in.C[t], state, in.D,
                                  in.z[t], in.delta_bias, true, in.reset[t]);
        expect_bit_equal(y, whole[0][t]);
        state = next;
      }
      expect_bit_equal(state, whole[1]);
    }
  }
}

TEST(SelectiveScan, CutAnywhereAndCarryTheState) {
  const ScanProblem p{34, 3, 18, 5};
  const auto in = arguments_of(p);
  const auto whole = in.run();
  for (int64_t cut = 0; cut <= p.T; ++cut) {
    const auto first = in.steps(0, cut, in.initial_state).run();
    const auto second = in.steps(cut, p.T, first[1]).run();
    expect_bit_equal({at::cat({first[0], second[0]}), second[1]}, whole);
  }
}

TEST(SelectiveScan, GradientsPassThroughACut) {
  const ScanProblem p{21, 2, 6, 3};
  const Op cut = [&](const Tensors& inputs) {
    const ScanArguments in(p.options, inputs, reset_of(p));
    const auto first = in.steps(0, 8, in.initial_state).run();
    const auto second = in.steps(8, p.T, first[1]).run();
    return Tensors{at::cat({first[0], second[0]}), second[1]};
  };
  expect_matches_reference(cut, kernel(p), inputs_of(p), at::kDouble, 1e-14, 1e-13);
}

TEST(SelectiveScan, TrainingAndActingGiveTheSameBits) {
  const ScanProblem p{33, 5, 20, 6};
  const auto in = to(inputs_of(p), at::kFloat);
  expect_bit_equal(kernel(p)(in), differentiate(kernel(p), in).outputs);
}

TEST(SelectiveScan, ResetEqualsFreshState) {
  const ScanProblem p{35, 3, 18, 5};
  auto in = arguments_of(p);
  for (const int64_t t : {0, 1, 15, 16, 17, 34}) {
    in.reset = at::zeros({p.T, p.B}, at::kBool);
    in.reset[t].fill_(true);
    const auto outputs = in.run();
    const auto fresh = in.steps(t, p.T, at::Tensor()).run();
    expect_bit_equal({outputs[0].slice(0, t), outputs[1]}, fresh);
  }
}

TEST(SelectiveScan, ResetAtEveryStepRemembersNothing) {
  const ScanProblem p{18, 2, 5, 3};
  auto in = arguments_of(p);
  in.reset = at::ones({p.T, p.B}, at::kBool);
  const auto y = in.run()[0];
  for (int64_t t = 0; t < p.T; ++t) {
    expect_bit_equal(y[t], in.steps(t, t + 1, at::Tensor()).run()[0][0]);
  }
}

TEST(SelectiveScan, ResetCutsGradients) {
  const ScanProblem p{20, 2, 4, 3};
  auto in = arguments_of(p);
  in.reset = at::zeros({p.T, p.B}, at::kBool);
  in.reset[17].fill_(true);
  for (auto* tensor : {&in.u, &in.delta, &in.initial_state}) tensor->requires_grad_();
  const auto outputs = in.run();
  const auto gradients = torch::autograd::grad({outputs[0].slice(0, 17).sum() + outputs[1].sum()},
                                               {in.u, in.delta, in.initial_state});
  for (const size_t i : {0, 1}) {
    EXPECT_TRUE((gradients[i].slice(0, 0, 17) == 0).all().item<bool>());
    EXPECT_TRUE((gradients[i].slice(0, 17) != 0).all().item<bool>());
  }
  EXPECT_TRUE((gradients[2] == 0).all().item<bool>());
}

TEST(SelectiveScan, NaNBeforeAResetReachesNothingAfterIt) {
  for (const auto& options : {ScanOptions{}, ScanOptions{.z = false}}) {
    const ScanProblem p{35, 3, 20, 4, 1, options};
    auto reset = at::zeros({p.T, p.B}, at::kBool);
    reset[17].fill_(true);
    const auto run = [&](const Tensors& values) {
      Tensors in;
      for (const auto& value : values) in.push_back(value.detach().clone().requires_grad_());
      const auto outputs = ScanArguments(p.options, in, reset).run();
      const Tensors seen = {outputs[0].slice(0, 17), outputs[1]};
      auto gradients = torch::autograd::grad(
          seen, in, {randn({p.T - 17, p.B, p.D}, 5), randn({p.B, p.D, p.N}, 6)});
      for (const auto& output : seen) gradients.push_back(output.detach());
      return gradients;
    };
    const auto clean = to(inputs_of(p), at::kFloat);
    const auto expected = run(clean);
    for (const double poison : {kNaN, kInfinity}) {
      Tensors poisoned;
      for (const auto& tensor : clean) poisoned.push_back(tensor.clone());
      for (const size_t i : {size_t{kU}, size_t{kDelta}, size_t{kB}, size_t{kC}}) {
        poisoned[i].slice(0, 0, 17).fill_(poison);
      }
      if (options.z) poisoned[6].slice(0, 0, 17).fill_(poison);
      poisoned.back().fill_(poison);
      expect_bit_equal(run(poisoned), expected);
    }
  }
}

TEST(SelectiveScan, RowAloneEqualsRowInBatch) {
  const ScanProblem p{19, 21, 70, 5};
  const auto weights = randn({p.T, p.B, p.D}, 9);
  const auto run = [&](int64_t begin, int64_t count) {
    auto in = arguments_of(p).rows(begin, count);
    Tensors asked;
    for (auto* tensor : {&in.u, &in.delta, &in.B, &in.C, &in.z, &in.initial_state}) {
      *tensor = tensor->detach().requires_grad_();
      asked.push_back(*tensor);
    }
    const auto outputs = in.run();
    auto results = torch::autograd::grad(
        outputs, asked, {weights.narrow(1, begin, count), at::ones_like(outputs[1])});
    results.back() = results.back().unsqueeze(0);  // rows second, as in the others
    results.push_back(outputs[0].detach());
    results.push_back(outputs[1].detach().unsqueeze(0));
    return results;
  };
  const auto batch = run(0, p.B);
  for (const int64_t b : {0, 3, 7, 8, 20}) {
    const auto alone = run(b, 1);
    for (size_t i = 0; i < batch.size(); ++i) {
      expect_bit_equal(batch[i].narrow(1, b, 1).contiguous(), alone[i]);
    }
  }
}

TEST(SelectiveScan, ARowDoesNotSeeItsNeighbours) {
  const ScanProblem p{18, 4, 20, 5};
  auto in = arguments_of(p);
  const auto before = in.rows(1, 1).run();
  for (auto* tensor : {&in.u, &in.delta, &in.B, &in.C, &in.z}) {
    *tensor = tensor->clone();
    tensor->select(1, 0).fill_(kNaN);
    tensor->select(1, 2).fill_(kInfinity);
  }
  const auto after = in.run();
  expect_bit_equal(after[0].narrow(1, 1, 1).contiguous(), before[0]);
  expect_bit_equal(after[1].narrow(0, 1, 1), before[1]);
}

TEST(SelectiveScan, ThreadsDoNotChangeAnyBit) {
  for (const ScanProblem& p : {ScanProblem{40, 67, 20, 6}, ScanProblem{300, 1, 150, 16}}) {
    expect_same_with_any_threads(kernel(p), to(inputs_of(p), at::kFloat));
  }
}

TEST(SelectiveScan, FwdWithStateIsThePlainScan) {
  const ScanProblem p{9, 2, 6, 3, 1, {.z = false, .delta_bias = false, .reset = false}};
  auto in = arguments_of(p);
  in.initial_state.requires_grad_();
  const auto [out, last] = selective_scan_fwd_with_state(in.u, in.delta, in.A, in.B, in.C, in.D,
                                                         in.initial_state, true, true);
  expect_bit_equal({out, last}, in.run());
  const auto gradient = torch::autograd::grad({last.sum()}, {in.initial_state})[0];
  EXPECT_TRUE((gradient != 0).all().item<bool>());
  const auto without = selective_scan_fwd_with_state(in.u, in.delta, in.A, in.B, in.C, in.D,
                                                     in.initial_state, true, false);
  expect_bit_equal(std::get<0>(without), out);
  EXPECT_FALSE(std::get<1>(without).defined());
}

TEST(SelectiveScan, BadInputNamesTheArgument) { expect_bad_input_is_named(at::kCPU); }

TEST(SelectiveScan, MetaTensorsGiveTheShapes) {
  const ScanProblem p{19, 3, 20, 6, 2};
  auto in = to(inputs_of(p), at::kFloat);
  const auto real = differentiate(kernel(p), in);
  for (auto& input : in) input = input.to(at::kMeta);
  const auto meta = differentiate(
      [&](const Tensors& inputs) {
        return ScanArguments(p.options, inputs, reset_of(p).to(at::kMeta)).run();
      },
      in);
  for (size_t i = 0; i < 2; ++i) EXPECT_EQ(meta.outputs[i].sizes(), real.outputs[i].sizes());
  for (size_t i = 0; i < in.size(); ++i) {
    EXPECT_EQ(meta.gradients[i].sizes(), real.gradients[i].sizes());
  }
  const auto half =
      kernel({3, 2, 4, 2, 1, kBare})(to(inputs_of({3, 2, 4, 2, 1, kBare}), at::kHalf));
  EXPECT_EQ(half[0].scalar_type(), at::kHalf);
  EXPECT_EQ(half[1].scalar_type(), at::kFloat);
}

TEST(SelectiveScan, AnyOtherDeviceRunsTheReference) {
  const ScanProblem p{4, 3, 6, 2};
  const auto in = arguments_of(p, at::kDouble);
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("retain::selective_scan", "");
  torch::jit::Stack stack{in.u, in.delta,         in.A,     in.B, in.C, in.D, in.z, in.delta_bias,
                          true, in.initial_state, in.reset, false};
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::XPU), &stack);
  expect_bit_equal({stack[0].toTensor(), stack[1].toTensor()}, in.run_reference());
}

}  // namespace
}  // namespace retain
