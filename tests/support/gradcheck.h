#pragma once

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <functional>
#include <vector>

#include "support/random_tensors.h"

namespace retain::testing {

/// Compares the gradients of `function` with central differences in fp64, through every output at
/// once: the outputs are weighted with fixed random numbers and summed. Every input must be fp64.
inline void expect_gradcheck(
    const std::function<std::vector<at::Tensor>(const std::vector<at::Tensor>&)>& function,
    std::vector<at::Tensor> inputs, double step = 1e-6, double tolerance = 1e-6) {
  const auto loss = [&](const std::vector<at::Tensor>& values) {
    auto total = at::zeros({}, at::kDouble);
    uint64_t seed = 1000;
    for (const auto& output : function(values)) {
      total = total + (output * randn(output.sizes(), ++seed, at::kDouble)).sum();
    }
    return total;
  };
  for (auto& input : inputs) input = input.detach().clone().requires_grad_();
  const auto gradients = torch::autograd::grad({loss(inputs)}, inputs);
  for (size_t i = 0; i < inputs.size(); ++i) {
    at::NoGradGuard no_grad;
    auto probe = inputs;
    probe[i] = inputs[i].detach().clone();
    auto flat = probe[i].view(-1);
    auto numeric = at::empty_like(flat);
    for (int64_t j = 0; j < flat.numel(); ++j) {
      const double value = flat[j].item<double>();
      flat[j] = value + step;
      const double above = loss(probe).item<double>();
      flat[j] = value - step;
      const double below = loss(probe).item<double>();
      flat[j] = value;
      numeric[j] = (above - below) / (2 * step);
    }
    const double error = (gradients[i].reshape(-1) - numeric).abs().max().item<double>();
    EXPECT_LE(error, tolerance * std::max(1.0, numeric.abs().max().item<double>()))
        << "input " << i;
  }
}

}  // namespace retain::testing
