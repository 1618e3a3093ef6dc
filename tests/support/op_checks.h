#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <functional>
#include <vector>

#include "support/random_tensors.h"

// What the tests of every op ask, with an op as a function from tensors to tensors.
namespace retain::testing {

using Tensors = std::vector<at::Tensor>;
using Op = std::function<Tensors(const Tensors&)>;

inline void expect_bit_equal(const at::Tensor& a, const at::Tensor& b) {
  ASSERT_EQ(a.sizes(), b.sizes());
  ASSERT_EQ(a.scalar_type(), b.scalar_type());
  EXPECT_TRUE(at::equal(a, b)) << "largest difference "
                               << (a - b).abs().max().to(at::kDouble).item<double>();
}

inline void expect_bit_equal(const Tensors& a, const Tensors& b) {
  ASSERT_EQ(a.size(), b.size());
  for (size_t i = 0; i < a.size(); ++i) {
    SCOPED_TRACE(i);
    expect_bit_equal(a[i], b[i]);
  }
}

inline void expect_close(const Tensors& got, const Tensors& expected, double tolerance) {
  ASSERT_EQ(got.size(), expected.size());
  for (size_t i = 0; i < got.size(); ++i) {
    ASSERT_EQ(got[i].sizes(), expected[i].sizes()) << "tensor " << i;
    EXPECT_LE(relative_error(got[i], expected[i]), tolerance) << "tensor " << i;
  }
}

inline Tensors to(const Tensors& tensors, at::ScalarType dtype) {
  Tensors converted;
  for (const auto& tensor : tensors) converted.push_back(tensor.to(dtype));
  return converted;
}

/// The outputs, then the gradients of all inputs with every output weighted by fixed random
/// numbers, which are rounded to `dtype`.
struct Outcome {
  Tensors outputs, gradients;
};

inline Outcome differentiate(const Op& op, Tensors inputs, at::ScalarType dtype = at::kDouble) {
  for (auto& input : inputs) input = input.detach().requires_grad_();
  Outcome outcome{op(inputs), {}};
  Tensors weights;
  uint64_t seed = 2000;
  for (const auto& output : outcome.outputs) {
    weights.push_back(randn(output.sizes(), ++seed, dtype).to(output.options()));
  }
  outcome.gradients = torch::autograd::grad(outcome.outputs, inputs, weights);
  for (auto& output : outcome.outputs) output = output.detach();
  return outcome;
}

inline void expect_bit_equal(const Outcome& a, const Outcome& b) {
  expect_bit_equal(a.outputs, b.outputs);
  expect_bit_equal(a.gradients, b.gradients);
}

/// Values and gradients of five runs are the same bits.
inline void expect_same_in_five_runs(const Op& op, const Tensors& inputs) {
  const auto first = differentiate(op, inputs);
  for (int again = 1; again < 5; ++again) expect_bit_equal(differentiate(op, inputs), first);
}

/// The op in `dtype` against the reference in fp64 on the same (rounded) numbers.
inline void expect_matches_reference(const Op& op, const Op& reference, const Tensors& inputs,
                                     at::ScalarType dtype, double tolerance,
                                     double gradient_tolerance) {
  const auto rounded = to(inputs, dtype);
  const auto got = differentiate(op, rounded, dtype);
  const auto expected = differentiate(reference, to(rounded, at::kDouble), dtype);
  expect_close(got.outputs, expected.outputs, tolerance);
  expect_close(got.gradients, expected.gradients, gradient_tolerance);
}

/// bf16 and fp16 inputs: within the bounds of their precision; the first output is of the inputs'
/// type, the second, which is memory, fp32.
inline void expect_half_types_keep_precision(const Op& op, const Op& reference,
                                             const Tensors& inputs) {
  expect_matches_reference(op, reference, inputs, at::kBFloat16, 5e-3, 5e-3);
  expect_matches_reference(op, reference, inputs, at::kHalf, 1e-3, 1e-3);
  for (const auto dtype : {at::kBFloat16, at::kHalf}) {
    const auto outputs = op(to(inputs, dtype));
    EXPECT_EQ(outputs[0].scalar_type(), dtype);
    EXPECT_EQ(outputs[1].scalar_type(), at::kFloat);
  }
}

/// Values and gradients with one thread and with two are the same bits.
inline void expect_same_with_any_threads(const Op& op, const Tensors& inputs) {
  const int threads = at::get_num_threads();
  at::set_num_threads(1);
  const auto one = differentiate(op, inputs);
  at::set_num_threads(2);
  const auto two = differentiate(op, inputs);
  at::set_num_threads(threads);
  expect_bit_equal(one, two);
}

/// True with the given probability, by the seed alone.
inline at::Tensor random_mask(at::IntArrayRef sizes, double probability, uint64_t seed) {
  auto generator = at::detail::createCPUGenerator(seed);
  return at::rand(sizes, generator, at::TensorOptions().dtype(at::kDouble)) < probability;
}

}  // namespace retain::testing
