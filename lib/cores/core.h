#pragma once

#include <retain/lib/state.h>
#include <torch/nn/module.h>

#include <string>

namespace retain {

struct CoreOutput {
  Tensor y;     ///< [T, B, d_model]
  State state;  ///< After the last step.
};

/// A recurrent core: weights are the module, memory is a value that goes in and comes out.
class Core : public torch::nn::Module {
 public:
  virtual int64_t d_model() const = 0;

  /// Zero memory for `batch` rows, on the device of the parameters; fp32 (fp64 where the parameters
  /// are). Throws c10::Error if `batch` is negative.
  virtual State initial_state(int64_t batch) const = 0;

  /// x [T, B, d_model]; reset [T, B] bool (undefined = none) clears the memory before step t reads
  /// its input, by selection: NaN before it reaches no value and no input's gradient after it. (The
  /// gradient of a weight sums over every step that was fed, poisoned ones too.) Acting is T = 1.
  /// Gradients flow into `state` and out of the returned one. Under autocast x may be narrower than
  /// the parameters. Throws c10::Error naming the argument if a shape, dtype or device is wrong or
  /// `state` belongs to another core.
  virtual CoreOutput forward(const Tensor& x, const State& state, const Tensor& reset = {}) = 0;

  /// One acting step without gradients, the memory written in place: x [B, d_model], reset [B] bool
  /// (undefined = none) → y [B, d_model]. `state` keeps its tensors, so that a CUDA graph can hold
  /// the call. Throws as forward does.
  virtual Tensor step(const Tensor& x, State& state, const Tensor& reset = {});
};

/// The checks of x and reset that every forward owes; `where` opens the message, `parameter` is any
/// of the core's.
void check_input(const std::string& where, const Tensor& x, const Tensor& reset, int64_t d_model,
                 const Tensor& parameter);
/// The same for a step's.
void check_step_input(const std::string& where, const Tensor& x, const Tensor& reset,
                      int64_t d_model, const Tensor& parameter);

/// A part of the State that check_state expects: of shape `sizes`, of the dtype and on the device
/// where a core with this `parameter` keeps its memory. It holds no values: one element, never
/// written, stands for all.
Tensor expected_part(const Tensor& parameter, at::IntArrayRef sizes);

/// Zeros of the parts, shapes, dtypes and devices of `expected`.
State zero_state(const State& expected);

}  // namespace retain
