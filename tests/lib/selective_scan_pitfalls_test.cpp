// What a selective scan is easily wrong about, on the CPU and on a GPU: step sizes far below zero,
// decays of nearly 0, what is not finite on either side of a reset, resets at the borders of
// chunks, strides and rows beyond 32 and 16 bits, drift, and a second device.

#include <c10/core/DeviceGuard.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <retain/lib/ops/rms_norm.h>
#include <retain/lib/state.h>

#include "lib/mamba_problem.h"
#include "lib/selective_scan_problem.h"
#include "support/cuda.h"

namespace retain {
namespace {

using ::testing::HasSubstr;
using namespace testing;

class ScanPitfalls : public OnCpuAndCuda {
 protected:
  /// The kernels of the device, with inputs and outputs on the CPU.
  Op scan(const ScanProblem& p, const at::Tensor& reset) const {
    return [=, this](const Tensors& in) {
      return cpu(ScanArguments(p.options, in, reset).to(device()).run());
    };
  }
};
INSTANTIATE_TEST_SUITE_P(On, ScanPitfalls, kCpuAndCuda, device_name);

TEST_P(ScanPitfalls, SoftplusIsRightFarFromZeroInEveryKernel) {
  const auto values =
      at::tensor({-20., -17., -15., -12., -10., -1., 0., 1., 19.875, 20., 20.125, 60., 100.});
  const auto size = values.exp().log1p(), slope = values.sigmoid();
  const auto expected_size = at::where(values > 20, values, size);
  const auto expected_slope = at::where(values > 20, at::ones_like(slope), slope);
  const auto worst = [](const at::Tensor& got, const at::Tensor& expected) {
    return (got.to(at::kCPU, at::kDouble) / expected - 1).abs().max().item<double>();
  };
  struct Case {
    at::ScalarType dtype;
    double value, slope;
  };
  for (const auto& [dtype, value_tolerance, slope_tolerance] :
       {Case{at::kFloat, 1e-6, 2e-6}, Case{at::kHalf, 1e-6, 1e-3},
        Case{at::kBFloat16, 2e-5, 5e-3}}) {
    for (const int64_t N : {1, 8, 16, 32, 40}) {
      for (const int64_t T : {1, 2}) {
        SCOPED_TRACE(::testing::Message() << dtype << " " << N << " " << T);
        const auto delta =
            values.view({1, 1, -1}).expand({T, 1, -1}).to(device(), dtype).contiguous();
        // Without a gradient one step is the kernel of the update.
        EXPECT_LE(worst(last_size(delta, N), expected_size.unsqueeze(-1)), value_tolerance);
        const auto asked = delta.clone().requires_grad_();
        const auto last = last_size(asked, N);
        EXPECT_LE(worst(last.detach(), expected_size.unsqueeze(-1)), value_tolerance);
        const auto gradient = torch::autograd::grad({last.sum() / N}, {asked})[0][T - 1][0];
        const int64_t first = dtype == at::kHalf ? 5 : 0;  // below, fp16 has few bits or none
        EXPECT_LE(worst(gradient.slice(0, first), expected_slope.slice(0, first)), slope_tolerance);
      }
    }
  }
}

/// dA from exp(delta A) h, never from a difference of states.
TEST_P(ScanPitfalls, GradientsOfFastIndicesDoNotCancel) {
  for (const int64_t N : {4, 16, 24, 40}) {
    const ScanProblem p{33, 2, 20,
                        N,  1, {.delta_bias = false, .delta_softplus = false, .reset = false}};
    auto inputs = inputs_of(p);
    inputs[kDelta] = at::ones_like(inputs[kDelta]);
    inputs[kA] = (-4 * (at::arange(N, at::kDouble) % 4 + 1)).expand({p.D, N}).contiguous();
    const auto narrow = to(inputs, at::kFloat);
    const auto got = differentiate(scan(p, {}), narrow, at::kFloat);
    const auto expected = differentiate(reference(p), to(narrow, at::kDouble), at::kFloat);
    for (int64_t n = 0; n < N; ++n) {  // one at a time: the others' size would hide it
      EXPECT_LE(relative_error(got.gradients[kA].select(1, n), expected.gradients[kA].select(1, n)),
                1e-5)
          << N << " " << n;
    }
  }
}

TEST_P(ScanPitfalls, DecaysOfZeroAndOneHaveGradients) {
  const ScanProblem p{33, 2, 20, 4, 1, {.reset = false}};
  auto inputs = inputs_of(p);
  inputs[kA] = at::tensor({0., -1e-9, -1e4, -1e30}, at::kDouble).expand({p.D, 4}).contiguous();
  expect_matches_reference(scan(p, {}), reference(p), inputs, at::kFloat, 1e-6, 1e-5);
}

/// A gate of 0 hides y in the output, and has a gradient all the same.
TEST_P(ScanPitfalls, ShutGatesHaveTheirGradient) {
  for (const int64_t N : {4, 16, 24}) {
    for (const bool odd_steps : {false, true}) {  // which one of two warps has
      const ScanProblem p{37, 2, 40, N, 1, {.reset = false}};
      auto inputs = inputs_of(p);
      auto shut = at::ones({p.T, p.B, p.D}, at::kBool);
      shut.slice(0, odd_steps ? 0 : 1, p.T, 2) =
          random_mask({(p.T + odd_steps) / 2, p.B, p.D}, 0.3, 5);
      shut[10].fill_(false);
      inputs[kZ].masked_fill_(shut, 0.);
      inputs[kZ][20].fill_(-0.);
      SCOPED_TRACE(::testing::Message() << N << " " << odd_steps);
      expect_matches_reference(scan(p, {}), reference(p), inputs, at::kFloat, 1e-6, 1e-5);
      expect_half_types_keep_precision(scan(p, {}), reference(p), inputs);
    }
  }
}

/// What meets a gradient of 0 does not count, finite or not.
TEST_P(ScanPitfalls, GatesThatAreNotFiniteMeetNoGradient) {
  for (const auto dtype : {at::kFloat, at::kBFloat16}) {
    for (const int64_t N : {4, 16, 24}) {
      const ScanProblem p{37, 2, 40, N, 1, {.reset = false}};
      const auto inputs = to(inputs_of(p), dtype);
      const auto hidden = random_mask({p.T, p.B, p.D}, 0.1, 5);
      const auto run = [&](double gate, bool of_state) {
        Tensors in;
        for (const auto& input : inputs) in.push_back(input.detach().clone());
        in[kZ].masked_fill_(hidden, gate);
        for (auto& input : in) input.requires_grad_();
        const auto outputs = scan(p, {})(in);
        const auto dy = randn({p.T, p.B, p.D}, 6).to(dtype).masked_fill(hidden, 0);
        return of_state ? torch::autograd::grad({outputs[1]}, in, {at::ones_like(outputs[1])})
                        : torch::autograd::grad({outputs[0]}, in, {dy});
      };
      for (const double gate : {kInfinity, -kInfinity, kNaN}) {
        for (const bool of_state : {false, true}) {
          SCOPED_TRACE(::testing::Message() << dtype << " " << N << " " << gate << " " << of_state);
          expect_close(run(gate, of_state), run(1, of_state), dtype == at::kFloat ? 1e-6 : 5e-3);
        }
      }
    }
  }
}

TEST_P(ScanPitfalls, NaNAfterAResetReachesNothingBeforeIt) {
  for (const auto dtype : {at::kFloat, at::kBFloat16}) {
    for (const int64_t N : {4, 16, 24, 40}) {
      for (const int64_t T : {35, 600}) {
        const ScanProblem p{T, 3, 20, N};
        const auto inputs = to(inputs_of(p), dtype);
        for (const int64_t at : {int64_t{1}, int64_t{15}, int64_t{16}, int64_t{17}, T - 1}) {
          auto reset = at::zeros({T, p.B}, at::kBool);
          reset[at].fill_(true);
          /// Gradients of what lies before the reset.
          const auto run = [&](double poison) {
            Tensors in;
            for (const auto& input : inputs) in.push_back(input.detach().requires_grad_());
            const auto outputs = scan(p, reset)(in);
            auto dy = randn({T, p.B, p.D}, 5).to(dtype), dlast = randn({p.B, p.D, N}, 6);
            dy.slice(0, at).fill_(poison);
            dlast.fill_(poison);
            const auto gradients = torch::autograd::grad(outputs, in, {dy, dlast.to(outputs[1])});
            Tensors seen;
            for (const size_t i : {size_t{kU}, size_t{kDelta}, size_t{kB}, size_t{kC}, size_t{kZ}})
              seen.push_back(gradients[i].slice(0, 0, at));
            seen.push_back(gradients.back());
            return seen;
          };
          for (const double poison : {kNaN, kInfinity}) {
            SCOPED_TRACE(::testing::Message() << dtype << " " << N << " " << T << " " << at);
            expect_close(run(poison), run(0), dtype == at::kFloat ? 1e-6 : 5e-3);
          }
        }
      }
    }
  }
}

TEST_P(ScanPitfalls, OddLengthsCarryGradientsOfHalfTypesOutOfTheLastState) {
  for (const auto& [dtype, tolerance] :
       {std::pair{at::kHalf, 2e-3}, std::pair{at::kBFloat16, 5e-3}}) {
    for (const int64_t N : {3, 16, 32}) {
      for (const int64_t T : {1, 127, 2049}) {
        const ScanProblem p{T, 2, 8, N, 1, {.reset = false}};
        auto inputs = inputs_of(p);
        inputs[kDelta] = inputs[kDelta] - 5;  // so slow that the gradient reaches the first step
        const auto run = [&](const Op& op, at::ScalarType type) {
          auto in = to(to(inputs, dtype), type);
          const Tensors asked = {in[kU], in[kDelta], in[kB], in.back()};
          for (auto tensor : asked) tensor.requires_grad_();
          return torch::autograd::grad({op(in)[1].sum()}, asked);
        };
        SCOPED_TRACE(::testing::Message() << dtype << " " << N << " " << T);
        expect_close(run(scan(p, {}), dtype), run(kernel(p), at::kDouble), tolerance);
      }
    }
  }
}

TEST_P(ScanPitfalls, StridesBeyond32BitsAreReadRight) {
  const ScanProblem p{2, 2, 8, 16, 1, {.reset = false}};
  const int64_t far = (int64_t{1} << 31) + 64;
  at::Tensor wide;  // of which two rows are touched
  try {
    wide = at::empty({far + 64}, at::TensorOptions(device()).dtype(at::kHalf));
  } catch (const c10::Error&) {
    GTEST_SKIP() << "needs 4 GB";
  }
  const auto inputs = to(inputs_of(p), at::kHalf);
  const auto run = [&](bool spread) {
    ScanArguments in(p.options, here(inputs), {});
    Tensors asked;
    for (auto* tensor : {&in.u, &in.delta, &in.z}) {
      if (spread) {
        const auto view = wide.as_strided({2, 2, 8}, {far, 8, 1});
        view.copy_(*tensor);
        *tensor = view;
      }
      *tensor = tensor->detach().requires_grad_();
      const auto outputs = in.run();
      for (const auto& output : cpu(outputs)) asked.push_back(output.detach());
      for (const auto& gradient : cpu(torch::autograd::grad({outputs[0].sum()}, {*tensor})))
        asked.push_back(gradient);
      *tensor = tensor->detach().contiguous();
    }
    return asked;
  };
  expect_bit_equal(run(true), run(false));
}

TEST_P(ScanPitfalls, TheLastOfManyRowsHasItsGradients) {
  for (const int64_t N : {4, 16, 32}) {
    const ScanProblem p{3, 70000, 16, N};  // more rows than a grid has beside its first axis
    const auto all = arguments_of(p);
    const auto last_row = [&](const ScanArguments& arguments) {
      auto in = arguments.to(device());
      Tensors asked;
      for (auto* tensor : {&in.initial_state, &in.u, &in.delta, &in.B, &in.C, &in.z}) {
        *tensor = tensor->detach().requires_grad_();
        asked.push_back(*tensor);
      }
      const auto outputs = in.run();
      auto results = torch::autograd::grad({outputs[0].sum() + outputs[1].sum()}, asked);
      results.push_back(outputs[0].detach());
      for (size_t i = 0; i < results.size(); ++i)
        results[i] = results[i].select(i == 0 ? 0 : 1, -1);
      return results;
    };
    expect_bit_equal(last_row(all), last_row(all.rows(p.B - 1, 1)));
  }
}

/// Chunks of kept states are 16 to 80 steps long here, parts of a chunk 4 or 8; -1: at every step.
TEST_P(ScanPitfalls, ResetsAtAnyStepCutValuesAndGradients) {
  for (const int64_t N : {3, 16, 24, 40}) {
    const ScanProblem p{150, 2, 20, N};
    const auto inputs = inputs_of(p);
    for (const int64_t at : {0, 1, 15, 16, 17, 31, 32, 33, 47, 48, 49, 79, 80, 81, 149, -1}) {
      SCOPED_TRACE(::testing::Message() << N << " " << at);
      auto reset = at::zeros({p.T, p.B}, at::kBool);
      if (at < 0) {
        reset.fill_(true);
      } else {
        reset[at][1] = true;
      }
      const Op expected = [&](const Tensors& in) {
        return ScanArguments(p.options, in, reset).run_reference();
      };
      expect_matches_reference(scan(p, reset), expected, inputs, at::kFloat, 1e-6, 1e-5);
      expect_matches_reference(scan(p, reset), expected, inputs, at::kBFloat16, 5e-3, 5e-3);
    }
  }
}

TEST_P(ScanPitfalls, ExpandedGradientsAreThoseWrittenOut) {
  for (const int64_t N : {4, 16, 40}) {
    const ScanProblem p{19, 3, 20, N};
    const auto run = [&](bool dense) {
      auto in = arguments_of(p).to(device());
      in.u.requires_grad_();
      in.initial_state.requires_grad_();
      const auto outputs = in.run();
      Tensors gradients;
      for (const auto& output : outputs) {
        const auto one = at::full({1, 1, 1}, 0.7, output.options()).expand_as(output);
        gradients.push_back(dense ? one.contiguous() : one);
      }
      return torch::autograd::grad(outputs, {in.u, in.initial_state}, gradients);
    };
    expect_bit_equal(run(false), run(true));
  }
}

TEST_P(ScanPitfalls, ChangingAnySavedInputIsAnError) {
  using S = ScanArguments;
  for (const auto argument :
       {&S::delta, &S::A, &S::B, &S::C, &S::D, &S::z, &S::delta_bias, &S::reset}) {
    auto in = arguments_of({3, 2, 4, 2}).to(device());
    in.u.requires_grad_();
    const auto y = in.run()[0];
    (in.*argument).zero_();
    EXPECT_THAT(error_of([&] { y.sum().backward(); }),
                HasSubstr("modified by an inplace operation"));
  }
}

/// As an agent acts: one step after the other, the states in place, some channels slow.
TEST_P(ScanPitfalls, StatesDoNotDriftOverActingSteps) {
  const at::NoGradGuard no_grad;
  MambaProblem p{100000, 1, 64, 16, 4};
  auto inputs = to(inputs_of(p), at::kFloat);
  inputs[8] = at::linspace(-8, -2, p.D);
  const auto in = here(inputs);
  const auto weights = weights_of(p, in);
  auto conv = in[1].clone(), ssm = in[2].clone();
  Tensor y;
  for (int64_t t = 0; t < p.T; ++t) y = mamba_update_(in[0][t], conv, ssm, weights);
  const auto wide = to(inputs, at::kDouble);
  const auto [all, last_conv, last_ssm] =
      mamba_inner(wide[0], wide[1], wide[2], weights_of(p, wide));
  expect_close(cpu({y, conv, ssm}), {all[p.T - 1], last_conv, last_ssm}, 1e-5);
}

/// While another device is the current one.
TEST(ScanPitfallsCuda, ASecondDeviceGivesTheSameBits) {
  RETAIN_NEEDS_CUDA();
  if (at::getNumGPUs() < 2) GTEST_SKIP() << "needs two GPUs";
  const MambaProblem block{3, 5, 64, 16, 4};
  for (const ScanProblem& p : {ScanProblem{40, 3, 64, 16}, ScanProblem{2000, 1, 32, 24}}) {
    for (const auto dtype : {at::kFloat, at::kBFloat16}) {
      const auto run = [&](at::Device device) {
        const at::Device elsewhere(at::kCUDA, 1 - device.index());
        const c10::DeviceGuard guard(elsewhere);
        const Op op = [&](const Tensors& in) {
          return cpu(ScanArguments(p.options, in, reset_of(p)).to(device).run());
        };
        auto outcome = differentiate(op, to(inputs_of(p), dtype));
        auto all = outcome.outputs;
        all.insert(all.end(), outcome.gradients.begin(), outcome.gradients.end());
        const auto add = [&](const Op& other, const Tensors& inputs) {
          const Op there = [&](const Tensors& in) {
            Tensors moved;
            for (const auto& input : in) moved.push_back(input.to(device));
            return cpu(other(moved));
          };
          const auto more = differentiate(there, to(inputs, dtype));
          all.insert(all.end(), more.outputs.begin(), more.outputs.end());
          all.insert(all.end(), more.gradients.begin(), more.gradients.end());
        };
        add(sequence(block), inputs_of(block));
        add(
            [](const Tensors& in) -> Tensors {
              const auto [y, sum] = rms_norm(in[0], in[1], in[2]);
              return {y, sum};
            },
            {randn({5, 3, 64}, 1), randn({64}, 2), randn({5, 3, 64}, 3)});
        Tensors in;
        for (const auto& input : to(inputs_of(block), dtype)) in.push_back(input.to(device));
        const at::NoGradGuard no_grad;
        const auto [y, conv, ssm] = mamba_update(in[0][0], in[1], in[2], weights_of(block, in));
        auto state = State(block.B, {{"conv", conv}, {"ssm", ssm}}).clone();
        state.zero(at::arange(block.B, in[0].options()) < 2);
        for (const auto& output : cpu({y, conv, ssm, state.at("conv"), state.at("ssm")}))
          all.push_back(output);
        return all;
      };
      expect_bit_equal(run(at::Device(at::kCUDA, 1)), run(at::Device(at::kCUDA, 0)));
    }
  }
}

}  // namespace
}  // namespace retain
