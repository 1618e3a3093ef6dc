// Forward pass of the selective scan (Gu & Dao 2023, arXiv:2312.00752, Algorithm 2):
//   h_t = exp(delta' A) h_{t-1} + delta' u B_t,   y_t = (Σ_n C_t h_t + D u) silu(z).
// Some of a block's warps scan, with the state in registers for the whole sequence. The others work
// beside them: they finish the outputs of the tile before, and prepare the tile after; where blocks
// are so few that a multiprocessor has one, further warps help them. The copies of a tile in shared
// memory are two, and one barrier a tile is all that orders them.

#include <retain/kernels/selective_scan/selective_scan_fwd.cuh>

namespace retain::kernels {
namespace {

/// The steps of the tiles.
struct Tiles {
  int64_t left;
  int longest, steps;

  __device__ __forceinline__ Tiles(int64_t all, int longest)
      : left(all), longest(longest), steps(count()) {}
  __device__ __forceinline__ int count() const {
    return static_cast<int>(min(left, int64_t{longest}));
  }
  __device__ __forceinline__ void next() {
    left -= steps;
    steps = count();
  }
};

/// Where the state goes every so many steps.
template <class Layout>
struct Checkpoints {
  static constexpr int kNever = 1 << 30;
  void* to;  ///< or nullptr
  bool in_bf16;
  bool whole;           ///< the thread's states are all there, in aligned fours
  int every, left = 0;  ///< steps from one to the next, and until the next
  int64_t at, all_states;

  __device__ __forceinline__ Checkpoints(const SelectiveScanCudaFwd& p, const WarpPlace<Layout>& me)
      : to(p.checkpoints),
        in_bf16(to != nullptr && p.in.checkpoint_type == ActivationType::bf16),
        whole(Layout::states >= 4 && p.in.N % 4 == 0 && p.in.N - me.n >= Layout::states &&
              me.channels - me.channel >= Layout::own && reinterpret_cast<uintptr_t>(to) % 16 == 0),
        every(to == nullptr ? kNever : static_cast<int>(p.in.checkpoint_every)),
        at(me.begin / p.in.checkpoint_every * p.in.B * p.in.D * p.in.N + me.state),
        all_states(p.in.B * p.in.D * p.in.N) {}

  /// Whether none comes after the first of so many steps.
  __device__ __forceinline__ bool none_within(int steps) const {
    return (left == 0 ? every : left) >= steps;
  }

  template <typename T>
  __device__ __forceinline__ void store(T* states, const OwnStates<Layout>& h, int64_t N,
                                        const WarpPlace<Layout>& me) const {
    if (!whole) return store_states<Layout>(states, N, me, h);
#pragma unroll
    for (int k = 0; k < Layout::own; ++k) {
#pragma unroll
      for (int j = 0; j + 4 <= Layout::states; j += 4) {
        store_word(states + k * N + j, {h[k][j], h[k][j + 1], h[k][j + 2], h[k][j + 3]});
      }
    }
  }

  /// Before `steps` steps.
  __device__ __forceinline__ void keep(const OwnStates<Layout>& h, int64_t N,
                                       const WarpPlace<Layout>& me, int steps) {
    if (left == 0) {
      if (in_bf16) {
        store(static_cast<__nv_bfloat16*>(to) + at, h, N, me);
      } else if (to != nullptr) {
        store(static_cast<float*>(to) + at, h, N, me);
      }
      at += all_states;
      left = every;
    }
    left -= steps;
  }
};

/// What a thread needs for a step.
template <class Layout>
struct StepInputs {
  float delta[Layout::own], drive[Layout::own], B[Layout::states], C[Layout::states];

  __device__ __forceinline__ void read(const FwdTile<Layout>& tile, const WarpPlace<Layout>& me,
                                       int s) {
    read_step<Layout>(tile.step[s], me, delta, drive);
    read_floats(&tile.B[s][me.n], B);
    read_floats(&tile.C[s][me.n], C);
  }
};

/// Steps that are unrolled, without resets and with them.
template <class Layout>
constexpr int kShort = Layout::own* Layout::states > 8 ? 4 : 8;
template <class Layout>
constexpr int kGroup = std::min(Layout::own* Layout::states > 8 ? 8 : 16, kTileSteps<Layout>);
constexpr int64_t kFullBlocks = 200;  ///< that fill any GPU but the last few multiprocessors

/// A group of steps. Sums are written after the inputs of the next steps are read, which the
/// compiler cannot tell apart.
template <bool kResets, int kSteps, class Layout>
__device__ __forceinline__ void scan_group(FwdTile<Layout>& tile, const WarpPlace<Layout>& me,
                                           const OwnStates<Layout>& A, int first, unsigned resets,
                                           OwnStates<Layout>& h) {
  constexpr int kAhead = kShort<Layout> / 2, kWritten = 4;  // steps read ahead, written at once
  static_assert(kTileSteps<Layout> % kSteps == 0 && kSteps % kWritten == 0);
  StepInputs<Layout> inputs[kAhead];
  float y[kWritten][Layout::own];
#pragma unroll
  for (int s = 0; s < kAhead; ++s) inputs[s].read(tile, me, first + s);
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    auto& x = inputs[s % kAhead];
    const bool reset = kResets && (resets >> s & 1);
#pragma unroll
    for (int k = 0; k < Layout::own; ++k) {
#pragma unroll
      for (int n = 0; n < Layout::states; ++n) {
        h[k][n] = advance(reset ? 0.f : h[k][n], x.delta[k], A[k][n], x.drive[k], x.B[n]);
      }
      y[s % kWritten][k] = own_sum(x.C, h[k]);
    }
    if (s + kAhead < kSteps) x.read(tile, me, first + s + kAhead);
    if (s % kWritten == kWritten - 1) {
#pragma unroll
      for (int i = 0; i < kWritten; ++i) tile.y[first + s + 1 - kWritten + i].put(me, y[i]);
    }
  }
}

/// The steps of a tile; a group without resets goes the quick way, with helpers a whole tile.
template <class Layout>
__device__ __forceinline__ void scan_tile(FwdTile<Layout>& tile, const WarpPlace<Layout>& me,
                                          const OwnStates<Layout>& A, int64_t N, int steps,
                                          Checkpoints<Layout>& checkpoints, OwnStates<Layout>& h) {
  const unsigned resets = tile.resets;
  if (Layout::helped && resets == 0 && checkpoints.none_within(kTileSteps<Layout>)) {
    checkpoints.keep(h, N, me, kTileSteps<Layout>);
    return scan_group<false, kTileSteps<Layout>>(tile, me, A, 0, 0, h);
  }
  const int end = kGroup<Layout> == kTileSteps<Layout> ? kGroup<Layout> : steps;
#pragma unroll 1
  for (int first = 0; first < end; first += kGroup<Layout>) {
    checkpoints.keep(h, N, me, kGroup<Layout>);
    const unsigned here = resets >> first & ((1u << kGroup<Layout>)-1);
    if (here == 0) {
      scan_group<false, kGroup<Layout>>(tile, me, A, first, 0, h);
    } else {
#pragma unroll 1
      for (int part = 0; part < kGroup<Layout>; part += kShort<Layout>) {
        scan_group<true, kShort<Layout>>(tile, me, A, first + part, here >> part, h);
      }
    }
  }
}

/// The warps that scan.
template <class Layout>
__device__ __forceinline__ void scan(const SelectiveScanCudaFwd& p, const WarpPlace<Layout>& me,
                                     FwdTile<Layout> (&shared)[2], Tiles tiles) {
  const auto& in = p.in;
  const int64_t all_states = in.B * in.D * in.N;
  OwnStates<Layout> A, h;
  load_rates(in, me, A);
  const float* entering =
      in.segments > 1 ? in.segment_states + me.segment * all_states : p.initial_state;
  load_states<Layout>(entering != nullptr ? entering + me.state : nullptr, in.N, me, h);
  Checkpoints<Layout> checkpoints(p, me);
  __syncthreads();
#pragma unroll 1
  for (int i = 0; tiles.steps > 0; i ^= 1) {
    scan_tile(shared[i], me, A, in.N, tiles.steps, checkpoints, h);
    tiles.next();
    __syncthreads();
  }
  if (me.segment == in.segments - 1) store_states<Layout>(p.last_state + me.state, in.N, me, h);
}

/// What turns Σ C h into the output, as it lies in memory: y = (sum + D u) silu(z).
template <class Layout, typename T>
struct Finish {
  Four<T> u[kRounds<Layout>], z[kRounds<Layout>];
};

__device__ __forceinline__ float silu(float z) { return __fmul_rn(z, sigmoid(z)); }

/// Step sizes, drives and resets of a tile into shared memory. Steps past the end have a
/// delta' of 0 and so no effect.
template <class Layout, typename T>
__device__ __forceinline__ void put_steps(const SelectiveScanCudaInputs& in,
                                          const WarpPlace<Layout>& me, float4 bias, int steps,
                                          const ChannelInputs<Layout, T>& from,
                                          FwdTile<Layout>& tile) {
  using Inputs = ChannelInputs<Layout, T>;
  const unsigned resets = reset_bits(from.reset != 0);
  if (Inputs::thread() == 0) tile.resets = resets;
  float4 size[Inputs::rounds];
#pragma unroll
  for (int r = 0; r < Inputs::rounds; ++r) size[r] = widen<T>(from.delta[r]) + bias;
  if (in.delta_softplus) {
#pragma unroll
    for (int r = 0; r < Inputs::rounds; ++r) size[r] = softplus4<T>(size[r]);
  }
#pragma unroll
  for (int r = 0; r < Inputs::rounds; ++r) {
    const int step = r * Layout::steps + me.four_step;
    if (step >= steps) size[r] = {};
    put_step<Layout>(tile.step[step], me, size[r], times4(size[r], widen<T>(from.u[r])));
  }
}

/// The outputs of a tile.
template <bool kGated, class Layout, typename T>
__device__ __forceinline__ void finish_tile(const FwdTile<Layout>& tile,
                                            const WarpPlace<Layout>& me, float4 D, int steps,
                                            const Finish<Layout, T>& by, T* y_at,
                                            int64_t stride_t) {
#pragma unroll
  for (int r = 0; r < kRounds<Layout>; ++r) {
    const int step = r * Layout::steps + me.four_step;
    if (step >= steps) continue;
    float4 y = tile.y[step].get(me) + times4(D, widen<T>(by.u[r]));
    if (kGated) {
      const float4 z = widen<T>(by.z[r]);
      y = times4(y, {silu(z.x), silu(z.y), silu(z.z), silu(z.w)});
    }
    store_four(y_at + r * Layout::steps * stride_t, y, me.channels - me.four, me.whole);
  }
}

/// The warps that prepare and finish.
template <typename T, class Layout>
__device__ __forceinline__ void serve(const SelectiveScanCudaFwd& p, const WarpPlace<Layout>& me,
                                      FwdTile<Layout> (&shared)[2], Tiles tiles,
                                      const Alignment& aligned) {
  const auto& in = p.in;
  const float4 D = me.load_weights(in.D_skip), bias = me.load_weights(in.delta_bias);
  const bool in_words =
      aligned.channels && (Layout::helped || (aligned.pairs && in.N == Layout::padded_n));
  ChannelInputs<Layout, T> inputs(in, me, aligned.channels);
  PairInputs<Layout, T> pairs(in, me);
  Tiles fetched = tiles;  // the tile on its way
  const auto fetch = [&] {
    if (in_words && fetched.steps == kTileSteps<Layout>) {
      inputs.fetch(in, me, kTileSteps<Layout>, true);
      if (!Layout::helped) pairs.fetch(in, kTileSteps<Layout>, true, true);
    } else {
      inputs.fetch(in, me, fetched.steps, false);
      if (!Layout::helped) pairs.fetch(in, fetched.steps, false, aligned.pairs);
    }
  };
  Finish<Layout, T> now, next;  // of the tile that is scanned, of the one after it
  const auto put = [&](FwdTile<Layout>& tile) {
    if (!Layout::helped) pairs.put(tile);
    put_steps(in, me, bias, fetched.steps, inputs, tile);
#pragma unroll
    for (int r = 0; r < kRounds<Layout>; ++r) {
      next.u[r] = inputs.u[r];
      next.z[r] = inputs.z[r];
    }
    fetched.next();
    fetch();
  };
  T* y_at = me.template at<T>(p.y, me.begin);
  fetch();
  put(shared[0]);
  __syncthreads();
  // While a tile is scanned: prepares the one after it. Finishes it while that one is scanned.
#pragma unroll 1
  for (int i = 0; tiles.steps > 0; i ^= 1) {
    now = next;
    put(shared[i ^ 1]);
    __syncthreads();
    if (in.z.data != nullptr) {
      finish_tile<true>(shared[i], me, D, tiles.steps, now, y_at, p.y.stride_t);
    } else {
      finish_tile<false>(shared[i], me, D, tiles.steps, now, y_at, p.y.stride_t);
    }
    y_at += kTileSteps<Layout> * p.y.stride_t;
    tiles.next();
  }
}

/// The warps that help: they bring B and C.
template <typename T, class Layout>
__device__ __forceinline__ void help(const SelectiveScanCudaInputs& in, const WarpPlace<Layout>& me,
                                     FwdTile<Layout> (&shared)[2], Tiles tiles, bool aligned) {
  PairInputs<Layout, T> pairs(in, me);
  Tiles fetched = tiles;
  const auto fetch = [&] {
    if (aligned && in.N == Layout::padded_n && fetched.steps == kTileSteps<Layout>) {
      pairs.fetch(in, kTileSteps<Layout>, true, true);
    } else {
      pairs.fetch(in, fetched.steps, false, aligned);
    }
  };
  const auto put = [&](FwdTile<Layout>& tile) {
    pairs.put(tile);
    fetched.next();
    fetch();
    __syncthreads();
  };
  fetch();
  put(shared[0]);
#pragma unroll 1
  for (int i = 0; tiles.steps > 0; i ^= 1) {
    put(shared[i ^ 1]);
    tiles.next();
  }
}

template <typename T, class Layout>
__global__ __launch_bounds__(Layout::block,
                             Layout::helped || Layout::padded_n > 64
                                 ? 1
                                 : 2) void scan_fwd(const __grid_constant__ SelectiveScanCudaFwd p,
                                                    Alignment aligned) {
  extern __shared__ char memory[];
  auto& shared = *reinterpret_cast<FwdTile<Layout>(*)[2]>(memory);
  const WarpPlace<Layout> me(p.in, aligned.channels);
  const Tiles tiles(me.end - me.begin, kTileSteps<Layout>);
  if (threadIdx.x < Layout::threads) {
    scan(p, me, shared, tiles);
  } else if (!Layout::helped || threadIdx.x < Layout::threads + Layout::servers) {
    serve<T>(p, me, shared, tiles, aligned);
  } else {
    help<T>(p.in, me, shared, tiles, aligned.pairs);
  }
}

/// Calls run(Layout{}) with the layout that fits the sizes: blocks as small as all may be at work
/// at once; where they are many, a thread owns four channels, which costs fewer instructions.
template <typename Run>
void dispatch_fwd_layout(const SelectiveScanCudaInputs& in, const Run& run) {
  const auto blocks = [&](auto layout) {
    return in.segments * in.B * in.G * channel_blocks<decltype(layout)>(in);
  };
  const auto either = [&](auto four, auto two) {
    if (blocks(four) >= kFullBlocks && in.D / in.G > two.channels) return run(four);
    return run(two);
  };
  if (in.N <= 4) return run(FwdLayout<1, 4, 1, 4>{});
  if (in.N <= 8) return run(FwdLayout<2, 4, 2, 4>{});
  if (in.N <= 16) {
    const FwdLayout<4, 4, 1, 2> least;      // 16 channels
    const FwdLayout<4, 4, 1, 4> one;        // 32
    const FwdLayout<4, 4, 2, 3> two_small;  // 48
    const FwdLayout<4, 4, 2, 4> two;        // 64
    if (blocks(least) <= kAtOnce / 2) return run(least);
    if (blocks(one) <= kAtOnce) return run(one);
    if (blocks(two_small) <= kAtOnce) return run(two_small);
    if (blocks(two) <= kAtOnce) return run(two);
    return either(FwdLayout<4, 4, 4, 4>{}, two);
  }
  if (in.N <= 32) {
    const FwdLayout<16, 2, 1, 4, 4> least;  // 8 channels
    const FwdLayout<8, 4, 1, 4> one;        // 16
    if (blocks(least) <= kAtOnce / 2) return run(least);
    if (blocks(one) <= kAtOnce) return run(one);
    return either(FwdLayout<8, 4, 4, 4>{}, FwdLayout<8, 4, 2, 4>{});
  }
  if (in.N <= 64) return run(FwdLayout<16, 4, 4, 4>{});
  if (in.N <= 128) return run(FwdLayout<32, 4, 4, 4>{});
  return run(FwdLayout<32, 8, 4, 4>{});
}

}  // namespace

void selective_scan_cuda_fwd(const SelectiveScanCudaFwd& p, CudaStream stream) {
  const auto& in = p.in;
  if (in.B * in.D == 0) return;
  if (in.segments > 1) enter_segments(p, stream);
  dispatch_activations(in.type, [&](auto element) {
    using T = decltype(element);
    dispatch_fwd_layout(in, [&](auto layout) {
      using Layout = decltype(layout);
      const Alignment aligned(in, {in.u, in.delta, in.z, p.y});
      constexpr int kBytes = 2 * sizeof(FwdTile<Layout>);
      allow_shared(scan_fwd<T, Layout>, kBytes);
      scan_fwd<T, Layout><<<scan_grid<Layout>(in), Layout::block, kBytes, stream>>>(p, aligned);
      check_launch("selective_scan: forward");
    });
  });
}

}  // namespace retain::kernels
