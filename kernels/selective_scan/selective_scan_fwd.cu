// Forward pass of the selective scan (Gu & Dao 2023, arXiv:2312.00752, Algorithm 2):
//   h_t = exp(delta' A) h_{t-1} + delta' u B_t,   y_t = (Σ_n C_t h_t + D u) silu(z).
// Layout: time-major, channels contiguous, so that neighbouring threads own neighbouring channels
// and all channels of a row share one copy of B and C in shared memory. The state lives in
// registers for the whole sequence. While a tile is scanned, the next one is on its way from
// memory.

#include <retain/kernels/selective_scan/selective_scan.cuh>

namespace retain::kernels {
namespace {

template <class Layout>
struct alignas(16) FwdShared {
  static constexpr int row = Layout::channels + 8;  ///< padded against bank conflicts
  float2 step[kTile][Layout::channels];             ///< delta', delta' u
  float B[Layout::pairs], C[Layout::pairs];
  float y[kTile][row];
};

/// Walks over the inputs a tile at a time, from memory to registers.
template <class Layout, typename T, bool kOutputs>
struct FwdWalk {
  static constexpr int kFours = Layout::fours_a_thread;
  const T *u_from, *delta_from, *z_from;
  MatrixWalk<Layout, T> B, C;
  Four<T> u[kFours], delta[kFours], z[kFours];
  bool reset;

  __device__ __forceinline__ FwdWalk(const SelectiveScanCudaInputs& in, const BlockPlace& place,
                                     const FourPlace<Layout>& mine)
      : u_from(mine.template at<T>(in.u, place, place.begin)),
        delta_from(mine.template at<T>(in.delta, place, place.begin)),
        z_from(mine.template at<T>(in.z, place, place.begin)),
        B(in.B_matrix, in.B_stride_g, place, place.begin),
        C(in.C_matrix, in.C_stride_g, place, place.begin) {}

  /// The next tile, of `steps` steps from `tile` on.
  __device__ __forceinline__ void fetch(const SelectiveScanCudaInputs& in, const BlockPlace& place,
                                        const FourPlace<Layout>& mine, int64_t tile, int steps) {
    const auto load = [&](Four<T>(&to)[kFours], const T*& from, const Activations& x) {
#pragma unroll
      for (int k = 0; k < kFours; ++k) {
        const bool there = mine.inside(k, steps);
        to[k] = load_four(from + k * mine.stride * x.stride_t, there ? mine.count : 0,
                          there && mine.whole);
      }
      from += kTile * x.stride_t;
    };
    load(u, u_from, in.u);
    load(delta, delta_from, in.delta);
    if (kOutputs && in.z.data != nullptr) load(z, z_from, in.z);
    B.fetch(in.B_matrix, in.N, steps);
    B.advance(in.B_matrix, 1);
    if (kOutputs) {
      C.fetch(in.C_matrix, in.N, steps);
      C.advance(in.C_matrix, 1);
    }
    reset = load_reset(in, place, tile);
  }
};

/// What a thread needs for its four channels.
struct FourWeights {
  float D[4], bias[4];
};

/// What turns Σ C h into the output: y = (sum + skip) gate.
struct Finish {
  float skip[4], gate[4];
};

/// delta' and delta' u of a tile into shared memory; what finishes the outputs into registers.
template <class Layout, typename T, bool kOutputs>
__device__ __forceinline__ void put_tile(const SelectiveScanCudaInputs& in,
                                         const FourPlace<Layout>& mine, const FourWeights& weights,
                                         const FwdWalk<Layout, T, kOutputs>& tile,
                                         FwdShared<Layout>& shared, Finish* finish) {
#pragma unroll
  for (int k = 0; k < Layout::fours_a_thread; ++k) {
    if (!mine.inside(k, kTile)) continue;
    const float4 u4 = widen<T>(tile.u[k]);
    const float u[4] = {u4.x, u4.y, u4.z, u4.w};
    float size[4];
    step_sizes(widen<T>(tile.delta[k]), weights.bias, in.delta_softplus, size);
    auto* to = reinterpret_cast<float4*>(&shared.step[mine.step + k * mine.stride][mine.channel]);
    to[0] = {size[0], __fmul_rn(size[0], u[0]), size[1], __fmul_rn(size[1], u[1])};
    to[1] = {size[2], __fmul_rn(size[2], u[2]), size[3], __fmul_rn(size[3], u[3])};
    if (!kOutputs) continue;
#pragma unroll
    for (int i = 0; i < 4; ++i) finish[k].skip[i] = __fmul_rn(weights.D[i], u[i]);
    if (in.z.data == nullptr) continue;
    const float4 z4 = widen<T>(tile.z[k]);
    const float z[4] = {z4.x, z4.y, z4.z, z4.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) finish[k].gate[i] = __fmul_rn(z[i], sigmoid(z[i]));
  }
  tile.B.put(shared.B);
  if (kOutputs) tile.C.put(shared.C);
}

/// A group of steps from step `first` of the tile on; y ← Σ C h. kCareful: steps past the end, or
/// resets among them.
template <class Layout, bool kOutputs, bool kCareful>
__device__ __forceinline__ void scan_group(FwdShared<Layout>& shared, const ThreadPlace<Layout>& me,
                                           const float (&A)[Layout::states], int first, int steps,
                                           unsigned resets, float (&h)[Layout::states],
                                           float& delta_sum) {
  float sum[Layout::group] = {};
#pragma unroll
  for (int j = 0; j < Layout::group; ++j) {
    const int s = first + j;
    const bool reset = kCareful && (resets >> s & 1), past = kCareful && s >= steps;
    const float2 step = shared.step[s][me.channel];
    float B[Layout::states], C[Layout::states];
    read_states(shared.B + s * Layout::padded_n + me.first_n(), B);
#pragma unroll
    for (int n = 0; n < Layout::states; ++n) {
      const float next = advance(reset ? 0.f : h[n], step.x, A[n], step.y, B[n]);
      h[n] = past ? h[n] : next;
    }
    if (kOutputs) {
      read_states(shared.C + s * Layout::padded_n + me.first_n(), C);
      sum[j] = own_sum(C, h);
    } else {
      delta_sum += past ? 0.f : step.x;
    }
  }
  if (!kOutputs) return;
  const float total = sum_over_lanes<Layout>(sum);
  if (me.lane < Layout::group) shared.y[first + me.lane][me.channel] = total;
}

/// The steps of a tile. A tile without resets, and a group of steps without, go the quick way.
template <class Layout, bool kOutputs>
__device__ __forceinline__ void scan_tile(FwdShared<Layout>& shared, const ThreadPlace<Layout>& me,
                                          const float (&A)[Layout::states], int steps,
                                          unsigned resets, float (&h)[Layout::states],
                                          float& delta_sum) {
  if (resets == 0 && steps == kTile) {
#pragma unroll 2
    for (int first = 0; first < kTile; first += Layout::group) {
      scan_group<Layout, kOutputs, false>(shared, me, A, first, steps, 0, h, delta_sum);
    }
    return;
  }
#pragma unroll 1
  for (int first = 0; first < steps; first += Layout::group) {
    const unsigned here = resets >> first & ((1u << Layout::group) - 1);
    if (here == 0 && first + Layout::group <= steps) {
      scan_group<Layout, kOutputs, false>(shared, me, A, first, steps, 0, h, delta_sum);
    } else {
      scan_group<Layout, kOutputs, true>(shared, me, A, first, steps, resets, h, delta_sum);
    }
  }
}

template <typename T, class Layout>
__device__ __forceinline__ void store_tile(const Activations& y, const FourPlace<Layout>& mine,
                                           const FwdShared<Layout>& shared, const Finish* finish,
                                           T*& to, int steps) {
#pragma unroll
  for (int k = 0; k < Layout::fours_a_thread; ++k) {
    if (!mine.inside(k, steps)) continue;
    const float4 sum =
        *reinterpret_cast<const float4*>(&shared.y[mine.step + k * mine.stride][mine.channel]);
    const Finish& f = finish[k];
    store_four(to + k * mine.stride * y.stride_t,
               {__fmul_rn(sum.x + f.skip[0], f.gate[0]), __fmul_rn(sum.y + f.skip[1], f.gate[1]),
                __fmul_rn(sum.z + f.skip[2], f.gate[2]), __fmul_rn(sum.w + f.skip[3], f.gate[3])},
               mine.count, mine.whole);
  }
  to += kTile * y.stride_t;
}

/// kOutputs: the scan itself. Otherwise what a segment does to the state that enters it: the state
/// that it makes of zero, and its decay.
template <typename T, class Layout, bool kOutputs>
__global__ __launch_bounds__(Layout::threads, Layout::blocks_an_sm) void scan_fwd(
    const __grid_constant__ SelectiveScanCudaFwd p, bool aligned) {
  __shared__ FwdShared<Layout> shared;
  const auto& in = p.in;
  const BlockPlace place = block_place<Layout>(in);
  const ThreadPlace<Layout> me(in, place);
  float A[Layout::states], h[Layout::states];
  load_states<Layout>(in.A + (place.first_channel + me.channel) * in.N + me.first_n(), in.N, me, A);
#pragma unroll
  for (int n = 0; n < Layout::states; ++n) A[n] *= kLog2e;
  const int64_t all_states = in.B * in.D * in.N;
  const float* entering =
      in.segments > 1 ? in.segment_states + place.segment * all_states : p.initial_state;
  load_states<Layout>(kOutputs && entering != nullptr ? entering + me.state : nullptr, in.N, me, h);

  const FourPlace<Layout> mine(place, aligned);
  FourWeights weights;
  mine.load(in.D_skip, place, weights.D);
  mine.load(in.delta_bias, place, weights.bias);
  FwdWalk<Layout, T, kOutputs> next(in, place, mine);
  T* y_to = mine.template at<T>(p.y, place, place.begin);
  Finish finish[Layout::fours_a_thread];
#pragma unroll
  for (int k = 0; k < Layout::fours_a_thread; ++k) finish[k] = {{}, {1.f, 1.f, 1.f, 1.f}};
  float* checkpoint = p.checkpoints;
  if (checkpoint != nullptr) {
    checkpoint += place.begin / in.checkpoint_every * all_states + me.state;
  }
  int until_checkpoint = 0;
  float delta_sum = 0;
  bool any_reset = false;
  int steps = static_cast<int>(min(place.end - place.begin, int64_t{kTile}));
  if (steps > 0) next.fetch(in, place, mine, place.begin, steps);
  for (int64_t tile = place.begin; tile < place.end; tile += kTile) {
    put_tile(in, mine, weights, next, shared, finish);
    const unsigned resets = reset_bits(next.reset);
    if (kOutputs && checkpoint != nullptr) {
      if (until_checkpoint == 0) {
        store_states<Layout>(checkpoint, in.N, me, h);
        checkpoint += all_states;
        until_checkpoint = static_cast<int>(in.checkpoint_every);
      }
      until_checkpoint -= kTile;
    }
    __syncthreads();
    const int steps_here = steps;
    steps = static_cast<int>(min(place.end - tile - kTile, int64_t{kTile}));
    if (steps > 0) next.fetch(in, place, mine, tile + kTile, steps);
    scan_tile<Layout, kOutputs>(shared, me, A, steps_here, resets, h, delta_sum);
    any_reset = any_reset || resets != 0;
    __syncthreads();
    if (kOutputs) store_tile(p.y, mine, shared, finish, y_to, steps_here);
  }

  if (kOutputs) {
    if (place.segment == in.segments - 1) {
      store_states<Layout>(p.last_state + me.state, in.N, me, h);
    }
    return;
  }
  const int64_t at = place.segment * all_states + me.state;
  store_states<Layout>(in.segment_states + at, in.N, me, h);
#pragma unroll
  for (int n = 0; n < Layout::states; ++n) h[n] = any_reset ? -1.f : exp2_fast(delta_sum * A[n]);
  store_states<Layout>(in.segment_decays + at, in.N, me, h);
}

__global__ void carry(const SelectiveScanCudaInputs in, const float* first, bool reverse) {
  const int64_t all_states = in.B * in.D * in.N;
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= all_states) return;
  float h = first != nullptr ? first[i] : 0.f;
#pragma unroll 8
  for (int64_t s = 0; s < in.segments; ++s) {
    const int64_t at = (reverse ? in.segments - 1 - s : s) * all_states + i;
    const float change = in.segment_states[at], decay = in.segment_decays[at];
    in.segment_states[at] = h;
    h = decay < 0 || h == 0 ? change : fmaf(decay, h, change);
  }
}

}  // namespace

void carry_segments(const SelectiveScanCudaInputs& in, const float* first, bool reverse,
                    CudaStream stream) {
  const int64_t all_states = in.B * in.D * in.N;
  carry<<<static_cast<unsigned>((all_states + 63) / 64), 64, 0, stream>>>(in, first, reverse);
  check_launch("selective_scan: carry");
}

void cut_into_segments(SelectiveScanCudaInputs& in, bool backward) {
  constexpr int64_t kFull = 262144;  // states in flight that hide all latencies
  constexpr int64_t kShortest = 64;
  const int64_t states = in.B * in.D * in.N;
  in.segments = 1;
  in.segment_steps = 0;
  // What segments cost, a pass more over the inputs, must be less than what they gain.
  if (states == 0 || states >= (backward ? 150000 : 100000) || in.T < 2 * kShortest) return;
  const int64_t wanted = std::min((kFull + states - 1) / states, in.T / kShortest);
  const int64_t steps = (in.T + wanted - 1) / wanted, every = in.checkpoint_every;
  in.segment_steps = (steps + every - 1) / every * every;
  in.segments = (in.T + in.segment_steps - 1) / in.segment_steps;
}

void selective_scan_cuda_fwd(const SelectiveScanCudaFwd& p, CudaStream stream) {
  const auto& in = p.in;
  if (in.B * in.D == 0) return;
  dispatch_activations(in.type, [&](auto element) {
    using T = decltype(element);
    dispatch_layout<256>(in.N, [&](auto layout) {
      using Layout = decltype(layout);
      const bool aligned = in_fours(in, {in.u, in.delta, in.z, p.y});
      const dim3 grid = scan_grid<Layout>(in);
      if (in.segments > 1) {
        scan_fwd<T, Layout, false><<<grid, Layout::threads, 0, stream>>>(p, aligned);
        check_launch("selective_scan: segments");
        carry_segments(in, p.initial_state, false, stream);
      }
      scan_fwd<T, Layout, true><<<grid, Layout::threads, 0, stream>>>(p, aligned);
      check_launch("selective_scan: forward");
    });
  });
}

}  // namespace retain::kernels
