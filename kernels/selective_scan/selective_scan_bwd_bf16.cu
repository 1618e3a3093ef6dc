// Backward pass of the selective scan for bf16 and d_state 9 to 16, whose forward pass left bf16
// states every 16 steps; the equations are in selective_scan_bwd.cu.
//
// A warp owns 32 channels, a lane one of them with all its states, so that a step's recurrences
// need no exchange. Time runs in tiles of 16 steps between kept states, from the last: elementwise
// work by pairs of channels; forward, with the state after each step left in shared memory as bf16;
// back, with its gradient in the state's place. Sums over channels (dB, dC) and over indices (y,
// du) are matrix products of these with bf16 factors, on the tensor cores, added up in fp32.

#include <retain/kernels/common/sum_parts.cuh>
#include <retain/kernels/selective_scan/selective_scan_bwd_bf16.cuh>

namespace retain::kernels {
namespace {

/// Stores a tile of gradients.
__device__ __forceinline__ void store_rows(const ChannelRows<bf16>& from, const Rows& rows,
                                           int first, int steps, int channels, bool words) {
  if (words) {
    const int row = threadIdx.x / 4, col = threadIdx.x % 4 * 16;
#pragma unroll
    for (int half = 0; half < kSteps; half += 8) {
      if (half + row < steps) {
        __stcg(
            reinterpret_cast<uint4*>(rows.near(first + half + row, col)),
            *reinterpret_cast<const uint4*>(reinterpret_cast<const char*>(from[half + row]) + col));
      }
    }
  } else if (threadIdx.x < channels) {
    for (int s = 0; s < steps; ++s) {
      reinterpret_cast<bf16*>(rows.at(first + s, 0))[threadIdx.x] = from[s][threadIdx.x];
    }
  }
}

/// 1 - e^-x for x >= 0: the derivative of softplus where it is x.
__device__ __forceinline__ float slope_of(float x) {
  const float near = x * fmaf(x, fmaf(x, .16666667f, -.5f), 1.f);
  return x < .03125f ? near : 1.f - exp2_fast(-kLog2e * x);
}

/// Elementwise work before the recurrences.
__device__ __forceinline__ void prepare(Bf16Raw& raw, Bf16Shared& shared, const PairWeights& w,
                                        int steps, float& odd) {
  float even = 0;  // of B, which shows in the states
  widen_indices(raw.B, &all_B(shared)[0][0], even);
  widen_indices(raw.C, &shared.C[0][0], odd);
  const auto keep = [](IndexRows<bf16>& to, const IndexRows<bf16>& from) {
    reinterpret_cast<uint4*>(to)[threadIdx.x] = reinterpret_cast<const uint4*>(from)[threadIdx.x];
  };
  keep(shared.B_near, raw.B);
  keep(shared.C_near, raw.C);
#pragma unroll 2
  for (int i = 0; i < kSteps; i += 2) {
    const int s = pair_step(i);
    const unsigned u_pair = pair_at(raw.u[s]);
    const float2 u = unpack(u_pair);
    const float2 size = sizes<bf16>(widen_pair(raw.delta[s]), w, s < steps);
    float2 dy = widen_pair(raw.dout[s]);
    if (w.gated) {
      const float2 z = widen_pair(raw.z[s]);
      const float low = open_gate(z.x, dy.x), high = open_gate(z.y, dy.y);
      pair_at(shared.slope[s]) = pack(low, high);
    }
    note(odd, dy);
    pair_at(shared.u[s]) = u_pair;
    pair_at(shared.size[s]) = size;
    pair_at(shared.dy[s]) = dy;
    pair_at(shared.drive[s]) = pack(size.x * u.x, size.y * u.y);
    pair_at(shared.dy_near[s]) = pack(dy.x, dy.y);
  }
}

/// dz of a group.
template <bool kCareful>
__device__ __forceinline__ void finish_gate(Bf16Shared& shared, const PairWeights& w, int first,
                                            const GroupRows& y) {
#pragma unroll 2
  for (int i = 0; i < kGroup; i += 2) {
    const int k = pair_step(i), s = first + k;
    const float2 u = widen_pair(shared.u[s]), slope = widen_pair(shared.slope[s]);
    const float2 sum = *reinterpret_cast<const float2*>(&y[k][in_group(k, pair_channel())]);
    pair_at(shared.slope[s]) = pack(times<kCareful>(slope.x, fmaf(w.D.x, u.x, sum.x)),
                                    times<kCareful>(slope.y, fmaf(w.D.y, u.y, sum.y)));
  }
}

/// du and ddelta of a group.
template <bool kCareful>
__device__ __forceinline__ void finish(Bf16Shared& shared, PairWeights& w, int first, int steps,
                                       const GroupRows& by_input, const GroupRows& by_decay) {
#pragma unroll 2
  for (int i = 0; i < kGroup; i += 2) {
    const int k = pair_step(i), s = first + k, at = in_group(k, pair_channel());
    const float2 u2 = widen_pair(shared.u[s]), size2 = pair_at(shared.size[s]);
    const float2 dy2 = pair_at(shared.dy[s]);
    const float2 input2 = *reinterpret_cast<const float2*>(&by_input[k][at]);
    const float2 decay2 = *reinterpret_cast<const float2*>(&by_decay[k][at]);
    float2 du, ddelta;
    const auto each = [&](auto m) {
      const float u = u2.*m, size = size2.*m, dy = dy2.*m, input = input2.*m;
      float dsize = fmaf(decay2.*m, kLn2, times<kCareful>(input, u));
      if (w.softplus) dsize = times<kCareful>(dsize, slope_of(size));
      if (s >= steps) dsize = 0;
      du.*m = plus_times<kCareful>(input, size, w.D.*m * dy);
      ddelta.*m = dsize;
      w.dD.*m = plus_times<kCareful>(dy, u, w.dD.*m);
      w.dbias.*m += dsize;
    };
    each(&float2::x);
    each(&float2::y);
    pair_at(shared.u[s]) = pack(du.x, du.y);
    pair_at(shared.dy_near[s]) = pack(ddelta.x, ddelta.y);
  }
}

__device__ __forceinline__ void load_packed(const bf16* from, int64_t N, bool exists, Packed& h) {
  if (N == kN && exists) {
#pragma unroll
    for (int i = 0; i < 2; ++i) h.half[i] = reinterpret_cast<const uint4*>(from)[i];
  } else {
    States x;
#pragma unroll
    for (int n = 0; n < kN; ++n) x[n] = exists && n < N ? to_float(from[n]) : 0.f;
    h.set(x);
  }
}

__global__ __launch_bounds__(32, 8) void scan_bwd_by_lanes(
    const __grid_constant__ SelectiveScanCudaBwd p, Alignment aligned, bool words) {
  extern __shared__ char memory[];
  auto& shared = *reinterpret_cast<Bf16Shared*>(memory);
  const auto& in = p.in;
  const WarpPlace<Layout> me(in, aligned.channels);
  const int N = static_cast<int>(in.N);
  const LaneTiles tiles(in, me, words);
  const int64_t all_states = in.B * in.D * in.N;
  const int64_t stride_t = in.B * in.G * in.N;
  const int64_t pairs_at = me.channel_block * in.T * stride_t + (me.b * in.G + me.group) * in.N;
  const bool exists = me.channel < me.channels;
  PairWeights w(in, me);
  OwnStates<Layout> A_, g_, dA_ = {};
  States &A = A_[0], &g = g_[0], &dA = dA_[0];
  load_rates(in, me, A_);
  const float* entering =
      in.segments > 1 ? in.segment_states + me.segment * all_states : p.dlast_state;
  load_states<Layout>(entering != nullptr ? entering + me.state : nullptr, N, me, g_);
  put_all_rows<bf16>(p, me, me.begin, shared.rows);

  const int length = static_cast<int>(me.end - me.begin);
  const auto* checkpoint = static_cast<const bf16*>(p.checkpoints) + me.state +
                           ((me.end + kSteps - 1) / kSteps - 1) * all_states;
  // What the next tile needs comes while the last slots are free.
  auto& raw = reinterpret_cast<Bf16Raw&>(shared.slot[kGroup + 1]);
  int reset = 0;
  Packed before;
  const auto fetch = [&](int first) {
    const int steps = min(length - first, kSteps);
    reset = load_reset(shared.rows, first, steps);
    tiles.bring(raw.u, shared.rows[kU], first, steps);
    tiles.bring(raw.delta, shared.rows[kDelta], first, steps);
    tiles.bring(raw.z, shared.rows[kZ], first, steps);
    tiles.bring(raw.dout, shared.rows[kDy], first, steps);
    tiles.bring(raw.B, shared.rows[kB], first, steps);
    tiles.bring(raw.C, shared.rows[kC], first, steps);
    load_packed(checkpoint, N, exists, before);
    checkpoint -= all_states;
  };
  const int last = (length + kSteps - 1) / kSteps * kSteps - kSteps;
  if (last >= 0) fetch(last);
#pragma unroll 1
  for (int first = last; first >= 0; first -= kSteps) {
    const int steps = min(length - first, kSteps);
    wait_for_copies();
    const unsigned resets = reset_bits(reset != 0);
    __syncwarp();
    float odd = 0;
    prepare(raw, shared, w, steps, odd);
    States h;
    before.get(h);
    __syncwarp();
    odd += odd_of<Layout>(g_);
    const int64_t pair = pairs_at + (me.begin + first) * stride_t;
    bool careful = false;
#pragma unroll 1
    for (int k = 0; k < kSteps; k += kGroup) {
      GroupProducts products(&shared.slot[k], &shared.dy_near[k], &shared.C_near[k]);
      scan(shared, A, k, resets, h, products);
#pragma unroll
      for (int n = 0; n < kN; ++n) note(odd, h[n]);
      careful = any_odd(odd);
      if (careful) {
        Packed from = before;
        if (k > 0) from.take(shared.slot[k - 1]);
        scan_carefully(shared, A, k, resets, from);
        __syncwarp();
        products.sums =
            GroupSums::carefully<false>(*reinterpret_cast<Slot(*)[kGroup]>(&shared.slot[k]),
                                        &shared.dy_near[k], &shared.C_near[k]);
        Packed last;
        last.take(shared.slot[k + kGroup - 1]);
        last.get(h);
      }
      products.sums.store_over_channels(p.dC_blocks + pair + k * stride_t, stride_t, N, steps - k);
      if (w.gated) {
        auto& y = reinterpret_cast<GroupRows&>(k == 0 ? shared.slot[kGroup] : shared.entering);
        products.sums.put_over_indices(y);
        __syncwarp();
        if (careful) {
          finish_gate<true>(shared, w, k, y);
        } else {
          finish_gate<false>(shared, w, k, y);
        }
        __syncwarp();
      }
    }
#pragma unroll 1
    for (int k = kSteps - kGroup; k >= 0; k -= kGroup) {
      auto& by_decay = reinterpret_cast<GroupRows&>(k == 0 ? shared.slot[kGroup] : shared.entering);
      if (k == 0) {
        before.put(shared.entering);
        if (first > 0) fetch(first - kSteps);
      }
      __syncwarp();
      GroupProducts products(&shared.slot[k], &shared.drive[k], &shared.B_near[k]);
      if (careful) {
        reverse_carefully(shared, A, k, resets, g, dA, by_decay);
        __syncwarp();
        products.sums =
            GroupSums::carefully<true>(*reinterpret_cast<Slot(*)[kGroup]>(&shared.slot[k]),
                                       &shared.drive[k], &shared.B_near[k]);
      } else {
        reverse(shared, A, k, resets, g, dA, by_decay, products);
      }
      products.sums.store_over_channels(p.dB_blocks + pair + k * stride_t, stride_t, N, steps - k);
      __syncwarp();
      auto& by_input = reinterpret_cast<GroupRows&>(shared.slot[k]);
      products.sums.put_over_indices(by_input);
      __syncwarp();
      if (careful) {
        finish<true>(shared, w, k, steps, by_input, by_decay);
      } else {
        finish<false>(shared, w, k, steps, by_input, by_decay);
      }
      __syncwarp();
    }
    store_rows(shared.u, shared.rows[kDu], first, steps, me.channels, tiles.words);
    store_rows(shared.dy_near, shared.rows[kDdelta], first, steps, me.channels, tiles.words);
    if (w.gated) store_rows(shared.slope, shared.rows[kDz], first, steps, me.channels, tiles.words);
    __syncwarp();
  }
  store_states<Layout>(p.dA_rows + me.segment * all_states + me.state, N, me, dA_);
  if (me.segment == 0) store_states<Layout>(p.dinitial_state + me.state, N, me, g_);
  const int64_t row = (me.segment * in.B + me.b) * in.D + me.first_channel;
  const auto store = [&](float* to, float2 sum) {
    sum.x += __shfl_xor_sync(~0u, sum.x, 16);
    sum.y += __shfl_xor_sync(~0u, sum.y, 16);
    const int c = pair_step(pair_channel());
    if (c < me.channels) to[row + c] = threadIdx.x < 16 ? sum.x : sum.y;
  };
  store(p.dD_rows, w.dD);
  store(p.ddelta_bias_rows, w.dbias);
}

}  // namespace

void launch_bf16_bwd(const SelectiveScanCudaBwd& p, CudaStream stream) {
  const auto& in = p.in;
  const auto all = {in.u, in.delta, in.z, p.dy, p.du, p.ddelta, p.dz};
  const Alignment aligned(in, all);
  if (in.B * in.D > 0) {
    allow_shared(scan_bwd_by_lanes, sizeof(Bf16Shared));
    scan_bwd_by_lanes<<<scan_grid<Layout>(in), 32, sizeof(Bf16Shared), stream>>>(
        p, aligned, in_words<bf16>(in, aligned, all));
    check_launch("selective_scan: backward");
  }
  const int64_t size = in.T * in.B * in.G * in.N;
  const int64_t blocks = channel_blocks<Layout>(in);
  launch_sum_blocks(p.dB_blocks, p.dC_blocks, blocks, size, static_cast<bf16*>(p.dB),
                    static_cast<bf16*>(p.dC), stream);
}

}  // namespace retain::kernels
