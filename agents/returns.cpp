#include <retain/agents/returns.h>

#include <ATen/ATen.h>
#include <retain/lib/dtype_name.h>

namespace retain {
namespace {

void check_shape(const char* name, const Tensor& tensor, at::IntArrayRef shape) {
  TORCH_CHECK(tensor.sizes() == shape, "gae: ", name, " must be ", shape, ", got ", tensor.sizes());
}

}  // namespace

Advantages gae(const Tensor& reward, const Tensor& discount, const Tensor& value,
               const Tensor& bootstrap_value, const Tensor& mask, double gamma, double gae_lambda) {
  TORCH_CHECK(value.dim() == 2, "gae: value must be [T, B], got ", value.sizes());
  check_shape("reward", reward, value.sizes());
  check_shape("discount", discount, value.sizes());
  check_shape("mask", mask, value.sizes());
  check_shape("bootstrap_value", bootstrap_value, {value.size(1)});
  TORCH_CHECK(mask.scalar_type() == at::kBool, "gae: mask must be bool, got ",
              dtype_name(mask.scalar_type()));

  at::NoGradGuard no_grad;
  const auto rows = value.size(0);
  auto advantage = at::zeros_like(value);
  if (rows == 0) return {advantage, value.clone()};

  const auto next_value = at::cat({value.slice(0, 1), bootstrap_value.unsqueeze(0)});
  const auto zero = at::zeros({}, value.options());
  const auto next = at::where(discount == 0, zero, gamma * discount * next_value);
  const auto delta = at::where(mask, reward + next - value, zero);
  const auto decay = at::where(mask, gamma * gae_lambda * discount, zero);
  const bool usual = delta.isfinite().all().item<bool>();
  const auto delta_at = delta.unbind(), decay_at = decay.unbind();
  auto advantage_at = advantage.unbind();
  advantage_at[rows - 1].copy_(delta_at[rows - 1]);
  for (int64_t t = rows - 2; t >= 0; --t) {
    at::addcmul_out(advantage_at[t], delta_at[t], decay_at[t], advantage_at[t + 1]);
    // 0 times what is not finite would not be 0.
    if (!usual) advantage_at[t].copy_(at::where(decay_at[t] == 0, delta_at[t], advantage_at[t]));
  }
  return {advantage, advantage + value};
}

}  // namespace retain
