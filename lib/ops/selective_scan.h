#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace retain {
using at::Tensor;

/// Selective scan (Mamba-1; Gu & Dao 2023, arXiv:2312.00752, Algorithm 2), time-major, with
/// explicit state.
///
/// For batch row b, channel d, state index n:
///   delta' = softplus(delta + delta_bias)             (softplus only if delta_softplus)
///   h_t    = exp(delta'_t A[d, n]) h_{t-1} + delta'_t B_t[n] u_t
///   y_t    = (sum_n C_t[n] h_t[n] + D[d] u_t) silu(z_t)
/// from h_{-1} = initial_state, or 0.
/// Where reset[t, b] is set, h_{t-1} is replaced by zero, by selection: nothing before it reaches
/// what follows. A may have any sign; where it is infinite the decay is 0 or infinite, and 1 where
/// delta' is 0; a NaN stays with its channel.
///
/// Shapes: u, delta, z [T, B, D]; A [D, N]; B, C [T, B, G, N], G divides D; D, delta_bias [D];
/// initial_state [B, D, N]; reset [T, B] bool. An undefined tensor counts as absent. On CUDA N is
/// at most 256.
/// Returns y [T, B, D] of u's dtype and last_state [B, D, N] (fp32; fp64 for fp64 inputs).
/// Differentiable in every floating-point input and through both outputs. On CUDA, in bf16 with z
/// and N from 8 to 32, a backward pass wants y as it was: changing it in place before is an error.
///
/// On CUDA few rows and channels over many steps are scanned in segments of time at once. `exact`
/// forces the order of time, which equals repeated updates bit for bit, as the CPU always does.
/// Throws c10::Error naming the argument on a wrong shape, dtype or device.
std::tuple<Tensor, Tensor> selective_scan(
    const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
    const std::optional<Tensor>& D = {}, const std::optional<Tensor>& z = {},
    const std::optional<Tensor>& delta_bias = {}, bool delta_softplus = false,
    const std::optional<Tensor>& initial_state = {}, const std::optional<Tensor>& reset = {},
    bool exact = false);

/// One step: u, delta, z [B, D]; B, C [B, G, N]; state [B, D, N]; reset [B] bool; the rest as
/// selective_scan's. The same bits as selective_scan with T = 1. Returns y [B, D] and the new state
/// [B, D, N]. Throws c10::Error naming the argument.
std::tuple<Tensor, Tensor> selective_scan_update(
    const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
    const Tensor& state, const std::optional<Tensor>& D = {}, const std::optional<Tensor>& z = {},
    const std::optional<Tensor>& delta_bias = {}, bool delta_softplus = false,
    const std::optional<Tensor>& reset = {});

/// selective_scan that also gives the states that enter steps 0, every, 2 every, … (before the
/// reset that such a step may bring): y, last_state and [ceil(T / every), B, D, N], as a replay
/// buffer keeps them. Without gradients one pass where `every` is a multiple of 16; otherwise the
/// scans of the parts, one after the other. Differentiable through all three. Throws if every < 1.
std::tuple<Tensor, Tensor, Tensor> selective_scan_states(
    const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
    int64_t every, const std::optional<Tensor>& D = {}, const std::optional<Tensor>& z = {},
    const std::optional<Tensor>& delta_bias = {}, bool delta_softplus = false,
    const std::optional<Tensor>& initial_state = {}, const std::optional<Tensor>& reset = {},
    bool exact = false);

/// What a segment leaves of the state that enters it, prod_t exp(delta'_t A), or 0 where it holds a
/// reset: [B, D, N] of A's dtype, at least fp32. Segments that were scanned apart, each from zero,
/// join by last_state ← decay · last_state of the segment before + last_state. Shapes: delta [T, B,
/// D]; A [D, N]; delta_bias [D]; reset [T, B] bool. Differentiable. Throws c10::Error naming the
/// argument.
Tensor selective_scan_decay(const Tensor& delta, const Tensor& A,
                            const std::optional<Tensor>& delta_bias = {},
                            bool delta_softplus = false, const std::optional<Tensor>& reset = {});

/// The plain composition of tensor operations, differentiable by autograd; the oracle in fp64.
std::tuple<Tensor, Tensor> selective_scan_reference(
    const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
    const std::optional<Tensor>& D = {}, const std::optional<Tensor>& z = {},
    const std::optional<Tensor>& delta_bias = {}, bool delta_softplus = false,
    const std::optional<Tensor>& initial_state = {}, const std::optional<Tensor>& reset = {});

/// The scan in one plain call: out [T, B, D] and, if return_last_state, last_state [B, D, N] (else
/// undefined). x0 [B, D, N] is the initial state, the rest as selective_scan's; gradients flow into
/// x0 and out of last_state.
std::tuple<Tensor, Tensor> selective_scan_fwd_with_state(
    const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
    const std::optional<Tensor>& D, const std::optional<Tensor>& x0, bool delta_softplus,
    bool return_last_state);

}  // namespace retain
