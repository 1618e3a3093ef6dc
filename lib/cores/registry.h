#pragma once

#include <retain/lib/cores/core.h>

#include <memory>
#include <string>
#include <vector>

namespace retain {

/// What make_core builds: a stack of n_layers × (norm → core → residual).
struct CoreOptions {
  std::string name = "mamba";  ///< One of core_names().
  int64_t d_model = 64;        ///< Width of input and output.
  int64_t n_layers = 1;        ///< How many layers the stack has.
  bool norm_input = true;      ///< Off: the first layer keeps its input's scale, so that rare large
                               ///< features stand out.
  bool recompute = false;      ///< Layers run again in the backward: less memory, more time.
  int64_t d_state = 16;        ///< Mamba: state size a channel.
  int64_t d_conv = 4;          ///< Mamba: taps of the causal convolution.
  int64_t expand = 2;          ///< Mamba: d_inner = expand · d_model; MLP: hidden units likewise.
  double dt_min = 1e-3;        ///< Mamba: smallest initial step; 1 / horizon suits long horizons.
  double dt_max = 1e-1;        ///< Mamba: largest initial step.
  double dt_init_floor = 1e-4;    ///< Mamba: initial steps are clamped from below here.
  int64_t chrono_horizon = 1000;  ///< gru_chrono: forget biases are log U(1, chrono_horizon - 1).
};

/// "mamba", "gru", "gru_chrono", "mlp".
std::vector<std::string> core_names();

/// A Stack with LibTorch's global generator as its source of random weights: at::manual_seed
/// makes it reproducible. Throws c10::Error for an option out of range, and for an unknown name
/// lists the valid ones.
std::shared_ptr<Core> make_core(const CoreOptions& options);

}  // namespace retain
