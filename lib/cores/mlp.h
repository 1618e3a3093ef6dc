#pragma once

#include <retain/lib/cores/core.h>
#include <torch/nn/modules/linear.h>

namespace retain {

struct MLPOptions {
  int64_t d_model = 64;  ///< Width of input and output.
  int64_t expand = 2;    ///< The hidden layer has expand · d_model units.
};

/// The memoryless core: fc2(relu(fc1(x))) at each step alone. Its State has no parts, only a batch
/// size.
class MLP : public Core {
 public:
  /// Throws c10::Error naming the option that is below 1.
  explicit MLP(const MLPOptions& options);

  int64_t d_model() const override { return options_.d_model; }
  const MLPOptions& options() const { return options_; }
  State initial_state(int64_t batch) const override { return State(batch); }
  CoreOutput forward(const Tensor& x, const State& state, const Tensor& reset = {}) override;

 private:
  MLPOptions options_;
  torch::nn::Linear fc1_{nullptr}, fc2_{nullptr};
};

}  // namespace retain
