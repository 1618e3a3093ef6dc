#pragma once

#include <retain/lib/ops/checks.h>

#include <tuple>

// The pieces of the GRU op behind its public door; lib/ops/gru.cpp registers them.
namespace retain {

void check_gru(const Tensor& x, const Tensor& w_ih, const Tensor& w_hh, const OptionalTensor& b_ih,
               const OptionalTensor& b_hh, const OptionalTensor& initial_state,
               const OptionalTensor& reset);

std::tuple<Tensor, Tensor> gru_cpu(const Tensor& x, const Tensor& w_ih, const Tensor& w_hh,
                                   const OptionalTensor& b_ih, const OptionalTensor& b_hh,
                                   const OptionalTensor& initial_state,
                                   const OptionalTensor& reset);

/// y [T, B, H] and last_state [B, H] in the state's dtype; the gates for the backward [T, B, 4, H
/// padded], or [0] unless keep_gates.
std::tuple<Tensor, Tensor, Tensor> gru_fwd_cpu(const Tensor& x, const Tensor& w_ih,
                                               const Tensor& w_hh, const OptionalTensor& b_ih,
                                               const OptionalTensor& b_hh,
                                               const OptionalTensor& initial_state,
                                               const OptionalTensor& reset, bool keep_gates);

/// dx ([0] unless needs_dx), dw_ih, dw_hh, db_ih, db_hh, dinitial_state, in the state's dtype.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gru_bwd_cpu(
    const OptionalTensor& dy, const OptionalTensor& dlast_state, const Tensor& x,
    const Tensor& w_ih, const Tensor& w_hh, const OptionalTensor& initial_state,
    const OptionalTensor& reset, const Tensor& y, const Tensor& gates, bool needs_dx);

}  // namespace retain
