#pragma once
// The two walks of the backward pass of the selective scan for bf16: forward, which leaves a state
// after each step in its slot, and back, which leaves its gradient there.

#include <retain/kernels/selective_scan/selective_scan_bwd_bf16.cuh>

namespace retain::kernels {

__device__ __forceinline__ void clear(States& h) {
#pragma unroll
  for (int n = 0; n < kN; ++n) h[n] = 0;
}

/// What the way there needs of a step.
struct ScanInputs {
  float size, drive, offset;
  States B;
  template <int kWarps>
  __device__ __forceinline__ ScanInputs(Bf16Shared<kWarps>& shared, int s, unsigned resets) {
    size = shared.size[s][threadIdx.x];
    drive = __fmul_rn(size, to_float(shared.u[s][threadIdx.x]));
    offset = exponent_offset(resets, s);
    read_floats<kN>(own_of(shared).all_B()[s], B);
  }
};

__device__ __forceinline__ void advance_all(const States& A, const ScanInputs& x, States& h) {
#pragma unroll
  for (int n = 0; n < kN; ++n) {
    h[n] = advance(h[n], x.size, A[n], x.drive, x.B[n], x.offset);
  }
}

__device__ __forceinline__ void scan_step(Slot& slot, const States& A, const ScanInputs& x,
                                          States& h) {
  advance_all(A, x, h);
  Packed packed;
  packed.set(h);
  packed.put(slot);
}

/// The way there over a group: states into the slots; beside it, the products of the steps before.
template <int kWarps>
__device__ __forceinline__ void scan(Bf16Shared<kWarps>& shared, const States& A, int first,
                                     unsigned resets, States& h, GroupProducts& products) {
  auto& slot = own_of(shared).slot;
  {
    const ScanInputs x(shared, first, resets), y(shared, first + 1, resets);
    scan_step(slot[first], A, x, h);
    scan_step(slot[first + 1], A, y, h);
  }
#pragma unroll 1
  for (int i = 2; i < kGroup; i += 2) {
    const int s = first + i;
    const ScanInputs x(shared, s, resets), y(shared, s + 1, resets);
    __syncwarp();
    products.add(i - 2);
    products.add(i - 1);
    scan_step(slot[s], A, x, h);
    scan_step(slot[s + 1], A, y, h);
  }
  __syncwarp();
  products.add(kGroup - 2);
  products.add(kGroup - 1);
}

/// The same without products; a reset clears even what is not finite.
template <int kWarps>
__device__ __forceinline__ void scan_carefully(Bf16Shared<kWarps>& shared, const States& A,
                                               int first, unsigned resets, const Packed& entering) {
  States h;
  entering.get(h);
#pragma unroll 1
  for (int s = first; s < first + kGroup; ++s) {
    const ScanInputs x(shared, s, 0);
    if (resets >> s & 1) clear(h);
    scan_step(own_of(shared).slot[s], A, x, h);
  }
}

/// The states after a tile, of which nothing else is asked.
template <int kWarps>
__device__ __forceinline__ void pass(Bf16Shared<kWarps>& shared, const States& A, unsigned resets,
                                     States& h) {
#pragma unroll 2
  for (int s = 0; s < kSteps; ++s) {
    const ScanInputs x(shared, s, 0);
    if (resets >> s & 1) clear(h);
    advance_all(A, x, h);
  }
}

/// What the way back needs of a step.
struct ReverseInputs {
  float size, dy, offset;
  States C;
  Packed before;
  template <int kWarps>
  __device__ __forceinline__ ReverseInputs(Bf16Shared<kWarps>& shared, int s, unsigned resets)
      : size(shared.size[s][threadIdx.x]),
        dy(shared.dy[s][threadIdx.x]),
        offset(exponent_offset(resets, s)) {
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
/// products of the steps after.
template <int kWarps>
__device__ __forceinline__ void reverse(Bf16Shared<kWarps>& shared, const States& A, int first,
                                        unsigned resets, States& g, States& dA, GroupRows& by_decay,
                                        GroupProducts& products) {
  auto& slot = own_of(shared).slot;
  const auto put = [&](int i, float sum) { by_decay[i][in_group(i, threadIdx.x)] = sum; };
  {
    const int i = kGroup - 1, s = first + i;
    const ReverseInputs x(shared, s, resets), y(shared, s - 1, resets);
    put(i, reverse_step<false>(slot[s], A, x, g, dA));
    put(i - 1, reverse_step<false>(slot[s - 1], A, y, g, dA));
  }
#pragma unroll 1
  for (int i = kGroup - 3; i > 0; i -= 2) {
    const int s = first + i;
    const ReverseInputs x(shared, s, resets), y(shared, s - 1, resets);
    __syncwarp();
    products.add(i + 2);
    products.add(i + 1);
    const float at_s = reverse_step<false>(slot[s], A, x, g, dA);
    const float below = reverse_step<false>(slot[s - 1], A, y, g, dA);
    put(i, at_s);
    put(i - 1, below);
  }
  __syncwarp();
  products.add(1);
  products.add(0);
}

template <int kWarps>
__device__ __forceinline__ void reverse_carefully(Bf16Shared<kWarps>& shared, const States& A,
                                                  int first, unsigned resets, States& g, States& dA,
                                                  GroupRows& by_decay) {
#pragma unroll 1
  for (int i = kGroup - 1; i >= 0; --i) {
    const ReverseInputs x(shared, first + i, resets);
    by_decay[i][in_group(i, threadIdx.x)] =
        reverse_step<true>(own_of(shared).slot[first + i], A, x, g, dA);
  }
}

}  // namespace retain::kernels
