// Backward pass of the selective scan for bf16 and d_state 8 to 32, whose forward pass left bf16
// states; the equations are in selective_scan_bwd.cu.
//
// A warp owns 32 channels, a lane one of them with 16 states, so that a step's recurrences need no
// exchange; above 16 two warps share the channels. Time runs in tiles of 16 steps, from the last:
// elementwise work by pairs of channels; forward, with the state after each step left in shared
// memory as bf16; back, with its gradient in the state's place. Sums over channels (dB, dC) and
// over indices (du) are matrix products of these with bf16 factors, on the tensor cores, added up
// in fp32. With two warps states are kept every 32 steps, and a chunk's first tile is passed once
// more, for the states that enter its second. dz comes from the forward's y, but where a gate is
// shut.

#include <retain/kernels/selective_scan/selective_scan_bwd_bf16_pairs.cuh>
#include <retain/kernels/selective_scan/selective_scan_bwd_bf16_walks.cuh>

namespace retain::kernels {
namespace {

/// Whether any thread of the block met something odd.
template <int kWarps>
__device__ __forceinline__ bool any_odd_of_block(float odd) {
  if constexpr (kWarps == 1) {
    return any_odd(odd);
  } else {
    return __syncthreads_or(odd != 0.f);
  }
}

/// A block's place, and its warp's among the indices.
template <int kWarps>
__device__ __forceinline__ WarpPlace<Layout> place_of(const SelectiveScanCudaInputs& in,
                                                      const Alignment& aligned) {
  WarpPlace<Layout> me(in, aligned.channels);
  me.move_to_index(kN * warp_of<kWarps>());
  return me;
}

/// The lane's states, N or kN of them; `whole`: in whole words.
__device__ __forceinline__ void load_packed(const bf16* from, int N, bool exists, bool whole,
                                            Packed& h) {
  if (whole) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool there = exists && i * kWord < N;
      h.half[i] = there ? reinterpret_cast<const uint4*>(from)[i] : uint4{};
    }
  } else {
    States x;
#pragma unroll
    for (int n = 0; n < kN; ++n) x[n] = exists && n < N ? to_float(from[n]) : 0.f;
    h.set(x);
  }
}

/// The rows of the inputs and gradients, of B and C those of the warp's indices.
template <int kWarps>
__device__ __forceinline__ void put_warp_rows(const SelectiveScanCudaBwd& p,
                                              const WarpPlace<Layout>& me, Rows* rows) {
  put_all_rows<bf16>(p, me, me.begin, rows);
  if constexpr (kWarps > 1) {
    if (threadIdx.x == 0) {
      rows[kB].data += me.n * sizeof(bf16);
      rows[kC].data += me.n * sizeof(bf16);
    }
    __syncwarp();
  }
}

/// Brings the tile at `first`, or what a pass over it needs, and the reset of the lane's step.
template <int kWarps>
__device__ __forceinline__ void bring_tile(Bf16Own& own, const LaneTiles& tiles, int first,
                                           int steps, bool all, int& reset) {
  // All addresses first: a copy would hold back the reads of the next rows.
  const Rows u = own.rows[kU], delta = own.rows[kDelta], z = own.rows[kZ];
  const Rows dout = own.rows[kDy], y = own.rows[kY], B = own.rows[kB], C = own.rows[kC];
  reset = load_reset(own.rows, first, steps);
  auto& raw = own.raw();
  if (kWarps == 1 || threadIdx.y == 0) {
    tiles.bring(raw.u, u, first, steps);
    tiles.bring(raw.delta, delta, first, steps);
  }
  if (kWarps == 1 || (all && threadIdx.y == kWarps - 1)) {
    tiles.bring(raw.z, z, first, steps);
    tiles.bring(raw.dout, dout, first, steps);
    tiles.bring(raw.y, y, first, steps);
  }
  tiles.bring(raw.B, B, first, steps);
  if (kWarps == 1 || all) tiles.bring(raw.C, C, first, steps);
}

/// How a block's shares of dB and of dC lie in memory: [row and group of channels, warp's indices,
/// pair of steps, 8], each four bf16 of which a lane has the sums over channels: of an index and of
/// the eighth after it.
struct BlockSums {
  int64_t rows, groups;

  __host__ __device__ __forceinline__ explicit BlockSums(const SelectiveScanCudaInputs& in)
      : rows(in.B * in.G * ((in.N + kN - 1) / kN)),
        groups((in.T + kSteps - 1) / kSteps * (kSteps / kGroup)) {}

  __host__ __device__ __forceinline__ int64_t of_a_block() const {
    return rows * groups * kGroupShares;
  }

  /// Where a lane's words begin.
  template <int kWarps>
  __device__ __forceinline__ uint2* at(float* blocks, const SelectiveScanCudaInputs& in,
                                       const WarpPlace<Layout>& me) const {
    const int64_t row = (me.b * in.G + me.group) * kWarps + warp_of<kWarps>();
    return reinterpret_cast<uint2*>(blocks) + me.channel_block * of_a_block() +
           row * groups * kGroupShares + threadIdx.x / 4;
  }
};

/// The way there over a tile: its states, dC and dz. Returns whether anything was odd.
template <int kWarps>
__device__ __forceinline__ bool scan_tile(Bf16Shared<kWarps>& shared, const PairWeights& w,
                                          bool usual, const States& A, const States& g,
                                          const Packed& before, unsigned resets, float D, uint2* dC,
                                          int first, int steps, int channels) {
  float odd = 0, odd_dz = 0;
  if (usual) {
    prepare<true>(shared, w, steps, odd, odd_dz);
  } else {
    prepare<false>(shared, w, steps, odd, odd_dz);
  }
  States h;
  before.get(h);
  sync<kWarps>();
  note(odd, g);
  scan(shared, A, h, dC);
  note(odd, h);
  const bool careful = any_odd_of_block<kWarps>(odd);
  if (careful) {
    before.get(h);
    scan_carefully(shared, A, resets, h, dC);
  }
  if (any_odd_of_block<kWarps>(odd_dz)) {
    sync<kWarps>();
    finish_shut_gates(shared, D, first, steps, channels);
    sync<kWarps>();
  }
  return careful;
}

/// The way back over the group of a tile from its step k on: dB, du and ddelta.
template <int kWarps>
__device__ __forceinline__ void reverse_group(Bf16Shared<kWarps>& shared, PairWeights& w,
                                              const States& A, States& g, States& dA,
                                              unsigned resets, bool careful, bool usual, uint2* dB,
                                              int k, int steps) {
  auto& own = own_of(shared);
  const int decay_at = k == 0 ? kGroup + 1 : 0, input_at = k + 1;
  auto& by_decay = group_rows(shared, warp_of<kWarps>(), decay_at);
  auto& by_input = group_rows(shared, warp_of<kWarps>(), input_at);
  // A reset's decay of 0 would not clear a gradient that has overflowed.
  if ((resets >> k & ((1u << kGroup) - 1)) != 0) {
    careful = any_odd_of_block<kWarps>(odd_of(g)) || careful;
  }
  if (careful) {
    reverse_carefully(shared, A, k, resets, g, dA, by_decay, by_input, dB);
  } else {
    reverse(shared, A, k, g, dA, by_decay, by_input, dB);
  }
  sync<kWarps>();
  if (careful) {
    finish<true, false>(shared, w, k, steps, input_at, decay_at);
  } else if (usual) {
    finish<false, true>(shared, w, k, steps, input_at, decay_at);
  } else {
    finish<false, false>(shared, w, k, steps, input_at, decay_at);
  }
  sync<kWarps>();
}

/// What pairs of channels gathered over time, of which half warps and warps have parts.
template <int kWarps>
__device__ __forceinline__ void store_pairs(float* to, float2 sum, float (&others)[kChannels],
                                            int channels) {
  sum.x += __shfl_xor_sync(~0u, sum.x, 16);
  sum.y += __shfl_xor_sync(~0u, sum.y, 16);
  const int c = pair_step(pair_channel());
  float own = threadIdx.x < 16 ? sum.x : sum.y;
  if constexpr (kWarps == 2) {
    if (threadIdx.y == 1) others[c] = own;
    __syncthreads();
    if (threadIdx.y == 1) return;
    own += others[c];
  }
  if (c < channels) to[c] = own;
}

/// kWhole: all lies in whole words.
template <int kWarps, bool kWhole>
__global__ __launch_bounds__(32 * kWarps, 8 / kWarps) void scan_bwd_by_lanes(
    const __grid_constant__ SelectiveScanCudaBwd p, Alignment aligned, Words some) {
  const Words words = kWhole ? Words{true, true} : some;
  extern __shared__ char memory[];
  auto& shared = *reinterpret_cast<Bf16Shared<kWarps>*>(memory);
  auto& own = own_of(shared);
  const auto& in = p.in;
  const auto me = place_of<kWarps>(in, aligned);
  const int N = static_cast<int>(in.N) - me.n;  // of the warp's indices on
  const LaneTiles tiles{words, me.channels, N};
  const int64_t all_states = in.B * in.D * in.N;
  const BlockSums sums(in);
  PairWeights w(in, me);
  const bool usual = w.softplus && w.gated;
  const float D = me.weight(in.D_skip, threadIdx.x);
  OwnStates<Layout> A_, g_, dA_ = {};
  States &A = A_[0], &g = g_[0], &dA = dA_[0];
  load_rates(in, me, A_);
  const float* entering =
      in.segments > 1 ? in.segment_states + me.segment * all_states : p.dlast_state;
  load_states<Layout>(entering != nullptr ? entering + me.state : nullptr, in.N, me, g_);
  put_warp_rows<kWarps>(p, me, own.rows);

  constexpr int kEvery = kSteps * kWarps;
  const int length = static_cast<int>(me.end - me.begin);
  const bool exists = me.channel < me.channels, whole = kWhole || in.N % kWord == 0;
  const auto* checkpoint = static_cast<const bf16*>(p.checkpoints) + me.state +
                           ((me.end + kEvery - 1) / kEvery - 1) * all_states;
  int reset = 0;
  Packed before;
  // Brings a tile, or what a pass over it needs, and the states before it if they were kept.
  const auto fetch = [&](int first, bool all) {
    bring_tile<kWarps>(own, tiles, first, min(length - first, kSteps), all, reset);
    if (kWarps == 1 || first % kEvery == 0) {
      load_packed(checkpoint, N, exists, whole, before);
      if (all) checkpoint -= all_states;
    }
  };
  // The tile at `first`, or the pass that must come before it.
  const auto fetch_next = [&](int first) {
    if (kWarps == 1 || first % kEvery == 0) {
      fetch(first, true);
    } else {
      fetch(first - kSteps, false);
    }
  };
  const int last = (length + kSteps - 1) / kSteps * kSteps - kSteps;
  const int64_t last_shares = (me.begin + last) / 2 * kShares;
  uint2* dB = sums.at<kWarps>(p.dB_blocks, in, me) + last_shares;
  uint2* dC = sums.at<kWarps>(p.dC_blocks, in, me) + last_shares;
  if (last >= 0) fetch_next(last);
#pragma unroll 1
  for (int first = last; first >= 0; first -= kSteps) {
    if (kWarps > 1 && first % kEvery != 0) {
      wait_for_copies();
      const unsigned resets = reset_bits(reset != 0);
      sync<kWarps>();
      prepare_pass(shared, w);
      States h;
      before.get(h);
      sync<kWarps>();
      fetch(first, true);
      pass(shared, A, resets, h);
      before.set(h);
    }
    const int steps = min(length - first, kSteps);
    wait_for_copies();
    const unsigned resets = reset_bits(reset != 0);
    if (threadIdx.x < kSteps) own.offset[threadIdx.x] = exponent_offset(resets, threadIdx.x);
    sync<kWarps>();
    const bool careful =
        scan_tile(shared, w, usual, A, g, before, resets, D, dC, first, steps, me.channels);
#pragma unroll 1
    for (int k = kSteps - kGroup; k >= 0; k -= kGroup) {
      if (k == 0) {
        before.put(own.entering);
        if (first > 0) fetch_next(first - kSteps);
      }
      __syncwarp();
      reverse_group(shared, w, A, g, dA, resets, careful, usual, dB + k * (kShares / 2), k, steps);
    }
    dB -= kSteps / 2 * kShares;
    dC -= kSteps / 2 * kShares;
    store_rows(shared, first, steps, me.channels, words.channels, w.gated);
    __syncwarp();
  }
  store_states<Layout>(p.dA_rows + me.segment * all_states + me.state, in.N, me, dA_);
  if (me.segment == 0) store_states<Layout>(p.dinitial_state + me.state, in.N, me, g_);
  const int64_t row = (me.segment * in.B + me.b) * in.D + me.first_channel;
  sync<kWarps>();
  store_pairs<kWarps>(p.dD_rows + row, w.dD, shared.size[0], me.channels);
  store_pairs<kWarps>(p.ddelta_bias_rows + row, w.dbias, shared.size[1], me.channels);
}

constexpr int kSumThreads = 128;

/// dB (y = 0) or dC (y = 1): a block of threads adds up four groups of steps of a row over all
/// `count` blocks of channels, one after the other.
__global__ __launch_bounds__(kSumThreads) void sum_bf16(
    const __grid_constant__ SelectiveScanCudaBwd p, int64_t count, unsigned blocks_a_row) {
  constexpr int kWarps = kSumThreads / 32;
  static_assert(kGroupShares == 32);  // a lane's word of a group
  const auto& in = p.in;
  const BlockSums sums(in);
  const unsigned row = blockIdx.x / blocks_a_row, lane = threadIdx.x % 32;
  const int64_t group = int64_t{blockIdx.x - row * blocks_a_row} * kWarps + threadIdx.x / 32;
  if (group >= sums.groups) return;
  const float* blocks = blockIdx.y == 0 ? p.dB_blocks : p.dC_blocks;
  const auto* from =
      reinterpret_cast<const uint2*>(blocks) + (row * sums.groups + group) * kGroupShares + lane;
  float2 low = {}, high = {};
#pragma unroll 8
  for (int64_t k = 0; k < count; ++k) {
    const uint2 words = __ldcs(from + k * sums.of_a_block());
    const float2 x = unpack(words.x), y = unpack(words.y);
    low = {low.x + x.x, low.y + x.y};
    high = {high.x + y.x, high.y + y.y};
  }
  const unsigned halves = static_cast<unsigned>((in.N + kN - 1) / kN), place = row / halves;
  const int64_t b = place / in.G, n = row % halves * kN + lane % 8;
  const int64_t t = group * kGroup + lane / 8 * 2;
  auto* to = static_cast<bf16*>(blockIdx.y == 0 ? p.dB : p.dC) + (t * in.B + b) * p.pair_stride +
             place % in.G * in.N + n;
  const auto put = [&](int64_t step, float2 x) {
    if (t + step >= in.T) return;
    if (n < in.N) to[step * in.B * p.pair_stride] = from_float<bf16>(x.x);
    if (n + 8 < in.N) to[step * in.B * p.pair_stride + 8] = from_float<bf16>(x.y);
  };
  put(0, {low.x, high.x});
  put(1, {low.y, high.y});
}

template <int kWarps>
void launch_by_lanes(const SelectiveScanCudaBwd& p, CudaStream stream) {
  const auto& in = p.in;
  const auto all = {in.u, in.delta, in.z, p.y, p.dy, p.du, p.ddelta, p.dz};
  const Alignment aligned(in, all);
  constexpr int kBytes = sizeof(Bf16Shared<kWarps>);
  const auto words = in_words<bf16>(in, aligned, all);
  const auto kernel = words.channels && words.indices ? scan_bwd_by_lanes<kWarps, true>
                                                      : scan_bwd_by_lanes<kWarps, false>;
  allow_shared(kernel, kBytes);
  kernel<<<scan_grid<Layout>(in), dim3(32, kWarps), kBytes, stream>>>(p, aligned, words);
  check_launch("selective_scan: backward");
}

}  // namespace

int64_t bf16_block_sums(const SelectiveScanCudaInputs& in) {
  return channel_blocks<Layout>(in) * BlockSums(in).of_a_block() * (sizeof(uint2) / sizeof(float));
}

void sum_bf16_blocks(const SelectiveScanCudaBwd& p, CudaStream stream) {
  const BlockSums sums(p.in);
  constexpr int64_t kGroups = kSumThreads / 32;  // of a block
  const int64_t blocks_a_row = (sums.groups + kGroups - 1) / kGroups;
  if (sums.rows * blocks_a_row == 0) return;
  const dim3 grid(static_cast<unsigned>(sums.rows * blocks_a_row), 2);
  sum_bf16<<<grid, kSumThreads, 0, stream>>>(p, channel_blocks<Layout>(p.in),
                                             static_cast<unsigned>(blocks_a_row));
  check_launch("selective_scan: sums of blocks");
}

void launch_bf16_bwd(const SelectiveScanCudaBwd& p, CudaStream stream) {
  if (p.in.N <= kN) {
    launch_by_lanes<1>(p, stream);
  } else {
    launch_by_lanes<2>(p, stream);
  }
}

}  // namespace retain::kernels
