#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

#include "lib/selective_scan_problem.h"
#include "support/cuda.h"
#include "support/errors.h"

namespace retain {
namespace {

using ::testing::HasSubstr;
using namespace testing;

ScanArguments on_cuda(const ScanArguments& in) { return in.to(at::kCUDA); }

/// The kernels, with inputs and outputs on the CPU.
Op gpu(const ScanProblem& p, bool exact = false) {
  return [=](const Tensors& in) {
    auto arguments = on_cuda(ScanArguments(p.options, in, reset_of(p)));
    arguments.exact = exact;
    return cpu(arguments.run());
  };
}

TEST(SelectiveScanCuda, AgreesWithReferenceOverShapes) {
  RETAIN_NEEDS_CUDA();
  auto shapes = odd_shapes();
  for (const ScanProblem& more :
       {ScanProblem{37, 2, 12, 32}, ScanProblem{200, 1, 9, 100}, ScanProblem{2047, 2, 8, 16},
        ScanProblem{2049, 1, 36, 16}, ScanProblem{700, 3, 8, 2}, ScanProblem{100, 2, 96, 16, 2},
        ScanProblem{1000, 2, 64, 16}, ScanProblem{50, 3, 40, 9}, ScanProblem{300, 2, 64, 32, 2},
        ScanProblem{77, 3, 40, 20}, ScanProblem{50, 3, 40, 24}, ScanProblem{300, 3, 72, 8},
        ScanProblem{90, 3, 48, 12}}) {
    shapes.push_back(more);
  }
  for (const auto& p : shapes) {
    SCOPED_TRACE(::testing::Message() << p.T << " " << p.B << " " << p.D << " " << p.N);
    expect_matches_reference(gpu(p), reference(p), inputs_of(p), at::kFloat, 1e-6, 1e-5);
    expect_matches_reference(gpu(p, true), reference(p), inputs_of(p), at::kFloat, 1e-6, 1e-5);
    expect_half_types_keep_precision(gpu(p), reference(p), inputs_of(p));
  }
}

/// As many rows and channels as leave time whole, over several chunks of kept states.
TEST(SelectiveScanCuda, HalfTypesAgreeWithReferenceOverChunks) {
  RETAIN_NEEDS_CUDA();
  const ScanProblem p{100, 32, 512, 32};
  expect_half_types_keep_precision(gpu(p), reference(p), inputs_of(p));
}

TEST(SelectiveScanCuda, AgreesWithReferenceForEveryCombinationOfOptions) {
  RETAIN_NEEDS_CUDA();
  for (const auto& options : all_options()) {
    for (const int64_t T : {18, 300}) {
      const ScanProblem p{T, 2, 18, 3, 1, options};
      expect_matches_reference(gpu(p), reference(p), inputs_of(p), at::kFloat, 1e-6, 1e-5);
    }
  }
}

TEST(SelectiveScanCuda, DoubleRunsTheReference) {
  RETAIN_NEEDS_CUDA();
  const ScanProblem p{9, 2, 6, 3, 2};
  expect_matches_reference(gpu(p), reference(p), inputs_of(p), at::kDouble, 1e-14, 1e-13);
}

TEST(SelectiveScanCuda, MixedTypesAreComputedInTheWider) {
  RETAIN_NEEDS_CUDA();
  const ScanProblem p{21, 2, 12, 5};
  auto in = on_cuda(arguments_of(p, at::kBFloat16));
  auto wide = in;
  for (auto* tensor : {&wide.u, &wide.B, &wide.C, &wide.z, &wide.A, &wide.D, &wide.delta_bias,
                       &wide.initial_state}) {
    *tensor = tensor->to(at::kFloat);
  }
  wide.delta = in.delta = in.delta.to(at::kFloat);
  const auto got = in.run(), expected = wide.run();
  expect_bit_equal({got[0], got[1]}, {expected[0].to(at::kBFloat16), expected[1]});
}

TEST(SelectiveScanCuda, HalfActivationsTakeFloatWeightsAndState) {
  RETAIN_NEEDS_CUDA();
  auto in = on_cuda(arguments_of({5, 2, 4, 3}, at::kHalf));
  const auto expected = in.run();
  for (auto* tensor : {&in.A, &in.D, &in.delta_bias, &in.initial_state}) {
    *tensor = tensor->to(at::kFloat);
  }
  expect_bit_equal(in.run(), expected);
}

TEST(SelectiveScanCuda, ExactEqualsRepeatedUpdates) {
  RETAIN_NEEDS_CUDA();
  for (const int64_t N : {3, 4, 8, 16, 24, 32, 40, 64, 128, 200, 256}) {
    const ScanProblem p{150, 2, 20, N};
    for (const auto dtype : {at::kFloat, at::kHalf, at::kBFloat16}) {
      auto in = on_cuda(arguments_of(p, dtype));
      in.exact = true;
      const auto whole = in.run();
      auto state = in.initial_state.to(at::kFloat);
      Tensors steps;
      for (int64_t t = 0; t < p.T; ++t) {
        const auto [y, next] =
            selective_scan_update(in.u[t], in.delta[t], in.A, in.B[t], in.C[t], state, in.D,
                                  in.z[t], in.delta_bias, in.delta_softplus, in.reset[t]);
        steps.push_back(y);
        state = next;
      }
      expect_bit_equal({at::stack(steps), state}, whole);
    }
  }
}

TEST(SelectiveScanCuda, CutAnywhereAndCarryTheState) {
  RETAIN_NEEDS_CUDA();
  const ScanProblem p{34, 3, 18, 5};
  const auto in = on_cuda(arguments_of(p));
  const auto whole = in.run();
  for (int64_t cut = 0; cut <= p.T; ++cut) {
    const auto first = in.steps(0, cut, in.initial_state).run();
    const auto second = in.steps(cut, p.T, first[1]).run();
    expect_bit_equal({at::cat({first[0], second[0]}), second[1]}, whole);
  }
}

TEST(SelectiveScanCuda, SegmentsAgreeWithTheOrderOfTime) {
  RETAIN_NEEDS_CUDA();
  for (const bool reset : {false, true}) {
    const ScanProblem p{5000, 1, 24, 16, 1, {.reset = reset}};
    auto in = on_cuda(arguments_of(p));
    in.delta = in.delta - 5;  // so slow that every segment feels the one before it
    const auto split = in.run();
    in.exact = true;
    const auto ordered = in.run();
    EXPECT_FALSE(at::equal(split[0], ordered[0])) << "time was not cut";
    for (auto* tensor :
         {&in.u, &in.delta, &in.A, &in.B, &in.C, &in.D, &in.z, &in.delta_bias, &in.initial_state}) {
      *tensor = tensor->to(at::kDouble);
    }
    const auto expected = in.run_reference();
    for (const auto& got : {split, ordered}) expect_close(got, expected, 1e-5);
  }
}

TEST(SelectiveScanCuda, SegmentsFeelWhatTheirNearestResetLeaves) {
  RETAIN_NEEDS_CUDA();
  constexpr int64_t kSteps = 4097;
  // Now and then, never, at every step, once.
  const auto reset =
      at::stack({random_mask({kSteps}, 0.01, 78), at::zeros({kSteps}, at::kBool),
                 at::ones({kSteps}, at::kBool), at::arange(kSteps).eq(kSteps / 2 + 3)},
                1);
  for (const auto& p : {ScanProblem{kSteps, 4, 512, 8}, ScanProblem{kSteps, 4, 256, 16},
                        ScanProblem{kSteps, 4, 128, 32}, ScanProblem{kSteps, 4, 64, 40}}) {
    auto in = inputs_of(p);
    in[kDelta] = in[kDelta] - 5;  // so slow that every segment feels its neighbour
    const auto run = [&](bool exact) -> Op {
      return [&, exact](const Tensors& inputs) {
        auto arguments = on_cuda(ScanArguments(p.options, inputs, reset));
        arguments.exact = exact;
        return cpu(arguments.run());
      };
    };
    for (const auto& [dtype, tolerance] :
         {std::pair{at::kFloat, 1e-5}, std::pair{at::kBFloat16, 5e-3}}) {
      SCOPED_TRACE(::testing::Message() << p.N << " " << dtype);
      const auto split = differentiate(run(false), to(in, dtype));
      const auto ordered = differentiate(run(true), to(in, dtype));
      EXPECT_FALSE(at::equal(split.gradients[kU], ordered.gradients[kU])) << "time was not cut";
      expect_close(split.outputs, ordered.outputs, tolerance);
      expect_close(split.gradients, ordered.gradients, tolerance);
    }
  }
}

TEST(SelectiveScanCuda, TrainingAndActingGiveTheSameBits) {
  RETAIN_NEEDS_CUDA();
  for (const ScanProblem& p : {ScanProblem{33, 5, 20, 6}, ScanProblem{33, 5, 20, 16},
                               ScanProblem{33, 5, 20, 32}, ScanProblem{1000, 1, 128, 32},
                               ScanProblem{6000, 1, 64, 16}, ScanProblem{900, 1, 24, 130}}) {
    SCOPED_TRACE(::testing::Message() << p.T << " " << p.N);
    for (const auto dtype : {at::kFloat, at::kHalf, at::kBFloat16}) {
      const auto in = to(inputs_of(p), dtype);
      expect_bit_equal(gpu(p)(in), differentiate(gpu(p), in).outputs);
    }
  }
}

TEST(SelectiveScanCuda, ResetEqualsFreshState) {
  RETAIN_NEEDS_CUDA();
  const ScanProblem p{35, 3, 18, 5};
  auto in = on_cuda(arguments_of(p));
  for (const int64_t t : {0, 1, 15, 16, 17, 34}) {
    in.reset = at::zeros({p.T, p.B}, in.reset.options());
    in.reset[t].fill_(true);
    const auto outputs = in.run();
    const auto fresh = in.steps(t, p.T, at::Tensor()).run();
    expect_bit_equal({outputs[0].slice(0, t), outputs[1]}, fresh);
  }
}

TEST(SelectiveScanCuda, ResetAtEveryStepRemembersNothing) {
  RETAIN_NEEDS_CUDA();
  const ScanProblem p{18, 2, 5, 3};
  auto in = on_cuda(arguments_of(p));
  in.reset = at::ones_like(in.reset);
  const auto y = in.run()[0];
  for (int64_t t = 0; t < p.T; ++t) {
    expect_bit_equal(y[t], in.steps(t, t + 1, at::Tensor()).run()[0][0]);
  }
}

/// Outputs from step `at` on, where a reset is, and what they alone give as gradients.
Tensors seen_from(const ScanProblem& p, int64_t at, const Tensors& values) {
  auto reset = at::zeros({p.T, p.B}, at::kBool);
  reset[at].fill_(true);
  Tensors in;
  for (const auto& value : values) in.push_back(cuda(value).detach().requires_grad_());
  const auto outputs = ScanArguments(p.options, in, cuda(reset)).run();
  const Tensors seen = {outputs[0].slice(0, at), outputs[1]};
  const Tensors gradients = {cuda(randn({p.T - at, p.B, p.D}, 5)), cuda(randn({p.B, p.D, p.N}, 6))};
  auto results = torch::autograd::grad(
      seen, in, {gradients[0].to(seen[0].scalar_type()), gradients[1].to(seen[1].scalar_type())});
  for (const auto& output : seen) results.push_back(output.detach());
  return results;
}

/// The inputs with a value in every activation before step `at`, and in the initial state.
Tensors poisoned_until(const ScanProblem& p, int64_t at, const Tensors& clean, double poison) {
  Tensors poisoned;
  for (const auto& tensor : clean) poisoned.push_back(tensor.clone());
  for (const size_t i : {size_t{kU}, size_t{kDelta}, size_t{kB}, size_t{kC}}) {
    poisoned[i].slice(0, 0, at).fill_(poison);
  }
  if (p.options.z) poisoned[6].slice(0, 0, at).fill_(poison);
  poisoned.back().fill_(poison);
  return poisoned;
}

TEST(SelectiveScanCuda, NaNBeforeAResetReachesNothingAfterIt) {
  RETAIN_NEEDS_CUDA();
  for (const int64_t T : {35, 600}) {
    for (const int64_t N : {4, 16, 24}) {
      for (const auto& options : {ScanOptions{}, ScanOptions{.z = false}}) {
        for (const double poison : {kNaN, kInfinity}) {
          const ScanProblem p{T, 3, 20, N, 1, options};
          const auto clean = to(inputs_of(p), at::kFloat);
          const auto poisoned = poisoned_until(p, T / 2, clean, poison);
          expect_bit_equal(seen_from(p, T / 2, poisoned), seen_from(p, T / 2, clean));
        }
      }
    }
  }
}

/// Sums that bf16 makes on the tensor cores are made one by one where a value is not finite.
TEST(SelectiveScanCuda, NaNBeforeAResetReachesNothingAfterItInBf16) {
  RETAIN_NEEDS_CUDA();
  for (const auto& p :
       {ScanProblem{35, 3, 40, 16}, ScanProblem{600, 3, 40, 16}, ScanProblem{35, 3, 40, 32},
        ScanProblem{600, 3, 64, 32}, ScanProblem{35, 3, 40, 8},
        ScanProblem{35, 3, 40, 16, 1, {.z = false}}, ScanProblem{600, 3, 40, 16, 1, {.z = false}},
        ScanProblem{600, 3, 40, 32, 1, {.z = false}}}) {
    for (const double poison : {kNaN, kInfinity}) {
      const auto clean = to(inputs_of(p), at::kBFloat16);
      for (const int64_t at : {p.T / 2, p.T - 2}) {
        const auto got = seen_from(p, at, poisoned_until(p, at, clean, poison));
        const auto expected = seen_from(p, at, clean);
        expect_close(got, expected, 5e-3);
        for (const size_t i : {size_t{kU}, size_t{kDelta}, size_t{kB}, size_t{kC}}) {
          EXPECT_TRUE((got[i].slice(0, 0, at) == 0).all().item<bool>()) << i;
        }
      }
    }
  }
}

/// A value that is not finite stays in the steps, channels and indices that it meets.
TEST(SelectiveScanCuda, NaNReachesOnlyWhatItMeetsInBf16) {
  RETAIN_NEEDS_CUDA();
  for (const int64_t N : {8, 16, 32}) {
    const ScanProblem p{40, 2, 64, N, 1, {.reset = false}};
    auto in = to(inputs_of(p), at::kBFloat16);
    in[kU][20][0][5] = std::nan("");
    const auto got = differentiate(gpu(p), in);
    const auto finite = [](const at::Tensor& x) { return x.isfinite().all().item<bool>(); };
    const auto y = got.outputs[0];
    EXPECT_TRUE(finite(y.slice(0, 0, 20)));
    EXPECT_FALSE(finite(y[20][0][5]));
    EXPECT_TRUE(finite(y.select(1, 1)));
    EXPECT_TRUE(finite(y.select(1, 0).slice(1, 6)));
    // dC sums dy h over channels: of the step and those after it. Gradients of the others stay.
    const auto dC = got.gradients[kC];
    EXPECT_TRUE(finite(dC.slice(0, 0, 20)));
    EXPECT_FALSE(finite(dC[20][0]));
    EXPECT_TRUE(finite(dC.select(1, 1)));
    EXPECT_TRUE(finite(got.gradients[kU].select(1, 0).slice(1, 6)));
    EXPECT_TRUE(finite(got.gradients[kDelta].select(1, 0).slice(1, 6)));
  }
}

TEST(SelectiveScanCuda, OddLengthsCarryGradientsOutOfTheLastState) {
  RETAIN_NEEDS_CUDA();
  std::vector<ScanProblem> problems;
  for (const int64_t T : {1, 3, 127, 129, 2047}) {
    problems.push_back({T, 2, 5, 3, 1, {.reset = false}});
  }
  for (const int64_t N : {3, 16, 24, 40}) problems.push_back({19, 2, 8, N, 1, {.reset = false}});
  for (const auto& p : problems) {
    const auto run = [&](const Op& op, at::ScalarType dtype) {
      auto in = to(inputs_of(p), dtype);
      in[kDelta] = in[kDelta] - 5;  // so slow that the gradient reaches the first step
      const Tensors asked = {in[kU], in[kDelta], in[kA], in[kB], in.back()};
      for (auto tensor : asked) tensor.requires_grad_();
      return torch::autograd::grad({op(in)[1].square().sum()}, asked);
    };
    expect_close(run(gpu(p), at::kFloat), run(reference(p), at::kDouble), 1e-5);
  }
}

TEST(SelectiveScanCuda, ReadsStridedAndExpandedViews) {
  RETAIN_NEEDS_CUDA();
  const ScanProblem p{18, 5, 20, 6, 2};
  const auto in = to(inputs_of(p), at::kFloat);
  const auto expected = differentiate(gpu(p), in);
  const auto batch_first = [](const at::Tensor& x) {
    return x.transpose(0, 1).contiguous().transpose(0, 1);
  };
  const auto within_wider = [](const at::Tensor& x) {
    return at::cat({x, x, x}, -1).narrow(-1, x.size(-1), x.size(-1));
  };
  const Op viewed = [&](const Tensors& inputs) {
    auto moved = cuda(inputs);
    for (const size_t i : {size_t{kU}, size_t{kDelta}, size_t{kZ}})
      moved[i] = batch_first(moved[i]);
    for (const size_t i : {size_t{kB}, size_t{kC}}) moved[i] = within_wider(moved[i]);
    return cpu(ScanArguments(p.options, moved, cuda(reset_of(p))).run());
  };
  const auto got = differentiate(viewed, in);
  expect_bit_equal(got, expected);

  auto arguments = on_cuda(arguments_of(p));
  arguments.u = arguments.u.narrow(0, 0, 1).expand({p.T, p.B, p.D});
  arguments.delta = arguments.delta.narrow(2, 0, 1).expand({p.T, p.B, p.D});
  arguments.B = arguments.B.narrow(1, 0, 1).expand({p.T, p.B, p.G, p.N});
  arguments.reset = arguments.reset.narrow(1, 0, 1).expand({p.T, p.B});
  auto dense = arguments;
  for (auto* tensor : {&dense.u, &dense.delta, &dense.B, &dense.reset}) {
    *tensor = tensor->contiguous();
  }
  expect_bit_equal(arguments.run(), dense.run());
}

/// B and C as x_proj gives them, side by side behind two columns of dt.
TEST(SelectiveScanCuda, ReadsBAndCBehindADtRankOfTwo) {
  RETAIN_NEEDS_CUDA();
  const ScanProblem p{50, 3, 64, 16};
  const Op behind_dt = [&](const Tensors& inputs) {
    auto moved = cuda(inputs);
    const auto all = at::cat({moved[kB].narrow(-1, 0, 2), moved[kB], moved[kC]}, -1);
    moved[kB] = all.narrow(-1, 2, p.N);
    moved[kC] = all.narrow(-1, 2 + p.N, p.N);
    return cpu(ScanArguments(p.options, moved, cuda(reset_of(p))).run());
  };
  for (const auto dtype : {at::kFloat, at::kBFloat16}) {
    const auto in = to(inputs_of(p), dtype);
    const auto got = differentiate(behind_dt, in), expected = differentiate(gpu(p), in);
    expect_bit_equal(got, expected);
  }
}

TEST(SelectiveScanCuda, ReadsRowsThatLieOffTheBoundaryOfFour) {
  RETAIN_NEEDS_CUDA();
  const ScanProblem p{20, 3, 16, 4};
  for (const auto dtype : {at::kFloat, at::kHalf}) {
    auto in = on_cuda(arguments_of(p, dtype));
    const auto expected = in.run();
    for (auto* tensor : {&in.u, &in.delta, &in.z}) {
      auto wider = at::zeros({p.T, p.B, p.D + 3}, tensor->options());
      wider.narrow(2, 1, p.D).copy_(*tensor);
      *tensor = wider.narrow(2, 1, p.D);
    }
    expect_bit_equal(in.run(), expected);
  }
}

TEST(SelectiveScanCuda, EmptySequencesAndBatchesWork) {
  RETAIN_NEEDS_CUDA();
  for (const auto& [T, B] : std::vector<std::pair<int64_t, int64_t>>{{0, 3}, {4, 0}, {0, 0}}) {
    const ScanProblem p{T, B, 5, 2};
    const auto in = to(inputs_of(p), at::kFloat);
    const auto got = differentiate(gpu(p), in);
    expect_bit_equal(got.outputs, reference(p)(in));
    EXPECT_TRUE((got.gradients[kA] == 0).all().item<bool>());
  }
}

void expect_row_alone_is_row_in_batch(const ScanProblem& p, at::ScalarType dtype) {
  const auto weights = randn({p.T, p.B, p.D}, 9).to(dtype);
  const auto run = [&](int64_t begin, int64_t count) {
    auto in = on_cuda(arguments_of(p, dtype).rows(begin, count));
    Tensors asked;
    for (auto* tensor : {&in.u, &in.delta, &in.B, &in.C, &in.z, &in.initial_state}) {
      *tensor = tensor->detach().requires_grad_();
      asked.push_back(*tensor);
    }
    const auto outputs = in.run();
    auto results = torch::autograd::grad(
        outputs, asked,
        {cuda(weights.narrow(1, begin, count).contiguous()), at::ones_like(outputs[1])});
    results.back() = results.back().unsqueeze(0);
    results.push_back(outputs[0].detach());
    results.push_back(outputs[1].detach().unsqueeze(0));
    return results;
  };
  const auto batch = run(0, p.B);
  for (const int64_t b : {0, 7, 20}) {
    const auto alone = run(b, 1);
    for (size_t i = 0; i < batch.size(); ++i) {
      expect_bit_equal(batch[i].narrow(1, b, 1).contiguous(), alone[i]);
    }
  }
}

TEST(SelectiveScanCuda, RowAloneEqualsRowInBatch) {
  RETAIN_NEEDS_CUDA();
  expect_row_alone_is_row_in_batch({37, 21, 70, 5}, at::kFloat);
  expect_row_alone_is_row_in_batch({37, 21, 72, 16}, at::kFloat);
  expect_row_alone_is_row_in_batch({37, 21, 72, 16}, at::kHalf);
  expect_row_alone_is_row_in_batch({37, 21, 72, 16}, at::kBFloat16);
  expect_row_alone_is_row_in_batch({37, 21, 72, 8}, at::kBFloat16);
  expect_row_alone_is_row_in_batch({37, 21, 64, 32}, at::kBFloat16);
}

/// The forward pass takes blocks of 16, 32, 48, 64 or 128 channels, by how many there are.
TEST(SelectiveScanCuda, BlocksOfAllSizesGiveTheSameBits) {
  RETAIN_NEEDS_CUDA();
  const ScanProblem p{40, 64, 1536, 16};
  for (const auto dtype : {at::kFloat, at::kBFloat16}) {
    const auto all = arguments_of(p, dtype);
    const auto alone = on_cuda(all.rows(3, 1)).run();
    for (const int64_t rows : {5, 8, 11, 64}) {
      const auto batch = on_cuda(all.rows(0, rows)).run();
      expect_bit_equal({batch[0].narrow(1, 3, 1).contiguous(), batch[1].narrow(0, 3, 1)}, alone);
    }
  }
}

TEST(SelectiveScanCuda, FiveRunsGiveTheSameBits) {
  RETAIN_NEEDS_CUDA();
  for (const ScanProblem& p :
       {ScanProblem{129, 33, 96, 16}, ScanProblem{4099, 1, 40, 16}, ScanProblem{129, 33, 96, 32}}) {
    for (const auto dtype : {at::kFloat, at::kHalf, at::kBFloat16}) {
      const auto in = to(inputs_of(p), dtype);
      expect_same_in_five_runs(gpu(p), in);
    }
  }
}

TEST(SelectiveScanCuda, StateDoesNotDriftOverManySteps) {
  RETAIN_NEEDS_CUDA();
  // Slow channels: what a step forgets, 1 - exp(delta A), goes down to 1e-4.
  const ScanProblem p{100000, 1, 16, 4, 1, {.reset = false}};
  auto narrow = to(inputs_of(p), at::kFloat);
  narrow[kDelta] = narrow[kDelta] - at::linspace(0, 6, p.D);
  for (const bool exact : {false, true}) {
    const auto got = gpu(p, exact)(narrow);
    expect_close(got, kernel(p)(to(narrow, at::kDouble)), 1e-5);
  }
}

TEST(SelectiveScanCuda, SoftplusIsExactFromDeepNegativeToTheIdentity) {
  RETAIN_NEEDS_CUDA();
  const std::vector<double> values = {-20, -17, -15, -12, -10, -1, 0, 1, 19.999, 20, 20.001, 60};
  auto delta = cuda(at::tensor(values, at::kFloat)).requires_grad_();
  const auto got = last_size(delta.view({1, 1, -1}), 1).view({-1});
  const auto slope = torch::autograd::grad({got.sum()}, {delta})[0];
  for (size_t i = 0; i < values.size(); ++i) {
    const double x = delta[i].item<double>();
    EXPECT_NEAR(got[i].item<double>() / (x > 20 ? x : std::log1p(std::exp(x))), 1, 4e-7) << x;
    EXPECT_NEAR(slope[i].item<double>() / (x > 20 ? 1 : 1 / (1 + std::exp(-x))), 1, 2e-6) << x;
  }
  EXPECT_EQ(got[10].item<double>(), delta[10].item<double>());
  EXPECT_EQ(slope[11].item<double>(), 1);
}

TEST(SelectiveScanCuda, ExtremeDecaysAreExact) {
  RETAIN_NEEDS_CUDA();
  expect_extreme_decays_are_exact(at::kCUDA);
}

TEST(SelectiveScanCuda, NonNegativeAIsDefined) {
  RETAIN_NEEDS_CUDA();
  const ScanProblem p{9, 2, 5, 3};
  for (const double scale : {0.0, -0.3}) {
    auto inputs = inputs_of(p);
    inputs[kA] = scale * inputs[kA];
    expect_matches_reference(gpu(p), reference(p), inputs, at::kFloat, 1e-6, 1e-5);
  }
}

/// The decay of such an index is 0, beyond the sequence's end and at a segment's border, too. Of
/// ddelta the reference, 0 times infinity, says nothing.
TEST(SelectiveScanCuda, InfinitelyFastIndicesForgetAtOnce) {
  RETAIN_NEEDS_CUDA();
  for (const int64_t T : {1, 2, 35, 600}) {
    for (const int64_t N : {3, 16, 24, 40}) {
      const ScanProblem p{T, 2, 20, N};
      auto inputs = inputs_of(p);
      inputs[kA].select(1, 0).fill_(-kInfinity);
      for (const auto dtype : {at::kFloat, at::kBFloat16}) {
        SCOPED_TRACE(::testing::Message() << T << " " << N << " " << dtype);
        const auto narrow = to(inputs, dtype);
        const auto got = differentiate(gpu(p), narrow);
        const auto expected = differentiate(reference(p), to(narrow, at::kDouble));
        const double tolerance = dtype == at::kFloat ? 1e-5 : 5e-3;
        expect_close(got.outputs, expected.outputs, tolerance);
        EXPECT_TRUE(got.gradients[kDelta].isfinite().all().item<bool>());
        for (const size_t i : {size_t{kU}, size_t{kB}, size_t{kC}, inputs.size() - 1}) {
          EXPECT_LE(relative_error(got.gradients[i], expected.gradients[i]), tolerance) << i;
        }
      }
    }
  }
}

TEST(SelectiveScanCuda, SegmentsThatGrowStayFinite) {
  RETAIN_NEEDS_CUDA();
  const int64_t T = 4096, D = 64, N = 16;
  const auto options = at::TensorOptions(at::kCUDA);
  const auto u = at::zeros({T, 1, D}, options);
  u[T - 1] = 1;
  const auto delta = at::full({T, 1, D}, -8., options), A = -at::ones({D, N}, options);
  const auto B = at::ones({T, 1, 1, N}, options);
  const auto run = [&](bool exact) {
    const auto [y, last] =
        selective_scan(u, delta, A, B, B, {}, {}, {}, /*delta_softplus=*/false, {}, {}, exact);
    return Tensors{y, last};
  };
  const auto split = run(false);
  for (const auto& output : split) EXPECT_TRUE(output.isfinite().all().item<bool>());
  expect_bit_equal(split, run(true));
}

/// A state that overflows before a reset, and a gradient that does after it, stay on their side.
TEST(SelectiveScanCuda, AResetStopsWhatOverflows) {
  RETAIN_NEEDS_CUDA();
  const int64_t T = 48, D = 8, at = 21;
  for (const auto dtype : {at::kFloat, at::kBFloat16}) {
    for (const int64_t N : {4, 16, 24}) {
      for (const int64_t asked : {at, T - 1}) {
        SCOPED_TRACE(::testing::Message() << dtype << " " << N << " " << asked);
        const auto options = at::TensorOptions(at::kCUDA).dtype(dtype);
        const auto u = at::ones({T, 1, D}, options).requires_grad_();
        const auto delta = at::ones({T, 1, D}, options).requires_grad_();
        const auto A = at::full({D, N}, 20., options.dtype(at::kFloat)).requires_grad_();
        const auto B = at::ones({T, 1, 1, N}, options).requires_grad_();
        const auto C = at::ones({T, 1, 1, N}, options).requires_grad_();
        const auto reset = at::zeros({T, 1}, options.dtype(at::kBool));
        reset[at] = true;
        const auto [y, last] = selective_scan(u, delta, A, B, C, {}, {}, {}, false, {}, reset);
        const auto gradients = torch::autograd::grad({y[asked].sum()}, {u, delta, B, C});
        for (const auto& gradient : gradients) {
          EXPECT_TRUE((gradient.slice(0, 0, at) == 0).all().item<bool>());
          if (asked != at) continue;
          EXPECT_TRUE(gradient[at].isfinite().all().item<bool>());
        }
      }
    }
  }
}

TEST(SelectiveScanCuda, TheLastRowOfAHugeTensorIsRight) {
  RETAIN_NEEDS_CUDA();
  // More than 2^31 elements in u, and more blocks than a grid has rows.
  const int64_t T = 34, B = 70000, D = 1024, N = 2;
  const auto options = at::TensorOptions(at::kCUDA).dtype(at::kHalf);
  const auto u = at::randn({T, B, D}, options), matrix = at::randn({T, B, 1, N}, options);
  const auto A = -at::rand({D, N}, options.dtype(at::kFloat));
  const auto [y, last] = selective_scan(u, u, A, matrix, matrix, {}, {}, {}, true);
  const auto row = [&](const at::Tensor& x) { return x.narrow(1, B - 1, 1).contiguous(); };
  const auto [row_y, row_last] =
      selective_scan(row(u), row(u), A, row(matrix), row(matrix), {}, {}, {}, true, {}, {}, true);
  expect_bit_equal({row(y), last.narrow(0, B - 1, 1)}, {row_y, row_last});
}

TEST(SelectiveScanCuda, BadInputNamesTheArgument) {
  RETAIN_NEEDS_CUDA();
  expect_bad_input_is_named(at::kCUDA);
  auto in = on_cuda(arguments_of({3, 2, 6, 4}));
  in.reset = in.reset.cpu();
  EXPECT_THAT(error_of([&] { in.run(); }), HasSubstr("reset must be on the device of u"));
  const auto wide = on_cuda(arguments_of({3, 2, 6, 257}));
  EXPECT_THAT(error_of([&] { wide.run(); }), HasSubstr("d_state must be at most 256 on CUDA"));
}

}  // namespace
}  // namespace retain
