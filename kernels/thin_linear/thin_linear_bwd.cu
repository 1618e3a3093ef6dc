// The backward pass of a product with few inputs, on the tensor cores; the equations are in
// thin_linear_cuda.h. A block owns all outputs of a row, a warp 64 of them, whose weights and whose
// part of dcolumns it keeps in registers. Tiles of 16 rows come by asynchronous copies. What the
// warps add to a tile's dx meets in shared memory, and is added up beside the next tile; what the
// blocks add to dcolumns, in a second kernel: always in the same order.

#include <retain/kernels/thin_linear/thin_linear_cuda.h>
#include <retain/kernels/common/sum_parts.cuh>
#include <retain/kernels/common/tensor_cores.cuh>

#include <algorithm>

namespace retain::kernels {
namespace {

constexpr int kRows = 16;      ///< of a tile
constexpr int kOwn = 64;       ///< outputs of a warp
constexpr int kIn = 16;        ///< inputs, at most; the products fill up with zeros
constexpr int kMostWarps = 8;  ///< of a block
constexpr int kStages = 4;     ///< tiles that are worked on or on their way
constexpr int kWord = 8;       ///< elements of 16 bytes
constexpr int kBlocks = kOwn / 16;

/// Rows lie apart so that eight of them are in different banks.
template <typename T>
using DyTile = T[kRows][kOwn + kWord];  ///< a warp's own
template <typename T>
using XTile = T[kRows][kIn + kWord];
/// What a warp adds to a tile's dx.
using Share = float[kRows][kIn + kWord];

template <typename T>
int bytes_of(int warps) {
  return kStages * int{sizeof(XTile<T>)} +
         warps * int{kStages * sizeof(DyTile<T>) + 2 * sizeof(Share)};
}

/// Starts to bring a tile, of dy the warp's outputs from `first` on, and of x if these are the
/// first; zeros beyond the last row and the last input.
template <typename T>
__device__ __forceinline__ void fetch(const ThinLinearCudaBwd& p, int64_t tile, int64_t first,
                                      DyTile<T>& dy, XTile<T>& x) {
  constexpr int kWords = kOwn / kWord;
  const int lane = threadIdx.x % 32;
  const int64_t begin = tile * kRows;
  const T* from = static_cast<const T*>(p.dy) + first + lane % kWords * kWord;
#pragma unroll
  for (int i = 0; i < kRows; i += 32 / kWords) {
    const int row = i + lane / kWords;
    const bool there = begin + row < p.rows;
    copy_word(&dy[row][lane % kWords * kWord], from + (there ? begin + row : 0) * p.dy_stride,
              there);
  }
  if (first > 0) return;
  const int row = lane / 2, k = lane % 2 * kWord;
  const bool there = begin + row < p.rows && k < p.in;
  copy_word(&x[row][k], static_cast<const T*>(p.x) + (there ? (begin + row) * p.x_stride + k : 0),
            there);
}

/// A warp's weights as the second factor of dy columnsᵀ.
template <typename T>
struct Weights {
  unsigned own[kBlocks][2][2];  ///< of 16 outputs, 8 inputs, and the half of the outputs

  __device__ __forceinline__ Weights(const ThinLinearCudaBwd& p, int64_t first) {
    const int lane = threadIdx.x % 32;
    const auto* bits = static_cast<const unsigned short*>(p.weight);
#pragma unroll
    for (int i = 0; i < 4 * kBlocks; ++i) {
      const int64_t out = first + i / 4 * 16 + i % 2 * 8 + lane % 4 * 2;
      const int in = i / 2 % 2 * 8 + lane / 4;
      const bool there = in < p.in;
      const unsigned low = there ? bits[out * p.in + in] : 0;
      const unsigned high = there ? bits[(out + 1) * p.in + in] : 0;
      own[i / 4][i / 2 % 2][i % 2] = low | high << 16;
    }
  }
};

/// Multiplies a warp's part of a tile: its share of dx, and what its rows add to dcolumns.
template <typename T>
__device__ __forceinline__ void multiply_tile(const DyTile<T>& dy, const XTile<T>& x,
                                              const Weights<T>& weights, Share& share,
                                              float (&dcolumns)[kBlocks][2][4]) {
  const int lane = threadIdx.x % 32;
  unsigned inputs[4];
  load_transposed(shared_address(&x[lane % 16][lane / 16 * kWord]), inputs);
  float dx[2][4] = {};
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
    unsigned straight[4], turned[4];
    load_matrices(shared_address(&dy[lane % 16][16 * block + lane / 16 * kWord]), straight);
    load_transposed(
        shared_address(&dy[lane / 16 * 8 + lane % 8][16 * block + lane / 8 % 2 * kWord]), turned);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const auto& weight = weights.own[block][half];
      multiply<T>(straight, weight[0], weight[1], dx[half]);
      multiply<T>(turned, inputs[2 * half], inputs[2 * half + 1], dcolumns[block][half]);
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane / 4, k = 8 * half + lane % 4 * 2;
    *reinterpret_cast<float2*>(&share[row][k]) = {dx[half][0], dx[half][1]};
    *reinterpret_cast<float2*>(&share[row + 8][k]) = {dx[half][2], dx[half][3]};
  }
}

/// Adds up the warps' shares of a tile's dx.
template <typename T>
__device__ __forceinline__ void store_dx(const ThinLinearCudaBwd& p, int64_t tile,
                                         const Share* shares) {
  const int pairs = static_cast<int>(p.in) / 2, warps = blockDim.x / 32;
  for (int i = threadIdx.x; i < kRows * pairs; i += blockDim.x) {
    const int row = i / pairs, k = i % pairs * 2;
    if (tile * kRows + row >= p.rows) break;
    float2 sum = {};
#pragma unroll
    for (int warp = 0; warp < kMostWarps; ++warp) {
      if (warp >= warps) break;
      const float2 share = *reinterpret_cast<const float2*>(&shares[warp][row][k]);
      sum.x += share.x;
      sum.y += share.y;
    }
    T* to = static_cast<T*>(p.dx) + (tile * kRows + row) * p.dx_stride + k;
    const T both[2] = {from_float<T>(sum.x), from_float<T>(sum.y)};
    *reinterpret_cast<unsigned*>(to) = *reinterpret_cast<const unsigned*>(both);
  }
}

template <typename T>
__global__ __launch_bounds__(32 * kMostWarps,
                             2) void thin_linear_bwd(const __grid_constant__ ThinLinearCudaBwd p) {
  extern __shared__ char memory[];
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  auto* x = reinterpret_cast<XTile<T>*>(memory);
  auto* all_dy = reinterpret_cast<DyTile<T>*>(x + kStages);
  auto* shares = reinterpret_cast<Share*>(all_dy + warps * kStages);
  auto* dy = all_dy + warp * kStages;
  const int64_t first = kOwn * warp, count = (p.rows + kRows - 1) / kRows;
  const Weights<T> weights(p, first);
  float dcolumns[kBlocks][2][4] = {};
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) {
    const int64_t tile = blockIdx.x + stage * p.parts;
    if (tile < count) fetch<T>(p, tile, first, dy[stage], x[stage]);
    close_copies();
  }
  int stage = 0, turn = 0;
  int64_t tile = blockIdx.x;
#pragma unroll 1
  for (; tile < count; tile += p.parts) {
    wait_for_copies_but<kStages - 2>();
    __syncthreads();  // the tile is there, and all are done with the one before
    const int64_t next = tile + (kStages - 1) * p.parts;
    const int free = (stage + kStages - 1) % kStages;
    if (next < count) fetch<T>(p, next, first, dy[free], x[free]);
    close_copies();
    if (tile >= p.parts) store_dx<T>(p, tile - p.parts, shares + (turn ^ 1) * warps);
    multiply_tile<T>(dy[stage], x[stage], weights, shares[turn * warps + warp], dcolumns);
    stage = (stage + 1) % kStages;
    turn ^= 1;
  }
  __syncthreads();
  store_dx<T>(p, tile - p.parts, shares + (turn ^ 1) * warps);
  float* parts = p.dcolumns_parts + blockIdx.x * p.in * p.out + first;
#pragma unroll
  for (int i = 0; i < 8 * kBlocks; ++i) {
    const int out = i / 8 * 16 + i % 4 / 2 * 8 + lane / 4;
    const int in = i / 4 % 2 * 8 + lane % 4 * 2 + i % 2;
    if (in < p.in) parts[in * p.out + out] = dcolumns[i / 8][i / 4 % 2][i % 4];
  }
}

}  // namespace

bool thin_linear_has_kernel(const ThinLinearCudaBwd& p) {
  const auto in_words = [](const void* data, int64_t stride) {
    return lies_on(data, 16) && stride % kWord == 0;
  };
  return p.type != ActivationType::fp32 && p.rows > 0 && (p.in == kWord || p.in == kIn) &&
         p.out % kOwn == 0 && p.out > 0 && p.out <= kOwn * kMostWarps &&
         in_words(p.dy, p.dy_stride) && in_words(p.x, p.x_stride) && lies_on(p.weight, 4) &&
         lies_on(p.dx, 4) && p.dx_stride % 2 == 0 &&
         bytes_of<__half>(static_cast<int>(p.out / kOwn)) <= most_shared_memory();
}

void cut_into_parts(ThinLinearCudaBwd& p) {
  constexpr int64_t kAtOnce = 132 * 2 * kMostWarps;  // warps that a device holds
  const int64_t tiles = (p.rows + kRows - 1) / kRows;
  p.parts = std::min(tiles, kAtOnce * kOwn / p.out);
}

void thin_linear_cuda_bwd(const ThinLinearCudaBwd& p, CudaStream stream) {
  dispatch_activations(p.type, [&](auto element) {
    using T = decltype(element);
    if constexpr (sizeof(T) == 2) {
      const int warps = static_cast<int>(p.out / kOwn), bytes = bytes_of<T>(warps);
      cudaFuncSetAttribute(thin_linear_bwd<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
      thin_linear_bwd<T><<<static_cast<unsigned>(p.parts), 32 * warps, bytes, stream>>>(p);
    }
  });
  check_launch("thin_linear: backward");
  launch_sum_rows(p.parts, {{{p.dcolumns_parts, p.in * p.out, p.dcolumns}}}, stream);
}

}  // namespace retain::kernels
