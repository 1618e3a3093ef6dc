#include <ATen/ATen.h>
#include <retain/lib/cores/core.h>
#include <retain/lib/dtype_name.h>
#include <retain/lib/ops/casts.h>
#include <retain/lib/ops/checks.h>

namespace retain {

namespace {

/// Under autocast x may be narrower, as what comes of a layer before is.
void check_matches(const std::string& where, const Tensor& x, const Tensor& parameter) {
  const bool autocast = x.is_floating_point() && autocast_is_on(x.device().type());
  TORCH_CHECK(autocast || x.scalar_type() == parameter.scalar_type(), where, ": x must be ",
              dtype_name(parameter.scalar_type()), " as the parameters are, got ",
              dtype_name(x.scalar_type()));
  TORCH_CHECK(x.device() == parameter.device(), where, ": x must be on ", parameter.device(),
              " as the parameters are, got ", x.device());
}

}  // namespace

Tensor Core::step(const Tensor& x, State& state, const Tensor& reset) {
  const at::NoGradGuard no_grad;
  check_rank("step", "x", x, "[B, d_model]");
  auto output = forward(x.unsqueeze(0), state, reset.defined() ? reset.unsqueeze(0) : reset);
  copy_state(output.state, state);
  return output.y.squeeze(0);
}

void check_input(const std::string& where, const Tensor& x, const Tensor& reset, int64_t d_model,
                 const Tensor& parameter) {
  const char* name = where.c_str();
  check_rank(name, "x", x, "[T, B, d_model]");
  check_shape(name, "x", x, "[T, B, d_model]", {x.sym_size(0), x.sym_size(1), d_model});
  check_matches(where, x, parameter);
  if (!reset.defined()) return;
  check_reset(name, reset, "[T, B]", {x.sym_size(0), x.sym_size(1)}, "x", x);
}

void check_step_input(const std::string& where, const Tensor& x, const Tensor& reset,
                      int64_t d_model, const Tensor& parameter) {
  const char* name = where.c_str();
  check_rank(name, "x", x, "[B, d_model]");
  check_shape(name, "x", x, "[B, d_model]", {x.sym_size(0), d_model});
  check_matches(where, x, parameter);
  if (reset.defined()) check_reset(name, reset, "[B]", {x.sym_size(0)}, "x", x);
}

Tensor expected_part(const Tensor& parameter, at::IntArrayRef sizes) {
  TORCH_CHECK(sizes[0] >= 0, "initial_state: batch must be at least 0, got ", sizes[0]);
  const auto options = at::TensorOptions(parameter.device()).dtype(state_dtype(parameter));
  return at::empty({}, options).expand(sizes);
}

State zero_state(const State& expected) {
  State state(expected.batch_size());
  for (const auto& [name, part] : expected.parts()) {
    state.insert(name, at::zeros(part.sizes(), part.options()));
  }
  return state;
}

}  // namespace retain
