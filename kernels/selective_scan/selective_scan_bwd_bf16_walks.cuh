#pragma once
// The two walks of the backward pass of the selective scan for bf16: forward, which leaves a state
// after each step in its slot, and back, which leaves its gradient there.

#include <retain/kernels/selective_scan/selective_scan_bwd_bf16.cuh>

namespace retain::kernels {

__device__ __forceinline__ void clear(States& h) {
#pragma unroll
  for (int n = 0; n < kN; ++n) h[n] = 0;
}

/// The offsets of the exponents of step s, even, and of the one after it.
template <int kWarps>
__device__ __forceinline__ float2 offsets_at(Bf16Shared<kWarps>& shared, int s) {
  return *reinterpret_cast<const float2*>(&own_of(shared).offset[s]);
}

/// What the way there needs of a step, but B.
struct ScanInputs {
  float size, drive, offset;
  template <int kWarps>
  __device__ __forceinline__ ScanInputs(Bf16Shared<kWarps>& shared, int s, float offset)
      : size(shared.size[s][threadIdx.x]),
        drive(__fmul_rn(size, to_float(shared.u[s][threadIdx.x]))),
        offset(offset) {}
};

/// Of steps s, even, and s + 1.
struct ScanPair {
  ScanInputs low, high;
  template <int kWarps>
  __device__ __forceinline__ ScanPair(Bf16Shared<kWarps>& shared, int s)
      : ScanPair(shared, s, offsets_at(shared, s)) {}

 private:
  template <int kWarps>
  __device__ __forceinline__ ScanPair(Bf16Shared<kWarps>& shared, int s, float2 offset)
      : low(shared, s, offset.x), high(shared, s + 1, offset.y) {}
};

template <int kWarps>
__device__ __forceinline__ void advance_all(Bf16Shared<kWarps>& shared, const States& A, int s,
                                            const ScanInputs& x, States& h) {
  States B;
  read_floats<kN>(own_of(shared).all_B()[s], B);
#pragma unroll
  for (int n = 0; n < kN; ++n) {
    h[n] = advance(h[n], x.size, A[n], x.drive, B[n], x.offset);
  }
}

template <int kWarps>
__device__ __forceinline__ void scan_step(Bf16Shared<kWarps>& shared, const States& A, int s,
                                          const ScanInputs& x, States& h) {
  advance_all(shared, A, s, x, h);
  Packed packed;
  packed.set(h);
  packed.put(own_of(shared).slot[s]);
}

/// The way there over a tile: states into the slots; beside it, shares of dC from the two steps
/// before. Before the first two lies something else, whose products are not stored. What a pair's
/// exponentials need is read a pair ahead, beyond the tile at its end.
template <int kWarps>
__device__ __forceinline__ void scan(Bf16Shared<kWarps>& shared, const States& A, States& h,
                                     uint2* dC) {
  OverChannels over_channels(own_of(shared).slot);
  ScanPair next(shared, 0);
  dC -= kShares;
#pragma unroll 1
  for (int s = 0; s < kSteps; s += 2) {
    const ScanPair pair = next;
    next = ScanPair(shared, s + 2);
    over_channels.take(&shared.dy_near[(s - 2) & kGroup]);
    __syncwarp();
    over_channels.store(s - 2, dC, s > 0);
    dC += kShares;
    scan_step(shared, A, s, pair.low, h);
    scan_step(shared, A, s + 1, pair.high, h);
  }
  __syncwarp();
  over_channels.store(kSteps - 2, dC);
}

/// The same one product after the other; a reset clears even what is not finite.
template <int kWarps>
__device__ __forceinline__ void scan_carefully(Bf16Shared<kWarps>& shared, const States& A,
                                               unsigned resets, States& h, uint2* dC) {
  auto& slot = own_of(shared).slot;
#pragma unroll 1
  for (int s = 0; s < kSteps; ++s) {
    const ScanInputs x(shared, s, kOffset);
    if (resets >> s & 1) clear(h);
    scan_step(shared, A, s, x, h);
  }
  __syncwarp();
#pragma unroll 1
  for (int k = 0; k < kSteps; k += kGroup) {
    OverChannels::carefully<false>(reinterpret_cast<const Slot(&)[kGroup]>(slot[k]),
                                   &shared.dy_near[k], dC + k / 2 * kShares);
  }
}

/// The states after a tile, of which nothing else is asked.
template <int kWarps>
__device__ __forceinline__ void pass(Bf16Shared<kWarps>& shared, const States& A, unsigned resets,
                                     States& h) {
#pragma unroll 2
  for (int s = 0; s < kSteps; ++s) {
    const ScanInputs x(shared, s, kOffset);
    if (resets >> s & 1) clear(h);
    advance_all(shared, A, s, x, h);
  }
}

/// What the way back needs of a step.
struct ReverseInputs {
  float size, dy, offset;
  States C;
  Packed before;
  template <int kWarps>
  __device__ __forceinline__ ReverseInputs(Bf16Shared<kWarps>& shared, int s, float offset)
      : size(shared.size[s][threadIdx.x]), dy(shared.dy[s][threadIdx.x]), offset(offset) {
    read_floats<kN>(own_of(shared).C[s], C);
    before.take((&own_of(shared).entering)[s]);
  }
};

/// A gradient into its slot; returns Σ_n e h A.
template <bool kCareful>
__device__ __forceinline__ float reverse_step(Slot& slot, const States& A, const ReverseInputs& x,
                                              States& g, States& dA) {
  States h, gradient;
  x.before.get(h);
#pragma unroll
  for (int n = 0; n < kN; ++n) {
    gradient[n] = plus_times<kCareful>(x.dy, x.C[n], g[n]);
    g[n] = times<kCareful>(gradient[n], decay_of(x.size, A[n], x.offset));
  }
  Packed packed;
  packed.set(gradient);
  packed.put(slot);
  if (kCareful && x.offset < 0) clear(g);
  float sum[2] = {};
#pragma unroll
  for (int n = 0; n < kN; ++n) {
    const float through = times<kCareful>(g[n], h[n]);
    sum[n % 2] = plus_times<kCareful>(through, A[n], sum[n % 2]);
    dA[n] = plus_times<kCareful>(through, x.size, dA[n]);
  }
  return sum[0] + sum[1];
}

/// The way back over a group: gradients into the slots, Σ_n e h A into `by_decay`; beside it, the
/// products of the steps after, which are shares of dB and, in `by_input`, what u and delta' get.
template <int kWarps>
__device__ __forceinline__ void reverse(Bf16Shared<kWarps>& shared, const States& A, int first,
                                        States& g, States& dA, GroupRows& by_decay,
                                        GroupRows& by_input, uint2* dB) {
  auto& own = own_of(shared);
  auto& slot = own.slot;
  OverChannels over_channels(&slot[first]);
  over_channels.take(&shared.drive[first]);
  OverIndices over_indices(&slot[first], &own.B_near[first]);
  const auto put = [&](int i, float sum) { by_decay[i][in_group(i, threadIdx.x)] = sum; };
  {
    const int i = kGroup - 1, s = first + i;
    const float2 offset = offsets_at(shared, s - 1);
    const ReverseInputs x(shared, s, offset.y), y(shared, s - 1, offset.x);
    put(i, reverse_step<false>(slot[s], A, x, g, dA));
    put(i - 1, reverse_step<false>(slot[s - 1], A, y, g, dA));
  }
  dB += (kGroup / 2 - 1) * kShares;
#pragma unroll 1
  for (int i = kGroup - 3; i > 0; i -= 2) {
    const int s = first + i;
    const float2 offset = offsets_at(shared, s - 1);
    const ReverseInputs x(shared, s, offset.y), y(shared, s - 1, offset.x);
    __syncwarp();
    over_channels.store(i + 1, dB);
    dB -= kShares;
    over_indices.add(i + 1);
    const float at_s = reverse_step<false>(slot[s], A, x, g, dA);
    const float below = reverse_step<false>(slot[s - 1], A, y, g, dA);
    put(i, at_s);
    put(i - 1, below);
  }
  __syncwarp();
  over_channels.store(0, dB);
  over_indices.add(0);
  __syncwarp();
  over_indices.put(by_input);
}

template <int kWarps>
__device__ __forceinline__ void reverse_carefully(Bf16Shared<kWarps>& shared, const States& A,
                                                  int first, unsigned resets, States& g, States& dA,
                                                  GroupRows& by_decay, GroupRows& by_input,
                                                  uint2* dB) {
  auto& own = own_of(shared);
#pragma unroll 1
  for (int i = kGroup - 1; i >= 0; --i) {
    const ReverseInputs x(shared, first + i, exponent_offset(resets, first + i));
    by_decay[i][in_group(i, threadIdx.x)] = reverse_step<true>(own.slot[first + i], A, x, g, dA);
  }
  __syncwarp();
  const auto& slots = reinterpret_cast<const Slot(&)[kGroup]>(own.slot[first]);
  OverChannels::carefully<true>(slots, &shared.drive[first], dB);
  OverIndices::carefully(slots, &own.B_near[first], by_input);
}

}  // namespace retain::kernels
