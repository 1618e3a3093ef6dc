#pragma once
// What a segment of time does to the state, or to the gradient, that enters it: where that goes,
// and how it is found for d_state 9 to 16; for any other it is in selective_scan_segments.cu.

#include <retain/kernels/selective_scan/selective_scan_lanes.cuh>

namespace retain::kernels {

/// A segment's change into segment_states and its decay, from Σ delta', into segment_decays; a
/// negative decay marks a reset inside. A times log2(e).
template <class Layout>
__device__ __forceinline__ void store_changes(const SelectiveScanCudaInputs& in,
                                              const WarpPlace<Layout>& me, bool reset,
                                              const float (&sum)[Layout::own],
                                              const OwnStates<Layout>& A,
                                              const OwnStates<Layout>& change) {
  const int64_t at = me.segment * in.B * in.D * in.N + me.state;
  store_states<Layout>(in.segment_states + at, in.N, me, change);
  OwnStates<Layout> decay;
#pragma unroll
  for (int k = 0; k < Layout::own; ++k) {
#pragma unroll
    for (int n = 0; n < Layout::states; ++n) {
      decay[k][n] = reset ? -1.f : exp2_fast(sum[k] * A[k][n]);
    }
  }
  store_states<Layout>(in.segment_decays + at, in.N, me, decay);
}

template <typename T>
struct alignas(16) LaneChangeShared {
  float size[kLaneSteps][kLaneChannels], value[kLaneSteps][kLaneChannels];  ///< delta'; u or dy
  float pairs[kLaneSteps][kLaneStates];                                     ///< B or C
  ChannelRows<T> delta, z, values;
  IndexRows<T> indices;
  Rows rows[kArrays];
};

/// Adds the shares of `count` steps of a tile, from the segment's border on; `total` is Σ delta' of
/// the steps between the border and them. kCareful: products of 0 are 0.
template <bool kGradients, bool kCareful, typename T>
__device__ __forceinline__ void add_shares(const LaneChangeShared<T>& shared, const LaneStates& A,
                                           int count, float& total, LaneStates& change) {
  constexpr bool kGuarded = kCareful && kGradients;  // dy of 0, which no output asked for
#pragma unroll(kCareful ? 1 : 4)
  for (int i = 0; i < count; ++i) {
    const int s = kGradients ? i : kLaneSteps - 1 - i;
    const float size = shared.size[s][threadIdx.x], value = shared.value[s][threadIdx.x];
    const float until = kGradients ? total + size : total;
    LaneStates pairs;
    read_floats<kLaneStates>(shared.pairs[s], pairs);
#pragma unroll
    for (int n = 0; n < kLaneStates; ++n) {
      const float own = times<kGuarded>(value, pairs[n]);
      change[n] = plus_times<kCareful>(own, exp2_fast(until * A[n]), change[n]);
    }
    total += size;
  }
}

/// change_of_states, or change_of_gradients, a lane to a channel; the values are u or dy.
template <typename T, bool kGradients>
__device__ __forceinline__ void change_by_lanes(const SelectiveScanCudaInputs& in,
                                                const Activations& values, Alignment aligned,
                                                bool words) {
  extern __shared__ char memory[];
  auto& shared = *reinterpret_cast<LaneChangeShared<T>*>(memory);
  const WarpPlace<LaneLayout> me(in, aligned.channels);
  const LaneTiles tiles(in, me, words);
  const PairWeights w(in, me);
  OwnStates<LaneLayout> A, change = {};
  load_rates(in, me, A);
  bool growing = false;  // decays may overflow
#pragma unroll
  for (int n = 0; n < kLaneStates; ++n) growing = growing || !(A[0][n] <= 0.f);
  put_rows<T>(in, me, me.begin, shared.rows);
  if (threadIdx.x == 0) {
    shared.rows[kU] = rows_of<T>(values, me.begin, me.b, me.first_channel);
    if (kGradients) shared.rows[kB] = shared.rows[kC];
  }
  __syncwarp();
  const int length = static_cast<int>(me.end - me.begin);
  const int count = (length + kLaneSteps - 1) / kLaneSteps;
  const bool gated = kGradients && w.gated;
  int steps = 0, reset = 0;
  const auto fetch = [&](int tile) {
    const int first = (kGradients ? tile : count - 1 - tile) * kLaneSteps;
    steps = min(length - first, kLaneSteps);
    reset = load_reset(shared.rows, first, steps);
    const Rows delta = shared.rows[kDelta], values = shared.rows[kU];
    const Rows z = shared.rows[kZ], indices = shared.rows[kB];
    tiles.bring(shared.delta, delta, first, steps);
    tiles.bring(shared.values, values, first, steps);
    if (gated) tiles.bring(shared.z, z, first, steps);
    tiles.bring(shared.indices, indices, first, steps);
  };
  float total[1] = {};
  unsigned resets = 0;
  if (count > 0) fetch(0);
#pragma unroll 1
  for (int tile = 0; tile < count && resets == 0; ++tile) {
    wait_for_copies();
    resets = reset_bits(reset != 0);
    __syncwarp();
    float odd = growing ? 1.f : 0.f;
    widen_indices(shared.indices, &shared.pairs[0][0], odd);
#pragma unroll 1
    for (int first = 0; first < kLaneSteps; first += 8) {
      // All is read before anything is written: the compiler cannot tell shared memory apart.
      float2 size[4], value[4], z[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int s = pair_step(first + 2 * i);
        size[i] = widen_pair(shared.delta[s]);
        value[i] = widen_pair(shared.values[s]);
        if (kGradients) z[i] = widen_pair(shared.z[s]);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int s = pair_step(first + 2 * i);
        size[i] = sizes<T>(size[i], w, s < steps);
        if (gated) {
          open_gate(z[i].x, value[i].x);
          open_gate(z[i].y, value[i].y);
        }
        if (!kGradients) value[i] = {size[i].x * value[i].x, size[i].y * value[i].y};
        note(odd, value[i]);
        note(odd, size[i]);
        pair_at(shared.size[s]) = size[i];
        pair_at(shared.value[s]) = value[i];
      }
    }
    __syncwarp();
    if (tile + 1 < count) fetch(tile + 1);
    int until = kLaneSteps;
    if (resets != 0) until = kGradients ? __ffs(resets) - 1 : kLaneSteps - 31 + __clz(resets);
    if (any_odd(odd)) {
      add_shares<kGradients, true>(shared, A[0], until, total[0], change[0]);
    } else {
      add_shares<kGradients, false>(shared, A[0], until, total[0], change[0]);
    }
    __syncwarp();
  }
  wait_for_copies();
  store_changes(in, me, resets != 0, total, A, change);
}

}  // namespace retain::kernels
