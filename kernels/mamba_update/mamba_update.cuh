#pragma once
// How blocks of a cluster lie over a Mamba block's channels, what each keeps in shared memory, how
// they send sums to each other, and the convolution.

#include <retain/kernels/mamba_update/mamba_update_cuda.h>
#include <retain/kernels/common/device.cuh>

namespace retain::kernels {

constexpr int kRows = 4;  ///< that are worked on at once
constexpr int kTaps = 4;

/// How a block lies over channels and states, and how many blocks own all channels. Each lane of a
/// channel has four states.
template <int kLanes, int kThreads, int kBlocks>
struct UpdateLayout {
  static constexpr int lanes = kLanes, threads = kThreads, blocks = kBlocks;
  static constexpr int warps = threads / 32, channels = threads / lanes;
  static constexpr int blocks_an_sm = 1024 / kThreads;  ///< that registers allow
  static constexpr int parts = channels / 32;           ///< channels a lane of x_proj
  static constexpr int D = channels * blocks;           ///< d_inner
  static constexpr int N = 4 * lanes;                   ///< d_state
};

/// Shared memory; what depends on dt_rank lies behind it. What a turn writes may still be read in
/// the turn before, x in the one before that.
template <class Layout>
struct alignas(16) UpdateShared {
  float4 h[2][kRows][Layout::threads];
  float4 dt_weight[Layout::threads];  ///< each thread's first four
  float4 taps[Layout::channels];
  float conv_bias[Layout::channels];
  float x[3][kRows][Layout::channels];
  int reset[3][kRows];
  uint64_t arrived[2];  ///< barriers that count the bytes of the cluster's sums
};

/// Sizes that follow dt_rank, and the shared memory that lies behind UpdateShared.
template <class Layout>
struct UpdateArrays {
  static constexpr int at_once = 4 * Layout::lanes;  ///< of dt, by the lanes of a channel
  int outputs;                                       ///< of x_proj: dt_rank + 2 d_state
  int rank;                                          ///< dt_rank, padded
  int width;                                         ///< of a row of (dt, B, C), dt padded

  __host__ __device__ explicit UpdateArrays(int64_t R)
      : outputs(static_cast<int>(R) + 2 * Layout::N),
        rank((static_cast<int>(R) + at_once - 1) / at_once * at_once),
        width(rank + 2 * Layout::N) {}

  __host__ __device__ int sums_size() const { return kRows * outputs * Layout::blocks; }
  /// [outputs, channels], the block's part of the weight
  __device__ float* x_proj(char* memory) const {
    return reinterpret_cast<float*>(memory + sizeof(UpdateShared<Layout>));
  }
  /// [2, kRows, outputs, blocks]
  __device__ float* sums(char* memory) const { return x_proj(memory) + outputs * Layout::channels; }
  /// [2, kRows, width]
  __device__ float* totals(char* memory) const { return sums(memory) + 2 * sums_size(); }

  size_t bytes() const {
    const int floats = outputs * Layout::channels + 2 * sums_size() + 2 * kRows * width;
    return sizeof(UpdateShared<Layout>) + floats * sizeof(float);
  }
};

__device__ __forceinline__ void copy_ahead(void* shared, const float* from) {
  const unsigned to = shared_address(shared);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from));
}

/// One phase of the barrier ends when so many bytes have come.
__device__ __forceinline__ void expect(uint64_t* barrier, unsigned bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}
/// The address of the same place in another block of the cluster.
__device__ __forceinline__ unsigned address_in(const void* shared, int block) {
  unsigned there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(there)
      : "r"(shared_address(shared)), "r"(block));
  return there;
}
/// Writes a value into another block's memory, and tells its barrier.
__device__ __forceinline__ void send(unsigned to, float value, unsigned barrier) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(to),
      "f"(value), "r"(barrier));
}

/// What a thread keeps of the weights for its channel's states.
struct ChannelWeights {
  float A[4], bias, D;
};

/// Element i of a weight of type W.
template <typename W>
__device__ __forceinline__ float weight_at(const void* weight, int i) {
  return to_float(static_cast<const W*>(weight)[i]);
}

/// The same of one that may be absent, and then is 0.
template <typename W>
__device__ __forceinline__ float optional_at(const void* weight, int i) {
  return weight != nullptr ? weight_at<W>(weight, i) : 0.f;
}

/// Four from element i on, which lie on their boundary.
template <typename W>
__device__ __forceinline__ float4 four_weights_at(const void* weight, int i) {
  return widen<W>(*reinterpret_cast<const Four<W>*>(static_cast<const W*>(weight) + i));
}

/// The same into shared memory, at the latest by the next close_copies and wait of this thread.
template <typename W>
__device__ __forceinline__ void bring_four(float* shared, const void* weight, int i) {
  if constexpr (std::is_same_v<W, float>) {
    copy_ahead(shared, static_cast<const float*>(weight) + i);
  } else {
    *reinterpret_cast<float4*>(shared) = four_weights_at<W>(weight, i);
  }
}

/// `state`: of the thread's first state in [D, N].
template <typename W>
__device__ __forceinline__ ChannelWeights load_channel(const MambaUpdateCuda& p, int channel,
                                                       int state) {
  const float4 A_log = four_weights_at<W>(p.A_log, state);
  return {.A = {rate_of(-expf(A_log.x)), rate_of(-expf(A_log.y)), rate_of(-expf(A_log.z)),
                rate_of(-expf(A_log.w))},
          .bias = optional_at<W>(p.dt_bias, channel),
          .D = optional_at<W>(p.D_skip, channel)};
}

/// The weights that lie in shared memory.
template <typename W, class Layout>
__device__ __forceinline__ void load_shared(const MambaUpdateCuda& p, int first,
                                            UpdateShared<Layout>& shared, float* x_proj,
                                            int outputs) {
  constexpr int kFours = Layout::channels / 4;  // of one output
  for (int i = threadIdx.x; i < outputs * kFours; i += Layout::threads) {
    bring_four<W>(x_proj + 4 * i, p.x_proj_weight, i / kFours * Layout::D + first + i % kFours * 4);
  }
  for (int i = threadIdx.x; i < Layout::channels; i += Layout::threads) {
    bring_four<W>(&shared.taps[i].x, p.conv_weight, (first + i) * kTaps);
    shared.conv_bias[i] = optional_at<W>(p.conv_bias, first + i);
  }
  const int R = static_cast<int>(p.R), lane = threadIdx.x % Layout::lanes;
  const int dt = (first + threadIdx.x / Layout::lanes) * R;
  float w[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    w[i] = 4 * lane + i < R ? weight_at<W>(p.dt_weight, dt + 4 * lane + i) : 0.f;
  }
  shared.dt_weight[threadIdx.x] = {w[0], w[1], w[2], w[3]};
  close_copies();
}

/// The inputs of a thread's value of the convolution, on their way: bits that nothing looks at yet.
template <typename T, class Layout>
struct ConvInputs {
  float before[kTaps - 1];
  T x;
  unsigned char reset;

  /// Row b's, of a channel.
  __device__ __forceinline__ void fetch(const MambaUpdateCuda& p, int b, int channel) {
    if (b >= static_cast<int>(p.B)) return;
    reset = 0;
    if (p.reset != nullptr) {
      reset = reinterpret_cast<const unsigned char*>(p.reset)[b * static_cast<int>(p.reset_stride)];
    }
    x = static_cast<const T*>(p.xz)[b * static_cast<int>(p.xz_stride) + channel];
    const float* state = p.conv_state + b * (kTaps - 1) * Layout::D + channel;
#pragma unroll
    for (int k = 0; k < kTaps - 1; ++k) before[k] = state[k * Layout::D];
  }

  /// silu(conv1d(x)), and the new state to memory.
  __device__ __forceinline__ float convolve(const MambaUpdateCuda& p, float4 taps, float bias,
                                            int b, int channel) {
    if (b >= static_cast<int>(p.B)) return 0.f;
#pragma unroll
    for (int k = 0; k < kTaps - 1; ++k) {
      if (reset != 0) before[k] = 0.f;
    }
    const float now = to_float(x);
    const float sum =
        fmaf(taps.w, now,
             fmaf(taps.z, before[2], fmaf(taps.y, before[1], fmaf(taps.x, before[0], bias))));
    float* state = p.new_conv_state + b * (kTaps - 1) * Layout::D + channel;
    state[0] = before[1];
    state[Layout::D] = before[2];
    state[2 * Layout::D] = now;
    return sum * sigmoid(sum);
  }
};

}  // namespace retain::kernels
