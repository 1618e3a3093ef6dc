// The convolution, x_proj and dt_proj of a Mamba block in one pass; the equations are in
// scan_inputs_cuda.h. A block has four groups of four warps, which hand tiles of 16 steps to each
// other through shared memory:
//   two teams convolve, a warp 128 channels: x comes to its tile by asynchronous copies, u takes
//     its place;
//   one multiplies both teams' tiles by x_proj on the tensor cores, a warp by the columns of its
//     128 channels, which it keeps in registers;
//   one adds up these shares, always in the same order, and multiplies dt by dt_proj.
// The groups need registers unlike each other and divide them anew.

#include <retain/kernels/scan_inputs/scan_inputs_cuda.h>
#include <retain/kernels/causal_conv1d/causal_conv1d.cuh>
#include <retain/kernels/common/tensor_cores.cuh>

#include <algorithm>

namespace retain::kernels {
namespace {

constexpr int kSteps = 16;    ///< of a tile
constexpr int kOwn = 128;     ///< channels of a warp
constexpr int kWarps = 4;     ///< of a group
constexpr int kTeams = 2;     ///< groups that convolve
constexpr int kStages = 3;    ///< a warp's tiles: that comes, that is convolved, that is multiplied
constexpr int kOutputs = 48;  ///< of x_proj, at most
constexpr int kRank = 16;     ///< inputs of dt_proj, at most
constexpr int kWord = 8;      ///< elements of 16 bytes
constexpr int kThreads = 32 * kWarps * (kTeams + 2);

/// Steps of a warp's channels; rows lie apart so that eight of them are in different banks.
template <typename T>
using Tile = T[kSteps][kOwn + kWord];
/// What a warp's channels add to a tile's (dt, B, C): matrices of 16 x 8 as lanes hold them.
using Share = float4[kOutputs / 8][32];

template <typename T>
struct alignas(16) ScanInputsShared {
  Tile<T> tile[kTeams][kWarps][kStages];
  Share share[2][kWarps];
  uint64_t convolved[kTeams][kWarps][kStages];   ///< the tile is u
  uint64_t multiplied[kTeams][kWarps][kStages];  ///< and may be overwritten
  uint64_t shared[2], added_up[2];               ///< the same of shares
};

/// Which of kCount places is next, and the parity of its barriers' phase.
template <int kCount>
struct Turn {
  int place = 0;
  unsigned phase = 0;

  __device__ __forceinline__ void go_on() {
    if (++place < kCount) return;
    place = 0;
    phase ^= 1;
  }
};

/// Runs of rows and who works on them: D / kOwn warps on one, a group on as many neighbours as it
/// has warps for, teams and blocks on groups of these in turn.
struct Runs {
  int sharing;      ///< warps that share a run
  unsigned groups;  ///< of runs, which a team works on at once
  unsigned count;

  __host__ __device__ __forceinline__ explicit Runs(const CausalConv1dCudaInputs& in)
      : sharing(static_cast<int>(in.D) / kOwn),
        count(static_cast<unsigned>((in.T + in.run_steps - 1) / in.run_steps * in.B)) {
    const unsigned at_once = kWarps / sharing;
    groups = (count + at_once - 1) / at_once;
  }

  /// A warp's run within a group; from `count` on there is none.
  __device__ __forceinline__ unsigned of(unsigned group, int warp) const {
    return group * (kWarps / sharing) + warp / sharing;
  }

  /// Tiles of a group. The first of its runs is the longest, and no later group has more.
  __device__ __forceinline__ int tiles(const CausalConv1dCudaInputs& in, unsigned group) const {
    if (group >= groups) return 0;
    const int64_t begin = of(group, 0) / static_cast<unsigned>(in.B) * in.run_steps;
    return static_cast<int>((min(in.T - begin, in.run_steps) + kSteps - 1) / kSteps);
  }

  /// Takes a place to a warp's run; without steps where there is none.
  __device__ __forceinline__ void go_to(const CausalConv1dCudaInputs& in, unsigned run,
                                        ConvPlace& place) const {
    const unsigned rows = static_cast<unsigned>(in.B), last = min(run, count - 1);
    place.b = last % rows;
    place.begin = last / rows * in.run_steps;
    place.end = run < count ? min(place.begin + in.run_steps, in.T) : place.begin;
  }
};

/// Calls run(team, group, tile) for all tiles of the block's teams, these in turn.
template <typename Run>
__device__ __forceinline__ void for_each_tile(const CausalConv1dCudaInputs& in, const Runs& runs,
                                              const Run& run) {
  for (unsigned first = blockIdx.x; first < runs.groups; first += gridDim.x * kTeams) {
    int tiles[kTeams];
#pragma unroll
    for (int team = 0; team < kTeams; ++team) {
      tiles[team] = runs.tiles(in, first + gridDim.x * team);
    }
#pragma unroll 1
    for (int i = 0; i < tiles[0]; ++i) {
#pragma unroll
      for (int team = 0; team < kTeams; ++team) {
        if (i < tiles[team]) run(team, first + gridDim.x * team, i);
      }
    }
  }
}

/// Tiles of x on their way to a warp.
template <typename T>
struct Arrivals {
  const T* from;  ///< the lane's next
  int64_t left;   ///< steps
  Turn<kStages> turn{0, 1};

  __device__ __forceinline__ void go_to(const CausalConv1dCudaInputs& in, const ConvPlace& place) {
    const int lane = threadIdx.x % 32;
    from = place.at<T>(in.x, place.begin + lane / 16) - 4 * lane + lane % 16 * kWord;
    left = place.end - place.begin;
  }

  /// Starts to bring the next tile, zeros where the run has ended.
  __device__ __forceinline__ void fetch(const CausalConv1dCudaInputs& in, Tile<T> (&tiles)[kStages],
                                        uint64_t (&free)[kStages]) {
    const int lane = threadIdx.x % 32;
    await(&free[turn.place], turn.phase);
    T* to = &tiles[turn.place][lane / 16][lane % 16 * kWord];
    constexpr int kRow = kOwn + kWord;
    if (left >= kSteps) {
#pragma unroll
      for (int i = 0; i < kSteps; i += 2) copy_word(to + i * kRow, from + i * in.x.stride_t, true);
    } else {
#pragma unroll 1
      for (int i = 0; i < kSteps; i += 2) {
        const bool there = i + lane / 16 < left;
        copy_word(to + i * kRow, there ? from + i * in.x.stride_t : in.x.data, there);
      }
    }
    from += kSteps * in.x.stride_t;
    left -= kSteps;
    turn.go_on();
  }
};

/// Makes a tile of x one of u. kCareful: fewer than kSteps, or resets among them.
template <typename T, int K, bool kCareful>
__device__ __forceinline__ void convolve(Tile<T>& tile, unsigned resets, int steps,
                                         int64_t stride_t, ConvWindow<K, kSteps>& window, T* u) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    if (kCareful && (resets >> i & 1)) window.forget_before(i);
    auto& four = *reinterpret_cast<Four<T>*>(&tile[i][4 * lane]);
    unpack(widen<T>(four), window.x[K - 1 + i]);
    four = narrow<T>(window.template outputs<true>(i));
    if (!kCareful || i < steps) __stcg(reinterpret_cast<Four<T>*>(u + i * stride_t), four);
  }
}

/// What a warp of a team does.
template <typename T, int K>
__device__ __forceinline__ void convolve_runs(const ScanInputsCuda& p, ScanInputsShared<T>& memory,
                                              int team, int warp) {
  const auto& in = p.conv.in;
  const int lane = threadIdx.x % 32;
  const Runs runs(in);
  ConvPlace place(32 * (warp % runs.sharing) + lane);
  ConvWindow<K, kSteps> window;
  window.load_weights(in, place);
  auto& tiles = memory.tile[team][warp];
  Arrivals<T> arrivals;
  Turn<kStages> turn;
  for (unsigned group = blockIdx.x + gridDim.x * team; group < runs.groups;
       group += gridDim.x * kTeams) {
    runs.go_to(in, runs.of(group, warp), place);
    warm_up<T, K>(in, place, window.x);
    const auto reset_at = [&](int64_t t) {
      return lane < kSteps && t + lane < place.end && place.reset(in, t + lane);
    };
    arrivals.go_to(in, place);
    const auto fetch = [&] { arrivals.fetch(in, tiles, memory.multiplied[team][warp]); };
    fetch();
    close_copies();
    bool reset = reset_at(place.begin);
    T* u = place.at<T>(p.conv.y, place.begin);
    int64_t t = place.begin;
#pragma unroll 1
    for (int i = runs.tiles(in, group); i > 0; --i) {
      if (i > 1) fetch();
      close_copies();
      wait_for_copies_but<1>();
      __syncwarp();  // for all lanes' copies
      const unsigned resets = __ballot_sync(~0u, reset);
      reset = reset_at(t + kSteps);
      const int steps = static_cast<int>(min(place.end - t, int64_t{kSteps}));
      auto& tile = tiles[turn.place];
      if (resets == 0 && steps == kSteps) {
        convolve<T, K, false>(tile, 0, kSteps, p.conv.y.stride_t, window, u);
      } else {
        convolve<T, K, true>(tile, resets, steps, p.conv.y.stride_t, window, u);
      }
      window.go_on();
      arrive(&memory.convolved[team][warp][turn.place]);
      turn.go_on();
      u += kSteps * p.conv.y.stride_t;
      t += kSteps;
    }
    if (place.begin < place.end && place.end == in.T) store_last_state<T>(p.conv, place);
  }
}

/// What a warp does that multiplies by x_proj.
template <typename T>
__device__ __forceinline__ void project(const ScanInputsCuda& p, ScanInputsShared<T>& memory,
                                        int warp) {
  const int lane = threadIdx.x % 32;
  const Runs runs(p.conv.in);
  const int D = static_cast<int>(p.conv.in.D), first = kOwn * (warp % runs.sharing);
  unsigned weight[kOwn / 16][kOutputs / 8][2];  // of 16 channels, 8 outputs, and half of the former
#pragma unroll
  for (int i = 0; i < kOwn / 16 * kOutputs / 8 * 2; ++i) {
    const int out = i / 2 % (kOutputs / 8) * 8 + lane / 4;
    const int channel = first + i / (kOutputs / 4) * 16 + i % 2 * 8 + lane % 4 * 2;
    const T* from = static_cast<const T*>(p.x_proj) + out * D + channel;
    weight[i / (kOutputs / 4)][i / 2 % (kOutputs / 8)][i % 2] =
        out < p.P ? *reinterpret_cast<const unsigned*>(from) : 0;
  }
  Turn<kStages> turns[kTeams];
  Turn<2> to{0, 1};
  for_each_tile(p.conv.in, runs, [&](int team, unsigned, int) {
    auto& turn = turns[team];
    await(&memory.convolved[team][warp][turn.place], turn.phase);
    const auto& tile = memory.tile[team][warp][turn.place];
    const unsigned from = shared_address(&tile[lane % 16][lane / 16 * kWord]);
    const auto load = [&](int k, unsigned(&u)[4]) { load_matrices(from + 16 * k * sizeof(T), u); };
    unsigned u[3][4];  // two are on their way
    load(0, u[0]);
    load(1, u[1]);
    float sum[kOutputs / 8][4] = {};
#pragma unroll
    for (int k = 0; k < kOwn / 16; ++k) {
      if (k + 2 < kOwn / 16) load(k + 2, u[(k + 2) % 3]);
#pragma unroll
      for (int n = 0; n < kOutputs / 8; ++n) {
        multiply<T>(u[k % 3], weight[k][n][0], weight[k][n][1], sum[n]);
      }
    }
    arrive(&memory.multiplied[team][warp][turn.place]);
    turn.go_on();
    await(&memory.added_up[to.place], to.phase);
#pragma unroll
    for (int n = 0; n < kOutputs / 8; ++n) {
      memory.share[to.place][warp][n][lane] = {sum[n][0], sum[n][1], sum[n][2], sum[n][3]};
    }
    arrive(&memory.shared[to.place]);
    to.go_on();
  });
}

/// Where a warp that finishes tiles writes: rows lane / 4 and lane / 4 + 8 of a tile.
template <typename T>
struct Output {
  T *dt_B_C, *delta;
  int left;  ///< steps from row lane / 4 on

  __device__ __forceinline__ void go_to(const ScanInputsCuda& p, const ConvPlace& place,
                                        int64_t channel) {
    const int lane = threadIdx.x % 32;
    const int64_t t = place.begin + lane / 4;
    dt_B_C = static_cast<T*>(p.dt_B_C) + (t * p.conv.in.B + place.b) * p.P + lane % 4 * 2;
    delta = place.at<T>(p.delta, t) + channel;
    left = static_cast<int>(place.end - t);
  }

  __device__ __forceinline__ void go_on(const ScanInputsCuda& p) {
    dt_B_C += kSteps * p.conv.in.B * p.P;
    delta += kSteps * p.delta.stride_t;
    left -= kSteps;
  }
};

/// What a warp does that adds up, and multiplies by dt_proj.
template <typename T>
__device__ __forceinline__ void finish(const ScanInputsCuda& p, ScanInputsShared<T>& memory,
                                       int warp) {
  const auto& in = p.conv.in;
  const int lane = threadIdx.x % 32;
  const Runs runs(in);
  const int own = warp % runs.sharing, first = kOwn * own;
  // Column 2 q + e of matrix 4 g + j is channel 32 g + 8 q + 2 j + e: a lane has eight neighbours.
  unsigned weight[kOwn / 8][2];
#pragma unroll
  for (int i = 0; i < kOwn / 8 * 2; ++i) {
    const int channel = first + i / 8 * 32 + lane / 8 * 8 + i / 2 % 4 * 2 + lane / 4 % 2;
    const int k = i % 2 * 8 + lane % 4 * 2;
    const T* from = static_cast<const T*>(p.dt_proj) + channel * p.R + k;
    weight[i / 2][i % 2] = k < p.R ? *reinterpret_cast<const unsigned*>(from) : 0;
  }
  unsigned stores = 0;  // matrices of (dt, B, C) that are this warp's to store
  for (int n = own; 8 * n < p.P; n += runs.sharing) stores |= 1u << n;
  const int64_t out_step = in.B * p.P;
  ConvPlace place(0);
  Output<T> outputs[kTeams];
  Turn<2> turn;
  for_each_tile(in, runs, [&](int team, unsigned group, int i) {
    auto& out = outputs[team];
    if (i == 0) {
      runs.go_to(in, runs.of(group, warp), place);
      out.go_to(p, place, first + lane % 4 * 8);
    }
    await(&memory.shared[turn.place], turn.phase);
    const Share* shares = memory.share[turn.place] + (warp - own);
    unsigned sums[kOutputs / 8][2];
#pragma unroll
    for (int n = 0; n < kOutputs / 8; ++n) {
      if (8 * n >= kRank && !(stores >> n & 1)) continue;
      float4 sum = shares[0][n][lane];
#pragma unroll
      for (int other = 1; other < kWarps; ++other) {
        if (other >= runs.sharing) continue;
        const float4 share = shares[other][n][lane];
        sum = {sum.x + share.x, sum.y + share.y, sum.z + share.z, sum.w + share.w};
      }
      sums[n][0] = pair_of<T>(sum.x, sum.y);
      sums[n][1] = pair_of<T>(sum.z, sum.w);
    }
    arrive(&memory.added_up[turn.place]);
    turn.go_on();
#pragma unroll
    for (int n = 0; n < kOutputs / 8; ++n) {
      if (!(stores >> n & 1)) continue;
      T* to = out.dt_B_C + 8 * n;
      if (8 * n + lane % 4 * 2 >= p.P) continue;
      if (out.left > 0) *reinterpret_cast<unsigned*>(to) = sums[n][0];
      if (out.left > 8) *reinterpret_cast<unsigned*>(to + 8 * out_step) = sums[n][1];
    }
    // With dt_rank 8 the next eight outputs are B's, which must not meet even zeros.
    const bool whole = p.R > 8;
    const unsigned dt[4] = {sums[0][0], sums[0][1], whole ? sums[1][0] : 0, whole ? sums[1][1] : 0};
#pragma unroll
    for (int g = 0; g < kOwn / 32; ++g) {
      float d[4][4] = {};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        multiply<T>(dt, weight[4 * g + j][0], weight[4 * g + j][1], d[j]);
      }
      const auto eight = [&](int at) {
        return uint4{pair_of<T>(d[0][at], d[0][at + 1]), pair_of<T>(d[1][at], d[1][at + 1]),
                     pair_of<T>(d[2][at], d[2][at + 1]), pair_of<T>(d[3][at], d[3][at + 1])};
      };
      T* to = out.delta + 32 * g;
      if (out.left > 0) __stcg(reinterpret_cast<uint4*>(to), eight(0));
      if (out.left > 8) __stcg(reinterpret_cast<uint4*>(to + 8 * p.delta.stride_t), eight(2));
    }
    out.go_on(p);
  });
}

/// Gives back all registers of a thread but so many, or takes as many: by groups of four warps.
template <int kCount>
__device__ __forceinline__ void keep_registers() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
#endif
}
template <int kCount>
__device__ __forceinline__ void take_registers() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
#endif
}

/// Empty below compute capability 9.0.
template <typename T, int K>
__global__ __launch_bounds__(kThreads,
                             1) void scan_inputs(const __grid_constant__ ScanInputsCuda p) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ char bytes[];
  auto& memory = *reinterpret_cast<ScanInputsShared<T>*>(bytes);
  const int group = threadIdx.x / (32 * kWarps), warp = threadIdx.x / 32 % kWarps;
  if (threadIdx.x < kTeams * kWarps * kStages) {
    init_barrier(&memory.convolved[0][0][0] + threadIdx.x, 32);
    init_barrier(&memory.multiplied[0][0][0] + threadIdx.x, 32);
  }
  if (threadIdx.x < 2) {
    init_barrier(&memory.shared[threadIdx.x], 32 * kWarps);
    init_barrier(&memory.added_up[threadIdx.x], 32 * kWarps);
  }
  __syncthreads();
  if (group < kTeams) {
    keep_registers<104>();
    convolve_runs<T, K>(p, memory, group, warp);
  } else if (group == kTeams) {
    take_registers<184>();
    project<T>(p, memory, warp);
  } else {
    keep_registers<120>();
    finish<T>(p, memory, warp);
  }
#endif
}

constexpr unsigned kBlocks = 132;  ///< that a device holds

}  // namespace

bool scan_inputs_has_kernel(const ScanInputsCuda& p) {
  const auto& in = p.conv.in;
  const auto in_words = [&](const Activations& x) { return lies_in_words(x, in.type, kWord); };
  return in.type != ActivationType::fp32 && in.silu && conv_window_in_registers(in.K) &&
         in.T * in.B > 0 && in.T * in.B <= std::numeric_limits<int>::max() &&
         (in.D == kOwn || in.D == 2 * kOwn || in.D == 4 * kOwn) && (p.R == 8 || p.R == kRank) &&
         p.P > p.R && p.P <= kOutputs && p.P % 2 == 0 && in_words(in.x) && in_words(p.conv.y) &&
         in_words(p.delta) && in_fours(in, {}, {in.bias, in.initial_state, p.conv.last_state}) &&
         lies_on(p.x_proj, 4) && lies_on(p.dt_proj, 4) && lies_on(p.dt_B_C, 4) &&
         is_for_hopper(scan_inputs<__half, 4>) &&
         sizeof(ScanInputsShared<__half>) <= static_cast<size_t>(most_shared_memory());
}

void cut_into_runs(ScanInputsCuda& p) {
  // Rounds of runs on the whole device, each of them a run's tiles, and about one to begin with.
  auto& in = p.conv.in;
  const int64_t at_once = int64_t{kBlocks} * kTeams * kWarps * kOwn / in.D;
  const int64_t tiles = (in.T + kSteps - 1) / kSteps;
  int64_t least = std::numeric_limits<int64_t>::max();
  for (int64_t rounds = 1; rounds <= 8; ++rounds) {
    const int64_t runs = std::clamp<int64_t>(rounds * at_once / in.B, 1, tiles);
    const int64_t length = (tiles + runs - 1) / runs, made = (tiles + length - 1) / length;
    const int64_t cost = (made * in.B + at_once - 1) / at_once * (length + 1);
    if (cost >= least) continue;
    least = cost;
    in.run_steps = length * kSteps;
  }
}

void scan_inputs_cuda(const ScanInputsCuda& p, CudaStream stream) {
  dispatch_conv(p.conv.in, [&](auto element, auto taps, auto silu) {
    using T = decltype(element);
    if constexpr (sizeof(T) == 2 && silu()) {
      constexpr int kBytes = sizeof(ScanInputsShared<T>);
      const auto kernel = scan_inputs<T, taps()>;
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
      kernel<<<std::min(kBlocks, Runs(p.conv.in).groups), kThreads, kBytes, stream>>>(p);
    }
  });
  check_launch("scan_inputs");
}

}  // namespace retain::kernels
