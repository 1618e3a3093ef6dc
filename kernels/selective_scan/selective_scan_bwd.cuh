#pragma once
// A part of the backward pass of the selective scan: its place in shared memory, the way there,
// which keeps states and decays in registers, and the way back. The equations are in
// selective_scan_bwd.cu.

#include <retain/kernels/selective_scan/selective_scan_rows.cuh>

#include <algorithm>

namespace retain::kernels {

/// Steps whose states and decays a thread keeps: as many as 128 registers hold.
template <class Layout>
constexpr int kPart = std::clamp(64 / (Layout::own * Layout::states), 1, Layout::steps);

/// What each thread adds to dB or dC, for every step of a part.
template <class Layout>
struct PairSums {
  static constexpr int row = Layout::across * Layout::padded_n + 16;  ///< against bank conflicts
  static constexpr int kWide = Layout::padded_n / 2;                  // pairs of values of a step
  float part[kPart<Layout>][row];

  __device__ __forceinline__ void put(int step, const float (&own)[Layout::states]) {
    write_floats(&part[step][threadIdx.x * Layout::states], own);
  }

  /// Sums over channels, of the part's first `steps` steps, into memory.
  __device__ __forceinline__ void store(float* to, int64_t stride_t, int N, int steps) const {
#pragma unroll
    for (int i = 0; i < kPart<Layout> * kWide; i += 32) {
      const int step = (i + threadIdx.x) / kWide, n = (i + threadIdx.x) % kWide * 2;
      if (step >= kPart<Layout>) continue;
      float2 x[Layout::across];
#pragma unroll
      for (int a = 0; a < Layout::across; ++a) {
        x[a] = *reinterpret_cast<const float2*>(&part[step][a * Layout::padded_n + n]);
      }
#pragma unroll
      for (int width = Layout::across / 2; width > 0; width /= 2) {
#pragma unroll
        for (int a = 0; a < Layout::across / 2; ++a) {  // as often each time: all is unrolled
          if (a < width) x[a] = {x[a].x + x[a + width].x, x[a].y + x[a + width].y};
        }
      }
      const float2 sum = x[0];
      float* at = to + step * stride_t + n;
      if (step >= steps) continue;
      if (N % 2 == 0 && n < N) {
        *reinterpret_cast<float2*>(at) = sum;
      } else if (n < N) {
        at[0] = sum.x;
        if (n + 1 < N) at[1] = sum.y;
      }
    }
  }
};

template <class Layout>
struct alignas(16) BwdShared {
  float2 step[Layout::steps][Layout::channels];  ///< delta', delta' u
  float dy[Layout::steps][Layout::channels];
  float B[Layout::steps][Layout::padded_n], C[Layout::steps][Layout::padded_n];
  LaneSums<Layout> by_input[kPart<Layout>], by_decay[kPart<Layout>];  ///< the first for y too
  PairSums<Layout> pairs;                                             ///< dC, then dB
  float4 u[32], slope[32], dz[32];  ///< each thread's four: u, softplus', dL/dout silu'(z)
  float4 dD[32], dbias[32];         ///< sums of each thread's fours
  float bias[Layout::channels], D[Layout::channels];
  Rows rows[kArrays];  ///< by Array
};

/// The states that enter the parts of a chunk but its first, each thread its own.
template <class Layout>
struct Starts {
  static constexpr int fours = Layout::own * Layout::states / 4;
  float4* memory;

  __device__ __forceinline__ void put(int part, const OwnStates<Layout>& h) const {
#pragma unroll
    for (int i = 0; i < fours; ++i) {
      const float* x = &h[i * 4 / Layout::states][i * 4 % Layout::states];
      memory[(part * fours + i) * 32 + threadIdx.x] = {x[0], x[1], x[2], x[3]};
    }
  }
  __device__ __forceinline__ void get(int part, OwnStates<Layout>& h) const {
#pragma unroll
    for (int i = 0; i < fours; ++i) {
      const float4 x = memory[(part * fours + i) * 32 + threadIdx.x];
      float* to = &h[i * 4 / Layout::states][i * 4 % Layout::states];
      to[0] = x.x;
      to[1] = x.y;
      to[2] = x.z;
      to[3] = x.w;
    }
  }
};

/// What the way there needs of a tile. Returns 0 if all is finite.
template <class Layout, typename T>
__device__ __forceinline__ float put_pass(const SelectiveScanCudaInputs& in,
                                          const WarpPlace<Layout>& me,
                                          const RawTile<Layout, T>& raw,
                                          BwdShared<Layout>& shared) {
  const float4 u = widen_at(raw.four[0][threadIdx.x]), delta = widen_at(raw.four[1][threadIdx.x]);
  const float4 bias = *reinterpret_cast<const float4*>(&shared.bias[me.four]);
  float odd = 0;
  put_pairs<Layout>(raw.pair[0], shared.B, odd);
  const float4 size = step_sizes<T>(delta, bias, in.delta_softplus), drive = times4(size, u);
  note(odd, drive);
  put_step<Layout>(shared.step[me.four_step], me, size, drive);
  return odd;
}

/// All of a tile, for the way back. Steps past the end have a delta' of 0 and so no effect. Returns
/// 0 if all is finite.
template <class Layout, typename T>
__device__ __forceinline__ float put_tile(const SelectiveScanCudaInputs& in,
                                          const WarpPlace<Layout>& me, int steps,
                                          const RawTile<Layout, T>& raw,
                                          BwdShared<Layout>& shared) {
  constexpr float4 kOnes{1.f, 1.f, 1.f, 1.f};
  const float4 u = widen_at(raw.four[0][threadIdx.x]), delta = widen_at(raw.four[1][threadIdx.x]);
  const float4 z = widen_at(raw.four[2][threadIdx.x]), dout = widen_at(raw.four[3][threadIdx.x]);
  const float4 bias = *reinterpret_cast<const float4*>(&shared.bias[me.four]);
  float odd = 0;
  put_pairs<Layout>(raw.pair[0], shared.B, odd);
  put_pairs<Layout>(raw.pair[1], shared.C, odd);
  const auto each = [](const auto& run) {
    run(&float4::x);
    run(&float4::y);
    run(&float4::z);
    run(&float4::w);
  };
  float4 dy = dout, dz = {}, size, slope = kOnes;
  if (in.z.data != nullptr) {
    each([&](auto m) {
      const float gate = dout.*m == 0.f ? 0.f : z.*m, open = sigmoid(gate);
      dz.*m = dout.*m * open * (1.f + gate * (1.f - open));
      dy.*m = dout.*m * gate * open;
    });
  }
  each([&](auto m) { size.*m = delta.*m + bias.*m; });
  if (in.delta_softplus) each([&](auto m) { size.*m = softplus(size.*m, slope.*m); });
  if (me.four_step >= steps) size = {};
  const float4 drive = times4(size, u);
  note(odd, drive);
  note(odd, dy);
  put_step<Layout>(shared.step[me.four_step], me, size, drive);
  *reinterpret_cast<float4*>(&shared.dy[me.four_step][me.four]) = dy;
  shared.u[threadIdx.x] = u;
  shared.slope[threadIdx.x] = slope;
  shared.dz[threadIdx.x] = dz;
  return odd;
}

/// The state after kPart steps from step `first` of the tile on. kCareful: a reset clears even what
/// is not finite.
template <bool kCareful, class Layout>
__device__ __forceinline__ void pass_part(const BwdShared<Layout>& shared,
                                          const WarpPlace<Layout>& me, const OwnStates<Layout>& A,
                                          int first, unsigned resets, OwnStates<Layout>& h) {
#pragma unroll
  for (int s = 0; s < kPart<Layout>; ++s) {
    const bool reset = kCareful && (resets >> s & 1);
    const float offset = exponent_offset(resets, s);
    float delta[Layout::own], drive[Layout::own], B[Layout::states];
    read_step<Layout>(shared.step[first + s], me, delta, drive);
    read_floats(&shared.B[first + s][me.n], B);
#pragma unroll
    for (int k = 0; k < Layout::own; ++k) {
#pragma unroll
      for (int n = 0; n < Layout::states; ++n) {
        h[k][n] = advance(reset ? 0.f : h[k][n], delta[k], A[k][n], drive[k], B[n], offset);
      }
    }
  }
}

/// A part's states before each step and its decays.
template <class Layout>
struct Kept {
  OwnStates<Layout> h[kPart<Layout>], a[kPart<Layout>];
};

/// What a thread needs for a step. It is read a step ahead, before the sums of the step before it
/// are written, which the compiler cannot tell apart.
template <class Layout>
struct StepInputs {
  float delta[Layout::own], drive[Layout::own], dy[Layout::own];
  float B[Layout::states], C[Layout::states];

  __device__ __forceinline__ StepInputs(const BwdShared<Layout>& shared,
                                        const WarpPlace<Layout>& me, int s) {
    read_step<Layout>(shared.step[s], me, delta, drive);
    read_floats(&shared.dy[s][me.channel], dy);
    read_floats(&shared.B[s][me.n], B);
    read_floats(&shared.C[s][me.n], C);
  }
};

/// A part forward: keeps its states and decays; Σ_n C h and Σ_d dy h into shared memory. kCareful:
/// something is not finite.
template <bool kCareful, class Layout>
__device__ __forceinline__ void scan_part(BwdShared<Layout>& shared, const WarpPlace<Layout>& me,
                                          const OwnStates<Layout>& A, int offset, unsigned resets,
                                          OwnStates<Layout>& h, Kept<Layout>& kept) {
  constexpr int P = kPart<Layout>;
  StepInputs<Layout> next(shared, me, offset);
#pragma unroll
  for (int s = 0; s < P; ++s) {
    const StepInputs<Layout> x = next;
    if (s + 1 < P) next = StepInputs<Layout>(shared, me, offset + s + 1);
    const bool reset = kCareful && (resets >> s & 1);
    const float offset = exponent_offset(resets, s);
    float y[Layout::own] = {}, dC[Layout::states] = {};
#pragma unroll
    for (int k = 0; k < Layout::own; ++k) {
#pragma unroll
      for (int n = 0; n < Layout::states; ++n) {
        const float before = reset ? 0.f : h[k][n], decay = decay_of(x.delta[k], A[k][n], offset);
        kept.h[s][k][n] = before;
        kept.a[s][k][n] = decay;
        h[k][n] = fmaf(decay, before, __fmul_rn(x.drive[k], x.B[n]));
        y[k] = fmaf(x.C[n], h[k][n], y[k]);
        dC[n] = plus_times<kCareful>(x.dy[k], h[k][n], dC[n]);
      }
    }
    shared.by_input[s].put(me, y);
    shared.pairs.put(s, dC);
  }
}

/// The part backward; g is dL/dh at its end, then at its start. Σ_n g B, Σ_n e h A and Σ_d g delta'
/// u into shared memory.
template <bool kCareful, class Layout>
__device__ __forceinline__ void reverse_part(BwdShared<Layout>& shared, const WarpPlace<Layout>& me,
                                             const OwnStates<Layout>& A, int offset,
                                             unsigned resets, const Kept<Layout>& kept,
                                             OwnStates<Layout>& g, OwnStates<Layout>& dA) {
  constexpr int P = kPart<Layout>;
  StepInputs<Layout> next(shared, me, offset + P - 1);
#pragma unroll
  for (int s = P - 1; s >= 0; --s) {
    const StepInputs<Layout> x = next;
    if (s > 0) next = StepInputs<Layout>(shared, me, offset + s - 1);
    const bool reset = kCareful && (resets >> s & 1);
    float by_input[Layout::own] = {}, by_decay[Layout::own] = {}, dB[Layout::states] = {};
#pragma unroll
    for (int k = 0; k < Layout::own; ++k) {
#pragma unroll
      for (int n = 0; n < Layout::states; ++n) {
        const float gradient = plus_times<kCareful>(x.dy[k], x.C[n], g[k][n]);
        by_input[k] = plus_times<kCareful>(gradient, x.B[n], by_input[k]);
        dB[n] = plus_times<kCareful>(gradient, x.drive[k], dB[n]);
        g[k][n] = reset ? 0.f : times<kCareful>(gradient, kept.a[s][k][n]);
        const float through = times<kCareful>(g[k][n], kept.h[s][k][n]);
        by_decay[k] = plus_times<kCareful>(through, A[k][n], by_decay[k]);
        dA[k][n] = plus_times<kCareful>(through, x.delta[k], dA[k][n]);
      }
    }
    shared.by_input[s].put(me, by_input);
    shared.by_decay[s].put(me, by_decay);
    shared.pairs.put(s, dB);
  }
}

/// Sums over n of the thread's four channels of one step.
struct FourSums {
  float4 y, by_input, by_decay;
};

/// A part there and back.
template <bool kCareful, class Layout>
__device__ __forceinline__ void part_both_ways(
    BwdShared<Layout>& shared, const WarpPlace<Layout>& me, const OwnStates<Layout>& A, int offset,
    int steps, unsigned resets, int N, float* dB_to, float* dC_to, int64_t pair_stride_t,
    OwnStates<Layout>& h, OwnStates<Layout>& g, OwnStates<Layout>& dA, FourSums& sums) {
  const bool mine =
      kPart<Layout> == Layout::steps || me.four_step / kPart<Layout> * kPart<Layout> == offset;
  const int step = me.four_step % kPart<Layout>;
  Kept<Layout> kept;
  scan_part<kCareful>(shared, me, A, offset, resets, h, kept);
  __syncwarp();
  if (mine) sums.y = shared.by_input[step].get(me);
  shared.pairs.store(dC_to, pair_stride_t, N, steps);
  __syncwarp();
  reverse_part<kCareful>(shared, me, A, offset, resets, kept, g, dA);
  __syncwarp();
  if (mine) {
    sums.by_input = shared.by_input[step].get(me);
    sums.by_decay = shared.by_decay[step].get(me);
  }
  shared.pairs.store(dB_to, pair_stride_t, N, steps);
}

}  // namespace retain::kernels
