#include <ATen/ATen.h>
#include <c10/cuda/CUDAGuard.h>
#include <retain/kernels/mamba_update/mamba_update_cuda.h>
#include <retain/lib/ops/casts.h>
#include <retain/lib/ops/cuda_arguments.h>
#include <retain/lib/ops/mamba_update_tensors.h>
#include <torch/library.h>

#include <array>

namespace retain {
namespace {

constexpr size_t kWeights = 7;

/// conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log and D as the kernel
/// takes them: all of xz's type, or all in fp32.
std::array<Tensor, kWeights> weights_of(const Tensor& xz, const MambaWeights& w) {
  std::array<Tensor, kWeights> weights = {
      w.conv_weight, w.conv_bias, w.x_proj_weight, w.dt_proj_weight, w.dt_proj_bias, w.A_log, w.D};
  const bool same = common_dtype(weights) == xz.scalar_type();
  std::array<at::ScalarType, kWeights> types;
  types.fill(same ? xz.scalar_type() : at::kFloat);
  weights = cast_together(weights, types);
  for (auto& weight : weights) weight = dense(weight, types[0]);
  return weights;
}

/// The kernel's view of one step's arguments, and the tensors that it points into.
struct Prepared {
  Tensor xz;
  std::array<Tensor, kWeights> weights;
  kernels::MambaUpdateCuda params;

  Prepared(const Tensor& xz_, const MambaWeights& w, const std::optional<Tensor>& reset)
      : xz(with_dense_rows(xz_, xz_.scalar_type())), weights(weights_of(xz, w)) {
    const auto& [conv_weight, conv_bias, x_proj_weight, dt_weight, dt_bias, A_log, D] = weights;
    params.B = xz.size(0);
    params.D = A_log.size(0);
    params.N = A_log.size(1);
    params.K = conv_weight.size(1);
    params.R = dt_weight.size(1);
    params.type = activation_type(xz.scalar_type());
    params.weight_type = activation_type(A_log.scalar_type());
    params.xz = xz.const_data_ptr();
    params.xz_stride = xz.stride(0);
    params.conv_weight = address(conv_weight);
    params.conv_bias = address(conv_bias);
    params.x_proj_weight = address(x_proj_weight);
    params.dt_weight = address(dt_weight);
    params.dt_bias = address(dt_bias);
    params.A_log = address(A_log);
    params.D_skip = address(D);
    if (!present(reset)) return;
    params.reset = reset->const_data_ptr<bool>();
    params.reset_stride = reset->stride(0);
  }
};

/// One step from dense fp32 states to others or to themselves; an undefined tensor, and nothing
/// done, where the kernel does not take these sizes.
Tensor fused(const Tensor& xz, const MambaWeights& weights, const std::optional<Tensor>& reset,
             const Tensor& conv_from, const Tensor& ssm_from, const Tensor& conv_to,
             const Tensor& ssm_to) {
  const c10::cuda::CUDAGuard guard(xz.device());
  Prepared prepared(xz, weights, reset);
  auto& params = prepared.params;
  params.conv_state = pointer<float>(conv_from);
  params.ssm_state = pointer<float>(ssm_from);
  params.new_conv_state = mutable_pointer<float>(conv_to);
  params.new_ssm_state = mutable_pointer<float>(ssm_to);
  if (!kernels::mamba_update_cuda_takes(params)) return {};
  const auto y = at::empty({params.B, params.D}, xz.options());
  params.y = y.mutable_data_ptr();
  kernels::mamba_update_cuda(params, current_stream());
  return y;
}

std::tuple<Tensor, Tensor, Tensor> update(MAMBA_UPDATE_PARAMETERS) {
  const auto weights = gather_mamba_weights(MAMBA_UPDATE_ARGUMENTS);
  check_mamba_update(xz, conv_state, ssm_state, weights, reset);
  if (xz.scalar_type() == at::kDouble) return composed_mamba_update(MAMBA_UPDATE_ARGUMENTS);
  const auto conv = dense(conv_state, at::kFloat), ssm = dense(ssm_state, at::kFloat);
  const auto new_conv = at::empty_like(conv), new_ssm = at::empty_like(ssm);
  const auto y = fused(xz, weights, reset, conv, ssm, new_conv, new_ssm);
  if (!y.defined()) return composed_mamba_update(MAMBA_UPDATE_ARGUMENTS);
  return {y, new_conv, new_ssm};
}

bool is_dense_float(const Tensor& state) {
  return state.scalar_type() == at::kFloat && state.is_contiguous();
}

Tensor update_(MAMBA_UPDATE_PARAMETERS) {
  const auto weights = gather_mamba_weights(MAMBA_UPDATE_ARGUMENTS);
  check_mamba_update_(xz, conv_state, ssm_state, weights, reset);
  if (is_dense_float(conv_state) && is_dense_float(ssm_state)) {
    const auto y = fused(xz, weights, reset, conv_state, ssm_state, conv_state, ssm_state);
    if (y.defined()) return y;
  }
  const auto [y, new_conv, new_ssm] = update(MAMBA_UPDATE_ARGUMENTS);
  Tensor(conv_state).copy_(new_conv);
  Tensor(ssm_state).copy_(new_ssm);
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(retain, CUDA, m) {
  m.impl("mamba_update", update);
  m.impl("mamba_update_", update_);
}

}  // namespace retain
