#include <retain/lib/ops/selective_scan.h>

#include <ATen/ATen.h>
#include <retain/kernels/selective_scan/selective_scan.h>
#include <retain/kernels/selective_scan/selective_scan_cuda.h>
#include <retain/lib/ops/casts.h>
#include <retain/lib/ops/checks.h>
#include <retain/lib/ops/find_op.h>
#include <retain/lib/ops/gradients.h>
#include <retain/lib/ops/kernel_arguments.h>
#include <retain/lib/ops/selective_scan_tensors.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace retain {

void check_selective_scan(const char* op, const SelectiveScanTensors& in) {
  check_rank(op, "u", in.u, "[T, B, d_inner]");
  check_floating(op, "u", in.u);
  check_rank(op, "A", in.A, "[d_inner, d_state]");
  check_rank(op, "B", in.B, "[T, B, groups, d_state]");
  const auto T = in.u.sym_size(0), B = in.u.sym_size(1), D = in.u.sym_size(2);
  const auto N = in.A.sym_size(1), G = in.B.sym_size(2);
  TORCH_CHECK(D > 0 && N > 0, op, ": d_inner and d_state must be at least 1, got ", D, " and ", N);
  TORCH_CHECK(G > 0 && D % G == 0, op, ": groups of B must divide d_inner = ", D, ", got ", G);
  const auto check = [&](const char* name, const Tensor& tensor, const char* layout,
                         std::initializer_list<c10::SymInt> sizes, bool required = false) {
    if (!required && !tensor.defined()) return;
    check_shape(op, name, tensor, layout, sizes);
    check_like(op, name, tensor, "u", in.u);
  };
  check("delta", in.delta, "[T, B, d_inner]", {T, B, D}, true);
  check("A", in.A, "[d_inner, d_state]", {D, N}, true);
  check("B", in.B, "[T, B, groups, d_state]", {T, B, G, N}, true);
  check("C", in.C, "[T, B, groups, d_state]", {T, B, G, N}, true);
  check("D", in.D, "[d_inner]", {D});
  check("z", in.z, "[T, B, d_inner]", {T, B, D});
  check("delta_bias", in.delta_bias, "[d_inner]", {D});
  check("initial_state", in.initial_state, "[B, d_inner, d_state]", {B, D, N});
  if (in.reset.defined()) check_reset(op, in.reset, "[T, B]", {T, B}, "u", in.u);
}

void check_selective_scan_bwd(const SelectiveScanTensors& in, const OptionalTensor& dy,
                              const OptionalTensor& dlast_state, const OptionalTensor& y,
                              const Tensor& checkpoints, int64_t checkpoint_every, const Tensor& dB,
                              const Tensor& dC, const OptionalTensor& dz) {
  constexpr char kOp[] = "selective_scan_bwd";
  check_selective_scan(kOp, in);
  TORCH_CHECK(checkpoint_every > 0, kOp, ": checkpoint_every must be positive, got ",
              checkpoint_every);
  TORCH_CHECK(present(dz) == in.z.defined(), kOp,
              ": dz must be there where z is, and only there, got ", present(dz) ? "dz" : "z",
              " alone");
  const auto T = in.u.sym_size(0), B = in.u.sym_size(1), D = in.u.sym_size(2);
  const auto N = in.A.sym_size(1), G = in.B.sym_size(2);
  const auto check = [&](const char* name, const OptionalTensor& tensor, const char* layout,
                         std::initializer_list<c10::SymInt> sizes) {
    check_if_present(kOp, name, tensor, layout, sizes, "u", in.u);
  };
  check("dy", dy, "[T, B, d_inner]", {T, B, D});
  check("dlast_state", dlast_state, "[B, d_inner, d_state]", {B, D, N});
  check("y", y, "[T, B, d_inner]", {T, B, D});
  check("checkpoints", checkpoints, "[ceil(T / checkpoint_every), B, d_inner, d_state]",
        {(T + (checkpoint_every - 1)) / checkpoint_every, B, D, N});
  check("dB", dB, "[T, B, groups, d_state]", {T, B, G, N});
  check("dC", dC, "[T, B, groups, d_state]", {T, B, G, N});
  check("dz", dz, "[T, B, d_inner]", {T, B, D});
  check_apart(kOp, "dB", dB);
  check_apart(kOp, "dC", dC);
  if (present(dz)) check_apart(kOp, "dz", *dz);
}

ScanFwdOutputs selective_scan_fwd(SELECTIVE_SCAN_PARAMETERS, int64_t checkpoint_every,
                                  at::ScalarType checkpoint_dtype) {
  static const auto op = find_op<decltype(selective_scan_fwd)>("retain::selective_scan_fwd");
  return op.call(SELECTIVE_SCAN_ARGUMENTS, checkpoint_every, checkpoint_dtype);
}

/// CUDA keeps states as often as its memory allows, the CPU at the start of each of its chunks.
ScanCheckpoints scan_checkpoints(const SelectiveScanTensors& in) {
  const auto N = in.A.sym_size(1).guard_int(__FILE__, __LINE__);
  int64_t every = kernels::kScanChunk;
  auto dtype = state_dtype(in.u);
  if (in.u.is_cuda()) {
    const auto type = activation_type(common_dtype({in.u, in.delta, in.z, in.B, in.C}));
    every = kernels::scan_checkpoint_every(N, type);
    const bool in_bf16 = kernels::scan_checkpoint_type(N, type) == kernels::ActivationType::bf16;
    if (in_bf16) dtype = at::kBFloat16;
  }
  const auto bytes = N * static_cast<int64_t>(c10::elementSize(dtype));  // of a channel's state
  return {every, dtype, 4 * bytes <= 5 * every * in.u.element_size()};
}

Tensor scan_checkpoints_again(SELECTIVE_SCAN_PARAMETERS) {
  const auto wanted = scan_checkpoints(gather_selective_scan(SELECTIVE_SCAN_ARGUMENTS));
  return std::get<2>(selective_scan_fwd(SELECTIVE_SCAN_ARGUMENTS, wanted.every, wanted.dtype));
}

ScanBwdIntoOutputs selective_scan_bwd_into(const OptionalTensor& dy,
                                           const OptionalTensor& dlast_state,
                                           SELECTIVE_SCAN_PARAMETERS, const OptionalTensor& y,
                                           const Tensor& checkpoints, int64_t checkpoint_every,
                                           const Tensor& dB, const Tensor& dC,
                                           const OptionalTensor& dz) {
  static const auto op =
      find_op<decltype(selective_scan_bwd_into)>("retain::selective_scan_bwd_into");
  return op.call(dy, dlast_state, SELECTIVE_SCAN_ARGUMENTS, y, checkpoints, checkpoint_every, dB,
                 dC, dz);
}

namespace {

ScanOutputs call_scan(SELECTIVE_SCAN_PARAMETERS) {
  static const auto op = find_op<decltype(call_scan)>("retain::selective_scan");
  return op.call(SELECTIVE_SCAN_ARGUMENTS);
}

ScanBwdOutputs call_bwd(const OptionalTensor& dy, const OptionalTensor& dlast_state,
                        SELECTIVE_SCAN_PARAMETERS, const OptionalTensor& y,
                        const Tensor& checkpoints, int64_t checkpoint_every) {
  static const auto op = find_op<decltype(call_bwd)>("retain::selective_scan_bwd");
  return op.call(dy, dlast_state, SELECTIVE_SCAN_ARGUMENTS, y, checkpoints, checkpoint_every);
}

// Meta: shapes and dtypes only

ScanFwdOutputs fwd_meta(SELECTIVE_SCAN_PARAMETERS, int64_t checkpoint_every,
                        at::ScalarType checkpoint_dtype) {
  check_selective_scan("selective_scan", gather_selective_scan(SELECTIVE_SCAN_ARGUMENTS));
  const auto T = u.sym_size(0), batch = u.sym_size(1), dim = u.sym_size(2), N = A.sym_size(1);
  const auto options = u.options().dtype(state_dtype(u));
  const auto checkpoints =
      checkpoint_every == 0
          ? at::empty({0}, options)
          : at::empty_symint({(T + (checkpoint_every - 1)) / checkpoint_every, batch, dim, N},
                             options.dtype(checkpoint_dtype));
  return {at::empty_symint({T, batch, dim}, u.options()),
          at::empty_symint({batch, dim, N}, options), checkpoints};
}

ScanOutputs scan_meta(SELECTIVE_SCAN_PARAMETERS) {
  auto [y, last_state, checkpoints] = fwd_meta(SELECTIVE_SCAN_ARGUMENTS, 0, state_dtype(u));
  return {y, last_state};
}

ScanBwdIntoOutputs bwd_into_meta(const OptionalTensor&, const OptionalTensor&,
                                 SELECTIVE_SCAN_PARAMETERS, const OptionalTensor&, const Tensor&,
                                 int64_t, const Tensor&, const Tensor&, const OptionalTensor&) {
  const auto in = gather_selective_scan(SELECTIVE_SCAN_ARGUMENTS);
  const auto like = [&](const Tensor& tensor) {
    return tensor.defined() ? at::empty_symint(tensor.sym_sizes(), tensor.options())
                            : at::empty({0}, u.options());
  };
  const auto state = at::empty_symint({u.sym_size(1), u.sym_size(2), A.sym_size(1)},
                                      u.options().dtype(state_dtype(u)));
  return {like(in.u), like(in.delta), like(in.A), like(in.D), like(in.delta_bias), state};
}

/// With dB, dC and dz of its own.
ScanBwdOutputs bwd(const OptionalTensor& dy, const OptionalTensor& dlast_state,
                   SELECTIVE_SCAN_PARAMETERS, const OptionalTensor& y, const Tensor& checkpoints,
                   int64_t checkpoint_every) {
  const auto like = [](const Tensor& tensor) {
    return at::empty_symint(tensor.sym_sizes(), tensor.options());
  };
  const auto dB = like(B), dC = like(C);
  const auto dz = z ? OptionalTensor(like(*z)) : std::nullopt;
  auto [du, ddelta, dA, dD, ddelta_bias, dinitial_state] = selective_scan_bwd_into(
      dy, dlast_state, SELECTIVE_SCAN_ARGUMENTS, y, checkpoints, checkpoint_every, dB, dC, dz);
  return {du,          ddelta,        dA, dB, dC, dD, dz ? *dz : at::empty({0}, u.options()),
          ddelta_bias, dinitial_state};
}

// Any other device

/// The reference is always in the order of time.
ScanOutputs reference(SELECTIVE_SCAN_PARAMETERS) {
  static_cast<void>(exact);
  return selective_scan_reference(u, delta, A, B, C, D, z, delta_bias, delta_softplus,
                                  initial_state, reset);
}

// Autograd

class SelectiveScan : public torch::autograd::Function<SelectiveScan> {
 public:
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* context,
                                                SELECTIVE_SCAN_PARAMETERS) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto wanted = scan_checkpoints(gather_selective_scan(SELECTIVE_SCAN_ARGUMENTS));
    auto [y, last_state, checkpoints] =
        selective_scan_fwd(SELECTIVE_SCAN_ARGUMENTS, wanted.kept ? wanted.every : 0, wanted.dtype);
    context->set_materialize_grads(false);
    context->save_for_backward({u, delta, A, B, C, value_or_undefined(D), value_or_undefined(z),
                                value_or_undefined(delta_bias), value_or_undefined(reset),
                                wanted.kept ? checkpoints : Tensor(),
                                wanted.kept ? Tensor() : value_or_undefined(initial_state),
                                scan_takes_y(wanted.dtype, present(z)) ? y : Tensor()});
    context->saved_data["delta_softplus"] = delta_softplus;
    context->saved_data["has_initial_state"] = present(initial_state);
    context->saved_data["exact"] = exact;
    context->saved_data["checkpoint_every"] = wanted.every;
    return {y, last_state};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& gradients) {
    const Unrecorded unrecorded;
    const auto saved = context->get_saved_variables();
    const auto D = if_present(saved[5]), z = if_present(saved[6]),
               delta_bias = if_present(saved[7]), reset = if_present(saved[8]);
    const bool delta_softplus = context->saved_data["delta_softplus"].toBool(),
               exact = context->saved_data["exact"].toBool();
    auto checkpoints = saved[9];
    if (!checkpoints.defined()) {
      checkpoints =
          scan_checkpoints_again(saved[0], saved[1], saved[2], saved[3], saved[4], D, z, delta_bias,
                                 delta_softplus, if_present(saved[10]), reset, exact);
    }
    auto [du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, dinitial_state] = call_bwd(
        if_present(gradients[0]), if_present(gradients[1]), saved[0], saved[1], saved[2], saved[3],
        saved[4], D, z, delta_bias, delta_softplus, std::nullopt, reset, exact,
        if_present(saved[11]), checkpoints, context->saved_data["checkpoint_every"].toInt());
    return {du,
            ddelta,
            dA,
            dB,
            dC,
            D ? dD : Tensor(),
            z ? dz : Tensor(),
            delta_bias ? ddelta_bias : Tensor(),
            Tensor(),
            context->saved_data["has_initial_state"].toBool() ? dinitial_state : Tensor(),
            Tensor(),
            Tensor()};
  }
};

ScanOutputs scan_autograd(SELECTIVE_SCAN_PARAMETERS) {
  const auto in = gather_selective_scan(SELECTIVE_SCAN_ARGUMENTS);
  if (!needs_gradient({u, delta, A, B, C, in.D, in.z, in.delta_bias, in.initial_state})) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return call_scan(SELECTIVE_SCAN_ARGUMENTS);
  }
  if (has_kernels("retain::selective_scan_bwd_into", u)) {
    const auto outputs = SelectiveScan::apply(SELECTIVE_SCAN_ARGUMENTS);
    return {outputs[0], outputs[1]};
  }
  return reference(SELECTIVE_SCAN_ARGUMENTS);
}

// Autocast: activations in the narrow type; weights and state stay as they are.

ScanOutputs scan_autocast(SELECTIVE_SCAN_PARAMETERS) {
  const auto narrow_u = autocasted(u), narrow_delta = autocasted(delta), narrow_B = autocasted(B),
             narrow_C = autocasted(C);
  const auto narrow_z = present(z) ? OptionalTensor(autocasted(*z)) : z;
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  return call_scan(narrow_u, narrow_delta, A, narrow_B, narrow_C, D, narrow_z, delta_bias,
                   delta_softplus, initial_state, reset, exact);
}

}  // namespace

ScanOutputs selective_scan(SELECTIVE_SCAN_PARAMETERS) {
  return call_scan(u, delta, A, B, C, if_present(D), if_present(z), if_present(delta_bias),
                   delta_softplus, if_present(initial_state), if_present(reset), exact);
}

ScanOutputs selective_scan_update(const Tensor& u, const Tensor& delta, const Tensor& A,
                                  const Tensor& B, const Tensor& C, const Tensor& state,
                                  const OptionalTensor& D, const OptionalTensor& z,
                                  const OptionalTensor& delta_bias, bool delta_softplus,
                                  const OptionalTensor& reset) {
  const char* op = "selective_scan_update";
  check_rank(op, "u", u, "[B, d_inner]");
  check_rank(op, "delta", delta, "[B, d_inner]");
  check_rank(op, "B", B, "[B, groups, d_state]");
  check_rank(op, "C", C, "[B, groups, d_state]");
  check_rank(op, "state", state, "[B, d_inner, d_state]");
  const auto one_step = [&](const OptionalTensor& tensor, const char* name, const char* layout) {
    if (!present(tensor)) return OptionalTensor();
    check_rank(op, name, *tensor, layout);
    return OptionalTensor(tensor->unsqueeze(0));
  };
  auto [y, new_state] =
      selective_scan(u.unsqueeze(0), delta.unsqueeze(0), A, B.unsqueeze(0), C.unsqueeze(0), D,
                     one_step(z, "z", "[B, d_inner]"), delta_bias, delta_softplus, state,
                     one_step(reset, "reset", "[B]"));
  return {y.squeeze(0), new_state};
}

ScanOutputs selective_scan_fwd_with_state(const Tensor& u, const Tensor& delta, const Tensor& A,
                                          const Tensor& B, const Tensor& C, const OptionalTensor& D,
                                          const OptionalTensor& x0, bool delta_softplus,
                                          bool return_last_state) {
  auto [out, last_state] = selective_scan(u, delta, A, B, C, D, {}, {}, delta_softplus, x0);
  return {out, return_last_state ? last_state : Tensor()};
}

TORCH_LIBRARY_FRAGMENT(retain, m) {
  m.def(
      "selective_scan(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D=None, "
      "Tensor? z=None, Tensor? delta_bias=None, bool delta_softplus=False, "
      "Tensor? initial_state=None, Tensor? reset=None, bool exact=False) "
      "-> (Tensor y, Tensor last_state)");
  m.def(
      "selective_scan_fwd(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, "
      "Tensor? z, Tensor? delta_bias, bool delta_softplus, Tensor? initial_state, Tensor? reset, "
      "bool exact, int checkpoint_every, ScalarType checkpoint_dtype) -> "
      "(Tensor y, Tensor last_state, Tensor checkpoints)");
  m.def(
      "selective_scan_bwd(Tensor? dy, Tensor? dlast_state, Tensor u, Tensor delta, Tensor A, "
      "Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, bool delta_softplus, "
      "Tensor? initial_state, Tensor? reset, bool exact, Tensor? y, Tensor checkpoints, "
      "int checkpoint_every) -> (Tensor du, Tensor ddelta, Tensor dA, Tensor dB, Tensor dC, "
      "Tensor dD, Tensor dz, Tensor ddelta_bias, Tensor dinitial_state)");
  m.def(
      "selective_scan_bwd_into(Tensor? dy, Tensor? dlast_state, Tensor u, Tensor delta, Tensor A, "
      "Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, bool delta_softplus, "
      "Tensor? initial_state, Tensor? reset, bool exact, Tensor? y, Tensor checkpoints, "
      "int checkpoint_every, Tensor(a!) dB, Tensor(b!) dC, Tensor(c!)? dz) -> (Tensor du, "
      "Tensor ddelta, Tensor dA, Tensor dD, Tensor ddelta_bias, Tensor dinitial_state)");
  m.def(
      "selective_scan_update(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor state, "
      "Tensor? D=None, Tensor? z=None, Tensor? delta_bias=None, bool delta_softplus=False, "
      "Tensor? reset=None) -> (Tensor y, Tensor new_state)",
      selective_scan_update);
  m.def(
      "selective_scan_fwd_with_state(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, "
      "Tensor? D, Tensor? x0, bool delta_softplus, bool return_last_state) -> "
      "(Tensor out, Tensor last_state)",
      selective_scan_fwd_with_state);
}

TORCH_LIBRARY_IMPL(retain, Meta, m) {
  m.impl("selective_scan", scan_meta);
  m.impl("selective_scan_fwd", fwd_meta);
  m.impl("selective_scan_bwd_into", bwd_into_meta);
}

TORCH_LIBRARY_IMPL(retain, CompositeExplicitAutograd, m) {
  m.impl("selective_scan", reference);
  m.impl("selective_scan_bwd", bwd);
}

TORCH_LIBRARY_IMPL(retain, AutocastCPU, m) { m.impl("selective_scan", scan_autocast); }

TORCH_LIBRARY_IMPL(retain, AutocastCUDA, m) { m.impl("selective_scan", scan_autocast); }

TORCH_LIBRARY_IMPL(retain, Autograd, m) {
  m.impl("selective_scan", scan_autograd);
  m.impl("selective_scan_fwd", torch::autograd::autogradNotImplementedFallback());
  m.impl("selective_scan_bwd", torch::autograd::autogradNotImplementedFallback());
  m.impl("selective_scan_bwd_into", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace retain
