#pragma once
// The second stage of sums over many blocks: parts that the blocks left in memory are added in a
// fixed order.

#include <retain/kernels/common/device.cuh>

namespace retain::kernels {

/// sum[i] = Σ_k parts[k, i], one after the other.
template <typename T>
__global__ void sum_blocks(const float* parts, int64_t count, int64_t size, T* sum) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= size) return;
  float total = 0;
#pragma unroll 8
  for (int64_t k = 0; k < count; ++k) total += parts[k * size + i];
  sum[i] = from_float<T>(total);
}

template <typename T>
void launch_sum_blocks(const float* parts, int64_t count, int64_t size, T* sum, CudaStream stream) {
  if (size == 0) return;
  const auto grid = static_cast<unsigned>((size + 127) / 128);
  sum_blocks<T><<<grid, 128, 0, stream>>>(parts, count, size, sum);
  check_launch("sum of blocks");
}

/// One array of parts [count, size] and where its sum goes; nothing where `sum` is nullptr.
struct RowSum {
  const float* parts = nullptr;  ///< [count, size]
  int64_t size = 0;
  float* sum = nullptr;  ///< out: [size]

  __host__ __device__ int64_t blocks() const { return sum == nullptr ? 0 : (size + 31) / 32; }
};

/// The same over many parts, of two arrays at once: a block's 16 rows of threads take every 16th
/// part each.
static __global__ void sum_rows(int64_t count, RowSum first, RowSum second) {
  __shared__ double shared[16][32];
  const bool is_first = blockIdx.x < first.blocks();
  const RowSum& rows = is_first ? first : second;
  const int64_t block = is_first ? blockIdx.x : blockIdx.x - first.blocks();
  const int64_t i = block * 32 + threadIdx.x;
  double total = 0;
  if (i < rows.size) {
#pragma unroll 4
    for (int64_t k = threadIdx.y; k < count; k += 16) total += rows.parts[k * rows.size + i];
  }
  shared[threadIdx.y][threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.y != 0 || i >= rows.size) return;
  for (int k = 1; k < 16; ++k) total += shared[k][threadIdx.x];
  rows.sum[i] = static_cast<float>(total);
}

inline void launch_sum_rows(int64_t count, const RowSum& first, const RowSum& second,
                            CudaStream stream) {
  const int64_t blocks = first.blocks() + second.blocks();
  if (blocks == 0) return;
  sum_rows<<<static_cast<unsigned>(blocks), dim3(32, 16), 0, stream>>>(count, first, second);
  check_launch("sum of rows");
}

inline void launch_sum_rows(const float* parts, int64_t count, int64_t size, float* sum,
                            CudaStream stream) {
  launch_sum_rows(count, {parts, size, sum}, {}, stream);
}

}  // namespace retain::kernels
