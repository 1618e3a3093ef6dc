#pragma once

#include <retain/lib/cores/core.h>

namespace retain {

struct GRUOptions {
  int64_t d_model = 64;  ///< Width of input and output.
  /// Longest memory wanted of chrono initialisation, in steps; 0 = LibTorch's initialisation.
  int64_t chrono_horizon = 0;
};

/// One GRU layer with torch.nn.GRU's equations, gate order and weights: weight_ih, weight_hh [3H,
/// H], bias_ih, bias_hh [3H], uniform in ±H^−½. Chrono initialisation (Tallec & Ollivier 2018,
/// arXiv:1804.11188, section 2) gives the gate z, which keeps memory here, the bias log U(1,
/// chrono_horizon − 1): a unit forgets over 2 … chrono_horizon steps. State: "hidden" [B, d_model].
class GRU : public Core {
 public:
  /// Throws c10::Error naming the option unless d_model is at least 1 and chrono_horizon at least 2
  /// or 0.
  explicit GRU(const GRUOptions& options);

  int64_t d_model() const override { return options_.d_model; }
  const GRUOptions& options() const { return options_; }
  State initial_state(int64_t batch) const override { return zero_state(expected_state(batch)); }
  CoreOutput forward(const Tensor& x, const State& state, const Tensor& reset = {}) override;

 private:
  State expected_state(int64_t batch) const;
  void reset_update_bias();

  GRUOptions options_;
  Tensor weight_ih_, weight_hh_, bias_ih_, bias_hh_;
};

}  // namespace retain
