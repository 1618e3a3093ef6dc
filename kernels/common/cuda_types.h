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

inline int64_t element_bytes(ActivationType type) { return type == ActivationType::fp32 ? 4 : 2; }

/// Whether an address is a multiple of so many bytes.
inline bool lies_on(const void* data, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(data) % bytes == 0;
}

/// Whether rows of x begin on the boundary of `count` elements.
inline bool lies_in_words(const Activations& x, ActivationType type, int64_t count) {
  return lies_on(x.data, count * element_bytes(type)) && x.stride_t % count == 0 &&
         x.stride_b % count == 0;
}

}  // namespace retain::kernels
