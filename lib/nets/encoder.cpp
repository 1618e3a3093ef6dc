#include <ATen/ATen.h>
#include <retain/lib/nets/encoder.h>
#include <retain/lib/ops/thin_linear.h>
#include <torch/nn/init.h>

#include <cmath>

namespace retain {

Encoder::Encoder(int64_t observation_size, int64_t d_model, bool activate) : activate_(activate) {
  TORCH_CHECK(observation_size >= 1, "Encoder: observation_size must be at least 1, got ",
              observation_size);
  TORCH_CHECK(d_model >= 1, "Encoder: d_model must be at least 1, got ", d_model);
  linear_ = register_module("linear", torch::nn::Linear(observation_size, d_model));
  torch::nn::init::orthogonal_(linear_->weight, std::sqrt(2.0));
  torch::nn::init::zeros_(linear_->bias);
}

Tensor Encoder::forward(const Tensor& observation) {
  TORCH_CHECK(observation.dim() >= 1 && observation.size(-1) == linear_->options.in_features(),
              "Encoder: observation must be [..., observation_size] = [..., ",
              linear_->options.in_features(), "], got ", observation.sizes());
  const auto features = thin_linear(observation, linear_->weight, linear_->bias);
  return activate_ ? features.relu() : features;
}

}  // namespace retain
