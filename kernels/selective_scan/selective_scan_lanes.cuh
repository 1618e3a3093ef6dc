#pragma once
// The selective scan with a channel to each lane of a warp, its states in the lane's registers:
// recurrences and sums over indices need no exchange. How a tile of 16 steps comes from memory, and
// what is elementwise, which lanes do by pairs of channels.

#include <retain/kernels/selective_scan/selective_scan_rows.cuh>

namespace retain::kernels {

/// 16 states a lane: all of a channel's with d_state up to 16, half of them up to 32.
using LaneLayout = WarpLayout<1, 16, 1>;
constexpr int kLaneSteps = 16, kLaneStates = LaneLayout::states, kLaneChannels = 32;
using LaneStates = float[kLaneStates];

/// A tile of an array with channels, and of B or C.
template <typename T>
using ChannelRows = T[kLaneSteps][kLaneChannels];
template <typename T>
using IndexRows = T[kLaneSteps][kLaneStates];

// From memory

/// Starts to bring the rows of a tile that exist, `count` elements of each in whole words of 16
/// bytes; zeros for the others.
template <typename T, int kWide>
__device__ __forceinline__ void copy_rows(T (&to)[kLaneSteps][kWide], Rows rows, int count,
                                          int first, int steps) {
  constexpr int kCopies = kWide * sizeof(T) / 16, kAtOnce = 32 / kCopies;  // of a row; rows
  const int row = threadIdx.x / kCopies, column = threadIdx.x % kCopies * 16;
  const bool there = rows.data != nullptr && column < count * static_cast<int>(sizeof(T));
#pragma unroll
  for (int step = 0; step < kLaneSteps; step += kAtOnce) {
    const int s = step + row;
    copy_word(reinterpret_cast<char*>(to[s]) + column, rows.near(first + s, column),
              s < steps && there);
  }
}

/// The same for any rows, here and now.
template <typename T, int kWide>
__device__ __noinline__ void load_rows(T (&to)[kLaneSteps][kWide], Rows rows, int count, int first,
                                       int steps) {
  for (int i = threadIdx.x; i < kLaneSteps * kWide; i += 32) {
    const int step = i / kWide, at = i % kWide;
    const bool there = step < steps && at < count && rows.data != nullptr;
    to[step][at] =
        there ? reinterpret_cast<const T*>(rows.at(first + step, 0))[at] : from_float<T>(0.f);
  }
}

/// Which rows of a launch lie in whole words of 16 bytes.
struct Words {
  bool channels, indices;
};

template <typename T>
Words in_words(const SelectiveScanCudaInputs& in, const Alignment& aligned,
               std::initializer_list<Activations> all) {
  constexpr int64_t kWord = 16 / sizeof(T);
  const auto whole = [&](const Activations& x) { return lies_in_words(x, in.type, kWord); };
  Words words{aligned.near && in.D / in.G % kWord == 0,
              aligned.near && in.N % kWord == 0 && in.B_stride_g % kWord == 0 &&
                  in.C_stride_g % kWord == 0 && whole(in.B_matrix) && whole(in.C_matrix)};
  for (const auto& x : all) words.channels = words.channels && whole(x);
  return words;
}

/// Brings a warp's tiles.
struct LaneTiles {
  Words words;
  int channels, N;  ///< that exist; N may be more than a tile has

  template <typename T, int kWide>
  __device__ __forceinline__ void bring(T (&to)[kLaneSteps][kWide], Rows rows, int first,
                                        int steps) const {
    constexpr bool kByChannel = kWide == kLaneChannels;
    const int count = kByChannel ? channels : N;
    if (kByChannel ? words.channels : words.indices) {
      copy_rows(to, rows, count, first, steps);
    } else {
      load_rows(to, rows, count, first, steps);
    }
  }
};

// Pairs of channels

/// Half a warp works on a step: a lane's step of the two from `i` on, its pair of channels, and
/// what a row holds of them.
__device__ __forceinline__ int pair_step(int i) { return i + threadIdx.x / 16; }
__device__ __forceinline__ int pair_channel() { return threadIdx.x % 16 * 2; }
__device__ __forceinline__ unsigned& pair_at(__nv_bfloat16 (&row)[kLaneChannels]) {
  return *reinterpret_cast<unsigned*>(&row[pair_channel()]);
}
__device__ __forceinline__ unsigned& pair_at(__half (&row)[kLaneChannels]) {
  return *reinterpret_cast<unsigned*>(&row[pair_channel()]);
}
__device__ __forceinline__ float2& pair_at(float (&row)[kLaneChannels]) {
  return *reinterpret_cast<float2*>(&row[pair_channel()]);
}

/// Both values of a word of bf16.
__device__ __forceinline__ float2 unpack(unsigned x) {
  return {__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u)};
}
__device__ __forceinline__ unsigned pack(float low, float high) {
  return pair_of<__nv_bfloat16>(low, high);
}

__device__ __forceinline__ float2 widen_pair(__nv_bfloat16 (&row)[kLaneChannels]) {
  return unpack(pair_at(row));
}
__device__ __forceinline__ float2 widen_pair(__half (&row)[kLaneChannels]) {
  return __half22float2(reinterpret_cast<const __half2&>(pair_at(row)));
}
__device__ __forceinline__ float2 widen_pair(float (&row)[kLaneChannels]) { return pair_at(row); }

/// A pair of channels' weights, and what they gather over time.
struct PairWeights {
  float2 bias, D, dD = {}, dbias = {};
  bool softplus, gated;

  __device__ __forceinline__ PairWeights(const SelectiveScanCudaInputs& in,
                                         const WarpPlace<LaneLayout>& me)
      : bias(load(in.delta_bias, me)),
        D(load(in.D_skip, me)),
        softplus(in.delta_softplus),
        gated(in.z.data != nullptr) {}

  static __device__ __forceinline__ float2 load(const float* from,
                                                const WarpPlace<LaneLayout>& me) {
    return {me.weight(from, pair_channel()), me.weight(from, pair_channel() + 1)};
  }
};

/// delta' of a pair, 0 where it is not there.
template <typename T, bool kUsual = false>
__device__ __forceinline__ float2 sizes(float2 delta, const PairWeights& w, bool there) {
  float2 size{delta.x + w.bias.x, delta.y + w.bias.y};
  if (kUsual || w.softplus) size = {softplus_for<T>(size.x), softplus_for<T>(size.y)};
  return there ? size : float2{};
}

/// dL/dout becomes dL/dy.
__device__ __forceinline__ void open_gate(float z, float& dy) {
  z = dy == 0.f ? 0.f : z;
  dy = dy * sigmoid(z) * z;
}

/// A tile's B or C as floats, four at a time.
template <typename T>
__device__ __forceinline__ void widen_indices(const IndexRows<T>& from, float* to, float& odd) {
#pragma unroll
  for (int i = 0; i < kLaneSteps * kLaneStates; i += 128) {
    const float4 x = widen_at(&from[0][0] + i + threadIdx.x * 4);
    note(odd, x);
    *reinterpret_cast<float4*>(to + i + threadIdx.x * 4) = x;
  }
}

}  // namespace retain::kernels
