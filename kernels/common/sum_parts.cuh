#pragma once
// The second stage of sums over many blocks: parts that the blocks left in memory are added in a
// fixed order.

#include <retain/kernels/common/device.cuh>

namespace retain::kernels {

/// sum[row, i] = Σ_k parts[k, row, i], one after the other, of two arrays at once. Rows are dense
/// in parts and `stride` apart in the sums.
template <typename T>
__global__ void sum_blocks(const float* first, const float* second, int64_t count, int64_t size,
                           unsigned width, int64_t stride, T* first_sum, T* second_sum) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= size) return;
  const float* parts = blockIdx.y == 0 ? first : second;
  float total = 0;
#pragma unroll 8
  for (int64_t k = 0; k < count; ++k) total += parts[k * size + i];
  const int64_t row = i / width;
  (blockIdx.y == 0 ? first_sum : second_sum)[row * stride + (i - row * width)] =
      from_float<T>(total);
}

template <typename T>
void launch_sum_blocks(const float* first, const float* second, int64_t count, int64_t rows,
                       int64_t width, int64_t stride, T* first_sum, T* second_sum,
                       CudaStream stream) {
  const int64_t size = rows * width;
  if (size == 0) return;
  const dim3 grid(static_cast<unsigned>((size + 127) / 128), 2);
  sum_blocks<T><<<grid, 128, 0, stream>>>(first, second, count, size, static_cast<unsigned>(width),
                                          stride, first_sum, second_sum);
  check_launch("sum of blocks");
}

/// One array of parts [count, size] and where its sum goes; nothing where `sum` is nullptr.
struct RowSum {
  const float* parts = nullptr;  ///< [count, size]
  int64_t size = 0;
  float* sum = nullptr;  ///< out: [size]

  __host__ __device__ int64_t blocks() const { return sum == nullptr ? 0 : (size + 31) / 32; }
};

/// Up to three of them.
struct RowSums {
  RowSum rows[3];
};

/// The same over many parts: a block's 16 rows of threads take every 16th part each.
static __global__ void sum_rows(int64_t count, const __grid_constant__ RowSums all) {
  __shared__ double shared[16][32];
  int64_t block = blockIdx.x;
  int which = 0;
  while (block >= all.rows[which].blocks()) block -= all.rows[which++].blocks();
  const RowSum& rows = all.rows[which];
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

inline void launch_sum_rows(int64_t count, const RowSums& all, CudaStream stream) {
  int64_t blocks = 0;
  for (const auto& rows : all.rows) blocks += rows.blocks();
  if (blocks == 0) return;
  sum_rows<<<static_cast<unsigned>(blocks), dim3(32, 16), 0, stream>>>(count, all);
  check_launch("sum of rows");
}

}  // namespace retain::kernels
