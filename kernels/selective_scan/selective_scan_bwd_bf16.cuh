#pragma once
// Pieces of the backward pass of the selective scan for bf16, which is in
// selective_scan_bwd_bf16.cu: its shared memory, and its sums as matrix products.

#include <retain/kernels/common/tensor_cores.cuh>
#include <retain/kernels/selective_scan/selective_scan_lanes.cuh>

namespace retain::kernels {

using bf16 = __nv_bfloat16;
using Layout = LaneLayout;
using States = LaneStates;
constexpr int kSteps = kLaneSteps, kN = kLaneStates, kChannels = kLaneChannels;
constexpr int kGroup = 8;  // steps: the columns of a product
constexpr int kWord = 16 / sizeof(bf16);
using Slot = uint4[kChannels * 2];  ///< a step's states as bf16
using GroupRows = float[kGroup][kChannels];

/// A tile as it lies in memory.
struct alignas(16) Bf16Raw {
  ChannelRows<bf16> u, delta, z, dout;
  IndexRows<bf16> B, C;
};

/// What a warp has for its own indices.
struct alignas(16) Bf16Own {
  Slot entering;      ///< first B as floats, then sums of a group, then the tile's first states
  Slot slot[kSteps];  ///< states after each step, then gradients
  float C[kSteps][kN];
  IndexRows<bf16> B_near, C_near;
  Rows rows[kArrays];

  __device__ __forceinline__ auto& all_B() {
    return reinterpret_cast<float(&)[kSteps][kN]>(entering);
  }
  /// Where the next tile comes while the last slots are free.
  __device__ __forceinline__ Bf16Raw& raw() { return reinterpret_cast<Bf16Raw&>(slot[kGroup + 1]); }
};

/// A block's channels; kWarps share them, each with kN indices.
template <int kWarps>
struct Bf16Shared {
  Bf16Own own[kWarps];
  float size[kSteps][kChannels], dy[kSteps][kChannels];  ///< delta', dL/dy
  ChannelRows<bf16> u;                                   ///< then du
  ChannelRows<bf16> drive;                               ///< delta' u
  ChannelRows<bf16> slope;                               ///< dL/dout silu'(z), then dz
  ChannelRows<bf16> dy_near;                             ///< dL/dy, then ddelta
};

template <int kWarps>
__device__ __forceinline__ int warp_of() {
  return kWarps == 1 ? 0 : static_cast<int>(threadIdx.y);
}
template <int kWarps>
__device__ __forceinline__ Bf16Own& own_of(Bf16Shared<kWarps>& shared) {
  return shared.own[warp_of<kWarps>()];
}
template <int kWarps>
__device__ __forceinline__ void sync() {
  if constexpr (kWarps == 1) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}

/// Where a lane's eight states of one half lie in a slot: no bank conflicts by lanes or by rows.
__device__ __forceinline__ int half_at(int channel, int half) {
  return channel * 2 + (half ^ (channel >> 2 & 1));
}

/// Where a channel's value lies in a row of a group.
__device__ __forceinline__ int in_group(int step, int channel) { return channel ^ step / 2 * 8; }

/// A lane's states as they lie in a slot.
struct Packed {
  uint4 half[2];

  __device__ __forceinline__ void set(const States& h) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float* x = &h[i * 8];
      half[i] = {pack(x[0], x[1]), pack(x[2], x[3]), pack(x[4], x[5]), pack(x[6], x[7])};
    }
  }
  __device__ __forceinline__ void get(States& h) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const unsigned word[4] = {half[i].x, half[i].y, half[i].z, half[i].w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 x = unpack(word[j]);
        h[i * 8 + 2 * j] = x.x;
        h[i * 8 + 2 * j + 1] = x.y;
      }
    }
  }
  __device__ __forceinline__ void put(Slot& slot) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) slot[half_at(threadIdx.x, i)] = half[i];
  }
  __device__ __forceinline__ void take(const Slot& slot) {
#pragma unroll
    for (int i = 0; i < 2; ++i) half[i] = slot[half_at(threadIdx.x, i)];
  }
};

/// Sums over a group of steps: of channels by index, and of indices by channel.
struct GroupSums {
  float over_channels[4] = {}, over_indices[2][4] = {};

  /// One product after the other. kGradients: the slots hold gradients, and one of zero wins over
  /// whatever it meets; else the factors do.
  template <bool kGradients>
  static __device__ __noinline__ GroupSums carefully(const Slot (&slots)[kGroup],
                                                     const bf16 (*factor)[kChannels],
                                                     const bf16 (*weights)[kN]) {
    GroupSums sums;
    const int lane = threadIdx.x, r = lane / 4, q = lane % 4;
    const auto at = [&](int s, int c, int n) {
      return to_float(reinterpret_cast<const bf16*>(&slots[s][half_at(c, n / 8)])[n % 8]);
    };
    const auto plus = [](float gradient, float x, float sum) {
      return plus_times<true>(gradient, x, sum);
    };
    for (int i = 0; i < 4; ++i) {
      const int n = r + i / 2 * 8, s = q * 2 + i % 2;
      for (int c = 0; c < kChannels; ++c) {
        const float x = at(s, c, n), f = to_float(factor[s][c]);
        float& sum = sums.over_channels[i];
        sum = kGradients ? plus(x, f, sum) : plus(f, x, sum);
      }
    }
    for (int i = 0; i < 8; ++i) {
      const int c = r + i / 2 * 8, s = q * 2 + i % 2;
      float sum = 0;
      for (int n = 0; n < kN; ++n) {
        const float x = at(s, c, n), f = to_float(weights[s][n]);
        sum = kGradients ? plus(x, f, sum) : fmaf(x, f, sum);
      }
      sums.over_indices[i / 4][i % 4] = sum;
    }
    return sums;
  }

  __device__ __forceinline__ void put_over_indices(GroupRows& to) const {
    const int c = threadIdx.x / 4, t = threadIdx.x % 4 * 2;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        to[t + i % 2][in_group(t, c + k * 16 + i / 2 * 8)] = over_indices[k][i];
      }
    }
  }
};

/// The same on the tensor cores, a step after the other. Rows `factor` [step, channel] and
/// `weights` [step, index] begin at the group's first step.
struct GroupProducts {
  GroupSums sums;
  unsigned f[4], w[2], by_index, by_channel;

  __device__ __forceinline__ GroupProducts(const Slot* slots, const bf16 (*factor)[kChannels],
                                           const bf16 (*weights)[kN]) {
    const int lane = threadIdx.x, r = lane / 4, q = lane % 4, row = lane % 8, m = lane / 8;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      f[i] = *reinterpret_cast<const unsigned*>(&factor[r][2 * q + 8 * i]);
#pragma unroll
    for (int i = 0; i < 2; ++i)
      w[i] = *reinterpret_cast<const unsigned*>(&weights[r][2 * q + 8 * i]);
    const unsigned base = shared_address(slots);
    by_index = base + half_at(row + m / 2 * 8, m % 2) * 16;
    by_channel = base + half_at(row + m % 2 * 8, m / 2) * 16;
  }

  /// Step `s` of the group.
  __device__ __forceinline__ void add(int s) {
    const bool mine = threadIdx.x / 4 == s;
    const unsigned w0 = mine ? w[0] : 0, w1 = mine ? w[1] : 0;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const unsigned offset = s * sizeof(Slot) + k * 512;
      unsigned a[4], b[4];
      load_transposed(by_index + offset, a);
      load_matrices(by_channel + offset, b);
      multiply<bf16>(a, mine ? f[2 * k] : 0, mine ? f[2 * k + 1] : 0, sums.over_channels);
      multiply<bf16>(b, w0, w1, sums.over_indices[k]);
    }
  }
};

}  // namespace retain::kernels
