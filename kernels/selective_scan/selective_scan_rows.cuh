#pragma once
// How a tile of the selective scan comes from memory, where every array has a row for each step, to
// the shared memory of a block of one warp: each thread brings four neighbouring channels of one
// step, and all together B and C.

#include <retain/kernels/selective_scan/selective_scan.cuh>

namespace retain::kernels {

/// Arrays with a row for each step.
enum Array { kU, kDelta, kZ, kDy, kB, kC, kReset, kY, kDu, kDdelta, kDz, kArrays };

/// Where an array's rows lie: its bytes at a first step, and from one step to the next.
struct alignas(16) Rows {
  char* data;
  int64_t stride;

  /// Byte `offset` of step `step`.
  __device__ __forceinline__ char* at(int step, int offset) const {
    return data + static_cast<uint64_t>(static_cast<unsigned>(step)) * stride + offset;
  }
  /// The same where strides are below 2^32: one instruction a step, as the compiler would not have
  /// it.
  __device__ __forceinline__ char* near(int step, int offset) const {
    uint64_t at;
    asm("mad.wide.u32 %0, %1, %2, %3;"
        : "=l"(at)
        : "r"(step), "r"(static_cast<unsigned>(stride)), "l"(data + offset));
    return reinterpret_cast<char*>(at);
  }
};

/// The rows of an array from step t on; `offset` elements into them.
template <typename T>
__device__ __forceinline__ Rows rows_of(const Activations& x, int64_t t, int64_t b,
                                        int64_t offset) {
  T* data = static_cast<T*>(x.data);
  if (data != nullptr) data += t * x.stride_t + b * x.stride_b + offset;
  return {reinterpret_cast<char*>(data), x.stride_t * static_cast<int64_t>(sizeof(T))};
}

/// The rows of the inputs from step t on.
template <typename T, class Layout>
__device__ __forceinline__ void put_rows(const SelectiveScanCudaInputs& in,
                                         const WarpPlace<Layout>& me, int64_t t, Rows* rows) {
  if (threadIdx.x != 0) return;
  rows[kU] = rows_of<T>(in.u, t, me.b, me.first_channel);
  rows[kDelta] = rows_of<T>(in.delta, t, me.b, me.first_channel);
  rows[kZ] = rows_of<T>(in.z, t, me.b, me.first_channel);
  rows[kB] = rows_of<T>(in.B_matrix, t, me.b, me.group * in.B_stride_g);
  rows[kC] = rows_of<T>(in.C_matrix, t, me.b, me.group * in.C_stride_g);
  const auto* reset = reinterpret_cast<const char*>(in.reset.data);
  if (reset != nullptr) reset += t * in.reset.stride_t + me.b * in.reset.stride_b;
  rows[kReset] = {const_cast<char*>(reset), in.reset.stride_t};
}

/// The rows of the inputs and of the gradients from step t on.
template <typename T, class Layout>
__device__ __forceinline__ void put_all_rows(const SelectiveScanCudaBwd& p,
                                             const WarpPlace<Layout>& me, int64_t t, Rows* rows) {
  put_rows<T>(p.in, me, t, rows);
  if (threadIdx.x == 0) {
    rows[kDy] = rows_of<T>(p.dy, t, me.b, me.first_channel);
    rows[kY] = rows_of<T>(p.y, t, me.b, me.first_channel);
    rows[kDu] = rows_of<T>(p.du, t, me.b, me.first_channel);
    rows[kDdelta] = rows_of<T>(p.ddelta, t, me.b, me.first_channel);
    rows[kDz] = rows_of<T>(p.dz, t, me.b, me.first_channel);
  }
  __syncwarp();
}

/// Whether the state is cleared before this thread's step of a tile, as it lies in memory.
__device__ __forceinline__ int load_reset(const Rows* all, int first, int steps) {
  const Rows rows = all[kReset];
  if (rows.data == nullptr || threadIdx.x >= steps) return 0;
  return *rows.at(first + threadIdx.x, 0);
}

constexpr int kFours = 4;  ///< arrays with channels of which a tile needs a part

/// What a tile needs, as it lies in memory.
template <class Layout, typename T>
struct alignas(16) RawTile {
  T four[kFours][32][4];                       ///< by Array: each thread's four
  T pair[2][Layout::steps][Layout::padded_n];  ///< B, C
};

/// Moves all rows by `steps` steps.
__device__ __forceinline__ void move_rows(Rows* all, int64_t steps) {
  __syncwarp();
  if (threadIdx.x < kArrays) {
    Rows& rows = all[threadIdx.x];
    if (rows.data != nullptr) rows.data += steps * rows.stride;
  }
  __syncwarp();
}

/// Starts to bring the tile that begins at step `first` of the rows into shared memory: u, delta
/// and B, and what gradients need. Channels and indices exist in whole words of four, which lie on
/// their boundaries; those that do not become zeros.
template <class Layout, typename T>
__device__ __forceinline__ void copy_tile(const Rows* all, RawTile<Layout, T>& raw,
                                          const WarpPlace<Layout>& me, int N, int first, int steps,
                                          bool gradients) {
  constexpr int kSize = sizeof(T);
  // All addresses first: a copy would hold back the reads of the next rows.
  const bool there = me.four_step < steps && me.four < me.channels;
  const char* from[kFours];
  bool exists[kFours];
#pragma unroll
  for (int i = 0; i < kFours; ++i) {
    const Rows rows = all[i];
    from[i] = rows.near(first + me.four_step, me.four * kSize);
    exists[i] = there && rows.data != nullptr;
  }
  constexpr int kWide = Layout::padded_n / 4, kHalf = Layout::steps * kWide;  // fours of B
  constexpr int kCopies = (2 * kHalf + 31) / 32;
  const Rows B = all[kB], C = all[kC];
#pragma unroll
  for (int i = 0; i < kFours; ++i) {
    if (i < 2 || gradients) copy_four<T>(raw.four[i][threadIdx.x], from[i], exists[i]);
  }
#pragma unroll(kCopies <= 8 ? kCopies : 1)
  for (int k = 0; k < kCopies; ++k) {
    const int i = k * 32 + threadIdx.x, step = i % kHalf / kWide, n = i % kWide * 4;
    const bool is_B = kHalf % 32 == 0 ? k * 32 < kHalf : i < kHalf;
    if (i < (gradients ? 2 : 1) * kHalf) {
      copy_four<T>(&raw.pair[0][0][0] + i * 4, (is_B ? B : C).near(first + step, n * kSize),
                   step < steps && n < N);
    }
  }
  close_copies();
}

/// The same for any tile, all of it, here and now.
template <class Layout, typename T>
__device__ __noinline__ void load_tile(const Rows* all, RawTile<Layout, T>& raw, int channels,
                                       int N, int first, int steps) {
  T *const fours = &raw.four[0][0][0], *const pairs = &raw.pair[0][0][0];
  for (int i = threadIdx.x; i < kFours * 128; i += 32) {
    const int step = i % 128 / Layout::channels, channel = i % Layout::channels;
    const Rows rows = all[i / 128];
    const bool there = step < steps && channel < channels && rows.data != nullptr;
    fours[i] =
        there ? reinterpret_cast<const T*>(rows.at(first + step, 0))[channel] : from_float<T>(0.f);
  }
  for (int i = threadIdx.x; i < 2 * Layout::steps * Layout::padded_n; i += 32) {
    const int step = i / Layout::padded_n % Layout::steps, n = i % Layout::padded_n;
    const bool there = step < steps && n < N;
    const Rows rows = all[i < Layout::steps * Layout::padded_n ? kB : kC];
    pairs[i] = there ? reinterpret_cast<const T*>(rows.at(first + step, 0))[n] : from_float<T>(0.f);
  }
}

template <typename T>
__device__ __forceinline__ float4 widen_at(const T* shared) {
  return widen<T>(*reinterpret_cast<const Four<T>*>(shared));
}

/// B or C of the tile as floats. Adds 0 to `odd` if all are finite.
template <class Layout, typename T>
__device__ __forceinline__ void put_pairs(const T (&raw)[Layout::steps][Layout::padded_n],
                                          float (&to)[Layout::steps][Layout::padded_n],
                                          float& odd) {
  constexpr int kPairs = Layout::steps * Layout::padded_n;
#pragma unroll(kPairs <= 1024 ? kPairs / 128 + 1 : 1)
  for (int k = 0; k < kPairs; k += 128) {
    const int i = k + threadIdx.x * 4;
    if (i < kPairs) {
      const float4 x = widen_at(&raw[0][0] + i);
      note(odd, x);
      *reinterpret_cast<float4*>(&to[0][0] + i) = x;
    }
  }
}

}  // namespace retain::kernels
