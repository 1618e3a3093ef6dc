#include <retain/kernels/gru/gru.h>
#include <retain/lib/ops/find_op.h>
#include <retain/lib/ops/gradients.h>
#include <retain/lib/ops/gru.h>
#include <retain/lib/ops/gru_tensors.h>
#include <retain/lib/ops/kernel_arguments.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace retain {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

void check_gru(const Tensor& x, const Tensor& w_ih, const Tensor& w_hh, const OptionalTensor& b_ih,
               const OptionalTensor& b_hh, const OptionalTensor& initial_state,
               const OptionalTensor& reset) {
  check_rank("gru", "x", x, "[T, B, I]");
  check_floating("gru", "x", x);
  check_rank("gru", "w_hh", w_hh, "[3H, H]");
  const auto T = x.sym_size(0), B = x.sym_size(1), I = x.sym_size(2), H = w_hh.sym_size(1);
  const auto check = [&](const char* name, const OptionalTensor& tensor, const char* layout,
                         std::initializer_list<c10::SymInt> sizes) {
    if (!present(tensor)) return;
    check_shape("gru", name, *tensor, layout, sizes);
    check_like("gru", name, *tensor, "x", x);
  };
  check_rank("gru", "w_ih", w_ih, "[3H, I]");
  check("w_ih", w_ih, "[3H, I]", {3 * H, I});
  check("w_hh", w_hh, "[3H, H]", {3 * H, H});
  check("b_ih", b_ih, "[3H]", {3 * H});
  check("b_hh", b_hh, "[3H]", {3 * H});
  check("initial_state", initial_state, "[B, H]", {B, H});
  if (present(reset)) check_reset("gru", *reset, "[T, B]", {T, B}, "x", x);
}

std::tuple<Tensor, Tensor> gru_reference(const Tensor& x, const Tensor& w_ih, const Tensor& w_hh,
                                         const OptionalTensor& b_ih, const OptionalTensor& b_hh,
                                         const OptionalTensor& initial_state,
                                         const OptionalTensor& reset) {
  check_gru(x, w_ih, w_hh, b_ih, b_hh, initial_state, reset);
  const auto dtype = state_dtype(x);
  const auto product = [&](const Tensor& a, const Tensor& w, const OptionalTensor& b) {
    const auto ab = at::matmul(a, w.to(dtype).t());
    return present(b) ? ab + b->to(dtype) : ab;
  };
  const auto x_gates = product(x.to(dtype), w_ih, b_ih).chunk(3, -1);
  auto h = present(initial_state) ? initial_state->to(dtype)
                                  : at::zeros({x.size(1), w_hh.size(1)}, x.options().dtype(dtype));
  std::vector<Tensor> y;
  for (int64_t t = 0; t < x.size(0); ++t) {
    if (present(reset)) h = at::where((*reset)[t].unsqueeze(-1), at::zeros({}, h.options()), h);
    const auto h_gates = product(h, w_hh, b_hh).chunk(3, -1);
    const auto r = at::sigmoid(x_gates[0][t] + h_gates[0]);
    const auto z = at::sigmoid(x_gates[1][t] + h_gates[1]);
    const auto n = at::tanh(x_gates[2][t] + r * h_gates[2]);
    h = (1 - z) * n + z * h;
    y.push_back(h);
  }
  const auto all = y.empty() ? at::zeros({0, h.size(0), h.size(1)}, h.options()) : at::stack(y);
  return {all.to(x.scalar_type()), y.empty() ? h.clone() : h};
}

namespace {

std::tuple<Tensor, Tensor, Tensor> gru_fwd_meta(const Tensor& x, const Tensor& w_ih,
                                                const Tensor& w_hh, const OptionalTensor& b_ih,
                                                const OptionalTensor& b_hh,
                                                const OptionalTensor& initial_state,
                                                const OptionalTensor& reset, bool keep_gates) {
  check_gru(x, w_ih, w_hh, b_ih, b_hh, initial_state, reset);
  const auto dtype = state_dtype(x);
  const auto T = x.sym_size(0), B = x.sym_size(1);
  const int64_t H = w_hh.size(1);
  const int64_t padded =
      dtype == at::kDouble ? kernels::gru_padded<double>(H) : kernels::gru_padded<float>(H);
  const auto allocate = [&](c10::SymIntArrayRef sizes) { return x.new_empty_symint(sizes, dtype); };
  return {allocate({T, B, H}), allocate({B, H}),
          keep_gates ? allocate({T, B, 4, padded}) : allocate({0})};
}

std::tuple<Tensor, Tensor> gru_meta(const Tensor& x, const Tensor& w_ih, const Tensor& w_hh,
                                    const OptionalTensor& b_ih, const OptionalTensor& b_hh,
                                    const OptionalTensor& initial_state,
                                    const OptionalTensor& reset) {
  auto [y, last_state, gates] =
      gru_fwd_meta(x, w_ih, w_hh, b_ih, b_hh, initial_state, reset, /*keep_gates=*/false);
  return {y.to(x.scalar_type()), last_state};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gru_bwd_meta(
    const OptionalTensor&, const OptionalTensor&, const Tensor& x, const Tensor& w_ih,
    const Tensor& w_hh, const OptionalTensor&, const OptionalTensor&, const Tensor&, const Tensor&,
    bool needs_dx) {
  const auto allocate = [&](c10::SymIntArrayRef sizes) {
    return x.new_empty_symint(sizes, state_dtype(x));
  };
  const auto H = w_hh.sym_size(1);
  return {needs_dx ? allocate(x.sym_sizes()) : allocate({0}),
          allocate(w_ih.sym_sizes()),
          allocate(w_hh.sym_sizes()),
          allocate({3 * H}),
          allocate({3 * H}),
          allocate({x.sym_size(1), H})};
}

class GruFunction : public torch::autograd::Function<GruFunction> {
 public:
  static variable_list forward(AutogradContext* context, const Tensor& x, const Tensor& w_ih,
                               const Tensor& w_hh, const OptionalTensor& b_ih,
                               const OptionalTensor& b_hh, const OptionalTensor& initial_state,
                               const OptionalTensor& reset) {
    static const auto op = find_op<decltype(gru_fwd_cpu)>("retain::gru_fwd");
    const auto [y, last_state, gates] = [&] {
      const at::AutoDispatchBelowADInplaceOrView below_autograd;
      return op.call(x, w_ih, w_hh, b_ih, b_hh, initial_state, reset, /*keep_gates=*/true);
    }();
    context->set_materialize_grads(false);
    context->save_for_backward({x, w_ih, w_hh, value_or_undefined(b_ih), value_or_undefined(b_hh),
                                value_or_undefined(initial_state), value_or_undefined(reset), y,
                                gates});
    return {y.to(x.scalar_type()), last_state};
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const Unrecorded unrecorded;
    static const auto op = find_op<decltype(gru_bwd_cpu)>("retain::gru_bwd");
    const auto saved = context->get_saved_variables();
    const auto [dx, dw_ih, dw_hh, db_ih, db_hh, dinitial_state] =
        op.call(if_present(gradients[0]), if_present(gradients[1]), saved[0], saved[1], saved[2],
                if_present(saved[5]), if_present(saved[6]), saved[7], saved[8],
                /*needs_dx=*/context->needs_input_grad(0));
    variable_list results = {dx, dw_ih, dw_hh, db_ih, db_hh, dinitial_state, Tensor()};
    if (!context->needs_input_grad(0)) results[0] = Tensor();
    for (size_t i = 0; i < results.size(); ++i) {
      if (!saved[i].defined()) results[i] = Tensor();
      if (results[i].defined()) results[i] = results[i].to(saved[i].scalar_type());
    }
    return results;
  }
};

std::tuple<Tensor, Tensor> gru_autograd(const Tensor& x, const Tensor& w_ih, const Tensor& w_hh,
                                        const OptionalTensor& b_ih, const OptionalTensor& b_hh,
                                        const OptionalTensor& initial_state,
                                        const OptionalTensor& reset) {
  if (!has_kernels("retain::gru_bwd", x)) {
    return gru_reference(x, w_ih, w_hh, b_ih, b_hh, initial_state, reset);
  }
  if (!needs_gradient({x, w_ih, w_hh, value_or_undefined(b_ih), value_or_undefined(b_hh),
                       value_or_undefined(initial_state)})) {
    at::AutoDispatchBelowADInplaceOrView guard;
    static const auto op = find_op<decltype(gru_cpu)>("retain::gru");
    return op.call(x, w_ih, w_hh, b_ih, b_hh, initial_state, reset);
  }
  const auto out = GruFunction::apply(x, w_ih, w_hh, b_ih, b_hh, initial_state, reset);
  return {out[0], out[1]};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(retain, m) {
  m.def(
      "gru(Tensor x, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, "
      "Tensor? initial_state=None, Tensor? reset=None) -> (Tensor y, Tensor last_state)");
  m.def(
      "gru_fwd(Tensor x, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, "
      "Tensor? initial_state, Tensor? reset, bool keep_gates) "
      "-> (Tensor y, Tensor last_state, Tensor gates)");
  m.def(
      "gru_bwd(Tensor? dy, Tensor? dlast_state, Tensor x, Tensor w_ih, Tensor w_hh, "
      "Tensor? initial_state, Tensor? reset, Tensor y, Tensor gates, bool needs_dx) "
      "-> (Tensor dx, Tensor dw_ih, Tensor dw_hh, Tensor db_ih, Tensor db_hh, "
      "Tensor dinitial_state)");
}
TORCH_LIBRARY_IMPL(retain, CPU, m) {
  m.impl("gru", gru_cpu);
  m.impl("gru_fwd", gru_fwd_cpu);
  m.impl("gru_bwd", gru_bwd_cpu);
}
TORCH_LIBRARY_IMPL(retain, Meta, m) {
  m.impl("gru", gru_meta);
  m.impl("gru_fwd", gru_fwd_meta);
  m.impl("gru_bwd", gru_bwd_meta);
}
TORCH_LIBRARY_IMPL(retain, CompositeExplicitAutograd, m) { m.impl("gru", gru_reference); }
TORCH_LIBRARY_IMPL(retain, Autograd, m) {
  m.impl("gru", gru_autograd);
  m.impl("gru_fwd", torch::autograd::autogradNotImplementedFallback());
  m.impl("gru_bwd", torch::autograd::autogradNotImplementedFallback());
}

std::tuple<Tensor, Tensor> gru(const Tensor& x, const Tensor& w_ih, const Tensor& w_hh,
                               const OptionalTensor& b_ih, const OptionalTensor& b_hh,
                               const OptionalTensor& initial_state, const OptionalTensor& reset) {
  check_gru(x, w_ih, w_hh, b_ih, b_hh, initial_state, reset);
  static const auto op = find_op<decltype(gru_cpu)>("retain::gru");
  return op.call(x, w_ih, w_hh, if_present(b_ih), if_present(b_hh), if_present(initial_state),
                 if_present(reset));
}

}  // namespace retain
