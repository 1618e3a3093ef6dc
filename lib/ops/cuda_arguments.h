#pragma once

#include <c10/cuda/CUDAStream.h>
#include <retain/kernels/common/cuda_types.h>
#include <retain/lib/ops/checks.h>
#include <retain/lib/ops/kernel_arguments.h>

// How ops hand tensors to CUDA kernels.
namespace retain {

inline kernels::CudaStream current_stream() { return c10::cuda::getCurrentCUDAStream().stream(); }

/// A [T, B, …] tensor, read only; its innermost dimension must be contiguous. Undefined = absent.
inline kernels::Activations activations(const Tensor& tensor) {
  if (!tensor.defined()) return {};
  return {const_cast<void*>(tensor.const_data_ptr()), tensor.stride(0), tensor.stride(1)};
}

inline kernels::Activations mutable_activations(const Tensor& tensor) {
  return {tensor.mutable_data_ptr(), tensor.stride(0), tensor.stride(1)};
}

}  // namespace retain
