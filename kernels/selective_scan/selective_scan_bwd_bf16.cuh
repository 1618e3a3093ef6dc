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
  ChannelRows<bf16> u, delta, z, dout, y;
  IndexRows<bf16> B, C;
};

/// What a warp has for its own indices.
struct alignas(16) Bf16Own {
  float C[kSteps][kN];
  IndexRows<bf16> B_near;
  Slot entering;         ///< first B as floats, then sums of a group, then the tile's first states
  Slot slot[kSteps];     ///< states after each step, then gradients
  float offset[kSteps];  ///< of a decay's exponent: minus infinity at a reset
  Rows rows[kArrays];

  __device__ __forceinline__ auto& all_B() {
    return reinterpret_cast<float(&)[kSteps][kN]>(entering);
  }
  /// Where the next tile comes while the last slots are free.
  __device__ __forceinline__ Bf16Raw& raw() {
    static_assert(sizeof(Bf16Raw) <= (kSteps - kGroup - 1) * sizeof(Slot));
    return reinterpret_cast<Bf16Raw&>(slot[kGroup + 1]);
  }
};

/// A block's channels; kWarps share them, each with kN indices.
template <int kWarps>
struct Bf16Shared {
  Bf16Own own[kWarps];
  float size[kSteps][kChannels], dy[kSteps][kChannels];  ///< delta', dL/dy
  ChannelRows<bf16> u;                                   ///< then du
  ChannelRows<bf16> drive;                               ///< delta' u
  ChannelRows<bf16> dz;
  ChannelRows<bf16> dy_near;  ///< dL/dy, then ddelta
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

/// A channel's value of one index in a slot.
__device__ __forceinline__ float state_at(const Slot& slot, int channel, int n) {
  return to_float(reinterpret_cast<const bf16*>(&slot[half_at(channel, n / 8)])[n % 8]);
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

/// Stores without a branch, which would keep apart what stands before and after it.
__device__ __forceinline__ void store_if(bool here, uint2* to, uint2 x) {
  asm volatile(
      "{.reg .pred here; setp.ne.b32 here, %3, 0; @here st.global.cg.v2.b32 [%0], {%1, %2};}" ::"l"(
          to),
      "r"(x.x), "r"(x.y), "r"(static_cast<int>(here))
      : "memory");
}

constexpr int kShares = 8;  ///< words of a pair of steps' shares of dB or dC
constexpr int kGroupShares = kGroup / 2 * kShares;

/// Sums over channels of slots by index: a block's shares of dB or dC, of which a pair of steps has
/// a word for each of eight lanes' indices.
struct OverChannels {
  unsigned f[4], by_index;

  __device__ __forceinline__ explicit OverChannels(const Slot* slots) {
    const int row = threadIdx.x % 8, m = threadIdx.x / 8;
    by_index = shared_address(slots) + half_at(row + m / 2 * 8, m % 2) * 16;
  }
  /// Takes the factors [step, channel] of a group.
  __device__ __forceinline__ void take(const bf16 (*factor)[kChannels]) {
    const int r = threadIdx.x / 4, q = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      f[i] = *reinterpret_cast<const unsigned*>(&factor[r][2 * q + 8 * i]);
  }

  /// Slots s and s + 1, s even: their products have a column for each step of their group, of which
  /// the lanes that hold the slots' own store it, if these slots are there.
  __device__ __forceinline__ void store(int s, uint2* to, bool there = true) {
    float sum[2][4] = {};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        unsigned a[4];
        load_transposed(by_index + (s + i) * sizeof(Slot) + k * 512, a);
        multiply<bf16>(a, f[2 * k], f[2 * k + 1], sum[i]);
      }
    }
    store_if(threadIdx.x % 4 == (s >> 1 & 3) && there, to,
             {pack(sum[0][0], sum[1][1]), pack(sum[0][2], sum[1][3])});
  }

  /// All of a group, one product after the other. kGradients: the slots hold gradients, and one of
  /// zero wins over whatever it meets; else the factors do.
  template <bool kGradients>
  static __device__ __noinline__ void carefully(const Slot (&slots)[kGroup],
                                                const bf16 (*factor)[kChannels], uint2* shares) {
    const int n = threadIdx.x / 4, s = threadIdx.x % 4 * 2;
    const auto sum = [&](int s, int n) {
      float total = 0;
      for (int c = 0; c < kChannels; ++c) {
        const float x = state_at(slots[s], c, n), f = to_float(factor[s][c]);
        total = kGradients ? plus_times<true>(x, f, total) : plus_times<true>(f, x, total);
      }
      return total;
    };
    __stcg(shares + s / 2 * kShares,
           uint2{pack(sum(s, n), sum(s + 1, n)), pack(sum(s, n + 8), sum(s + 1, n + 8))});
  }
};

/// Sums over indices of the gradients in a group's slots by channel; a step's product has zeros in
/// the other steps' columns.
struct OverIndices {
  float sum[2][4] = {};
  unsigned w[2], by_channel;

  /// Of the slots with `weights` [step, index], whose rows begin at the group's first step.
  __device__ __forceinline__ OverIndices(const Slot* slots, const bf16 (*weights)[kN]) {
    const int row = threadIdx.x % 8, m = threadIdx.x / 8;
    by_channel = shared_address(slots) + half_at(row + m % 2 * 8, m / 2) * 16;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      w[i] = *reinterpret_cast<const unsigned*>(
          &weights[threadIdx.x / 4][threadIdx.x % 4 * 2 + 8 * i]);
    }
  }

  /// Slots s and s + 1.
  __device__ __forceinline__ void add(int s) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool mine = threadIdx.x / 4 == s + i;
      const unsigned w0 = mine ? w[0] : 0, w1 = mine ? w[1] : 0;
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        unsigned a[4];
        load_matrices(by_channel + (s + i) * sizeof(Slot) + k * 512, a);
        multiply<bf16>(a, w0, w1, sum[k]);
      }
    }
  }

  /// All of a group, one product after the other; a gradient of zero wins over whatever it meets.
  static __device__ __noinline__ void carefully(const Slot (&slots)[kGroup],
                                                const bf16 (*weights)[kN], GroupRows& to) {
    const int c = threadIdx.x;
    float sum[kGroup] = {};
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int s = 0; s < kGroup; ++s) {
        sum[s] = plus_times<true>(state_at(slots[s], c, n), to_float(weights[s][n]), sum[s]);
      }
    }
    __syncwarp();  // the sums may lie where the slots do
#pragma unroll
    for (int s = 0; s < kGroup; ++s) to[s][in_group(s, c)] = sum[s];
  }

  __device__ __forceinline__ void put(GroupRows& to) const {
    const int c = threadIdx.x / 4, q = threadIdx.x % 4;
    float* const rows = &to[q * 2][c];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float* const at = rows + (j ^ q) * 8;
      at[0] = sum[j / 2][j % 2 * 2];
      at[kChannels] = sum[j / 2][j % 2 * 2 + 1];
    }
  }
};

}  // namespace retain::kernels
