#pragma once

#include <ATen/ATen.h>
#include <retain/kernels/causal_conv1d/causal_conv1d_cuda.h>
#include <retain/lib/ops/cuda_arguments.h>

namespace retain {

/// The kernels' view of the arguments, and the tensors that it points into.
struct CausalConv1dCudaArguments {
  Tensor x, weight, bias, initial_state;
  kernels::CausalConv1dCudaInputs in;

  CausalConv1dCudaArguments(const Tensor& x_, const Tensor& weight_, const OptionalTensor& bias_,
                            bool silu, const OptionalTensor& initial_state_,
                            const OptionalTensor& reset)
      : x(with_dense_rows(x_, x_.scalar_type())),
        weight(dense(weight_, at::kFloat)),
        bias(dense(bias_, at::kFloat)),
        initial_state(dense(initial_state_, at::kFloat)) {
    in.T = x.size(0);
    in.B = x.size(1);
    in.D = x.size(2);
    in.K = weight.size(1);
    in.type = activation_type(x.scalar_type());
    in.x = activations(x);
    in.weight = pointer<float>(weight);
    in.bias = pointer<float>(bias);
    in.initial_state = pointer<float>(initial_state);
    in.reset = time_major<bool>(value_or_undefined(reset));
    in.silu = silu;
  }

  Tensor floats(at::IntArrayRef sizes) const {
    return at::empty(sizes, x.options().dtype(at::kFloat));
  }
  Tensor like_x() const { return at::empty({in.T, in.B, in.D}, x.options()); }
};

}  // namespace retain
