#pragma once

#include <torch/nn/module.h>
#include <torch/nn/modules/linear.h>

namespace retain {
using at::Tensor;

/// Observation [T, B, observation_size] → features [T, B, d_model]: one linear map, then a ReLU if
/// `activate`.
class Encoder : public torch::nn::Module {
 public:
  /// Throws c10::Error naming the size that is below 1.
  Encoder(int64_t observation_size, int64_t d_model, bool activate = false);
  /// Any leading shape works. Throws c10::Error if the last size is not observation_size.
  Tensor forward(const Tensor& observation);

 private:
  bool activate_;
  torch::nn::Linear linear_{nullptr};
};

}  // namespace retain
