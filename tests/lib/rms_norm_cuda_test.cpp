#include <gtest/gtest.h>

#include "lib/rms_norm_problem.h"
#include "support/cuda.h"

namespace retain {
namespace {

using namespace testing;

TEST(RmsNormCuda, DoubleRunsTheReference) {
  RETAIN_NEEDS_CUDA();
  expect_matches_reference(on_cuda(op_of(rms_norm)), op_of(rms_norm_reference),
                           inputs_of({4, 3, 5}, true), at::kDouble, 1e-14, 1e-13);
}

TEST(RmsNormCuda, FiveRunsAreTheSameBits) {
  RETAIN_NEEDS_CUDA();
  for (const int64_t D : {65, 256}) {
    const auto in = cuda(to(inputs_of({129, 65, D}, true), at::kFloat));
    expect_same_in_five_runs(op_of(rms_norm), in);
  }
}

TEST(RmsNormCuda, TheLastRowsOfAHugeTensorAreRight) {
  RETAIN_NEEDS_CUDA();
  const int64_t rows = (1 << 21) + 4099;
  for (const int64_t D : {1024, 1025}) {  // more than 2^31 elements
    const auto x = at::randn({rows, D}, at::TensorOptions(at::kCUDA).dtype(at::kBFloat16));
    const auto weight = cuda(randn({D}, 2)).requires_grad_();
    const auto dy = at::zeros_like(x);
    dy.slice(0, -5).normal_();
    const auto run = [&](int64_t count) {
      const auto part = x.slice(0, rows - count).detach().requires_grad_();
      const auto [y, residual_out] = rms_norm(part, weight);
      const auto gradients = torch::autograd::grad({y}, {part, weight}, {dy.slice(0, -count)});
      return Tensors{y.detach().slice(0, -5), residual_out.detach().slice(0, -5),
                     gradients[0].slice(0, -5), gradients[1]};
    };
    const auto whole = run(rows), alone = run(5);
    for (const size_t i : {0, 1, 2}) expect_bit_equal(whole[i], alone[i]);
    expect_close({whole[3]}, {alone[3]}, 1e-5);
  }
}

}  // namespace
}  // namespace retain
