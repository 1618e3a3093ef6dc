#pragma once
// What is elementwise in the backward pass of the selective scan for bf16, before and after its
// walks: a lane's pairs of channels of a group at once, of which all is read before anything is
// written, because the compiler cannot tell shared memory apart.

#include <retain/kernels/selective_scan/selective_scan_bwd_bf16.cuh>

namespace retain::kernels {

template <int kWarps>
constexpr int kPairs = kGroup / 2 / kWarps;  ///< of a lane in a group

/// A lane's i-th step of a group.
template <int kWarps>
__device__ __forceinline__ int step_of_pair(int i) {
  return pair_step(2 * (warp_of<kWarps>() * kPairs<kWarps> + i));
}

/// Where the first warp brings u and delta, and the last one z, dL/dout and y.
template <int kWarps>
__device__ __forceinline__ Bf16Raw& first_raw(Bf16Shared<kWarps>& shared) {
  return shared.own[0].raw();
}
template <int kWarps>
__device__ __forceinline__ Bf16Raw& last_raw(Bf16Shared<kWarps>& shared) {
  return shared.own[kWarps - 1].raw();
}

/// Before a pass.
template <int kWarps>
__device__ __forceinline__ void prepare_pass(Bf16Shared<kWarps>& shared, const PairWeights& w) {
  auto& own = own_of(shared);
  auto& raw = first_raw(shared);
  float even = 0;
  widen_indices(own.raw().B, &own.all_B()[0][0], even);
#pragma unroll
  for (int first = 0; first < kSteps; first += kGroup) {
    unsigned u[kPairs<kWarps>], delta[kPairs<kWarps>];
#pragma unroll
    for (int i = 0; i < kPairs<kWarps>; ++i) {
      const int s = first + step_of_pair<kWarps>(i);
      u[i] = pair_at(raw.u[s]);
      delta[i] = pair_at(raw.delta[s]);
    }
#pragma unroll
    for (int i = 0; i < kPairs<kWarps>; ++i) {
      const int s = first + step_of_pair<kWarps>(i);
      pair_at(shared.u[s]) = u[i];
      pair_at(shared.size[s]) = sizes<bf16>(unpack(delta[i]), w, true);
    }
  }
}

/// dL/dy out of dL/dout; returns dz = dL/dout y (1 / z + 1 - sigmoid(z)) for y as it left the gate.
/// It is not finite where z is 0, or y not finite; and as near as y is, which a z below 1e-30 may
/// take to the smallest numbers of bf16.
__device__ __forceinline__ float through_gate(float z, float y, float& dout) {
  z = dout == 0.f ? 1.f : z;
  const float open = sigmoid(z), dz = dout * (y * (reciprocal(z) + (1.f - open)));
  dout = dout * open * z;
  return dz;
}

/// Before the recurrences. kUsual: with softplus and a gate.
template <bool kUsual, int kWarps>
__device__ __forceinline__ void prepare(Bf16Shared<kWarps>& shared, const PairWeights& w, int steps,
                                        float& odd, float& odd_dz) {
  auto& own = own_of(shared);
  auto &raw = own.raw(), &early = first_raw(shared), &late = last_raw(shared);
  float even = 0;  // of B, which shows in the states
  widen_indices(raw.B, &own.all_B()[0][0], even);
  widen_indices(raw.C, &own.C[0][0], odd);
  reinterpret_cast<uint4*>(own.B_near)[threadIdx.x] =
      reinterpret_cast<const uint4*>(raw.B)[threadIdx.x];
  const bool gated = kUsual || w.gated;
#pragma unroll 1
  for (int first = 0; first < kSteps; first += kGroup) {
    unsigned u[kPairs<kWarps>], delta[kPairs<kWarps>], z[kPairs<kWarps>], dout[kPairs<kWarps>],
        y[kPairs<kWarps>];
#pragma unroll
    for (int i = 0; i < kPairs<kWarps>; ++i) {
      const int s = first + step_of_pair<kWarps>(i);
      u[i] = pair_at(early.u[s]);
      delta[i] = pair_at(early.delta[s]);
      z[i] = pair_at(late.z[s]);
      dout[i] = pair_at(late.dout[s]);
      y[i] = pair_at(late.y[s]);
    }
    float2 size[kPairs<kWarps>], dy[kPairs<kWarps>];
    unsigned dz[kPairs<kWarps>];
#pragma unroll
    for (int i = 0; i < kPairs<kWarps>; ++i) {
      size[i] = sizes<bf16, kUsual>(unpack(delta[i]), w, first + step_of_pair<kWarps>(i) < steps);
      dy[i] = unpack(dout[i]);
      if (gated) {
        const float2 gate = unpack(z[i]), through = unpack(y[i]);
        const float low = through_gate(gate.x, through.x, dy[i].x),
                    high = through_gate(gate.y, through.y, dy[i].y);
        note(odd_dz, float2{low, high});
        dz[i] = pack(low, high);
      }
      note(odd, dy[i]);
    }
#pragma unroll
    for (int i = 0; i < kPairs<kWarps>; ++i) {
      const int s = first + step_of_pair<kWarps>(i);
      const float2 x = unpack(u[i]);
      pair_at(shared.u[s]) = u[i];
      pair_at(shared.size[s]) = size[i];
      pair_at(shared.dy[s]) = dy[i];
      if (gated) pair_at(shared.dz[s]) = dz[i];
      pair_at(shared.drive[s]) = pack(size[i].x * x.x, size[i].y * x.y);
      pair_at(shared.dy_near[s]) = pack(dy[i].x, dy[i].y);
    }
  }
}

/// dz of a tile where it is not finite, from the states of all warps, which must not change
/// meanwhile; `D` is of the lane's channel.
template <int kWarps>
__device__ __noinline__ void finish_shut_gates(Bf16Shared<kWarps>& shared, float D, int first,
                                               int steps, int channels) {
  const int c = threadIdx.x;
  if (c >= channels) return;
  const auto& rows = shared.own[0].rows;
  const auto load = [&](const Rows& from, int s) {
    return to_float(reinterpret_cast<const bf16*>(from.at(first + s, 0))[c]);
  };
  for (int s = warp_of<kWarps>(); s < steps; s += kWarps) {
    if (isfinite(to_float(shared.dz[s][c]))) continue;
    float slope = rows[kDy].data != nullptr ? load(rows[kDy], s) : 0.f;
    float y = D * to_float(shared.u[s][c]);
    for (const auto& own : shared.own) {
      for (int n = 0; n < kN; ++n) y = fmaf(own.C[s][n], state_at(own.slot[s], c, n), y);
    }
    const float z = slope == 0.f ? 0.f : load(rows[kZ], s), open = sigmoid(z);
    slope *= open * fmaf(z, 1.f - open, 1.f);
    shared.dz[s][c] = from_float<bf16>(times<true>(slope, y));
  }
}

/// Sums of a group, of each warp in its own slot `at`, counted from the entering states.
template <int kWarps>
__device__ __forceinline__ GroupRows& group_rows(Bf16Shared<kWarps>& shared, int warp, int at) {
  return reinterpret_cast<GroupRows&>((&shared.own[warp].entering)[at]);
}

/// All warps' sums of a pair.
template <int kWarps>
__device__ __forceinline__ float2 pair_in(Bf16Shared<kWarps>& shared, int at, int step) {
  float2 sum = {};
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) {
    const auto& row = group_rows(shared, warp, at)[step];
    const float2 x = *reinterpret_cast<const float2*>(&row[in_group(step, pair_channel())]);
    sum = warp == 0 ? x : float2{sum.x + x.x, sum.y + x.y};
  }
  return sum;
}

/// 1 - e^-x for x >= 0: the derivative of softplus where it is x.
__device__ __forceinline__ float slope_of(float x) {
  const float near = fmaf(-.5f * x, x, x);
  return x < .00390625f ? near : 1.f - exp2_fast(-kLog2e * x);
}

/// du and ddelta of a group.
template <bool kCareful, bool kUsual, int kWarps>
__device__ __forceinline__ void finish(Bf16Shared<kWarps>& shared, PairWeights& w, int first,
                                       int steps, int input_at, int decay_at) {
  float2 u[kPairs<kWarps>], size[kPairs<kWarps>], dy[kPairs<kWarps>], input[kPairs<kWarps>],
      decay[kPairs<kWarps>];
#pragma unroll
  for (int i = 0; i < kPairs<kWarps>; ++i) {
    const int k = step_of_pair<kWarps>(i), s = first + k;
    u[i] = widen_pair(shared.u[s]);
    size[i] = pair_at(shared.size[s]);
    dy[i] = pair_at(shared.dy[s]);
    input[i] = pair_in(shared, input_at, k);
    decay[i] = pair_in(shared, decay_at, k);
  }
  float2 du[kPairs<kWarps>], ddelta[kPairs<kWarps>];
#pragma unroll
  for (int i = 0; i < kPairs<kWarps>; ++i) {
    const auto each = [&](auto m) {
      float dsize = fmaf(decay[i].*m, kLn2, times<kCareful>(input[i].*m, u[i].*m));
      if (kUsual || w.softplus) dsize = times<kCareful>(dsize, slope_of(size[i].*m));
      if (first + step_of_pair<kWarps>(i) >= steps) dsize = 0;
      du[i].*m = plus_times<kCareful>(input[i].*m, size[i].*m, w.D.*m * dy[i].*m);
      ddelta[i].*m = dsize;
      w.dD.*m = plus_times<kCareful>(dy[i].*m, u[i].*m, w.dD.*m);
      w.dbias.*m += dsize;
    };
    each(&float2::x);
    each(&float2::y);
  }
#pragma unroll
  for (int i = 0; i < kPairs<kWarps>; ++i) {
    const int s = first + step_of_pair<kWarps>(i);
    pair_at(shared.u[s]) = pack(du[i].x, du[i].y);
    pair_at(shared.dy_near[s]) = pack(ddelta[i].x, ddelta[i].y);
  }
}

/// Stores a tile of gradients.
template <int kWarps>
__device__ __forceinline__ void store_rows(Bf16Shared<kWarps>& shared, int first, int steps,
                                           int channels, bool words, bool gated) {
  const auto& rows = own_of(shared).rows;
  const Rows du = rows[kDu], ddelta = rows[kDdelta], dz = rows[kDz];
  constexpr int kHalves = 2 / kWarps;  // of a tile, for each warp
  const int half = warp_of<kWarps>();
  if (words) {
    const int row = threadIdx.x / 4, col = threadIdx.x % 4;
    uint4 part[3][kHalves];
#pragma unroll
    for (int i = 0; i < kHalves; ++i) {
      const int s = row + 8 * (half + i);
      part[0][i] = reinterpret_cast<const uint4*>(shared.u[s])[col];
      part[1][i] = reinterpret_cast<const uint4*>(shared.dy_near[s])[col];
      part[2][i] = reinterpret_cast<const uint4*>(shared.dz[s])[col];
    }
#pragma unroll
    for (int i = 0; i < kHalves; ++i) {
      const int s = row + 8 * (half + i);
      if (s < steps && col * kWord < channels) {
        __stcg(reinterpret_cast<uint4*>(du.near(first + s, col * 16)), part[0][i]);
        __stcg(reinterpret_cast<uint4*>(ddelta.near(first + s, col * 16)), part[1][i]);
        if (gated) __stcg(reinterpret_cast<uint4*>(dz.near(first + s, col * 16)), part[2][i]);
      }
    }
  } else if (threadIdx.x < channels) {
    for (int s = half; s < steps; s += kWarps) {
      const auto put = [&](const Rows& rows, const bf16(&from)[kChannels]) {
        reinterpret_cast<bf16*>(rows.at(first + s, 0))[threadIdx.x] = from[threadIdx.x];
      };
      put(du, shared.u[s]);
      put(ddelta, shared.dy_near[s]);
      if (gated) put(dz, shared.dz[s]);
    }
  }
}

}  // namespace retain::kernels
