#pragma once

#include <retain/lib/cores/core.h>
#include <retain/lib/ops/mamba_block.h>
#include <torch/nn/modules/conv.h>
#include <torch/nn/modules/linear.h>

namespace retain {

struct Mamba1Options {
  int64_t d_model = 64;         ///< Width of input and output.
  int64_t d_state = 16;         ///< State size a channel.
  int64_t d_conv = 4;           ///< Taps of the causal convolution.
  int64_t expand = 2;           ///< d_inner = expand · d_model.
  int64_t dt_rank = 0;          ///< Width of the step's projection; 0 = ceil(d_model / 16).
  double dt_min = 1e-3;         ///< Smallest initial step.
  double dt_max = 1e-1;         ///< Largest initial step.
  double dt_init_floor = 1e-4;  ///< Initial steps are clamped from below here.
};

/// The Mamba block (Gu & Dao 2023, arXiv:2312.00752, section 3.4, figure 3):
///   (x, z) = in_proj(input);  x = silu(conv1d(x));  (dt, B, C) = x_proj(x);  delta = dt_proj(dt)
///   y = out_proj(selective_scan(x, delta, A = −exp(A_log), B, C, D, z))
/// Initial values are the published ones: A_log = log(1 … d_state), D = 1, dt_proj.weight uniform
/// in ±dt_rank^−½, and dt_proj.bias such that softplus(bias) is log-uniform in [dt_min, dt_max].
/// Parameters bear the names of the public models. State: "conv" [B, d_conv − 1, d_inner], "ssm"
/// [B, d_inner, d_state].
class Mamba1 : public Core {
 public:
  /// Throws c10::Error naming the option that is out of range.
  explicit Mamba1(const Mamba1Options& options);

  int64_t d_model() const override { return options_.d_model; }
  const Mamba1Options& options() const { return options_; }
  State initial_state(int64_t batch) const override { return zero_state(expected_state(batch)); }
  CoreOutput forward(const Tensor& x, const State& state, const Tensor& reset = {}) override;
  Tensor step(const Tensor& x, State& state, const Tensor& reset = {}) override;

  /// The parameters between in_proj and out_proj as the ops take them, views of this core's.
  MambaWeights weights() const;

 private:
  State expected_state(int64_t batch) const;
  int64_t d_inner() const { return options_.expand * options_.d_model; }
  void reset_dt_proj();

  Mamba1Options options_;
  torch::nn::Linear in_proj_{nullptr}, x_proj_{nullptr}, dt_proj_{nullptr}, out_proj_{nullptr};
  torch::nn::Conv1d conv1d_{nullptr};
  Tensor A_log_, D_;
};

}  // namespace retain
