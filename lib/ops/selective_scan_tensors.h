#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

// Between the dispatcher and the kernels of the selective scan.
namespace retain {
using at::Tensor;

/// The arguments of selective_scan; undefined where absent.
struct SelectiveScanTensors {
  Tensor u, delta, A, B, C, D, z, delta_bias;
  bool delta_softplus = false;
  Tensor initial_state, reset;
};

/// Shapes, dtypes, devices; `op` opens the message.
void check_selective_scan(const char* op, const SelectiveScanTensors& in);

/// y, last_state and, if asked for, the state that enters each chunk of time (else an empty
/// tensor).
std::tuple<Tensor, Tensor, Tensor> selective_scan_fwd_cpu(const SelectiveScanTensors& in,
                                                          bool keep_checkpoints);

/// In the type of the state; an empty tensor where the argument is absent.
struct SelectiveScanGradients {
  Tensor u, delta, A, B, C, D, z, delta_bias, initial_state;
};

/// dy, dlast_state: undefined counts as zero. in.initial_state is not read: the checkpoints hold
/// it.
SelectiveScanGradients selective_scan_bwd_cpu(const Tensor& dy, const Tensor& dlast_state,
                                              const SelectiveScanTensors& in,
                                              const Tensor& checkpoints);

}  // namespace retain
