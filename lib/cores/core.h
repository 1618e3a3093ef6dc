#pragma once

#include <retain/lib/state.h>
#include <torch/nn/module.h>

#include <string>

namespace retain {

struct CoreOutput {
  Tensor y;  ///< [T, B, d_model]
  State state;
};

/// A recurrent core: weights are the module, memory is a value that goes in and comes out.
class Core : public torch::nn::Module {
 public:
  virtual int64_t d_model() const = 0;

  /// Zero memory for `batch` rows, on the device of the parameters; fp32 (fp64 where the parameters
  /// are).
  virtual State initial_state(int64_t batch) const = 0;

  /// x [T, B, d_model]; reset [T, B] bool (undefined = none) clears the memory before step t reads
  /// its input, by selection: NaN before it reaches no value and no input's gradient after it. (The
  /// gradient of a weight sums over every step that was fed, poisoned ones too.) Acting is T = 1.
  /// Gradients flow into `state` and out of the returned one. Throws c10::Error naming the argument
  /// if a shape, dtype or device is wrong or `state` belongs to another core.
  virtual CoreOutput forward(const Tensor& x, const State& state, const Tensor& reset = {}) = 0;
};

/// The checks of x and reset that every forward owes; `where` opens the message, `parameter` is any
/// of the core's.
void check_input(const std::string& where, const Tensor& x, const Tensor& reset, int64_t d_model,
                 const Tensor& parameter);

/// A part of the State that check_state expects: of shape `sizes`, of the dtype and on the device
/// where a core with this `parameter` keeps its memory. One zero stands for every value, so that it
/// costs no memory.
Tensor expected_part(const Tensor& parameter, at::IntArrayRef sizes);

/// Zeros of the parts, shapes, dtypes and devices of `expected`.
State zero_state(const State& expected);

}  // namespace retain
