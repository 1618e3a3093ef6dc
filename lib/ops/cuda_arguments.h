#pragma once

#include <c10/cuda/CUDAStream.h>
#include <retain/kernels/common/cuda_types.h>
#include <retain/lib/ops/checks.h>
#include <retain/lib/ops/kernel_arguments.h>

// How ops hand tensors to CUDA kernels.
namespace retain {

inline kernels::CudaStream current_stream() { return c10::cuda::getCurrentCUDAStream().stream(); }

inline kernels::ActivationType activation_type(at::ScalarType dtype) {
  if (dtype == at::kHalf) return kernels::ActivationType::fp16;
  if (dtype == at::kBFloat16) return kernels::ActivationType::bf16;
  TORCH_INTERNAL_ASSERT(dtype == at::kFloat);
  return kernels::ActivationType::fp32;
}

/// A [T, B, …] tensor, read only; its innermost dimension must be contiguous. Undefined = absent.
inline kernels::Activations activations(const Tensor& tensor) {
  if (!tensor.defined()) return {};
  return {const_cast<void*>(tensor.const_data_ptr()), tensor.stride(0), tensor.stride(1)};
}

inline kernels::Activations mutable_activations(const Tensor& tensor) {
  return {tensor.mutable_data_ptr(), tensor.stride(0), tensor.stride(1)};
}

}  // namespace retain
