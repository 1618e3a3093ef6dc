#include <ATen/ATen.h>
#include <retain/lib/ops/casts.h>
#include <retain/lib/ops/gradients.h>
#include <retain/lib/ops/kernel_arguments.h>
#include <retain/lib/ops/selective_scan.h>
#include <retain/lib/ops/selective_scan_tensors.h>

#include <algorithm>
#include <vector>

// States inside a sequence, and what joins sequences that were scanned apart.
namespace retain {
namespace {

/// Steps between the states that every device's kernels can give: a multiple of all their own.
constexpr int64_t kKept = 16;

OptionalTensor steps(const OptionalTensor& tensor, int64_t first, int64_t count) {
  return present(tensor) ? OptionalTensor(tensor->narrow(0, first, count)) : std::nullopt;
}

/// Part after part.
ScanFwdOutputs scan_parts(SELECTIVE_SCAN_PARAMETERS, int64_t every) {
  const int64_t T = u.size(0);
  const std::vector<int64_t> sizes = {u.size(1), u.size(2), A.size(1)};
  const auto options = u.options().dtype(state_dtype(u));
  Tensor state = present(initial_state) ? initial_state->to(options) : at::zeros(sizes, options);
  std::vector<Tensor> outputs, states;
  for (int64_t t = 0; t < T; t += every) {
    const int64_t count = std::min(every, T - t);
    const auto part = [&](const Tensor& x) { return x.narrow(0, t, count); };
    states.push_back(state);
    auto [y, next] =
        selective_scan(part(u), part(delta), A, part(B), part(C), D, steps(z, t, count), delta_bias,
                       delta_softplus, state, steps(reset, t, count), exact);
    outputs.push_back(y);
    state = next;
  }
  if (T == 0) {
    return {at::empty_like(autocasted(u)), state.clone(),
            at::empty({0, sizes[0], sizes[1], sizes[2]}, options)};
  }
  return {at::cat(outputs), state, at::stack(states)};
}

}  // namespace

ScanFwdOutputs selective_scan_states(const Tensor& u, const Tensor& delta, const Tensor& A,
                                     const Tensor& B, const Tensor& C, int64_t every,
                                     const OptionalTensor& D, const OptionalTensor& z,
                                     const OptionalTensor& delta_bias, bool delta_softplus,
                                     const OptionalTensor& initial_state,
                                     const OptionalTensor& reset, bool exact) {
  constexpr char kOp[] = "selective_scan_states";
  const auto in = gather_selective_scan(SELECTIVE_SCAN_ARGUMENTS);
  check_selective_scan(kOp, in);
  TORCH_CHECK(every >= 1, kOp, ": every must be at least 1, got ", every);
  // Longer than the sequence is as long as it.
  every = std::min(every, std::max<int64_t>(u.size(0) + kKept - 1, kKept) / kKept * kKept);
  const bool one_pass =
      every % kKept == 0 && has_kernels("retain::selective_scan_bwd_into", u) &&
      !needs_gradient({u, delta, A, B, C, in.D, in.z, in.delta_bias, in.initial_state});
  if (!one_pass) return scan_parts(SELECTIVE_SCAN_ARGUMENTS, every);
  const int64_t kept = u.is_cuda() ? every : kKept;
  const auto narrow_z = present(z) ? OptionalTensor(autocasted(*z)) : std::nullopt;
  auto [y, last_state, states] =
      selective_scan_fwd(autocasted(u), autocasted(delta), A, autocasted(B), autocasted(C),
                         if_present(D), narrow_z, if_present(delta_bias), delta_softplus,
                         if_present(initial_state), if_present(reset), exact, kept, state_dtype(u));
  if (kept == every) return {y, last_state, states};
  return {y, last_state, states.slice(0, 0, std::nullopt, every / kept).contiguous()};
}

Tensor selective_scan_decay(const Tensor& delta, const Tensor& A, const OptionalTensor& delta_bias,
                            bool delta_softplus, const OptionalTensor& reset) {
  constexpr char kOp[] = "selective_scan_decay";
  check_rank(kOp, "delta", delta, "[T, B, d_inner]");
  check_floating(kOp, "delta", delta);
  check_rank(kOp, "A", A, "[d_inner, d_state]");
  const auto T = delta.sym_size(0), batch = delta.sym_size(1), D = delta.sym_size(2);
  check_shape(kOp, "A", A, "[d_inner, d_state]", {D, A.sym_size(1)});
  check_like(kOp, "A", A, "delta", delta);
  if (present(delta_bias)) {
    check_shape(kOp, "delta_bias", *delta_bias, "[d_inner]", {D});
    check_like(kOp, "delta_bias", *delta_bias, "delta", delta);
  }
  if (present(reset)) check_reset(kOp, *reset, "[T, B]", {T, batch}, "delta", delta);

  // A row with a reset is left out before anything is made of it: its gradients are zero, too.
  const auto dtype = state_dtype(delta);
  const auto cleared = present(reset) ? reset->any(0) : Tensor();
  const auto kept = cleared.defined() ? delta.masked_fill(cleared.view({1, -1, 1}), 0) : delta;
  auto step = autocasted(kept).to(dtype);  // as the scan takes it
  if (present(delta_bias)) step = step + delta_bias->to(dtype);
  if (delta_softplus) step = at::softplus(step);
  const auto decay = (step.sum(0).unsqueeze(-1) * finite_rates(A, dtype)).exp();
  if (!cleared.defined()) return decay;
  return decay.masked_fill(cleared.view({-1, 1, 1}), 0);
}

TORCH_LIBRARY_FRAGMENT(retain, m) {
  m.def(
      "selective_scan_states(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, int every, "
      "Tensor? D=None, Tensor? z=None, Tensor? delta_bias=None, bool delta_softplus=False, "
      "Tensor? initial_state=None, Tensor? reset=None, bool exact=False) "
      "-> (Tensor y, Tensor last_state, Tensor states)",
      selective_scan_states);
  m.def(
      "selective_scan_decay(Tensor delta, Tensor A, Tensor? delta_bias=None, "
      "bool delta_softplus=False, Tensor? reset=None) -> Tensor",
      selective_scan_decay);
}

}  // namespace retain
