// One step of the selective scan, the acting step of an agent: every state is read and written
// once, four indices a thread, neighbouring threads on neighbouring addresses. The lanes of a
// channel repeat its few scalar operations. The same operations in the same order as a sequence's,
// and so the same bits.

#include <retain/kernels/selective_scan/selective_scan.cuh>

namespace retain::kernels {
namespace {

/// What a thread keeps over the rows.
template <class Layout>
struct Weights {
  float A[Layout::states], D, bias;
};

/// One row's inputs, on their way.
template <class Layout>
struct RowInputs {
  float h[Layout::states], B[Layout::states], C[Layout::states], u, delta, z;
  bool reset;
};

/// Reads `states` neighbours, as words where they lie so; those that do not exist are 0.
template <class Layout, bool kWords, typename T>
__device__ __forceinline__ void read(const T* from, int count, float (&x)[Layout::states]) {
#pragma unroll
  for (int j = 0; j < Layout::states; j += 4) {
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

template <class Layout, bool kWords>
__device__ __forceinline__ void write(float* to, int count, const float (&x)[Layout::states]) {
#pragma unroll
  for (int j = 0; j < Layout::states; j += 4) {
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

/// A thread's place: its channel of D, its first state index and how many of its indices exist.
struct UpdatePlace {
  int64_t channel, group;
  int n, count;
};

template <typename T, class Layout, bool kWords>
__device__ __forceinline__ RowInputs<Layout> load_row(const SelectiveScanCudaFwd& p,
                                                      const UpdatePlace& me, int64_t b) {
  const auto& in = p.in;
  const auto at = [&](const Activations& x, int64_t index) {
    return static_cast<const T*>(x.data) + b * x.stride_b + index;
  };
  RowInputs<Layout> row = {};
  if (p.initial_state != nullptr) {
    const float* state = p.initial_state + (b * in.D + me.channel) * in.N + me.n;
    read<Layout, kWords>(state, me.count, row.h);
  }
  read<Layout, kWords>(at(in.B_matrix, me.group * in.B_stride_g + me.n), me.count, row.B);
  read<Layout, kWords>(at(in.C_matrix, me.group * in.C_stride_g + me.n), me.count, row.C);
  row.u = to_float(*at(in.u, me.channel));
  row.delta = to_float(*at(in.delta, me.channel));
  if (in.z.data != nullptr) row.z = to_float(*at(in.z, me.channel));
  row.reset = in.reset.data != nullptr && in.reset.data[b * in.reset.stride_b];
  return row;
}

/// The new state of a row, into row.h; returns the output.
template <typename T, class Layout>
__device__ __forceinline__ float advance_row(const SelectiveScanCudaInputs& in,
                                             const Weights<Layout>& weights,
                                             RowInputs<Layout>& row) {
  float size = row.delta + weights.bias;
  if (in.delta_softplus) size = softplus_for<T>(size);
  const float drive = __fmul_rn(size, row.u);
#pragma unroll
  for (int n = 0; n < Layout::states; ++n) {
    row.h[n] = advance(row.reset ? 0.f : row.h[n], size, weights.A[n], drive, row.B[n]);
  }
  float sum = own_sum(row.C, row.h);
#pragma unroll
  for (int bit = 1; bit < Layout::lanes; bit *= 2) sum += __shfl_xor_sync(~0u, sum, bit);
  const float gate = in.z.data == nullptr ? 1.f : __fmul_rn(row.z, sigmoid(row.z));
  return __fmul_rn(sum + __fmul_rn(weights.D, row.u), gate);
}

/// kWords: states, B and C lie in aligned fours, and all lanes have their indices.
template <typename T, class Layout, bool kWords>
__global__ __launch_bounds__(Layout::threads) void scan_update(
    const __grid_constant__ SelectiveScanCudaFwd p, int rows) {
  const auto& in = p.in;
  const int64_t per_group = in.D / in.G;
  const int64_t blocks = in.G * ((per_group + Layout::channels - 1) / Layout::channels);
  const int64_t block = blockIdx.x % blocks, first_row = blockIdx.x / blocks * rows;
  const int64_t group = block / (blocks / in.G);
  const int64_t within = block % (blocks / in.G) * Layout::channels + threadIdx.x / Layout::lanes;
  const bool live = within < per_group;
  const int n = threadIdx.x % Layout::lanes * Layout::states;
  const UpdatePlace me{group * per_group + (live ? within : 0), group, n,
                       static_cast<int>(in.N) - n};
  Weights<Layout> weights;
  read<Layout, kWords>(in.A + me.channel * in.N + me.n, me.count, weights.A);
#pragma unroll
  for (int j = 0; j < Layout::states; ++j) weights.A[j] = rate_of(weights.A[j]);
  weights.D = in.D_skip != nullptr ? in.D_skip[me.channel] : 0.f;
  weights.bias = in.delta_bias != nullptr ? in.delta_bias[me.channel] : 0.f;

  const int64_t end = min(in.B, first_row + rows);
  RowInputs<Layout> next = load_row<T, Layout, kWords>(p, me, first_row);
  for (int64_t b = first_row; b < end; ++b) {
    RowInputs<Layout> row = next;
    if (b + 1 < end) next = load_row<T, Layout, kWords>(p, me, b + 1);
    const float y = advance_row<T>(in, weights, row);
    if (!live) continue;
    write<Layout, kWords>(p.last_state + (b * in.D + me.channel) * in.N + me.n, me.count, row.h);
    if (n == 0) static_cast<T*>(p.y.data)[b * p.y.stride_b + me.channel] = from_float<T>(y);
  }
}

template <typename T, class Layout>
bool in_words(const SelectiveScanCudaFwd& p) {
  const auto& in = p.in;
  const auto matrix = [&](const Activations& x, int64_t stride_g) {
    return lies_on(x.data, 4 * sizeof(T)) && x.stride_b % 4 == 0 && stride_g % 4 == 0;
  };
  return in.N == Layout::padded_n && lies_on(p.initial_state, 16) && lies_on(p.last_state, 16) &&
         lies_on(in.A, 16) && matrix(in.B_matrix, in.B_stride_g) &&
         matrix(in.C_matrix, in.C_stride_g);
}

/// Calls run(Layout{}) with the layout that fits d_state.
template <typename Run>
void dispatch_update_layout(int64_t N, const Run& run) {
  if (N <= 4) return run(WarpLayout<1, 4, 1, 4>{});
  if (N <= 8) return run(WarpLayout<2, 4, 1, 4>{});
  if (N <= 16) return run(WarpLayout<4, 4, 1, 4>{});
  if (N <= 32) return run(WarpLayout<8, 4, 1, 8>{});
  if (N <= 64) return run(WarpLayout<16, 4, 1, 8>{});
  if (N <= 128) return run(WarpLayout<32, 4, 1, 8>{});
  return run(WarpLayout<32, 8, 1, 8>{});
}

}  // namespace

void selective_scan_cuda_update(const SelectiveScanCudaFwd& p, CudaStream stream) {
  const auto& in = p.in;
  if (in.B * in.D == 0) return;
  dispatch_activations(in.type, [&](auto element) {
    using T = decltype(element);
    dispatch_update_layout(in.N, [&](auto layout) {
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
