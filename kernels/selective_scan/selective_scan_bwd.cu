// Backward pass of the selective scan. With g_t = dL/dh_t = C_t dy_t + exp(delta'_{t+1} A) g_{t+1},
// e_t = exp(delta'_t A) g_t and dy the gradient before the gate:
//   dB_t = Σ_d g delta' u,   dC_t = Σ_d dy h_t,   dA = Σ_t e h_{t-1} delta',
//   du = delta' Σ_n g B + D dy,   ddelta' = u Σ_n g B + Σ_n e h_{t-1} A.
// Time runs in chunks between checkpoints, last chunk first. A chunk runs forward once for the
// states that enter each of its parts; then part by part, from the last, forward with every state
// and decay kept in registers, and backward. dB and dC are summed over the channels of a block
// through shared memory and over blocks by a second kernel, always in the same order. A reset makes
// its step's decay 0, and 0 times a gradient or a state is 0 where all is finite; a chunk where
// something is not goes a careful way, in which a step that no gradient reaches adds nothing and a
// reset clears, even what is NaN.

#include <retain/kernels/common/sum_parts.cuh>
#include <retain/kernels/selective_scan/selective_scan_bwd.cuh>
#include <retain/kernels/selective_scan/selective_scan_lanes.cuh>

namespace retain::kernels {
namespace {

/// Gradients of the thread's four activations from the sums over n.
template <typename T, class Layout>
__device__ __forceinline__ void finish_tile(const WarpPlace<Layout>& me, int first, int steps,
                                            const FourSums& sums, bool whole, bool near,
                                            BwdShared<Layout>& shared) {
  if (me.four_step >= steps) return;
  const auto* step = reinterpret_cast<const float4*>(&shared.step[me.four_step][me.four]);
  const float4 low = step[0], high = step[1], u4 = shared.u[threadIdx.x];
  const float4 dy = *reinterpret_cast<const float4*>(&shared.dy[me.four_step][me.four]);
  const float4 slope = shared.slope[threadIdx.x], dz_y = shared.dz[threadIdx.x];
  const float4 D = *reinterpret_cast<const float4*>(&shared.D[me.four]);
  float4 dD = shared.dD[threadIdx.x], dbias = shared.dbias[threadIdx.x];
  float4 du, ddelta, dz;
  const auto finish = [&](auto member, float size) {
    const float u = u4.*member;
    const float by_input = sums.by_input.*member, D_here = D.*member;
    du.*member = fmaf(D_here, dy.*member, times<true>(by_input, size));
    const float dsize = fmaf(sums.by_decay.*member, kLn2, times<true>(by_input, u));
    ddelta.*member = times<true>(dsize, slope.*member);
    dz.*member = times<true>(dz_y.*member, fmaf(D_here, u, sums.y.*member));
    dD.*member += times<true>(dy.*member, u);
    dbias.*member += ddelta.*member;
  };
  finish(&float4::x, low.x);
  finish(&float4::y, low.z);
  finish(&float4::z, high.x);
  finish(&float4::w, high.z);
  shared.dD[threadIdx.x] = dD;
  shared.dbias[threadIdx.x] = dbias;
  const auto at = [&](const Rows& rows) {
    const int offset = me.four * static_cast<int>(sizeof(T));
    return reinterpret_cast<T*>(near ? rows.near(first + me.four_step, offset)
                                     : rows.at(first + me.four_step, offset));
  };
  const Rows du_rows = shared.rows[kDu], ddelta_rows = shared.rows[kDdelta],
             dz_rows = shared.rows[kDz];
  const int count = me.channels - me.four;
  store_four(at(du_rows), du, count, whole);
  store_four(at(ddelta_rows), ddelta, count, whole);
  if (dz_rows.data != nullptr) store_four(at(dz_rows), dz, count, whole);
}

/// Adds a chunk's dA to what the chunks after it left in memory.
template <class Layout>
__device__ __forceinline__ void add_dA(float* total, int64_t N, const WarpPlace<Layout>& me,
                                       bool first, OwnStates<Layout>& dA) {
  OwnStates<Layout> sum;
  load_states<Layout>(first ? nullptr : total, N, me, sum);
#pragma unroll
  for (int k = 0; k < Layout::own; ++k) {
#pragma unroll
    for (int n = 0; n < Layout::states; ++n) {
      sum[k][n] += dA[k][n];
      dA[k][n] = 0;
    }
  }
  store_states<Layout>(total, N, me, sum);
}

/// dD and ddelta_bias of the block's steps: what the threads that share a channel found.
template <class Layout>
__device__ void store_channel_sums(const SelectiveScanCudaBwd& p, const WarpPlace<Layout>& me,
                                   const BwdShared<Layout>& shared) {
  const int64_t row = (me.segment * p.in.B + me.b) * p.in.D + me.first_channel;
  for (int channel = threadIdx.x; channel < me.channels; channel += 32) {
    double dD = 0, dbias = 0;
    for (int thread = channel / 4; thread < 32; thread += Layout::quads) {
      dD += reinterpret_cast<const float*>(&shared.dD[thread])[channel % 4];
      dbias += reinterpret_cast<const float*>(&shared.dbias[thread])[channel % 4];
    }
    p.dD_rows[row + channel] = static_cast<float>(dD);
    p.ddelta_bias_rows[row + channel] = static_cast<float>(dbias);
  }
}

template <typename T, class Layout>
__global__ __launch_bounds__(32, 8) void scan_bwd(const __grid_constant__ SelectiveScanCudaBwd p,
                                                  Alignment aligned) {
  extern __shared__ char memory[];
  constexpr int kSteps = Layout::steps, P = kPart<Layout>, kParts = kSteps / P;
  auto& shared = *reinterpret_cast<BwdShared<Layout>*>(memory);
  auto& raw = *reinterpret_cast<RawTile<Layout, T>*>(memory + sizeof(BwdShared<Layout>));
  const Starts<Layout> starts{
      reinterpret_cast<float4*>(memory + sizeof(BwdShared<Layout>) + sizeof(RawTile<Layout, T>))};
  const auto& in = p.in;
  const WarpPlace<Layout> me(in, aligned.channels);
  const int N = static_cast<int>(in.N);
  const int every = static_cast<int>(in.checkpoint_every);
  const bool whole = aligned.channels && me.four < me.channels;  // this thread's four
  const bool words = aligned.channels && aligned.near && aligned.pairs;
  const int64_t all_states = in.B * in.D * in.N;
  const int64_t pair_stride_t = in.B * in.G * in.N;
  const int64_t pairs_at =
      me.channel_block * in.T * pair_stride_t + (me.b * in.G + me.group) * in.N;
  for (int i = threadIdx.x; i < Layout::channels; i += 32) {
    shared.bias[i] = me.weight(in.delta_bias, i);
    shared.D[i] = me.weight(in.D_skip, i);
  }
  OwnStates<Layout> A, g, h, dA = {};
  load_rates(in, me, A);
  const float* entering =
      in.segments > 1 ? in.segment_states + me.segment * all_states : p.dlast_state;
  load_states<Layout>(entering != nullptr ? entering + me.state : nullptr, N, me, g);
  shared.dD[threadIdx.x] = shared.dbias[threadIdx.x] = {};
  float* dA_row = p.dA_rows + me.segment * all_states + me.state;

  const int64_t chunks = (me.end - me.begin + every - 1) / every;
  int64_t first = me.begin + (chunks - 1) * every;
  int length = static_cast<int>(me.end - first);
  put_all_rows<T>(p, me, first, shared.rows);
  int reset = 0;  // compared when it has come
  // Starts on tile k of the chunk that the rows are of.
  const auto fetch = [&](int k, bool gradients) {
    const int steps = min(length - k * kSteps, kSteps);
    reset = load_reset(shared.rows, k * kSteps, steps);
    if (words) {
      copy_tile(shared.rows, raw, me, N, k * kSteps, steps, gradients);
    } else {
      load_tile(shared.rows, raw, me.channels, N, k * kSteps, steps);
    }
  };
  // Waits for it; the bits say which of its steps have a reset.
  const auto arrive = [&] {
    wait_for_copies();
    const unsigned resets = reset_bits(reset != 0);
    __syncwarp();
    return resets;
  };
  bool ends_odd = false;  // something in the state that leaves the chunk is not finite
  if (chunks > 0) fetch(0, length <= P);
#pragma unroll 1
  for (; first >= me.begin; first -= every) {
    const int last = (length - 1) / kSteps, last_part = (length - 1) / P;
    const float* checkpoint =
        static_cast<const float*>(p.checkpoints) + first / every * all_states + me.state;
    load_states<Layout>(checkpoint, N, me, h);
    const bool begins_odd = any_odd(odd_of(h));
    bool careful = begins_odd || ends_odd || any_odd(odd_of(g));  // something is not finite
    ends_odd = begins_odd;
    float odd = 0;
#pragma unroll 1
    for (int k = 0; k * kParts < last_part; ++k) {
      const unsigned resets = arrive();
      careful = any_odd(put_pass(in, me, raw, shared)) || careful;
      __syncwarp();
      const bool more = (k + 1) * kParts < last_part;
      fetch(more ? k + 1 : last, !more);
#pragma unroll 1
      for (int part = 0; part < kParts && k * kParts + part < last_part; ++part) {
        const unsigned here = resets >> part * P & ((1u << P) - 1);
        if (careful || here != 0) {
          pass_part<true>(shared, me, A, part * P, here, h);
        } else {
          pass_part<false>(shared, me, A, part * P, here, h);
        }
        starts.put(k * kParts + part, h);
        note(odd, h);
      }
      __syncwarp();
    }
    careful = any_odd(odd) || careful;
    const int here_length = length;
#pragma unroll 1
    for (int k = last; k >= 0; --k) {
      const int steps = min(here_length - k * kSteps, kSteps);
      const unsigned resets = arrive();
      careful = any_odd(put_tile(in, me, steps, raw, shared)) || careful;
      __syncwarp();
      if (k > 0) {
        fetch(k - 1, true);
      } else if (first > me.begin) {
        move_rows(shared.rows, -every);
        length = every;
        fetch(0, every <= P);
      }
      FourSums sums = {};
#pragma unroll 1
      for (int part = kParts - 1; part >= 0; --part) {
        const int offset = part * P;
        if (offset >= steps) continue;
        if (k + part == 0) {
          load_states<Layout>(checkpoint, N, me, h);
        } else {
          starts.get(k * kParts + part - 1, h);
        }
        const int64_t at = pairs_at + (first + k * kSteps + offset) * pair_stride_t;
        const unsigned here = resets >> offset & ((1u << P) - 1);
        if (careful || overflowed(here, h, g)) {
          part_both_ways<true>(shared, me, A, offset, steps - offset, here, N, p.dB_blocks + at,
                               p.dC_blocks + at, pair_stride_t, h, g, dA, sums);
        } else {
          part_both_ways<false>(shared, me, A, offset, steps - offset, here, N, p.dB_blocks + at,
                                p.dC_blocks + at, pair_stride_t, h, g, dA, sums);
        }
        __syncwarp();
      }
      // After the last tile the rows are those of the chunk before.
      finish_tile<T>(me, k > 0 || first == me.begin ? k * kSteps : every, steps, sums, whole, words,
                     shared);
      __syncwarp();
    }
    add_dA(dA_row, N, me, here_length == static_cast<int>(me.end - first), dA);
  }

  if (me.segment == 0) store_states<Layout>(p.dinitial_state + me.state, N, me, g);
  if (chunks == 0) store_states<Layout>(dA_row, N, me, dA);
  __syncwarp();
  store_channel_sums(p, me, shared);
}

/// Calls run(Layout{}) with the layout that fits d_state.
template <typename Run>
void dispatch_bwd_layout(int64_t N, const Run& run) {
  if (N <= 4) return run(WarpLayout<1, 4, 1>{});
  if (N <= 8) return run(WarpLayout<2, 4, 2>{});
  return run(WarpLayout<4, 4, 4>{});
}

template <typename T, class Layout>
void launch_layout(const SelectiveScanCudaBwd& p, CudaStream stream) {
  const auto& in = p.in;
  const Alignment aligned(in, {in.u, in.delta, in.z, p.dy, p.du, p.ddelta, p.dz});
  constexpr int64_t kPartBytes = Layout::own * Layout::states * 32 * sizeof(float);
  const int64_t parts = in.checkpoint_every / kPart<Layout> - 1;
  const auto bytes =
      static_cast<int>(sizeof(BwdShared<Layout>) + sizeof(RawTile<Layout, T>) + parts * kPartBytes);
  allow_shared(scan_bwd<T, Layout>, bytes);
  scan_bwd<T, Layout><<<scan_grid<Layout>(in), 32, bytes, stream>>>(p, aligned);
  check_launch("selective_scan: backward");
}

void launch_bwd(const SelectiveScanCudaBwd& p, CudaStream stream) {
  dispatch_activations(p.in.type, [&](auto element) {
    using T = decltype(element);
    dispatch_bwd_layout(p.in.N, [&](auto layout) {
      using Layout = decltype(layout);
      if constexpr (!std::is_same_v<T, __nv_bfloat16> || Layout::padded_n <= 8) {  // else by lanes
        launch_layout<T, Layout>(p, stream);
      }
    });
  });
}

/// Blocks of channels in a group, whose shares of dB and dC are [T, B, G, N] each.
int64_t blocks_of_a_group(const SelectiveScanCudaInputs& in) {
  if (in.N > kSmallState) return wide_channel_blocks(in);
  int64_t blocks = 0;
  dispatch_bwd_layout(in.N, [&](auto layout) { blocks = channel_blocks<decltype(layout)>(in); });
  return blocks;
}

void sum_block_pairs(const SelectiveScanCudaBwd& p, CudaStream stream) {
  const auto& in = p.in;
  if (keeps_bf16(in)) return sum_bf16_blocks(p, stream);
  dispatch_activations(in.type, [&](auto element) {
    using T = decltype(element);
    launch_sum_blocks(p.dB_blocks, p.dC_blocks, blocks_of_a_group(in), in.T * in.B, in.G * in.N,
                      p.pair_stride, static_cast<T*>(p.dB), static_cast<T*>(p.dC), stream);
  });
}

}  // namespace

int64_t selective_scan_cuda_block_sums(const SelectiveScanCudaInputs& in) {
  return keeps_bf16(in) ? bf16_block_sums(in) : blocks_of_a_group(in) * in.T * in.B * in.G * in.N;
}

void selective_scan_cuda_bwd(const SelectiveScanCudaBwd& p, CudaStream stream) {
  const auto& in = p.in;
  if (in.B * in.D > 0) {
    if (in.segments > 1) enter_segments(p, stream);
    if (keeps_bf16(in)) {
      launch_bf16_bwd(p, stream);
    } else if (in.N > kSmallState) {
      launch_wide_bwd(p, stream);
    } else {
      launch_bwd(p, stream);
    }
  }
  sum_block_pairs(p, stream);
  launch_sum_rows(in.segments * in.B,
                  {{{p.dA_rows, in.D * in.N, p.dA},
                    {p.dD_rows, in.D, p.dD},
                    {p.ddelta_bias_rows, in.D, p.ddelta_bias}}},
                  stream);
}

}  // namespace retain::kernels
