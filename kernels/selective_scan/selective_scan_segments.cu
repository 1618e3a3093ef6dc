// Segments of time: what each does to the state, or to the gradient, that enters it, from zero and
// for its last alone; then these are carried over the segments. A step's share needs no recurrence:
// it is the product of the decays between the step and the segment's border. A lane owns a channel
// with 16 indices, and four warps share the steps between the border and the nearest reset, beyond
// which nothing is felt.

#include <retain/kernels/selective_scan/selective_scan_lanes.cuh>

namespace retain::kernels {
namespace {

constexpr int kWalkers = 4;                ///< most warps that share a segment's walk, in parts
static_assert(kLaneStates <= kLaneSteps);  // a change takes the place of a tile's values

/// What a walker has for a tile; last, what its part does.
template <typename T>
struct alignas(16) Walker {
  float size[kLaneSteps][kLaneChannels];   ///< delta'; then their sum
  float value[kLaneSteps][kLaneChannels];  ///< u delta', or dy; then the change by index
  float pairs[kLaneSteps][kLaneStates];    ///< B, or C
  ChannelRows<T> delta, z, values;
  IndexRows<T> indices;
  Rows rows[kArrays];
  int found;  ///< distance of the nearest reset among its steps, or -1
};

/// The steps of a segment that its border feels, none beyond the nearest reset.
struct Reach {
  int steps;
  bool reset;
};

/// Walkers look in equal parts of the segment. Distances count steps from the border.
template <bool kGradients, typename T>
__device__ __forceinline__ Reach reach_of(const SelectiveScanCudaInputs& in,
                                          const WarpPlace<LaneLayout>& me, Walker<T>* walkers) {
  const int length = static_cast<int>(me.end - me.begin);
  if (in.reset.data == nullptr) return {length, false};
  const bool* from = in.reset.data + me.b * in.reset.stride_b;
  const auto reset_at = [&](int distance) {
    const int64_t t = kGradients ? me.begin + distance : me.end - 1 - distance;
    return distance < length && from[t * in.reset.stride_t];
  };
  constexpr int kLooks = 4;  // of a lane, in flight together
  const int part = (length + blockDim.y - 1) / blockDim.y;
  const int begin = threadIdx.y * part, end = min(begin + part, length);
  int found = -1;
  for (int distance = begin; distance < end && found < 0; distance += 32 * kLooks) {
    bool resets[kLooks];
#pragma unroll
    for (int i = 0; i < kLooks; ++i) resets[i] = reset_at(distance + 32 * i + threadIdx.x);
#pragma unroll
    for (int i = 0; i < kLooks; ++i) {
      const unsigned bits = reset_bits(resets[i]);
      if (bits != 0 && found < 0) found = distance + 32 * i + __ffs(bits) - 1;
    }
  }
  if (threadIdx.x == 0) walkers[threadIdx.y].found = found;
  __syncthreads();
  for (unsigned i = 0; i < blockDim.y; ++i) {
    const int nearest = walkers[i].found;
    if (nearest >= 0) return {kGradients ? nearest : nearest + 1, true};
  }
  return {length, false};
}

/// What a tile's steps bring, from what came of memory. Adds 0 to `odd` if all is finite.
template <bool kGradients, typename T>
__device__ __forceinline__ void prepare_tile(Walker<T>& own, const PairWeights& w, int steps,
                                             float& odd) {
  const bool gated = kGradients && w.gated;
  widen_indices(own.indices, &own.pairs[0][0], odd);
#pragma unroll 1
  for (int first = 0; first < kLaneSteps; first += 8) {
    // All is read before anything is written: the compiler cannot tell shared memory apart.
    float2 size[4], value[4], z[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int s = pair_step(first + 2 * i);
      size[i] = widen_pair(own.delta[s]);
      value[i] = widen_pair(own.values[s]);
      if (kGradients) z[i] = widen_pair(own.z[s]);
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
      if (!w.softplus && (size[i].x < 0.f || size[i].y < 0.f)) odd = 1;  // decays may overflow
      pair_at(own.size[s]) = size[i];
      pair_at(own.value[s]) = value[i];
    }
  }
}

/// Adds the shares of a tile's steps, from the segment's border on; `total` is Σ delta' of the
/// steps between the border and them. kCareful: products of 0 are 0.
template <bool kGradients, bool kCareful, int kN, typename T>
__device__ __forceinline__ void add_shares(const Walker<T>& own, const LaneStates& A, float& total,
                                           LaneStates& change) {
  constexpr bool kGuarded = kCareful && kGradients;  // dy of 0, which no output asked for
#pragma unroll(kCareful ? 1 : 4)
  for (int i = 0; i < kLaneSteps; ++i) {
    const int s = kGradients ? i : kLaneSteps - 1 - i;
    const float size = own.size[s][threadIdx.x], value = own.value[s][threadIdx.x];
    const float until = kGradients ? total + size : total;
    float pairs[kN];
    read_floats<kN>(own.pairs[s], pairs);
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      const float share = times<kGuarded>(value, pairs[n]);
      change[n] = plus_times<kCareful>(share, exp2_fast(until * A[n]), change[n]);
    }
    total += size;
  }
}

/// Joins the walkers' parts in the first, which is at the border.
template <typename T>
__device__ __forceinline__ void join_parts(Walker<T>* walkers, const LaneStates& A, float& total,
                                           LaneStates& change) {
  const auto lane = threadIdx.x;
  auto& own = walkers[threadIdx.y];
  __syncwarp();
  own.size[0][lane] = total;
#pragma unroll
  for (int n = 0; n < kLaneStates; ++n) own.value[n][lane] = change[n];
  __syncthreads();
  if (threadIdx.y > 0) return;
#pragma unroll 1
  for (unsigned walker = 1; walker < blockDim.y; ++walker) {
#pragma unroll
    for (int n = 0; n < kLaneStates; ++n) {
      const float beyond = walkers[walker].value[n][lane];
      change[n] = plus_times<true>(beyond, exp2_fast(total * A[n]), change[n]);
    }
    total += walkers[walker].size[0][lane];
  }
}

/// A segment's change into segment_states, and its decay, from Σ delta', into segment_decays; a
/// negative decay marks a reset inside.
__device__ __forceinline__ void store_change(const SelectiveScanCudaInputs& in,
                                             const WarpPlace<LaneLayout>& me, bool reset,
                                             float total, const OwnStates<LaneLayout>& A,
                                             const OwnStates<LaneLayout>& change) {
  const int64_t at = me.segment * in.B * in.D * in.N + me.state;
  OwnStates<LaneLayout> decay;
#pragma unroll
  for (int n = 0; n < kLaneStates; ++n) decay[0][n] = reset ? -1.f : exp2_fast(total * A[0][n]);
  store_states<LaneLayout>(in.segment_states + at, in.N, me, change);
  store_states<LaneLayout>(in.segment_decays + at, in.N, me, decay);
}

/// What a segment does to the state that enters it, or to the gradient that enters at its end. The
/// values are u, or dy.
template <typename T, bool kGradients>
__device__ __forceinline__ void walk(const SelectiveScanCudaInputs& in, const Activations& values,
                                     Alignment aligned, Words words) {
  extern __shared__ char memory[];
  auto* walkers = reinterpret_cast<Walker<T>*>(memory);
  auto& own = walkers[threadIdx.y];
  WarpPlace<LaneLayout> me(in, aligned.channels);
  me.move_to_index(blockIdx.y * kLaneStates);
  if (me.segment == (kGradients ? 0 : in.segments - 1)) return;  // nobody asks for its change
  const int N = min(static_cast<int>(in.N) - me.n, kLaneStates);
  const LaneTiles tiles{words, me.channels, N};
  const PairWeights w(in, me);
  OwnStates<LaneLayout> A, change = {};
  load_rates(in, me, A);
  bool growing = false;  // decays may overflow
#pragma unroll
  for (int n = 0; n < kLaneStates; ++n) growing = growing || !(A[0][n] <= 0.f);
  const Reach reach = reach_of<kGradients>(in, me, walkers);
  const int64_t from = kGradients ? me.begin : me.end - reach.steps;
  put_rows<T>(in, me, from, own.rows);
  if (threadIdx.x == 0) {
    own.rows[kU] = rows_of<T>(values, from, me.b, me.first_channel);
    if (kGradients) own.rows[kB] = own.rows[kC];
    own.rows[kB].data += me.n * sizeof(T);
  }
  __syncwarp();
  const int count = (reach.steps + kLaneSteps - 1) / kLaneSteps;
  const int part = (count + blockDim.y - 1) / blockDim.y;
  const int begin = threadIdx.y * part, end = min(begin + part, count);
  int steps = 0;
  const auto fetch = [&](int tile) {
    const int first = (kGradients ? tile : count - 1 - tile) * kLaneSteps;
    steps = min(reach.steps - first, kLaneSteps);
    const Rows delta = own.rows[kDelta], values = own.rows[kU];
    const Rows z = own.rows[kZ], indices = own.rows[kB];
    tiles.bring(own.delta, delta, first, steps);
    tiles.bring(own.values, values, first, steps);
    if (kGradients && w.gated) tiles.bring(own.z, z, first, steps);
    tiles.bring(own.indices, indices, first, steps);
  };
  float total = 0;
  if (begin < end) fetch(begin);
#pragma unroll 1
  for (int tile = begin; tile < end; ++tile) {
    wait_for_copies();
    __syncwarp();
    float odd = growing ? 1.f : 0.f;
    prepare_tile<kGradients>(own, w, steps, odd);
    __syncwarp();
    if (tile + 1 < end) fetch(tile + 1);
    if (any_odd(odd)) {
      add_shares<kGradients, true, kLaneStates>(own, A[0], total, change[0]);
    } else if (N > kLaneStates / 2) {
      add_shares<kGradients, false, kLaneStates>(own, A[0], total, change[0]);
    } else {
      add_shares<kGradients, false, kLaneStates / 2>(own, A[0], total, change[0]);
    }
    __syncwarp();
  }
  join_parts(walkers, A[0], total, change[0]);
  if (threadIdx.y == 0) store_change(in, me, reach.reset, total, A, change);
}

template <typename T>
__global__ __launch_bounds__(32 * kWalkers, 16 / kWalkers) void change_of_states(
    const __grid_constant__ SelectiveScanCudaFwd p, Alignment aligned, Words words) {
  walk<T, false>(p.in, p.in.u, aligned, words);
}
template <typename T>
__global__ __launch_bounds__(32 * kWalkers, 16 / kWalkers) void change_of_gradients(
    const __grid_constant__ SelectiveScanCudaBwd p, Alignment aligned, Words words) {
  walk<T, true>(p.in, p.dy, aligned, words);
}

/// Launches a block for each segment, 32 channels and 16 indices.
template <typename T, typename Kernel, class Params>
void launch_walks(Kernel kernel, const Params& p, std::initializer_list<Activations> all,
                  CudaStream stream) {
  const auto& in = p.in;
  dim3 grid = scan_grid<LaneLayout>(in);
  grid.y = static_cast<unsigned>((in.N + kLaneStates - 1) / kLaneStates);
  const int64_t tiles = (in.segment_steps + kLaneSteps - 1) / kLaneSteps;
  const int walkers = static_cast<int>(std::min<int64_t>(tiles, kWalkers));
  const Alignment aligned(in, all);
  allow_shared(kernel, kWalkers * sizeof(Walker<T>));
  kernel<<<grid, dim3(32, walkers), walkers * sizeof(Walker<T>), stream>>>(
      p, aligned, in_words<T>(in, aligned, all));
  check_launch("selective_scan: walks of segments");
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
      if (s + k + 1 >= in.segments) break;
      change[k] = in.segment_states[place(s + k)];
      decay[k] = in.segment_decays[place(s + k)];
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      in.segment_states[place(s + k)] = h;
      if (s + k + 1 == in.segments) return;
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

/// A round of blocks, where much of a device is idle without and time is long enough for two
/// launches more; with d_state 9 to 16 as many of 64 channels, two warps, as are at work at once.
int64_t forward_segments(const SelectiveScanCudaInputs& in, int64_t warps) {
  constexpr int64_t kHalf = 200, kThird = 100, kFew = 32, kRound = 1024, kShort = 64;
  const bool usual = in.N > 8 && in.N <= 16;
  if (warps >= (usual ? kThird : kHalf)) return 1;
  if (in.N > 8 && in.N <= 32 && in.T < (usual && warps <= kFew ? 512 : 768)) return 1;
  const int64_t round = usual ? 2 * kAtOnce / warps : (kRound + warps - 1) / warps;
  return std::min({round, in.T / kShort, kAtOnce});
}

/// As few rounds of the warps that a device holds as leave little of it idle; where blocks are
/// wide, a round where it gains more than it costs, a pass more over the inputs.
int64_t backward_segments(const SelectiveScanCudaInputs& in, int64_t warps) {
  if (in.N > kSmallState && !keeps_bf16(in)) {
    constexpr int64_t kFull = 292, kRound = 1024, kShort = 32;
    if (warps >= kFull) return 1;
    return std::min((kRound + warps - 1) / warps, in.T / kShort);
  }
  constexpr int64_t kHeld = 4 * kAtOnce, kFull = 1000, kRounds = 3, kMost = 1024;
  if (warps >= kFull) return 1;
  const auto segments = [&](int64_t rounds) { return rounds * kHeld / warps; };
  const auto busy = [&](int64_t rounds) {
    return segments(rounds) * warps * 100 / (rounds * kHeld);
  };
  int64_t rounds = 1;
  for (int64_t more = 2; more <= kRounds; ++more) {
    if (busy(more) > busy(rounds) + 5) rounds = more;
  }
  const int64_t shortest = rounds == 1 ? 32 : 64;
  return std::min({segments(rounds), in.T / shortest, kMost});
}

}  // namespace

void enter_segments(const SelectiveScanCudaFwd& p, CudaStream stream) {
  dispatch_activations(p.in.type, [&](auto element) {
    using T = decltype(element);
    launch_walks<T>(change_of_states<T>, p, {p.in.u, p.in.delta}, stream);
  });
  launch_carry(p.in, p.initial_state, false, stream);
}

void enter_segments(const SelectiveScanCudaBwd& p, CudaStream stream) {
  dispatch_activations(p.in.type, [&](auto element) {
    using T = decltype(element);
    launch_walks<T>(change_of_gradients<T>, p, {p.in.delta, p.in.z, p.dy}, stream);
  });
  launch_carry(p.in, p.dlast_state, true, stream);
}

void cut_into_segments(SelectiveScanCudaInputs& in, bool backward) {
  in.segments = 1;
  in.segment_steps = 0;
  // Warps of 512 states each, as every layout has them for d_state in whole lanes.
  const int64_t warps = (in.B * in.D * in.N + 511) / 512;
  if (warps == 0) return;
  const int64_t wanted = backward ? backward_segments(in, warps) : forward_segments(in, warps);
  if (wanted < 2) return;
  // Where no states are kept, as where those of training are: the same segments, the same bits.
  const int64_t every = in.checkpoint_every > kScanCudaTile ? in.checkpoint_every
                                                            : scan_checkpoint_every(in.N, in.type);
  const int64_t steps = (in.T + wanted - 1) / wanted;
  in.segment_steps = (steps + every - 1) / every * every;
  in.segments = (in.T + in.segment_steps - 1) / in.segment_steps;
}

}  // namespace retain::kernels
