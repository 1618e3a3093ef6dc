#pragma once

#include <retain/lib/state.h>
#include <torch/nn/module.h>

namespace retain {

struct CoreOutput {
  Tensor y;  ///< [T, B, d_model]
  State state;
};

/// A recurrent core: weights are the module, memory is a value that goes in and comes out.
class Core : public torch::nn::Module {
 public:
  virtual int64_t d_model() const = 0;

  /// Zero memory for `batch` rows, on the device of the parameters; fp32 (fp64 where the parameters are).
  virtual State initial_state(int64_t batch) const = 0;

  /// x [T, B, d_model]; reset [T, B] bool (undefined = none) clears the memory before step t reads its input.
  /// Acting is T = 1. Gradients flow into `state` and out of the returned one. Throws c10::Error naming the
  /// argument if a shape, dtype or device is wrong or `state` belongs to another core.
  virtual CoreOutput forward(const Tensor& x, const State& state, const Tensor& reset = {}) = 0;
};

}  // namespace retain
