#pragma once
// How blocks of the forward pass of the selective scan lie over channels and states, what a tile
// has in shared memory, and how it comes there from memory.

#include <retain/kernels/selective_scan/selective_scan.cuh>

namespace retain::kernels {

/// How warps are laid over channels and states. Threads that serve bring four channels of a step
/// each, and B and C unless kHelpers warps do that.
template <int kLanes, int kStates, int kOwn, int kWarps, int kHelpers = 0>
struct FwdLayout : WarpLayout<kLanes, kStates, kOwn, kWarps> {
  using Warps = WarpLayout<kLanes, kStates, kOwn, kWarps>;
  static constexpr bool helped = kHelpers > 0;
  static constexpr int steps = std::min(Warps::steps, 32);               ///< of a tile
  static constexpr int servers = Warps::quads * steps;                   ///< threads
  static constexpr int pair_threads = helped ? 32 * kHelpers : servers;  ///< for B and C
  static constexpr int block = Warps::threads + servers + 32 * kHelpers;
};

/// How many steps of a tile a thread brings four channels of. Two give a serving warp more to do at
/// once, and fewer barriers; with many lanes a channel tiles are long anyway.
template <class Layout>
constexpr int kRounds = Layout::lanes <= 4 ? 2 : 1;
template <class Layout>
constexpr int kTileSteps = Layout::steps* kRounds<Layout>;

/// The sums of a step. Where threads that finish neighbouring steps read them together, these lie
/// four banks of memory apart.
template <class Layout, bool kApart>
struct StepSums : LaneSums<Layout> {};
template <class Layout>
struct StepSums<Layout, true> : LaneSums<Layout> {
  float padding[4];
};

template <class Layout>
struct alignas(16) FwdTile {
  float2 step[kTileSteps<Layout>][Layout::channels];  ///< delta', delta' u
  float B[kTileSteps<Layout>][Layout::padded_n], C[kTileSteps<Layout>][Layout::padded_n];
  StepSums<Layout, (Layout::quads < 8)> y[kTileSteps<Layout>];
  unsigned resets;  ///< bit s: the state is cleared before step s
};

/// Walks over u, delta, z and the resets a tile at a time, from memory to registers. Only the last
/// tile is shorter than others.
template <class Layout, typename T>
struct ChannelInputs {
  static constexpr int rounds = kRounds<Layout>;
  const T *u_at, *delta_at, *z_at;
  const bool* reset_at;
  Four<T> u[rounds], delta[rounds], z[rounds];
  int reset;  ///< compared when it has come

  static __device__ __forceinline__ int thread() { return threadIdx.x % Layout::threads; }
  static __device__ __forceinline__ int beyond(const WarpPlace<Layout>& me, bool aligned) {
    return aligned ? max(me.four + 4 - me.channels, 0) : 0;
  }

  /// `aligned`: channels lie in aligned fours. Then threads without channels may read the last four
  /// that exist.
  __device__ __forceinline__ ChannelInputs(const SelectiveScanCudaInputs& in,
                                           const WarpPlace<Layout>& me, bool aligned)
      : u_at(me.template at<T>(in.u, me.begin) - beyond(me, aligned)),
        delta_at(me.template at<T>(in.delta, me.begin) - beyond(me, aligned)),
        z_at(me.template at<T>(in.z, me.begin) - beyond(me, aligned)),
        reset_at(in.reset.data + (me.begin + thread() % 32) * in.reset.stride_t +
                 me.b * in.reset.stride_b) {}

  /// The next tile. `words`: all of its steps exist, and channels lie in aligned fours.
  __device__ __forceinline__ void fetch(const SelectiveScanCudaInputs& in,
                                        const WarpPlace<Layout>& me, int steps, bool words) {
    reset = 0;
    if (in.reset.data != nullptr && thread() % 32 < steps) reset = *reset_at;
#pragma unroll
    for (int r = 0; r < rounds; ++r) {
      const int64_t step = r * Layout::steps;  // and me.four_step
      const bool there = words || step + me.four_step < steps;
      const int fours_there = there ? (words ? 4 : me.channels - me.four) : 0;
      const bool whole = words || (there && me.whole);
      u[r] = load_four(u_at + step * in.u.stride_t, fours_there, whole);
      delta[r] = load_four(delta_at + step * in.delta.stride_t, fours_there, whole);
      if (in.z.data != nullptr) z[r] = load_four(z_at + step * in.z.stride_t, fours_there, whole);
    }
    u_at += kTileSteps<Layout> * in.u.stride_t;
    delta_at += kTileSteps<Layout> * in.delta.stride_t;
    z_at += kTileSteps<Layout> * in.z.stride_t;
    reset_at += kTileSteps<Layout> * in.reset.stride_t;
  }
};

/// The same for B and C, by the block's last threads.
template <class Layout, typename T>
struct PairInputs {
  static constexpr int threads = Layout::pair_threads;
  static constexpr int wide = Layout::padded_n / 4;  ///< fours of a step of B
  static constexpr int tile_steps = kTileSteps<Layout>, rows = 2 * tile_steps;  ///< B's, then C's
  static constexpr int at_once = threads / wide;                                ///< rows
  static constexpr int count = (rows + at_once - 1) / at_once;                  ///< a thread
  static_assert(threads % wide == 0);
  const T *B_at, *C_at;  ///< as if the thread's first row were of B, and of C
  Four<T> pairs[count];

  static __device__ __forceinline__ int thread() {
    return Layout::helped ? threadIdx.x - Layout::threads - Layout::servers
                          : threadIdx.x % Layout::threads;
  }
  static __device__ __forceinline__ int first_row() { return thread() / wide; }
  static __device__ __forceinline__ int first_n() { return thread() % wide * 4; }

  __device__ __forceinline__ PairInputs(const SelectiveScanCudaInputs& in,
                                        const WarpPlace<Layout>& me)
      : B_at(static_cast<const T*>(in.B_matrix.data) +
             (me.begin + first_row()) * in.B_matrix.stride_t + me.b * in.B_matrix.stride_b +
             me.group * in.B_stride_g + first_n()),
        C_at(static_cast<const T*>(in.C_matrix.data) +
             (me.begin + first_row()) * in.C_matrix.stride_t + me.b * in.C_matrix.stride_b +
             me.group * in.C_stride_g + first_n()) {}

  /// The next tile. `words`: all of it exists and lies in aligned fours; else `aligned` says
  /// whether those fours do that exist.
  __device__ __forceinline__ void fetch(const SelectiveScanCudaInputs& in, int steps, bool words,
                                        bool aligned) {
#pragma unroll
    for (int k = 0; k < count; ++k) {
      const int row = k * at_once + first_row();
      const bool is_B = row < tile_steps;
      const T* from = is_B ? B_at + k * at_once * in.B_matrix.stride_t
                           : C_at + (k * at_once - tile_steps) * in.C_matrix.stride_t;
      const bool there = row < rows && (words || (is_B ? row : row - tile_steps) < steps);
      const int count_there = there ? static_cast<int>(in.N) - first_n() : 0;
      pairs[k] = load_four(from, count_there, there && (words || (aligned && count_there >= 4)));
    }
    B_at += tile_steps * in.B_matrix.stride_t;
    C_at += tile_steps * in.C_matrix.stride_t;
  }

  __device__ __forceinline__ void put(FwdTile<Layout>& tile) const {
#pragma unroll
    for (int k = 0; k < count; ++k) {
      const int row = k * at_once + first_row();
      float* to = row < tile_steps ? tile.B[row] : tile.C[row - tile_steps];
      if (row < rows) *reinterpret_cast<float4*>(to + first_n()) = widen<T>(pairs[k]);
    }
  }
};

}  // namespace retain::kernels
