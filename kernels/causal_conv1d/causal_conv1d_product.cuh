#pragma once
// A product that adds to dy on its way into the backward pass of the causal convolution: what a
// projection of the convolution's output passes back, rows [T, B, P] by columns [P, D]. A warp
// makes 16 steps of its 128 channels at a time, on the tensor cores, and brings their resets.

#include <retain/kernels/causal_conv1d/causal_conv1d.cuh>
#include <retain/kernels/common/tensor_cores.cuh>

namespace retain::kernels {

constexpr int kProductSteps = 16, kProductChannels = 128;
constexpr int kProductMost = 128;  ///< columns of `rows`, at most

/// None.
struct NoProduct {
  static constexpr bool kThere = false;
  static constexpr int kFours = 1;  ///< that a copy of the walk's inputs brings
  static int bytes(int64_t, int) { return 0; }
  __device__ __forceinline__ NoProduct(const CausalConv1dCudaBwd&, int64_t, char*) {}
};

/// The product as a warp makes it; lanes own neighbouring fours of channels.
template <typename T>
class Product {
 public:
  static constexpr bool kThere = true;
  static constexpr int kFours = 2;

  /// Bytes of a block's shared memory.
  static int bytes(int64_t P, int warps) {
    const int depth = depth_of(P);
    return depth * kWide * static_cast<int>(sizeof(T)) +
           warps * (kSumBytes + kProductSteps * (depth + kPad) * static_cast<int>(sizeof(T)));
  }

  /// Brings the block's columns, from `channel` on. All threads come here together.
  __device__ __forceinline__ Product(const CausalConv1dCudaBwd& p, int64_t channel, char* memory)
      : p_(p), lane_(threadIdx.x % 32), P_(static_cast<int>(p.P)), depth_(depth_of(p.P)) {
    columns_ = reinterpret_cast<T*>(memory);
    char* own = memory + depth_ * kWide * sizeof(T) +
                threadIdx.x / 32 * (kSumBytes + kProductSteps * (depth_ + kPad) * sizeof(T));
    sums_ = reinterpret_cast<float*>(own);
    rows_ = reinterpret_cast<T*>(own + kSumBytes);
    constexpr int kWords = kProductChannels / kWord;
    for (int i = threadIdx.x; i < depth_ * kWords; i += blockDim.x) {
      const int k = i / kWords, at = i % kWords * kWord;
      const T* from = static_cast<const T*>(p.columns) + (k < P_ ? k : 0) * p.in.D + channel + at;
      copy_word(columns_ + k * kWide + at, from, k < P_);
    }
    wait_for_copies();
    __syncthreads();
  }

  /// Starts to bring the rows and the resets of the 16 steps from t on; zeros from `stop` on.
  __device__ __forceinline__ void fetch(int64_t t, int64_t b, int64_t stop) {
    const int step = lane_ % 16, first = lane_ / 16 * kWord;
    const T* from = static_cast<const T*>(p_.rows.data) + b * p_.rows.stride_b;
    const bool there = t + step < stop;
    if (there) from += (t + step) * p_.rows.stride_t;
    T* to = rows_ + step * (depth_ + kPad) + first;
#pragma unroll
    for (int k = 0; k < kProductMost; k += 2 * kWord) {
      if (k >= depth_) break;
      const bool exists = there && first + k < P_;
      copy_word(to + k, from + (exists ? first + k : 0), exists);
    }
    const auto& reset = p_.in.reset;
    const auto* flags = reinterpret_cast<const unsigned char*>(reset.data);
    flag_ = 0;
    if (flags != nullptr && there) flag_ = flags[(t + step) * reset.stride_t + b * reset.stride_b];
  }

  /// Makes the 16 steps that were fetched, then fetches the next ones if there are any.
  __device__ __forceinline__ void make(int64_t next, int64_t b, int64_t stop) {
    resets_ = __ballot_sync(~0u, flag_ != 0);
    wait_for_copies();
    __syncwarp();
    depth_ == kUsual ? multiply_rows<kUsual>() : multiply_rows<0>();
    __syncwarp();
    if (next < stop) fetch(next, b, stop);
  }

  /// The lane's four channels of a step of the 16.
  __device__ __forceinline__ float4 at(int step) const {
    return *reinterpret_cast<const float4*>(sums_ + step * kSumWide + 4 * lane_);
  }

  /// The resets of the chunk at a step of the 16, bit i for its step i.
  __device__ __forceinline__ unsigned resets(int step) const { return resets_ >> step & 0xf; }

 private:
  static constexpr int kWord = 16 / sizeof(T), kPad = kWord;  // against bank conflicts
  static constexpr int kWide = kProductChannels + kPad, kSumWide = kProductChannels + 8;
  static constexpr int kSumBytes = kProductSteps * kSumWide * sizeof(float);
  static constexpr int kTiles = 4;   // of 8 channels at once
  static constexpr int kUsual = 48;  // depth, of dt_rank and d_state 16

  static __host__ __device__ __forceinline__ int depth_of(int64_t P) {
    return static_cast<int>((P + 15) / 16 * 16);
  }

  /// sums = rows columns; kDepth: the depth where it is known, or 0.
  template <int kDepth>
  __device__ __forceinline__ void multiply_rows() {
    const int depth = kDepth > 0 ? kDepth : depth_;
    const unsigned row = shared_address(rows_ + lane_ % 16 * (depth + kPad) + lane_ / 16 * kWord);
    const unsigned column = shared_address(columns_ + lane_ % 16 * kWide + lane_ / 16 * kWord);
#pragma unroll 1
    for (int first = 0; first < kProductChannels; first += 8 * kTiles) {
      float sum[kTiles][4] = {};
#pragma unroll
      for (int k = 0; k < kProductMost; k += 16) {
        if (k >= depth) break;
        unsigned a[4];
        load_matrices(row + k * sizeof(T), a);
#pragma unroll
        for (int i = 0; i < kTiles; i += 2) {
          unsigned b[4];
          load_transposed(column + (k * kWide + first + 8 * i) * sizeof(T), b);
          multiply<T>(a, b[0], b[1], sum[i]);
          multiply<T>(a, b[2], b[3], sum[i + 1]);
        }
      }
      float* to = sums_ + lane_ / 4 * kSumWide + first + lane_ % 4 * 2;
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        *reinterpret_cast<float2*>(to + 8 * i) = {sum[i][0], sum[i][1]};
        *reinterpret_cast<float2*>(to + 8 * i + 8 * kSumWide) = {sum[i][2], sum[i][3]};
      }
    }
  }

  const CausalConv1dCudaBwd& p_;
  const int lane_, P_, depth_;
  T* columns_;         ///< [depth][kWide]
  T* rows_;            ///< [16][depth + kPad]
  float* sums_;        ///< [16][kSumWide]
  unsigned flag_ = 0;  ///< the reset that the lane fetched
  unsigned resets_;    ///< bit i stands for step i of the 16
};

}  // namespace retain::kernels
