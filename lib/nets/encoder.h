#pragma once

#include <torch/nn/module.h>
#include <torch/nn/modules/linear.h>

namespace retain {
using at::Tensor;

/// Observation [T, B, observation_size] → features [T, B, d_model]: one linear map, then a ReLU if
/// `activate`.
class Encoder : public torch::nn::Module {
 public:
  Encoder(int64_t observation_size, int64_t d_model, bool activate = false);
  Tensor forward(const Tensor& observation);

 private:
  bool activate_;
  torch::nn::Linear linear_{nullptr};
};

}  // namespace retain
