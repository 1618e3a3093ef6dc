// Segments of time: what each does to the state, or to the gradient, that enters it, from zero and
// for its last alone; then these are carried over the segments. A step's share needs no recurrence:
// it is the product of the decays between the step and the segment's border.

#include <retain/kernels/selective_scan/selective_scan_segments.cuh>

namespace retain::kernels {
namespace {

template <class Layout, typename T>
struct alignas(16) SegmentShared {
  float2 step[Layout::steps][Layout::channels];  ///< delta', and delta' u or dy
  float pairs[Layout::steps][Layout::padded_n];  ///< B or C
  Rows rows[kArrays];
  RawTile<Layout, T, 3> raw;
};

/// What a segment does to the state that enters it: the state that it makes of zero, and its decay.
/// Walks back from its end, where a step's share of the last state is exp(A Σ delta') of the steps
/// after it. Nothing comes from before a reset, so that the last one ends the walk.
template <typename T, class Layout>
__global__ __launch_bounds__(32, 16) void change_of_states(
    const __grid_constant__ SelectiveScanCudaFwd p, Alignment aligned) {
  extern __shared__ char memory[];
  auto& shared = *reinterpret_cast<SegmentShared<Layout, T>*>(memory);
  constexpr int kSteps = Layout::steps;
  const auto& in = p.in;
  const WarpPlace<Layout> me(in, aligned.channels);
  const int N = static_cast<int>(in.N);
  const bool words = aligned.channels && me.channels == Layout::channels && aligned.near &&
                     aligned.pairs && N == Layout::padded_n;
  const float4 bias = me.load_weights(in.delta_bias);
  const int64_t tiles = (me.end - me.begin + kSteps - 1) / kSteps;
  const int64_t last = me.begin + (tiles - 1) * kSteps;
  put_rows<T>(in, me, last, shared.rows);
  __syncwarp();
  OwnStates<Layout> A, h = {};
  load_rates(in, me, A);
  float after[Layout::own] = {}, tile_sum[Layout::own];  // Σ delta' of the steps after a tile
  unsigned resets = 0;
  int steps = static_cast<int>(me.end - last), reset = 0;
  const auto start = [&] {
    reset = load_reset(shared.rows, 0, steps);
    if (words) {
      copy_tile(shared.rows, shared.raw, me, 0, steps, 2, 1);
    } else {
      load_tile<Layout, T>(shared.rows, &shared.raw.four[0][0][0], 2, &shared.raw.pair[0][0][0],
                           me.channels, N, 0, steps);
    }
  };
  start();
#pragma unroll 1
  for (int64_t t = last; t >= me.begin && resets == 0; t -= kSteps) {
    wait_for_copies();
    resets = reset_bits(reset != 0);
    __syncwarp();
    const float4 u = widen_at(shared.raw.four[kU][threadIdx.x]);
    float4 size =
        step_sizes<T>(widen_at(shared.raw.four[kDelta][threadIdx.x]), bias, in.delta_softplus);
    if (me.four_step >= steps) size = {};
    put_step<Layout>(shared.step[me.four_step], me, size, times4(size, u));
    float even = 0;
    put_pairs<Layout>(shared.raw.pair[0], shared.pairs, even);
    steps = kSteps;
    if (t > me.begin) {
      move_rows(shared.rows, kArrays, -kSteps);
      start();
    }
    __syncwarp();
    const int from = resets != 0 ? 31 - __clz(resets) : 0;
#pragma unroll
    for (int k = 0; k < Layout::own; ++k) tile_sum[k] = 0;
#pragma unroll 4
    for (int s = kSteps - 1; s >= from; --s) {
      float delta[Layout::own], drive[Layout::own], B[Layout::states];
      read_step<Layout>(shared.step[s], me, delta, drive);
      read_floats(&shared.pairs[s][me.n], B);
#pragma unroll
      for (int k = 0; k < Layout::own; ++k) {
        const float sum = after[k] + tile_sum[k];
#pragma unroll
        for (int n = 0; n < Layout::states; ++n) {
          const float own = __fmul_rn(drive[k], B[n]);  // 0 wins over a decay that overflows
          if (own != 0.f) h[k][n] = fmaf(exp2_fast(sum * A[k][n]), own, h[k][n]);
        }
        tile_sum[k] += delta[k];
      }
    }
#pragma unroll
    for (int k = 0; k < Layout::own; ++k) after[k] += tile_sum[k];
    __syncwarp();
  }
  wait_for_copies();
  store_changes(in, me, resets != 0, after, A, h);
}

/// What a segment does to the gradient that enters at its end: the gradient at its start that comes
/// of its own outputs, and its decay. A step's share is exp(A Σ delta') of the steps up to it.
/// Nothing comes from beyond a reset, so that the first one ends the walk.
template <typename T, class Layout>
__global__ __launch_bounds__(32, 16) void change_of_gradients(
    const __grid_constant__ SelectiveScanCudaBwd p, Alignment aligned) {
  extern __shared__ char memory[];
  auto& shared = *reinterpret_cast<SegmentShared<Layout, T>*>(memory);
  constexpr int kSteps = Layout::steps;
  const auto& in = p.in;
  const WarpPlace<Layout> me(in, aligned.channels);
  const int N = static_cast<int>(in.N);
  const bool words = aligned.channels && me.channels == Layout::channels && aligned.near &&
                     aligned.pairs && N == Layout::padded_n;
  const float4 bias = me.load_weights(in.delta_bias);
  put_rows<T>(in, me, me.begin, shared.rows);
  // dy takes the place of u, C that of B.
  if (threadIdx.x == 0) {
    shared.rows[kU] = rows_of<T>(p.dy, me.begin, me.b, me.first_channel);
    shared.rows[kB] = shared.rows[kC];
  }
  __syncwarp();
  OwnStates<Layout> A, g = {};
  load_rates(in, me, A);
  float total[Layout::own] = {}, tile_sum[Layout::own];  // Σ delta' up to a tile
  unsigned resets = 0;
  int steps = static_cast<int>(min(me.end - me.begin, int64_t{kSteps})), reset = 0;
  const auto start = [&] {
    reset = load_reset(shared.rows, 0, steps);
    if (words) {
      copy_tile(shared.rows, shared.raw, me, 0, steps, 3, 1);
    } else {
      load_tile<Layout, T>(shared.rows, &shared.raw.four[0][0][0], 3, &shared.raw.pair[0][0][0],
                           me.channels, N, 0, steps);
    }
  };
  start();
#pragma unroll 1
  for (int64_t t = me.begin; t < me.end && resets == 0; t += kSteps) {
    wait_for_copies();
    resets = reset_bits(reset != 0);
    __syncwarp();
    float4 dy = widen_at(shared.raw.four[kU][threadIdx.x]);
    const float4 z = widen_at(shared.raw.four[kZ][threadIdx.x]);
    const float4 size =
        step_sizes<T>(widen_at(shared.raw.four[kDelta][threadIdx.x]), bias, in.delta_softplus);
    if (in.z.data != nullptr) {
      const auto gated = [](float dy, float z) { return dy == 0.f ? 0.f : dy * z * sigmoid(z); };
      dy = {gated(dy.x, z.x), gated(dy.y, z.y), gated(dy.z, z.z), gated(dy.w, z.w)};
    }
    put_step<Layout>(shared.step[me.four_step], me, size, dy);
    float even = 0;
    put_pairs<Layout>(shared.raw.pair[0], shared.pairs, even);
    const int until = resets != 0 ? __ffs(resets) - 1 : steps;
    if (t + kSteps < me.end) {
      move_rows(shared.rows, kArrays, kSteps);
      steps = static_cast<int>(min(me.end - t - kSteps, int64_t{kSteps}));
      start();
    }
    __syncwarp();
#pragma unroll
    for (int k = 0; k < Layout::own; ++k) tile_sum[k] = 0;
#pragma unroll 4
    for (int s = 0; s < until; ++s) {
      float delta[Layout::own], dy[Layout::own], C[Layout::states];
      read_step<Layout>(shared.step[s], me, delta, dy);
      read_floats(&shared.pairs[s][me.n], C);
#pragma unroll
      for (int k = 0; k < Layout::own; ++k) {
        tile_sum[k] += delta[k];
        const float sum = total[k] + tile_sum[k];
#pragma unroll
        for (int n = 0; n < Layout::states; ++n) {
          const float own = dy[k] == 0.f ? 0.f : dy[k] * C[n];
          if (own != 0.f) g[k][n] = fmaf(own, exp2_fast(sum * A[k][n]), g[k][n]);
        }
      }
    }
#pragma unroll
    for (int k = 0; k < Layout::own; ++k) total[k] += tile_sum[k];
    __syncwarp();
  }
  wait_for_copies();
  store_changes(in, me, resets != 0, total, A, g);
}

template <typename T>
__global__ __launch_bounds__(32, 16) void change_of_states_by_lanes(
    const __grid_constant__ SelectiveScanCudaFwd p, Alignment aligned, bool words) {
  change_by_lanes<T, false>(p.in, p.in.u, aligned, words);
}
template <typename T>
__global__ __launch_bounds__(32, 16) void change_of_gradients_by_lanes(
    const __grid_constant__ SelectiveScanCudaBwd p, Alignment aligned, bool words) {
  change_by_lanes<T, true>(p.in, p.dy, aligned, words);
}

bool fits_lanes(int64_t N) { return N > 8 && N <= kLaneStates; }

/// Calls run(Layout{}) with the layout of one warp that fits any other d_state.
template <typename Run>
void dispatch_other_layout(int64_t N, const Run& run) {
  if (N <= 4) return run(WarpLayout<1, 4, 1>{});
  if (N <= 8) return run(WarpLayout<2, 4, 2>{});
  if (N <= 32) return run(WarpLayout<8, 4, 4>{});
  if (N <= 64) return run(WarpLayout<16, 4, 4>{});
  if (N <= 128) return run(WarpLayout<32, 4, 4>{});
  return run(WarpLayout<32, 8, 4>{});
}

/// Replaces the change that each segment makes from zero by the state that enters it, thread an
/// index of [B, D, N]. `reverse` carries gradients from the last segment to the first.
__global__ void carry(const SelectiveScanCudaInputs in, const float* first, bool reverse) {
  const int64_t all_states = in.B * in.D * in.N;
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= all_states) return;
  float h = first != nullptr ? first[i] : 0.f;
  const auto place = [&](int64_t s) {
    return (reverse ? in.segments - 1 - s : s) * all_states + i;
  };
  constexpr int kAhead = 8;  // segments whose changes are in flight together
  for (int64_t s = 0; s < in.segments; s += kAhead) {
    float change[kAhead], decay[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (s + k >= in.segments) break;
      change[k] = in.segment_states[place(s + k)];
      decay[k] = in.segment_decays[place(s + k)];
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (s + k >= in.segments) break;
      in.segment_states[place(s + k)] = h;
      h = decay[k] < 0 || h == 0 ? change[k] : fmaf(decay[k], h, change[k]);
    }
  }
}

void launch_carry(const SelectiveScanCudaInputs& in, const float* first, bool reverse,
                  CudaStream stream) {
  const int64_t all_states = in.B * in.D * in.N;
  carry<<<static_cast<unsigned>((all_states + 63) / 64), 64, 0, stream>>>(in, first, reverse);
  check_launch("selective_scan: carry");
}

}  // namespace

void enter_segments(const SelectiveScanCudaFwd& p, CudaStream stream) {
  const auto& in = p.in;
  dispatch_activations(in.type, [&](auto element) {
    using T = decltype(element);
    const auto all = {in.u, in.delta};
    const Alignment aligned(in, all);
    if (fits_lanes(in.N)) {
      change_of_states_by_lanes<T>
          <<<scan_grid<LaneLayout>(in), 32, sizeof(LaneChangeShared<T>), stream>>>(
              p, aligned, in_words<T>(in, aligned, all));
      return check_launch("selective_scan: change of states");
    }
    dispatch_other_layout(in.N, [&](auto layout) {
      using Layout = decltype(layout);
      constexpr int kBytes = sizeof(SegmentShared<Layout, T>);
      allow_shared(change_of_states<T, Layout>, kBytes);
      change_of_states<T, Layout><<<scan_grid<Layout>(in), 32, kBytes, stream>>>(p, aligned);
      check_launch("selective_scan: change of states");
    });
  });
  launch_carry(in, p.initial_state, false, stream);
}

void enter_segments(const SelectiveScanCudaBwd& p, CudaStream stream) {
  const auto& in = p.in;
  dispatch_activations(in.type, [&](auto element) {
    using T = decltype(element);
    const auto all = {in.delta, in.z, p.dy};
    const Alignment aligned(in, all);
    if (fits_lanes(in.N)) {
      change_of_gradients_by_lanes<T>
          <<<scan_grid<LaneLayout>(in), 32, sizeof(LaneChangeShared<T>), stream>>>(
              p, aligned, in_words<T>(in, aligned, all));
      return check_launch("selective_scan: change of gradients");
    }
    dispatch_other_layout(in.N, [&](auto layout) {
      using Layout = decltype(layout);
      constexpr int kBytes = sizeof(SegmentShared<Layout, T>);
      allow_shared(change_of_gradients<T, Layout>, kBytes);
      change_of_gradients<T, Layout><<<scan_grid<Layout>(in), 32, kBytes, stream>>>(p, aligned);
      check_launch("selective_scan: change of gradients");
    });
  });
  launch_carry(in, p.dlast_state, true, stream);
}

void cut_into_segments(SelectiveScanCudaInputs& in, bool backward) {
  in.segments = 1;
  in.segment_steps = 0;
  // Warps of 512 states each, as every layout has them for d_state in whole lanes.
  const int64_t warps = (in.B * in.D * in.N + 511) / 512;
  int64_t wanted = 1;
  if (warps == 0) return;
  if (backward && in.N > kSmallState && !keeps_bf16(in)) {
    // Where segments gain more than they cost, a pass more over the inputs.
    constexpr int64_t kFull = 292, kRound = 1024, kShort = 32;
    if (warps >= kFull) return;
    wanted = std::min((kRound + warps - 1) / warps, in.T / kShort);
  } else if (backward) {
    // Several rounds of the warps that a device holds, in segments that cost little more.
    constexpr int64_t kFull = 1000, kRounds = 3072, kMost = 1024;
    if (warps >= kFull) return;
    int64_t shortest = 256;
    while (shortest > 32 && warps * (in.T / shortest) < kRounds * 2 / 3) shortest /= 2;
    wanted = std::min({kRounds / warps, in.T / shortest, kMost});
  } else {
    // A round of blocks, where much of a device is idle without and time is long enough for two
    // launches more; by lanes as many of 64 channels, two warps, as are at work at once.
    constexpr int64_t kHalf = 200, kThird = 100, kRound = 1024, kShort = 64, kLong = 768;
    if (warps >= (fits_lanes(in.N) ? kThird : kHalf)) return;
    if (in.N > 8 && in.N <= 32 && in.T < kLong) return;
    const int64_t round = fits_lanes(in.N) ? 2 * kAtOnce / warps : (kRound + warps - 1) / warps;
    wanted = std::min({round, in.T / kShort, kAtOnce});
  }
  if (wanted < 2) return;
  const int64_t steps = (in.T + wanted - 1) / wanted, every = in.checkpoint_every;
  in.segment_steps = (steps + every - 1) / every * every;
  in.segments = (in.T + in.segment_steps - 1) / in.segment_steps;
}

}  // namespace retain::kernels
