#pragma once

#include <ATen/core/Tensor.h>
#include <retain/lib/ops/checks.h>
#include <torch/library.h>

#include <tuple>

// Between the dispatcher and the kernels of the selective scan.
namespace retain {
using at::Tensor;

/// The arguments of selective_scan; undefined where absent.
struct SelectiveScanTensors {
  Tensor u, delta, A, B, C;
  Tensor D = {}, z = {}, delta_bias = {};
  bool delta_softplus = false;
  Tensor initial_state = {}, reset = {};
  bool exact = false;
};

// The arguments that every op of the scan starts with, and their names.
#define SELECTIVE_SCAN_PARAMETERS                                                            \
  const Tensor &u, const Tensor &delta, const Tensor &A, const Tensor &B, const Tensor &C,   \
      const OptionalTensor &D, const OptionalTensor &z, const OptionalTensor &delta_bias,    \
      bool delta_softplus, const OptionalTensor &initial_state, const OptionalTensor &reset, \
      bool exact
#define SELECTIVE_SCAN_ARGUMENTS \
  u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, reset, exact

inline SelectiveScanTensors gather_selective_scan(SELECTIVE_SCAN_PARAMETERS) {
  return {u,
          delta,
          A,
          B,
          C,
          value_or_undefined(D),
          value_or_undefined(z),
          value_or_undefined(delta_bias),
          delta_softplus,
          value_or_undefined(initial_state),
          value_or_undefined(reset),
          exact};
}

/// Shapes, dtypes, devices; `op` opens the message.
void check_selective_scan(const char* op, const SelectiveScanTensors& in);

/// The same, and shapes and devices of what the backward pass takes and writes.
void check_selective_scan_bwd(const SelectiveScanTensors& in, const OptionalTensor& dy,
                              const OptionalTensor& dlast_state, const OptionalTensor& y,
                              const Tensor& checkpoints, int64_t checkpoint_every, const Tensor& dB,
                              const Tensor& dC, const OptionalTensor& dz);

using ScanOutputs = std::tuple<Tensor, Tensor>;
using ScanFwdOutputs = std::tuple<Tensor, Tensor, Tensor>;
using ScanBwdOutputs =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
/// The same without dB, dC and dz, which are written where the caller wants them.
using ScanBwdIntoOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

/// The pass without gradients that also gives the state entering every checkpoint_every-th step, 0
/// for none: what a device's kernels offer, in multiples of their own. These states have the
/// state's dtype, or the one that a training pass keeps.
ScanFwdOutputs selective_scan_fwd(SELECTIVE_SCAN_PARAMETERS, int64_t checkpoint_every,
                                  at::ScalarType checkpoint_dtype);

/// The pass back: gradients of u, delta, A, D, delta_bias and initial_state. Those of B, C and,
/// where it is there, z are written, in tensors of their shape and dtype. `y` is the forward's,
/// asked for where scan_takes_y says so.
ScanBwdIntoOutputs selective_scan_bwd_into(const OptionalTensor& dy,
                                           const OptionalTensor& dlast_state,
                                           SELECTIVE_SCAN_PARAMETERS, const OptionalTensor& y,
                                           const Tensor& checkpoints, int64_t checkpoint_every,
                                           const Tensor& dB, const Tensor& dC,
                                           const OptionalTensor& dz);

/// How often the backward on u's device wants the state, as what, and whether the forward keeps
/// them for it: where they would take more than 5/4 of u's memory it runs the forward again.
struct ScanCheckpoints {
  int64_t every;
  at::ScalarType dtype;
  bool kept;
};
ScanCheckpoints scan_checkpoints(const SelectiveScanTensors& in);

/// Whether the backward over states of such a dtype takes the forward's y.
inline bool scan_takes_y(at::ScalarType checkpoint_dtype, bool gated) {
  return gated && checkpoint_dtype == at::kBFloat16;
}

/// Those of a forward run again.
Tensor scan_checkpoints_again(SELECTIVE_SCAN_PARAMETERS);

/// A in `dtype`, its infinities the largest numbers: times a delta' of 0 they are 0.
Tensor finite_rates(const Tensor& A, at::ScalarType dtype);

/// An empty tensor where the argument is absent.
struct SelectiveScanGradients {
  Tensor u, delta, A, D, delta_bias, initial_state;
};

/// Gradients that are written where the caller wants them; z is undefined where it is absent.
struct SelectiveScanWritten {
  Tensor B, C, z;
};

/// A device's kernels as the dispatcher calls them:
///   ScanFwdOutputs fwd(const SelectiveScanTensors& in, int64_t checkpoint_every,
///                      at::ScalarType checkpoint_dtype)
/// returns y, last_state and [ceil(T / checkpoint_every), B, d_inner, d_state], the state that
/// enters every checkpoint_every-th step; an empty tensor if checkpoint_every is 0;
///   SelectiveScanGradients bwd(const Tensor& dy, const Tensor& dlast_state,
///                              const SelectiveScanTensors& in, const Tensor& y,
///                              const Tensor& checkpoints, int64_t checkpoint_every,
///                              const SelectiveScanWritten& written)
/// takes an undefined dy or dlast_state as zero; y is there where scan_takes_y says so. It
/// does not read in.initial_state: the checkpoints hold it.
template <auto& kFwd, auto& kBwd>
struct SelectiveScanOps {
  static ScanOutputs scan(SELECTIVE_SCAN_PARAMETERS) {
    auto [y, last_state, checkpoints] = fwd(SELECTIVE_SCAN_ARGUMENTS, 0, state_dtype(u));
    return {y, last_state};
  }

  static ScanFwdOutputs fwd(SELECTIVE_SCAN_PARAMETERS, int64_t checkpoint_every,
                            at::ScalarType checkpoint_dtype) {
    const auto in = gather_selective_scan(SELECTIVE_SCAN_ARGUMENTS);
    check_selective_scan("selective_scan", in);
    return kFwd(in, checkpoint_every, checkpoint_dtype);
  }

  /// Each gradient in the type of its argument.
  static ScanBwdIntoOutputs bwd_into(const OptionalTensor& dy, const OptionalTensor& dlast_state,
                                     SELECTIVE_SCAN_PARAMETERS, const OptionalTensor& y,
                                     const Tensor& checkpoints, int64_t checkpoint_every,
                                     const Tensor& dB, const Tensor& dC, const OptionalTensor& dz) {
    const auto in = gather_selective_scan(SELECTIVE_SCAN_ARGUMENTS);
    check_selective_scan_bwd(in, dy, dlast_state, y, checkpoints, checkpoint_every, dB, dC, dz);
    const auto g =
        kBwd(value_or_undefined(dy), value_or_undefined(dlast_state), in, value_or_undefined(y),
             checkpoints, checkpoint_every, {dB, dC, value_or_undefined(dz)});
    const auto as = [](const Tensor& gradient, const Tensor& argument) {
      return argument.defined() ? gradient.to(argument.scalar_type()) : gradient;
    };
    return {as(g.u, in.u), as(g.delta, in.delta),           as(g.A, in.A),
            as(g.D, in.D), as(g.delta_bias, in.delta_bias), g.initial_state};
  }

  static void add_to(torch::Library& library) {
    library.impl("selective_scan", scan);
    library.impl("selective_scan_fwd", fwd);
    library.impl("selective_scan_bwd_into", bwd_into);
  }
};

}  // namespace retain
