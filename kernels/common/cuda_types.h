#pragma once

#include <cstdint>

struct CUstream_st;

namespace retain::kernels {

/// The stream that a CUDA launch goes to: a cudaStream_t, without CUDA's headers.
using CudaStream = CUstream_st*;

/// Element type of the activations that a CUDA kernel reads and writes; it computes in fp32.
enum class ActivationType { fp32, fp16, bf16 };

/// An array [T, B, …] of activations whose innermost dimension is contiguous; strides count
/// elements, 0 is allowed.
struct Activations {
  void* data = nullptr;  ///< nullptr where the argument is absent
  int64_t stride_t = 0;
  int64_t stride_b = 0;
};

}  // namespace retain::kernels
