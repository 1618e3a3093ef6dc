#pragma once
// Copies and clears the parts of a memory, [B, …] arrays with contiguous rows, in one launch for
// all of them: what an agent's memory costs beside its steps is launches more than bytes.
//
// All pointers are device pointers, none is owned or kept. A call launches on its stream and
// returns; it neither allocates nor synchronises. Throws std::runtime_error if CUDA refuses a
// launch.

#include <retain/kernels/common/cuda_types.h>

#include <cstdint>

namespace retain::kernels {

inline constexpr int kMaxStateParts = 64;  ///< of one launch

struct StatePart {
  const void* from = nullptr;  ///< read by copy
  void* to = nullptr;          ///< written
  int64_t row_bytes = 0;
};

struct StatePartsCuda {
  int64_t B = 0;  ///< rows
  int count = 0;  ///< parts
  StatePart part[kMaxStateParts] = {};
};

void copy_state_cuda(const StatePartsCuda& parts, CudaStream stream);

/// Zeros where mask [B], mask_stride elements apart, is set; other rows are not touched.
void zero_state_cuda(const StatePartsCuda& parts, const bool* mask, int64_t mask_stride,
                     CudaStream stream);

}  // namespace retain::kernels
