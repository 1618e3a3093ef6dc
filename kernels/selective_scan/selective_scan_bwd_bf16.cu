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
__device__ __forceinline__ void store_rows(const Bf16Shared& shared, int first, int steps,
                                           int channels, bool words, bool gated) {
  const Rows du = shared.rows[kDu], ddelta = shared.rows[kDdelta], dz = shared.rows[kDz];
  if (words) {
    const int row = threadIdx.x / 4, col = threadIdx.x % 4;
    uint4 part[3][2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int s = row + 8 * i;
      part[0][i] = reinterpret_cast<const uint4*>(shared.u[s])[col];
      part[1][i] = reinterpret_cast<const uint4*>(shared.dy_near[s])[col];
      part[2][i] = reinterpret_cast<const uint4*>(shared.slope[s])[col];
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int s = row + 8 * i;
      if (s < steps) {
        __stcg(reinterpret_cast<uint4*>(du.near(first + s, col * 16)), part[0][i]);
        __stcg(reinterpret_cast<uint4*>(ddelta.near(first + s, col * 16)), part[1][i]);
        if (gated) __stcg(reinterpret_cast<uint4*>(dz.near(first + s, col * 16)), part[2][i]);
      }
    }
  } else if (threadIdx.x < channels) {
    for (int s = 0; s < steps; ++s) {
      const auto put = [&](const Rows& rows, const bf16(&from)[kChannels]) {
        reinterpret_cast<bf16*>(rows.at(first + s, 0))[threadIdx.x] = from[threadIdx.x];
      };
      put(du, shared.u[s]);
      put(ddelta, shared.dy_near[s]);
      if (gated) put(dz, shared.slope[s]);
    }
  }
}

/// 1 - e^-x for x >= 0: the derivative of softplus where it is x.
__device__ __forceinline__ float slope_of(float x) {
  const float near = x * fmaf(x, fmaf(x, .16666667f, -.5f), 1.f);
  return x < .03125f ? near : 1.f - exp2_fast(-kLog2e * x);
}

// Elementwise work: a lane's pairs of channels four at once, of which all is read before anything
// is written, because the compiler cannot tell shared memory apart. kUsual: with softplus and a
// gate.

constexpr int kPairs = kGroup / 2;  ///< of a lane in a group

/// Before the recurrences.
template <bool kUsual>
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
  const bool gated = kUsual || w.gated;
#pragma unroll 1
  for (int first = 0; first < kSteps; first += kGroup) {
    unsigned u[kPairs], delta[kPairs], z[kPairs], dout[kPairs];
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const int s = pair_step(first + 2 * i);
      u[i] = pair_at(raw.u[s]);
      delta[i] = pair_at(raw.delta[s]);
      z[i] = pair_at(raw.z[s]);
      dout[i] = pair_at(raw.dout[s]);
    }
    float2 size[kPairs], dy[kPairs];
    unsigned slope[kPairs];
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      size[i] = sizes<bf16, kUsual>(unpack(delta[i]), w, pair_step(first + 2 * i) < steps);
      dy[i] = unpack(dout[i]);
      if (gated) {
        const float2 gate = unpack(z[i]);
        const float low = open_gate(gate.x, dy[i].x), high = open_gate(gate.y, dy[i].y);
        slope[i] = pack(low, high);
      }
      note(odd, dy[i]);
    }
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const int s = pair_step(first + 2 * i);
      const float2 x = unpack(u[i]);
      pair_at(shared.u[s]) = u[i];
      pair_at(shared.size[s]) = size[i];
      pair_at(shared.dy[s]) = dy[i];
      if (gated) pair_at(shared.slope[s]) = slope[i];
      pair_at(shared.drive[s]) = pack(size[i].x * x.x, size[i].y * x.y);
      pair_at(shared.dy_near[s]) = pack(dy[i].x, dy[i].y);
    }
  }
}

__device__ __forceinline__ float2 pair_in(const GroupRows& rows, int step) {
  return *reinterpret_cast<const float2*>(&rows[step][in_group(step, pair_channel())]);
}

/// dz of a group.
template <bool kCareful>
__device__ __forceinline__ void finish_gate(Bf16Shared& shared, const PairWeights& w, int first,
                                            const GroupRows& y) {
  float2 u[kPairs], slope[kPairs], sum[kPairs];
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const int k = pair_step(2 * i), s = first + k;
    u[i] = widen_pair(shared.u[s]);
    slope[i] = widen_pair(shared.slope[s]);
    sum[i] = pair_in(y, k);
  }
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const auto dz = [&](auto m) {
      return times<kCareful>(slope[i].*m, fmaf(w.D.*m, u[i].*m, sum[i].*m));
    };
    pair_at(shared.slope[first + pair_step(2 * i)]) = pack(dz(&float2::x), dz(&float2::y));
  }
}

/// du and ddelta of a group.
template <bool kCareful, bool kUsual>
__device__ __forceinline__ void finish(Bf16Shared& shared, PairWeights& w, int first, int steps,
                                       const GroupRows& by_input, const GroupRows& by_decay) {
  float2 u[kPairs], size[kPairs], dy[kPairs], input[kPairs], decay[kPairs];
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const int k = pair_step(2 * i), s = first + k;
    u[i] = widen_pair(shared.u[s]);
    size[i] = pair_at(shared.size[s]);
    dy[i] = pair_at(shared.dy[s]);
    input[i] = pair_in(by_input, k);
    decay[i] = pair_in(by_decay, k);
  }
  float2 du[kPairs], ddelta[kPairs];
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const auto each = [&](auto m) {
      float dsize = fmaf(decay[i].*m, kLn2, times<kCareful>(input[i].*m, u[i].*m));
      if (kUsual || w.softplus) dsize = times<kCareful>(dsize, slope_of(size[i].*m));
      if (first + pair_step(2 * i) >= steps) dsize = 0;
      du[i].*m = plus_times<kCareful>(input[i].*m, size[i].*m, w.D.*m * dy[i].*m);
      ddelta[i].*m = dsize;
      w.dD.*m = plus_times<kCareful>(dy[i].*m, u[i].*m, w.dD.*m);
      w.dbias.*m += dsize;
    };
    each(&float2::x);
    each(&float2::y);
  }
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const int s = first + pair_step(2 * i);
    pair_at(shared.u[s]) = pack(du[i].x, du[i].y);
    pair_at(shared.dy_near[s]) = pack(ddelta[i].x, ddelta[i].y);
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
  const bool usual = w.softplus && w.gated;
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
    // All addresses first: a copy would hold back the reads of the next rows.
    const Rows u = shared.rows[kU], delta = shared.rows[kDelta], z = shared.rows[kZ];
    const Rows dout = shared.rows[kDy], B = shared.rows[kB], C = shared.rows[kC];
    reset = load_reset(shared.rows, first, steps);
    tiles.bring(raw.u, u, first, steps);
    tiles.bring(raw.delta, delta, first, steps);
    tiles.bring(raw.z, z, first, steps);
    tiles.bring(raw.dout, dout, first, steps);
    tiles.bring(raw.B, B, first, steps);
    tiles.bring(raw.C, C, first, steps);
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
    if (usual) {
      prepare<true>(raw, shared, w, steps, odd);
    } else {
      prepare<false>(raw, shared, w, steps, odd);
    }
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
        finish<true, false>(shared, w, k, steps, by_input, by_decay);
      } else if (usual) {
        finish<false, true>(shared, w, k, steps, by_input, by_decay);
      } else {
        finish<false, false>(shared, w, k, steps, by_input, by_decay);
      }
      __syncwarp();
    }
    store_rows(shared, first, steps, me.channels, tiles.words, w.gated);
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
