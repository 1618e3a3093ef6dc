#include <ATen/ATen.h>
#include <retain/lib/ops/checks.h>
#include <retain/lib/ops/selective_scan.h>
#include <retain/lib/ops/selective_scan_tensors.h>

#include <limits>

namespace retain {
namespace {

/// [B, G, N] → [B, D, N]: each group's row for each of its channels.
Tensor per_channel(const Tensor& row, int64_t channels) {
  return row.repeat_interleave(channels / row.size(1), 1);
}

}  // namespace

Tensor finite_rates(const Tensor& A, at::ScalarType dtype) {
  const double most =
      dtype == at::kDouble ? std::numeric_limits<double>::max() : std::numeric_limits<float>::max();
  return A.to(dtype).clamp(-most, most);
}

std::tuple<Tensor, Tensor> selective_scan_reference(
    const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
    const std::optional<Tensor>& D, const std::optional<Tensor>& z,
    const std::optional<Tensor>& delta_bias, bool delta_softplus,
    const std::optional<Tensor>& initial_state, const std::optional<Tensor>& reset) {
  check_selective_scan("selective_scan_reference",
                       {u, delta, A, B, C, value_or_undefined(D), value_or_undefined(z),
                        value_or_undefined(delta_bias), delta_softplus,
                        value_or_undefined(initial_state), value_or_undefined(reset)});
  const auto dtype = state_dtype(u);
  const auto input = u.to(dtype), rates = finite_rates(A, dtype);
  auto step = delta.to(dtype);  // delta'
  if (present(delta_bias)) step = step + delta_bias->to(dtype);
  if (delta_softplus) step = at::softplus(step);  // the identity above 20

  auto h = present(initial_state) ? initial_state->to(dtype)
                                  : at::zeros({u.size(1), u.size(2), A.size(1)}, input.options());
  std::vector<Tensor> outputs;
  for (int64_t t = 0; t < u.size(0); ++t) {
    if (present(reset)) h = at::where((*reset)[t].view({-1, 1, 1}), at::zeros_like(h), h);
    const auto delta_t = step[t].unsqueeze(-1), u_t = input[t].unsqueeze(-1);
    const auto B_t = per_channel(B[t].to(dtype), u.size(2));
    const auto C_t = per_channel(C[t].to(dtype), u.size(2));
    h = at::exp(delta_t * rates) * h + delta_t * B_t * u_t;
    outputs.push_back((C_t * h).sum(-1));
  }
  auto y = outputs.empty() ? at::zeros_like(input) : at::stack(outputs);
  if (present(D)) y = y + D->to(dtype) * input;
  if (present(z)) y = y * at::silu(z->to(dtype));
  return {y.to(u.scalar_type()), present(initial_state) && outputs.empty() ? h.clone() : h};
}

}  // namespace retain
