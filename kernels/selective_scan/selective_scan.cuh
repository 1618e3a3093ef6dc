#pragma once
// Device pieces that the passes of the selective scan share.
//
// A block owns one batch row, `channels` channels of one group and one segment of time. A thread
// owns `own` neighbouring channels and `states` indices of each, in registers; a channel's indices
// are spread over `lanes` neighbouring threads. Time runs in tiles such that each thread loads and
// stores four neighbouring channels of one step; what a step needs goes through shared memory, and
// so do sums over threads.
//
// A sum over n is a fixed tree: pairs, pairs of pairs, …, whatever the layout is.

#include <retain/kernels/selective_scan/selective_scan_cuda.h>
#include <retain/kernels/common/device.cuh>

#include <algorithm>
#include <initializer_list>

namespace retain::kernels {

constexpr int kTile = static_cast<int>(kScanCudaTile);
constexpr int64_t kAtOnce = 264;  ///< blocks: two on each multiprocessor of a large GPU

/// How warps are laid over channels and states.
template <int kLanes, int kStates, int kOwn, int kWarps = 1>
struct WarpLayout {
  static constexpr int lanes = kLanes, states = kStates, own = kOwn;
  static constexpr int threads = 32 * kWarps;
  static constexpr int padded_n = lanes * states;
  static constexpr int across = threads / lanes;  ///< threads over channels
  static constexpr int channels = across * own;
  static constexpr int quads = channels / 4;
  static constexpr int steps = threads / quads;  ///< of a tile

  /// Threads from one lane of a channel to its next. Two where warps share the work: a read of 16
  /// bytes a thread, of B or C, takes half as long if neighbours read the same. (A warp alone has
  /// few registers, and loses more by the mapping.)
  static constexpr int apart = kWarps > 1 && lanes < 32 ? 2 : 1;
  static __device__ __forceinline__ unsigned lane(unsigned thread) {
    return thread / apart % lanes;
  }
  static __device__ __forceinline__ unsigned place(unsigned thread) {  ///< over channels
    return thread / (apart * lanes) * apart + thread % apart;
  }
};

/// The thread's own values of [.., D, N].
template <class Layout>
using OwnStates = float[Layout::own][Layout::states];

/// Where a block works.
struct BlockPlace {
  int64_t segment, b, group, channel_block;
  int64_t first_channel;  ///< of D
  int channels;           ///< of the block that exist
  int64_t begin, end;     ///< time steps

  /// What a [D] vector holds for channel i of the block, 0 where either is absent.
  __device__ __forceinline__ float weight(const float* from, int i) const {
    return from != nullptr && i < channels ? from[first_channel + i] : 0.f;
  }
};

template <class Layout>
__device__ __forceinline__ BlockPlace block_place(const SelectiveScanCudaInputs& in) {
  const int64_t per_group = in.D / in.G;
  const int64_t blocks = (per_group + Layout::channels - 1) / Layout::channels;
  BlockPlace place;
  int64_t rest = blockIdx.x;
  place.channel_block = rest % blocks;
  rest /= blocks;
  place.group = rest % in.G;
  rest /= in.G;
  place.b = rest % in.B;
  place.segment = rest / in.B;
  const int64_t first = place.channel_block * Layout::channels;
  place.first_channel = place.group * per_group + first;
  place.channels = static_cast<int>(min(per_group - first, int64_t{Layout::channels}));
  place.begin = place.segment * in.segment_steps;
  place.end = in.segments == 1 ? in.T : min(in.T, place.begin + in.segment_steps);
  return place;
}

/// Where a block works, and a thread of it.
template <class Layout>
struct WarpPlace : BlockPlace {
  int channel;    ///< first of the thread's own, in the block
  int n;          ///< first of the thread's indices
  int64_t state;  ///< offset of its first state in [B, D, N]
  int four_step;  ///< the step of a tile whose four channels the thread loads and stores
  int four;       ///< first of these four, in the block
  bool whole;     ///< all four exist, on their own boundary in memory

  __device__ __forceinline__ WarpPlace(const SelectiveScanCudaInputs& in, bool aligned)
      : BlockPlace(block_place<Layout>(in)) {
    const unsigned thread = threadIdx.x % Layout::threads;
    channel = Layout::place(thread) * Layout::own;
    n = Layout::lane(thread) * Layout::states;
    state = (b * in.D + first_channel + channel) * in.N + n;
    four_step = thread / Layout::quads;
    four = thread % Layout::quads * 4;
    whole = aligned && channels - four >= 4;
  }

  /// To the indices from `first` on, of a warp or block that has no others.
  __device__ __forceinline__ void move_to_index(int first) {
    n += first;
    state += first;
  }

  /// The thread's four of the tile that begins at step t.
  template <typename T>
  __device__ __forceinline__ T* at(const Activations& x, int64_t t) const {
    return static_cast<T*>(x.data) + (t + four_step) * x.stride_t + b * x.stride_b + first_channel +
           four;
  }

  /// A [D] vector's four, 0 where it is absent.
  __device__ __forceinline__ float4 load_weights(const float* from) const {
    float x[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[i] = from != nullptr && four + i < channels ? from[first_channel + four + i] : 0.f;
    }
    return {x[0], x[1], x[2], x[3]};
  }
};

template <class Layout>
int64_t channel_blocks(const SelectiveScanCudaInputs& in) {
  return (in.D / in.G + Layout::channels - 1) / Layout::channels;
}

template <class Layout>
dim3 scan_grid(const SelectiveScanCudaInputs& in) {
  const int64_t blocks = in.segments * in.B * in.G * channel_blocks<Layout>(in);
  if (blocks > INT32_MAX) throw std::runtime_error("selective_scan: too many rows and channels");
  return dim3(static_cast<unsigned>(blocks));
}

/// Lets a kernel have that much dynamic shared memory, which follows from d_state; throws where the
/// device has less. Any other refusal is left to check_launch.
template <typename Kernel>
void allow_shared(Kernel kernel, int bytes) {
  const auto what = cudaFuncAttributeMaxDynamicSharedMemorySize;
  if (cudaFuncSetAttribute(kernel, what, bytes) == cudaSuccess) return;
  const int most = most_shared_memory();
  if (bytes <= most) return;
  cudaGetLastError();  // a later call would report it too
  throw std::runtime_error("selective_scan: d_state is too large for this device: a block needs " +
                           std::to_string(bytes) + " bytes of shared memory, and may have " +
                           std::to_string(most));
}

/// What lies in aligned fours in memory.
struct Alignment {
  bool channels, pairs;
  bool near = true;  ///< all strides over time are below 2^32 bytes

  Alignment(const SelectiveScanCudaInputs& in, std::initializer_list<Activations> all) {
    channels = in.D / in.G % 4 == 0;
    for (const auto& x : all) channels = channels && in_fours(in, x);
    pairs = in.N % 4 == 0 && in.B_stride_g % 4 == 0 && in.C_stride_g % 4 == 0 &&
            in_fours(in, in.B_matrix) && in_fours(in, in.C_matrix);
    for (const auto& x : all) near = near && is_near(in, x);
    near = near && is_near(in, in.B_matrix) && is_near(in, in.C_matrix);
  }

  static bool is_near(const SelectiveScanCudaInputs& in, const Activations& x) {
    const int64_t limit = int64_t{1} << (in.type == ActivationType::fp32 ? 30 : 31);
    return x.stride_t >= 0 && x.stride_t < limit;
  }

  static bool in_fours(const SelectiveScanCudaInputs& in, const Activations& x) {
    return lies_in_words(x, in.type, 4);
  }
};

/// This thread's part of a [.., D, N] array; what does not exist reads as 0 and is not written.
template <class Layout>
__device__ __forceinline__ void load_states(const float* from, int64_t N,
                                            const WarpPlace<Layout>& me, OwnStates<Layout>& h) {
  const bool words = N % 4 == 0 && reinterpret_cast<uintptr_t>(from) % 16 == 0;
#pragma unroll
  for (int k = 0; k < Layout::own; ++k) {
#pragma unroll
    for (int j = 0; j < Layout::states; j += 4) {
      const bool there = from != nullptr && me.channel + k < me.channels;
      const auto count = there ? static_cast<int>(N) - me.n - j : 0;
      const bool whole = Layout::states >= 4 && words && count >= 4;
      const float4 x = widen<float>(load_four(from + k * N + j, count, whole));
      h[k][j] = x.x;
      h[k][j + 1] = x.y;
      if constexpr (Layout::states >= 4) {
        h[k][j + 2] = x.z;
        h[k][j + 3] = x.w;
      }
    }
  }
}

template <class Layout, typename T>
__device__ __forceinline__ void store_states(T* to, int64_t N, const WarpPlace<Layout>& me,
                                             const OwnStates<Layout>& h) {
  const bool words = N % 4 == 0 && reinterpret_cast<uintptr_t>(to) % (4 * sizeof(T)) == 0;
#pragma unroll
  for (int k = 0; k < Layout::own; ++k) {
#pragma unroll
    for (int j = 0; j < Layout::states; j += 4) {
      const int count = me.channel + k < me.channels ? static_cast<int>(N) - me.n - j : 0;
      if constexpr (Layout::states < 4) {
#pragma unroll
        for (int n = 0; n < Layout::states; ++n) {
          if (n < count) to[k * N + n] = from_float<T>(h[k][n]);
        }
      } else {
        store_four(to + k * N + j, float4{h[k][j], h[k][j + 1], h[k][j + 2], h[k][j + 3]}, count,
                   words && count >= 4);
      }
    }
  }
}

/// A for exponentials of base 2.
template <class Layout>
__device__ __forceinline__ void load_rates(const SelectiveScanCudaInputs& in,
                                           const WarpPlace<Layout>& me, OwnStates<Layout>& A) {
  load_states<Layout>(in.A + (me.first_channel + me.channel) * in.N + me.n, in.N, me, A);
#pragma unroll
  for (int k = 0; k < Layout::own; ++k) {
#pragma unroll
    for (int n = 0; n < Layout::states; ++n) A[k][n] = rate_of(A[k][n]);
  }
}

/// Bit s says that the state is cleared before step s of the tile, of which the lanes of a warp
/// hold one each.
__device__ __forceinline__ unsigned reset_bits(bool reset) { return __ballot_sync(~0u, reset); }

template <typename T>
__device__ __forceinline__ float4 softplus4(float4 x) {
  return {softplus_for<T>(x.x), softplus_for<T>(x.y), softplus_for<T>(x.z), softplus_for<T>(x.w)};
}

/// delta' of four elements.
template <typename T>
__device__ __forceinline__ float4 step_sizes(float4 delta, float4 bias, bool use_softplus) {
  const float4 size{delta.x + bias.x, delta.y + bias.y, delta.z + bias.z, delta.w + bias.w};
  return use_softplus ? softplus4<T>(size) : size;
}

/// What decay_of adds to its exponent. Near 1 the special-function unit is 7e-9 low on average,
/// which a memory of thousands of steps would feel; this takes that back, and leaves exp(0) = 1.
constexpr float kOffset = 1e-8f;

/// The same, or what makes the decay 0 before a step with a reset.
__device__ __forceinline__ float exponent_offset(unsigned resets, int step) {
  return resets >> step & 1 ? -INFINITY : kOffset;
}

/// exp(delta' A); A times log2(e).
__device__ __forceinline__ float decay_of(float delta, float A, float offset = kOffset) {
  return exp2_fast(fmaf(delta, A, offset));
}

/// h ← exp(delta' A) h + (delta' u) B for one index.
__device__ __forceinline__ float advance(float h, float delta, float A, float drive, float B,
                                         float offset = kOffset) {
  return fmaf(decay_of(delta, A, offset), h, __fmul_rn(drive, B));
}

/// The sum of a thread's own products, a tree.
template <int kStates>
__device__ __forceinline__ float own_sum(const float (&C)[kStates], const float (&h)[kStates]) {
  float sum[kStates / 2];
#pragma unroll
  for (int j = 0; j < kStates / 2; ++j) {
    sum[j] = fmaf(C[2 * j + 1], h[2 * j + 1], __fmul_rn(C[2 * j], h[2 * j]));
  }
#pragma unroll
  for (int width = kStates / 4; width > 0; width /= 2) {
#pragma unroll
    for (int j = 0; j < width; ++j) sum[j] = sum[2 * j] + sum[2 * j + 1];
  }
  return sum[0];
}

/// Adds 0 to `odd` if x is finite, else NaN.
__device__ __forceinline__ void note(float& odd, float x) { odd = fmaf(x, 0.f, odd); }
__device__ __forceinline__ void note(float& odd, float2 x) {
  note(odd, x.x);
  note(odd, x.y);
}
__device__ __forceinline__ void note(float& odd, float4 x) {
  note(odd, float2{x.x, x.y});
  note(odd, float2{x.z, x.w});
}
template <int kCount>
__device__ __forceinline__ void note(float& odd, const float (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) note(odd, x[i]);
}
template <int kRows, int kCount>
__device__ __forceinline__ void note(float& odd, const float (&x)[kRows][kCount]) {
#pragma unroll
  for (int i = 0; i < kRows; ++i) note(odd, x[i]);
}
__device__ __forceinline__ bool any_odd(float odd) { return __any_sync(~0u, odd != 0.f); }

/// 0 if all are finite.
template <typename States>
__device__ __forceinline__ float odd_of(const States& h) {
  float odd = 0;
  note(odd, h);
  return odd;
}

/// Whether a state or a gradient has overflowed before one of the resets of a few steps: their
/// decay of 0 would not clear it.
template <typename States>
__device__ __forceinline__ bool overflowed(unsigned resets, const States& h, const States& g) {
  return resets != 0 && any_odd(odd_of(h) + odd_of(g));
}

/// Products in which a zero gradient wins over whatever it meets.
template <bool kCareful>
__device__ __forceinline__ float times(float gradient, float x) {
  return kCareful && gradient == 0.f ? 0.f : __fmul_rn(gradient, x);
}
template <bool kCareful>
__device__ __forceinline__ float plus_times(float gradient, float x, float sum) {
  return kCareful && gradient == 0.f ? sum : fmaf(gradient, x, sum);
}

/// `count` neighbouring floats of shared memory, 1, 2 or fours of them.
template <int count>
__device__ __forceinline__ void read_floats(const float* shared, float (&x)[count]) {
  if constexpr (count == 1) {
    x[0] = *shared;
  } else if constexpr (count == 2) {
    const float2 two = *reinterpret_cast<const float2*>(shared);
    x[0] = two.x;
    x[1] = two.y;
  } else {
#pragma unroll
    for (int j = 0; j < count; j += 4) {
      const float4 four = *reinterpret_cast<const float4*>(shared + j);
      x[j] = four.x;
      x[j + 1] = four.y;
      x[j + 2] = four.z;
      x[j + 3] = four.w;
    }
  }
}

template <int count>
__device__ __forceinline__ void write_floats(float* shared, const float (&x)[count]) {
  if constexpr (count == 1) {
    *shared = x[0];
  } else if constexpr (count == 2) {
    *reinterpret_cast<float2*>(shared) = {x[0], x[1]};
  } else {
#pragma unroll
    for (int j = 0; j < count; j += 4) {
      *reinterpret_cast<float4*>(shared + j) = {x[j], x[j + 1], x[j + 2], x[j + 3]};
    }
  }
}

/// Two values of each of a step's channels, the thread's own.
template <class Layout>
__device__ __forceinline__ void read_step(const float2 (&step)[Layout::channels],
                                          const WarpPlace<Layout>& me, float (&x)[Layout::own],
                                          float (&y)[Layout::own]) {
  float both[2 * Layout::own];
  read_floats(reinterpret_cast<const float*>(&step[me.channel]), both);
#pragma unroll
  for (int k = 0; k < Layout::own; ++k) {
    x[k] = both[2 * k];
    y[k] = both[2 * k + 1];
  }
}

/// Two values of each of the four channels that the thread loads.
template <class Layout>
__device__ __forceinline__ void put_step(float2 (&step)[Layout::channels],
                                         const WarpPlace<Layout>& me, float4 x, float4 y) {
  auto* to = reinterpret_cast<float4*>(&step[me.four]);
  to[0] = {x.x, y.x, x.y, y.y};
  to[1] = {x.z, y.z, x.w, y.w};
}

__device__ __forceinline__ float4 times4(float4 a, float4 b) {
  return {__fmul_rn(a.x, b.x), __fmul_rn(a.y, b.y), __fmul_rn(a.z, b.z), __fmul_rn(a.w, b.w)};
}

__device__ __forceinline__ float4 operator+(float4 a, float4 b) {
  return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w};
}

/// What the lanes of each channel add to a sum over n: written a thread's own channels at a time,
/// read in fours of channels. Rows are padded against bank conflicts.
template <class Layout>
struct LaneSums {
  static constexpr int parts = Layout::lanes < 8 ? Layout::lanes : 8;
  static constexpr int row = Layout::channels + (Layout::lanes <= 4 ? 8 : 4);
  float part[parts][row];

  __device__ __forceinline__ void put(const WarpPlace<Layout>& me, float (&own)[Layout::own]) {
    constexpr int kEach = Layout::lanes / parts;
    const int lane = Layout::lane(threadIdx.x);
#pragma unroll
    for (int bit = 1; bit < kEach; bit *= 2) {
#pragma unroll
      for (int k = 0; k < Layout::own; ++k) {
        own[k] += __shfl_xor_sync(~0u, own[k], bit * Layout::apart);
      }
    }
    if (lane % kEach == 0) write_floats(&part[lane / kEach][me.channel], own);
  }
  /// The sums of the thread's four channels: a tree over the lanes.
  __device__ __forceinline__ float4 get(const WarpPlace<Layout>& me) const {
    return sum<0, parts>(me);
  }
  template <int kFirst, int kCount>
  __device__ __forceinline__ float4 sum(const WarpPlace<Layout>& me) const {
    if constexpr (kCount == 1) {
      return *reinterpret_cast<const float4*>(&part[kFirst][me.four]);
    } else {
      return sum<kFirst, kCount / 2>(me) + sum<kFirst + kCount / 2, kCount / 2>(me);
    }
  }
};

/// Largest d_state of the backward pass with whole states in a warp; above it, the wide one.
inline constexpr int64_t kSmallState = 16;

int64_t wide_channel_blocks(const SelectiveScanCudaInputs& in);

/// All of the backward pass but its segments and the sums over blocks and rows, for d_state above
/// kSmallState.
void launch_wide_bwd(const SelectiveScanCudaBwd& p, CudaStream stream);

/// Whether a training forward pass keeps the state as bf16.
inline bool keeps_bf16(const SelectiveScanCudaInputs& in) {
  return scan_checkpoint_type(in.N, in.type) == ActivationType::bf16;
}

/// As launch_wide_bwd, over states that were kept as bf16.
void launch_bf16_bwd(const SelectiveScanCudaBwd& p, CudaStream stream);

/// What its blocks leave of dB and of dC, in floats, and the sum over them.
int64_t bf16_block_sums(const SelectiveScanCudaInputs& in);
void sum_bf16_blocks(const SelectiveScanCudaBwd& p, CudaStream stream);

/// The state that enters each segment into segment_states.
void enter_segments(const SelectiveScanCudaFwd& p, CudaStream stream);

/// The gradient that enters each segment at its end into segment_states.
void enter_segments(const SelectiveScanCudaBwd& p, CudaStream stream);

}  // namespace retain::kernels
