#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <retain/kernels/common/cpu_isa.h>
#include <retain/lib/ops/causal_conv1d.h>
#include <retain/lib/ops/gru.h>
#include <retain/lib/ops/rms_norm.h>

#include "lib/selective_scan_problem.h"
#include "support/op_checks.h"

namespace retain {
namespace {

using namespace testing;
using kernels::CpuIsa;

const char* name_of(CpuIsa isa) {
  return isa == CpuIsa::baseline ? "baseline" : isa == CpuIsa::avx2 ? "avx2" : "avx512";
}

/// The ops with the kernels of one instruction set.
class CpuIsaTest : public ::testing::TestWithParam<CpuIsa> {
 protected:
  void SetUp() override {
    if (!kernels::has_cpu_isa(GetParam())) {
      GTEST_SKIP() << name_of(GetParam()) << " is not in this build, or not in this machine";
    }
    kernels::set_cpu_isa(GetParam());
    ASSERT_EQ(kernels::cpu_isa(), GetParam());
  }
  void TearDown() override { kernels::set_cpu_isa(widest_); }

  /// The variant agrees with the reference, and does not depend on the number of threads.
  static void expect_right(const Op& op, const Op& reference, const Tensors& inputs) {
    expect_matches_reference(op, reference, inputs, at::kFloat, 1e-6, 1e-5);
    expect_matches_reference(op, reference, inputs, at::kDouble, 1e-13, 1e-12);
    expect_same_with_any_threads(op, to(inputs, at::kFloat));
  }

 private:
  const CpuIsa widest_ = kernels::cpu_isa();
};

TEST_P(CpuIsaTest, SelectiveScanIsRight) {
  for (const ScanProblem& p : {ScanProblem{1, 3, 20, 16}, ScanProblem{35, 3, 37, 17},
                               ScanProblem{18, 9, 32, 4, 2}, ScanProblem{33, 2, 16, 1, 1, kBare}}) {
    SCOPED_TRACE(p.T);
    expect_right(kernel(p), reference(p), inputs_of(p));
  }
}

TEST_P(CpuIsaTest, CausalConv1dIsRight) {
  const auto reset = random_mask({33, 5}, 0.2, 7);
  const auto op = [&](const auto& function) {
    return [&](const Tensors& in) -> Tensors {
      const auto [y, last_state] = function(in[0], in[1], in[2], /*silu=*/true, in[3], reset);
      return {y, last_state};
    };
  };
  expect_right(op(causal_conv1d), op(causal_conv1d_reference),
               {randn({33, 5, 70}, 1, at::kDouble), randn({70, 4}, 2, at::kDouble),
                randn({70}, 3, at::kDouble), randn({5, 3, 70}, 4, at::kDouble)});
}

TEST_P(CpuIsaTest, RmsNormIsRight) {
  const auto op = [](const auto& function) {
    return [&](const Tensors& in) -> Tensors {
      const auto [y, residual] = function(in[0], in[1], in[2], 1e-5);
      return {y, residual};
    };
  };
  expect_right(op(rms_norm), op(rms_norm_reference),
               {randn({7, 9, 37}, 1, at::kDouble), randn({37}, 2, at::kDouble),
                randn({7, 9, 37}, 3, at::kDouble)});
}

TEST_P(CpuIsaTest, GruIsRight) {
  const auto reset = random_mask({13, 21}, 0.2, 7);
  const auto op = [&](const auto& function) {
    return [&](const Tensors& in) -> Tensors {
      const auto [y, last_state] = function(in[0], in[1], in[2], in[3], in[4], in[5], reset);
      return {y, last_state};
    };
  };
  const auto weight = [](at::IntArrayRef sizes, uint64_t seed) {
    return 0.2 * randn(sizes, seed, at::kDouble);
  };
  expect_right(op(gru), op(gru_reference),
               {randn({13, 21, 9}, 1, at::kDouble), weight({57, 9}, 2), weight({57, 19}, 3),
                weight({57}, 4), weight({57}, 5), randn({21, 19}, 6, at::kDouble)});
}

INSTANTIATE_TEST_SUITE_P(Cpu, CpuIsaTest,
                         ::testing::Values(CpuIsa::baseline, CpuIsa::avx2, CpuIsa::avx512),
                         [](const auto& info) { return name_of(info.param); });

}  // namespace
}  // namespace retain
