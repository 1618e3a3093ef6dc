#include <retain/lib/cores/core.h>
#include <torch/torch.h>

namespace retain {
namespace {

void check_x(const std::string& where, const Tensor& x, int64_t d_model, const Tensor& parameter) {
  TORCH_CHECK(x.defined(), where, ": x is undefined");
  TORCH_CHECK(x.dim() == 3 && x.size(2) == d_model, where, ": x must be [T, B, d_model] = [*, *, ",
              d_model, "], got ", x.sizes());
  TORCH_CHECK(x.scalar_type() == parameter.scalar_type(), where, ": x must be ",
              parameter.scalar_type(), " as the parameters are, got ", x.scalar_type());
  TORCH_CHECK(x.device() == parameter.device(), where, ": x must be on ", parameter.device(),
              " as the parameters are, got ", x.device());
}

void check_reset(const std::string& where, const Tensor& reset, const Tensor& x) {
  if (!reset.defined()) return;
  TORCH_CHECK(reset.sizes() == x.sizes().slice(0, 2), where,
              ": reset must be [T, B] = ", x.sizes().slice(0, 2), ", got ", reset.sizes());
  TORCH_CHECK(reset.scalar_type() == at::kBool, where, ": reset must be Bool, got ",
              reset.scalar_type());
  TORCH_CHECK(reset.device() == x.device(), where, ": reset must be on ", x.device(),
              " as x is, got ", reset.device());
}

}  // namespace

void check_input(const std::string& where, const Tensor& x, const Tensor& reset, int64_t d_model,
                 const Tensor& parameter) {
  check_x(where, x, d_model, parameter);
  check_reset(where, reset, x);
}

Tensor expected_part(const Tensor& parameter, at::IntArrayRef sizes) {
  const auto dtype = parameter.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  TORCH_CHECK(sizes[0] >= 0, "initial_state: batch must be at least 0, got ", sizes[0]);
  return at::zeros({}, at::TensorOptions(parameter.device()).dtype(dtype)).expand(sizes);
}

State zero_state(const State& expected) {
  State state(expected.batch_size());
  for (const auto& [name, part] : expected.parts()) {
    state.insert(name, at::zeros(part.sizes(), part.options()));
  }
  return state;
}

}  // namespace retain
