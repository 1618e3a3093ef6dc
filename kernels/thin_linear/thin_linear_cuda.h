#pragma once
// The backward pass of a product with few inputs, y = x columns, on CUDA: both gradients from one
// pass over dy,
//   dx = dy columnsᵀ,   dcolumns = xᵀ dy.
//
// All pointers are device pointers, none is owned or kept. A call launches on its stream and
// returns; it neither allocates nor synchronises. Throws std::runtime_error if CUDA refuses a
// launch.

#include <retain/kernels/common/cuda_types.h>

#include <cstdint>

namespace retain::kernels {

struct ThinLinearCudaBwd {
  int64_t rows = 0;
  int64_t in = 0;   ///< inputs of a row
  int64_t out = 0;  ///< outputs of a row
  ActivationType type = ActivationType::bf16;
  const void* dy = nullptr;  ///< [rows, out]
  int64_t dy_stride = 0;     ///< from row to row, in elements, as all strides
  const void* x = nullptr;   ///< [rows, in]
  int64_t x_stride = 0;
  const void* weight = nullptr;  ///< columnsᵀ, [out, in] contiguous
  void* dx = nullptr;            ///< out: [rows, in]
  int64_t dx_stride = 0;
  float* dcolumns = nullptr;        ///< out: [in, out]
  int64_t parts = 0;                ///< blocks that share the rows
  float* dcolumns_parts = nullptr;  ///< scratch [parts, in, out]
};

/// Whether there is a kernel for it: half types, 8 or 16 inputs, outputs in whole blocks of 64 up
/// to 512, rows in words of 16 bytes. Asks for all pointers but scratch memory.
bool thin_linear_has_kernel(const ThinLinearCudaBwd& params);

/// Sets parts by a fixed rule on the sizes.
void cut_into_parts(ThinLinearCudaBwd& params);

void thin_linear_cuda_bwd(const ThinLinearCudaBwd& params, CudaStream stream);

}  // namespace retain::kernels
