#pragma once
// Device pieces of the backward pass for d_state above 16, or 32 in bf16.
//
// A block owns one batch row, `channels` channels of one group and one segment of time. A channel's
// state is spread over `lanes` neighbouring threads, `states` indices each, in registers. Time runs
// in tiles of kScanCudaTile steps: the block loads a tile of the inputs with each thread taking
// four neighbouring channels of one step, puts delta' and delta' u into shared memory, and then
// every thread walks through the steps with its own states.
//
// A sum over n is a fixed tree: pairs, pairs of pairs, …, whatever `lanes` and `states` are.

#include <retain/kernels/selective_scan/selective_scan.cuh>

namespace retain::kernels {

/// How a block of threads is laid over channels and states.
template <int kLanes, int kStates, int kThreads>
struct ScanLayout {
  static constexpr int lanes = kLanes, states = kStates, threads = kThreads;
  static constexpr int channels = threads / lanes;
  static constexpr int padded_n = lanes * states;
  static constexpr int warp_channels = 32 / lanes;
  static constexpr int warps = threads / 32;
  static constexpr int blocks_an_sm = padded_n > 128 ? 1 : 512 / threads;  ///< that registers allow
  static constexpr int fours = kTile * channels / 4;  ///< of one activation in a tile
  static constexpr int fours_a_thread = (fours + threads - 1) / threads;
  static constexpr int pairs = kTile * padded_n;  ///< of B or C in a tile
  static constexpr int pairs_a_thread = (pairs + threads - 1) / threads;
  static constexpr int group = 4;  ///< steps whose sums over n are made together

  /// As in WarpLayout: neighbouring threads are pairs of channels.
  static constexpr int apart = lanes < 32 ? 2 : 1;
  static __device__ __forceinline__ int lane() { return threadIdx.x / apart % lanes; }
  static __device__ __forceinline__ int channel() {  ///< in the block
    return threadIdx.x / (apart * lanes) * apart + threadIdx.x % apart;
  }
  /// What bit of a thread is a channel's.
  static __device__ constexpr int channel_bit(int bit) { return bit < apart ? bit : bit * lanes; }
};

/// Calls run(ScanLayout{}) with the layout that fits d_state.
template <typename Run>
void dispatch_wide_layout(int64_t N, const Run& run) {
  if (N <= 32) return run(ScanLayout<8, 4, 256>{});
  if (N <= 64) return run(ScanLayout<16, 4, 256>{});
  if (N <= 128) return run(ScanLayout<32, 4, 256>{});
  return run(ScanLayout<32, 8, 256>{});
}

/// A thread's place inside its block.
template <class Layout>
struct ThreadPlace {
  int channel, lane;  ///< in the block; in the channel
  bool live;
  int64_t state;  ///< offset of its first state index in [B, D, N]

  __device__ __forceinline__ ThreadPlace(const SelectiveScanCudaInputs& in, const BlockPlace& place)
      : channel(Layout::channel()),
        lane(Layout::lane()),
        live(channel < place.channels),
        state(((place.b * in.D) + place.first_channel + channel) * in.N + lane * Layout::states) {}

  __device__ __forceinline__ int first_n() const { return lane * Layout::states; }
};

/// This thread's part of a [.., D, N] array; what does not exist reads as 0 and is not written.
template <class Layout>
__device__ __forceinline__ void load_states(const float* from, int64_t N,
                                            const ThreadPlace<Layout>& me,
                                            float (&h)[Layout::states]) {
#pragma unroll
  for (int j = 0; j < Layout::states; ++j) {
    h[j] = from != nullptr && me.live && me.first_n() + j < N ? from[j] : 0.f;
  }
}

template <class Layout>
__device__ __forceinline__ void store_states(float* to, int64_t N, const ThreadPlace<Layout>& me,
                                             const float (&h)[Layout::states]) {
#pragma unroll
  for (int j = 0; j < Layout::states; ++j) {
    if (me.live && me.first_n() + j < N) to[j] = h[j];
  }
}

/// Four neighbouring channels of every `stride`-th step of a tile: what a thread loads and stores.
template <class Layout>
struct FourPlace {
  static constexpr int across = Layout::channels / 4;
  static constexpr int stride = Layout::threads / across;
  int step, channel;  ///< first step in the tile; first channel in the block
  int count;          ///< of the four channels that exist
  bool whole;         ///< all four exist, on their own boundary in memory

  __device__ __forceinline__ FourPlace(const BlockPlace& place, bool aligned)
      : step(threadIdx.x / across),
        channel(threadIdx.x % across * 4),
        count(place.channels - channel),
        whole(aligned && count >= 4) {}

  /// Whether step k of this thread's is one of the tile's first `steps`.
  __device__ __forceinline__ bool inside(int k, int steps) const {
    return step + k * stride < steps;
  }

  /// The thread's first four of a tile that begins at step t.
  template <typename T>
  __device__ __forceinline__ T* at(const Activations& x, const BlockPlace& place, int64_t t) const {
    return static_cast<T*>(x.data) + (t + step) * x.stride_t + place.b * x.stride_b +
           place.first_channel + channel;
  }
};

/// Whether the state is cleared before this thread's step of the tile: the lanes of a warp share
/// its steps. reset_bits makes them one word once they have come from memory.
__device__ __forceinline__ bool load_reset(const SelectiveScanCudaInputs& in,
                                           const BlockPlace& place, int64_t tile) {
  const int64_t t = tile + threadIdx.x % 32;
  return in.reset.data != nullptr && threadIdx.x % 32 < kTile && t < place.end &&
         in.reset.data[t * in.reset.stride_t + place.b * in.reset.stride_b];
}

/// A tile of a [T, B, G, N] array: from memory to registers, then to shared memory, padded with
/// zeros.
template <class Layout, typename T>
struct MatrixWalk {
  static constexpr int kAcross =
      Layout::threads < Layout::padded_n ? Layout::threads : Layout::padded_n;
  static constexpr int kDown = Layout::threads / kAcross;   ///< steps that the threads cover
  static constexpr int kWide = Layout::padded_n / kAcross;  ///< elements of a step a thread
  const T* from;
  int step, n;
  T value[Layout::pairs_a_thread];

  __device__ __forceinline__ MatrixWalk(const Activations& x, int64_t stride_g,
                                        const BlockPlace& place, int64_t tile)
      : step(threadIdx.x / kAcross), n(threadIdx.x % kAcross) {
    from = static_cast<const T*>(x.data) + (tile + step) * x.stride_t + place.b * x.stride_b +
           place.group * stride_g + n;
  }

  __device__ __forceinline__ void fetch(const Activations& x, int N, int steps) {
#pragma unroll
    for (int k = 0; k < Layout::pairs_a_thread; ++k) {
      const int down = k / kWide * kDown, right = k % kWide * kAcross;
      const bool inside = n + right < N && step + down < steps;
      value[k] = inside ? from[down * x.stride_t + right] : from_float<T>(0.f);
    }
  }

  /// Adds 0 to `odd` if all are finite.
  __device__ __forceinline__ void put(float* shared, float& odd) const {
#pragma unroll
    for (int k = 0; k < Layout::pairs_a_thread; ++k) {
      const int down = k / kWide * kDown, right = k % kWide * kAcross;
      note(odd, to_float(value[k]));
      if (step + down < kTile)
        shared[(step + down) * Layout::padded_n + n + right] = to_float(value[k]);
    }
  }
};

/// delta' of four elements.
__device__ __forceinline__ void step_sizes(float4 delta, const float* bias, bool use_softplus,
                                           float (&size)[4]) {
  size[0] = delta.x + bias[0];
  size[1] = delta.y + bias[1];
  size[2] = delta.z + bias[2];
  size[3] = delta.w + bias[3];
  if (!use_softplus) return;
#pragma unroll
  for (int i = 0; i < 4; ++i) size[i] = softplus(size[i]);
}

/// Sums each of `group` values over the lanes of a channel; lane l gets the total of value
/// l % group.
template <class Layout>
__device__ __forceinline__ float sum_over_lanes(float (&value)[Layout::group]) {
  const int lane = Layout::lane();
#pragma unroll
  for (int bit = 1; bit < Layout::lanes; bit *= 2) {
    const int left = Layout::group / (2 * bit);
    if (left == 0) {
      value[0] += __shfl_xor_sync(~0u, value[0], bit * Layout::apart);
      continue;
    }
#pragma unroll
    for (int j = 0; j < left; ++j) {
      const bool odd = (lane & bit) != 0;
      const float keep = odd ? value[2 * j + 1] : value[2 * j];
      const float give = odd ? value[2 * j] : value[2 * j + 1];
      value[j] = keep + __shfl_xor_sync(~0u, give, bit * Layout::apart);
    }
  }
  return value[0];
}

}  // namespace retain::kernels
