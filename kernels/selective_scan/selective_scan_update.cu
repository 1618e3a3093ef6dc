// One step of the selective scan, the acting step of an agent: every state is read and written
// once, four indices a thread, neighbouring threads on neighbouring addresses. The lanes of a
// channel repeat its few scalar operations. The same operations in the same order as a sequence's,
// and so the same bits. In a block the step size comes from a product of low rank, delta =
// dt_weight dt (Gu & Dao 2023, arXiv:2312.00752, section 3.6), which the lanes share.

#include <retain/kernels/selective_scan/selective_scan.cuh>

namespace retain::kernels {
namespace {

/// What a thread keeps over the rows.
template <class Layout>
struct Weights {
  float A[Layout::states], D, bias;
  float dt[4];  ///< the first four of the lane's share of dt_weight
};

/// One row's inputs, on their way.
template <class Layout>
struct RowInputs {
  float h[Layout::states], B[Layout::states], C[Layout::states], dt[4], u, delta, z;
  bool reset;
};

/// Reads `kCount` neighbours, as words where they lie so; those that do not exist are 0.
template <bool kWords, int kCount, typename T>
__device__ __forceinline__ void read(const T* from, int count, float (&x)[kCount]) {
#pragma unroll
  for (int j = 0; j < kCount; j += 4) {
    if constexpr (kWords) {
      const float4 four = widen<T>(*reinterpret_cast<const Four<T>*>(from + j));
      x[j] = four.x;
      x[j + 1] = four.y;
      x[j + 2] = four.z;
      x[j + 3] = four.w;
    } else {
#pragma unroll
      for (int i = j; i < j + 4; ++i) x[i] = i < count ? to_float(from[i]) : 0.f;
    }
  }
}

template <bool kWords, int kCount>
__device__ __forceinline__ void write(float* to, int count, const float (&x)[kCount]) {
#pragma unroll
  for (int j = 0; j < kCount; j += 4) {
    if constexpr (kWords) {
      __stcs(reinterpret_cast<float4*>(to + j), float4{x[j], x[j + 1], x[j + 2], x[j + 3]});
    } else {
#pragma unroll
      for (int i = j; i < j + 4; ++i) {
        if (i < count) to[i] = x[i];
      }
    }
  }
}

/// A thread's place: its channel of D, its first state index and how many from there on exist; the
/// same of its share of dt_rank.
struct UpdatePlace {
  int64_t channel, group;
  int n, count, first_rank, rank;
};

/// The lane's share of dt_weight dt from index `from` of R on, in fours that lie 4 · lanes apart.
template <typename T, class Layout, bool kWords>
__device__ __forceinline__ float low_rank_sum(const SelectiveScanCudaUpdate& p, const T* dt,
                                              const float* weight, int from, float sum) {
  for (int r = from; r < p.R; r += 4 * Layout::lanes) {
    const int count = static_cast<int>(p.R) - r;
    float w[4], x[4];
    read<kWords>(weight + r, count, w);
    read<kWords>(dt + r, count, x);
#pragma unroll
    for (int i = 0; i < 4; ++i) sum = fmaf(w[i], x[i], sum);
  }
  return sum;
}

template <typename T, class Layout, bool kWords>
__device__ __forceinline__ RowInputs<Layout> load_row(const SelectiveScanCudaUpdate& p,
                                                      const UpdatePlace& me, int64_t b) {
  const auto& in = p.scan.in;
  const auto at = [&](const Activations& x, int64_t index) {
    return static_cast<const T*>(x.data) + b * x.stride_b + index;
  };
  RowInputs<Layout> row = {};
  if (p.scan.initial_state != nullptr) {
    const float* state = p.scan.initial_state + (b * in.D + me.channel) * in.N + me.n;
    read<kWords>(state, me.count, row.h);
  }
  read<kWords>(at(in.B_matrix, me.group * in.B_stride_g + me.n), me.count, row.B);
  read<kWords>(at(in.C_matrix, me.group * in.C_stride_g + me.n), me.count, row.C);
  row.u = to_float(*at(in.u, me.channel));
  if (p.dt.data == nullptr) {
    row.delta = to_float(*at(in.delta, me.channel));
  } else if (me.rank > 0) {
    read<kWords>(at(p.dt, me.first_rank), me.rank, row.dt);
  }
  if (in.z.data != nullptr) row.z = to_float(*at(in.z, me.channel));
  row.reset = in.reset.data != nullptr && in.reset.data[b * in.reset.stride_b];
  return row;
}

template <class Layout>
__device__ __forceinline__ float sum_of_lanes(float sum) {
#pragma unroll
  for (int bit = 1; bit < Layout::lanes; bit *= 2) sum += __shfl_xor_sync(~0u, sum, bit);
  return sum;
}

/// delta = dt_weight dt of a row.
template <typename T, class Layout, bool kWords>
__device__ __forceinline__ float low_rank_delta(const SelectiveScanCudaUpdate& p,
                                                const UpdatePlace& me, int64_t b,
                                                const Weights<Layout>& weights,
                                                const RowInputs<Layout>& row) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) sum = fmaf(weights.dt[i], row.dt[i], sum);
  const T* dt = static_cast<const T*>(p.dt.data) + b * p.dt.stride_b;
  sum = low_rank_sum<T, Layout, kWords>(p, dt, p.dt_weight + me.channel * p.R,
                                        me.first_rank + 4 * Layout::lanes, sum);
  return sum_of_lanes<Layout>(sum);
}

/// The new state of a row, into row.h; returns the output.
template <class Layout>
__device__ __forceinline__ float advance_row(const SelectiveScanCudaInputs& in,
                                             const Weights<Layout>& weights,
                                             RowInputs<Layout>& row) {
  float size = row.delta + weights.bias;
  if (in.delta_softplus) size = softplus(size);
  const float drive = __fmul_rn(size, row.u);
#pragma unroll
  for (int n = 0; n < Layout::states; ++n) {
    row.h[n] = advance(row.reset ? 0.f : row.h[n], size, weights.A[n], drive, row.B[n]);
  }
  const float sum = sum_of_lanes<Layout>(own_sum(row.C, row.h));
  const float gate = in.z.data == nullptr ? 1.f : __fmul_rn(row.z, sigmoid(row.z));
  return __fmul_rn(sum + __fmul_rn(weights.D, row.u), gate);
}

template <class Layout, bool kWords>
__device__ __forceinline__ Weights<Layout> load_weights(const SelectiveScanCudaUpdate& p,
                                                        const UpdatePlace& me) {
  const auto& in = p.scan.in;
  Weights<Layout> weights = {};
  read<kWords>(in.A + me.channel * in.N + me.n, me.count, weights.A);
#pragma unroll
  for (int j = 0; j < Layout::states; ++j) {
    const float A = p.A_is_log ? -expf(weights.A[j]) : weights.A[j];
    weights.A[j] = A * kLog2e;
  }
  weights.D = in.D_skip != nullptr ? in.D_skip[me.channel] : 0.f;
  weights.bias = in.delta_bias != nullptr ? in.delta_bias[me.channel] : 0.f;
  if (p.dt.data != nullptr && me.rank > 0) {
    read<kWords>(p.dt_weight + me.channel * p.R + me.first_rank, me.rank, weights.dt);
  }
  return weights;
}

/// kWords: states, B, C, dt and dt_weight lie in aligned fours, and all lanes have their indices.
template <typename T, class Layout, bool kWords>
__global__ __launch_bounds__(Layout::threads) void scan_update(
    const __grid_constant__ SelectiveScanCudaUpdate p, int rows) {
  const auto& in = p.scan.in;
  const int64_t per_group = in.D / in.G;
  const int64_t blocks = in.G * ((per_group + Layout::channels - 1) / Layout::channels);
  const int64_t block = blockIdx.x % blocks, first_row = blockIdx.x / blocks * rows;
  const int64_t group = block / (blocks / in.G);
  const int64_t within = block % (blocks / in.G) * Layout::channels + threadIdx.x / Layout::lanes;
  const bool live = within < per_group;
  const int lane = threadIdx.x % Layout::lanes;
  const UpdatePlace me{.channel = group * per_group + (live ? within : 0),
                       .group = group,
                       .n = lane * Layout::states,
                       .count = static_cast<int>(in.N) - lane * Layout::states,
                       .first_rank = 4 * lane,
                       .rank = static_cast<int>(p.R) - 4 * lane};
  const Weights<Layout> weights = load_weights<Layout, kWords>(p, me);
  const int64_t end = min(in.B, first_row + rows);
  RowInputs<Layout> next = load_row<T, Layout, kWords>(p, me, first_row);
  for (int64_t b = first_row; b < end; ++b) {
    RowInputs<Layout> row = next;
    if (b + 1 < end) next = load_row<T, Layout, kWords>(p, me, b + 1);
    if (p.dt.data != nullptr) row.delta = low_rank_delta<T, Layout, kWords>(p, me, b, weights, row);
    const float y = advance_row(in, weights, row);
    if (!live) continue;
    write<kWords>(p.scan.last_state + (b * in.D + me.channel) * in.N + me.n, me.count, row.h);
    if (lane == 0) {
      static_cast<T*>(p.scan.y.data)[b * p.scan.y.stride_b + me.channel] = from_float<T>(y);
    }
  }
}

template <typename T, class Layout>
bool in_words(const SelectiveScanCudaUpdate& p) {
  const auto& in = p.scan.in;
  const auto aligned = [](const void* x, int64_t bytes) {
    return reinterpret_cast<uintptr_t>(x) % bytes == 0;
  };
  const auto rows = [&](const Activations& x) {
    return aligned(x.data, 4 * sizeof(T)) && x.stride_b % 4 == 0;
  };
  return in.N == Layout::padded_n && aligned(p.scan.initial_state, 16) &&
         aligned(p.scan.last_state, 16) && aligned(in.A, 16) && rows(in.B_matrix) &&
         in.B_stride_g % 4 == 0 && rows(in.C_matrix) && in.C_stride_g % 4 == 0 && rows(p.dt) &&
         aligned(p.dt_weight, 16) && p.R % 4 == 0;
}

}  // namespace

void selective_scan_cuda_update(const SelectiveScanCudaUpdate& p, CudaStream stream) {
  const auto& in = p.scan.in;
  if (in.B * in.D == 0) return;
  dispatch_activations(in.type, [&](auto element) {
    using T = decltype(element);
    dispatch_layout<256>(in.N, [&](auto layout) {
      using Layout = decltype(layout);
      constexpr int64_t kBlocks = 8192;  // that fill any GPU several times
      const int64_t blocks = in.G * channel_blocks<Layout>(in);
      const int64_t rows = std::clamp<int64_t>(in.B * blocks / kBlocks, 1, 8);
      const int64_t grid = blocks * ((in.B + rows - 1) / rows);
      if (grid > INT32_MAX) throw std::runtime_error("selective_scan: too many rows and channels");
      const auto kernel =
          in_words<T, Layout>(p) ? scan_update<T, Layout, true> : scan_update<T, Layout, false>;
      kernel<<<static_cast<unsigned>(grid), Layout::threads, 0, stream>>>(p,
                                                                          static_cast<int>(rows));
      check_launch("selective_scan: update");
    });
  });
}

}  // namespace retain::kernels
