// Root-mean-square norm of rows with residual add (Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4):
//   s = x + residual,   y = s r weight with r = 1 / sqrt(mean(s²) + eps),
//   ds = r (weight dy - s r² mean(weight dy s)) + dresidual_out,   dweight = Σ_rows dy s r.
// Layout: features contiguous. A row belongs to a part of a warp, a warp or a block, each thread
// with up to four times four neighbouring features in registers between the sum over the row and
// the output, so that memory is read once. Rows that are longer, or that do not lie in fours, are
// read twice. A sum over a row is a fixed tree. In the backward every block keeps dweight over its
// rows in registers; a second kernel adds up the blocks in order.

#include <retain/kernels/rms_norm/rms_norm_cuda.h>
#include <retain/kernels/common/device.cuh>
#include <retain/kernels/common/sum_parts.cuh>

#include <algorithm>
#include <initializer_list>
#include <stdexcept>
#include <utility>

namespace retain::kernels {
namespace {

/// How a block is laid over rows: `lanes` threads a row, each with `fours` times four features.
template <int kLanes, int kFours, int kThreads = 256>
struct NormLayout {
  static constexpr int lanes = kLanes, fours = kFours, threads = kThreads;
  static constexpr int rows = threads / lanes;
};
constexpr int64_t kLongest = 8192;  ///< features that fit into a block's registers

/// Calls run(NormLayout{}) with the layout that fits a row of at most kLongest features.
template <typename Run>
void dispatch_rows(int64_t D, const Run& run) {
  if (D <= 64) return run(NormLayout<8, 2>{});
  if (D <= 128) return run(NormLayout<16, 2>{});
  if (D <= 256) return run(NormLayout<32, 2>{});
  if (D <= 512) return run(NormLayout<32, 4>{});
  if (D <= 1024) return run(NormLayout<128, 2, 128>{});
  if (D <= 2048) return run(NormLayout<256, 2>{});
  if (D <= 4096) return run(NormLayout<256, 4>{});
  return run(NormLayout<512, 4, 512>{});
}

/// The same for rows that are read twice.
template <typename Run>
void dispatch_long_rows(int64_t D, const Run& run) {
  if (D <= 2048) return run(NormLayout<32, 0>{});
  return run(NormLayout<512, 0, 512>{});
}

/// Where a row of a [T, B, D] array lies.
template <typename T>
__device__ __forceinline__ T* row_of(const Activations& x, int64_t B, int64_t row) {
  T* data = static_cast<T*>(x.data);
  if (x.stride_t == B * x.stride_b) return data + row * x.stride_b;
  return data + row / B * x.stride_t + row % B * x.stride_b;
}

/// Sums over the threads of a row; each of them gets the total. All threads of the block call it.
template <class Layout>
__device__ __forceinline__ float sum_over_row(float x) {
#pragma unroll
  for (int bit = (Layout::lanes < 32 ? Layout::lanes : 32) / 2; bit > 0; bit /= 2) {
    x += __shfl_xor_sync(~0u, x, bit);
  }
  if constexpr (Layout::lanes > 32) {
    constexpr int kWarps = Layout::lanes / 32;
    __shared__ float warps[kWarps];
    __syncthreads();
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
    __syncthreads();
    x = 0;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) x += warps[warp];
  }
  return x;
}

__device__ __forceinline__ float4 operator+(float4 a, float4 b) {
  return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w};
}
__device__ __forceinline__ float4 operator*(float4 a, float4 b) {
  return {a.x * b.x, a.y * b.y, a.z * b.z, a.w * b.w};
}
__device__ __forceinline__ float4 operator*(float a, float4 b) {
  return {a * b.x, a * b.y, a * b.z, a * b.w};
}
__device__ __forceinline__ float dot(float4 a, float4 b) {
  return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, a.x * b.x)));
}

/// A thread's place in its row.
template <class Layout>
struct Lane {
  int row, lane;  ///< in the block; in the row

  __device__ __forceinline__ Lane()
      : row(threadIdx.x / Layout::lanes), lane(threadIdx.x % Layout::lanes) {}

  __device__ __forceinline__ int64_t feature(int k) const { return 4 * (lane + k * Layout::lanes); }

  /// The thread's fours of a row; zeros where the row is absent or has ended.
  template <typename T>
  __device__ __forceinline__ void load(const T* from, int64_t D,
                                       Four<T> (&to)[Layout::fours]) const {
#pragma unroll
    for (int k = 0; k < Layout::fours; ++k) {
      to[k] = {};
      if (from != nullptr && feature(k) < D) {
        to[k] = *reinterpret_cast<const Four<T>*>(from + feature(k));
      }
    }
  }
};

template <typename T, typename R, class Layout>
__global__ __launch_bounds__(Layout::threads) void norm_fwd(
    const __grid_constant__ RmsNormCudaFwd p) {
  constexpr int kFours = Layout::fours;
  const Lane<Layout> me;
  const int64_t row = int64_t{blockIdx.x} * Layout::rows + me.row;
  const bool live = row < p.T * p.B;
  const bool add = live && p.residual.data != nullptr;
  Four<T> x[kFours];
  Four<R> residual[kFours];
  Four<float> weight[kFours];
  me.load(live ? row_of<const T>(p.x, p.B, row) : nullptr, p.D, x);
  me.load(add ? row_of<const R>(p.residual, p.B, row) : nullptr, p.D, residual);
  me.load(p.weight, p.D, weight);
  float4 s[kFours];
  float square = 0;
#pragma unroll
  for (int k = 0; k < kFours; ++k) {
    s[k] = widen<T>(x[k]);
    if (add) s[k] = s[k] + widen<R>(residual[k]);
    square += dot(s[k], s[k]);
  }
  const float mean = sum_over_row<Layout>(square) / static_cast<float>(p.D);
  const float scale = rsqrtf(mean + p.eps);
  if (!live) return;
#pragma unroll
  for (int k = 0; k < kFours; ++k) {
    if (me.feature(k) >= p.D) continue;
    const int64_t at = row * p.D + me.feature(k);
    store_word(p.residual_out + at, s[k]);
    store_word(static_cast<T*>(p.y) + at, scale * s[k] * widen<float>(weight[k]));
  }
}

/// Rows of any length and place.
template <typename T, typename R, class Layout>
__global__ __launch_bounds__(Layout::threads) void long_fwd(
    const __grid_constant__ RmsNormCudaFwd p) {
  const Lane<Layout> me;
  const int64_t row = int64_t{blockIdx.x} * Layout::rows + me.row;
  const int64_t D = row < p.T * p.B ? p.D : 0;
  float* s = p.residual_out + row * p.D;
  float square = 0;
  if (D > 0) {
    const T* x = row_of<const T>(p.x, p.B, row);
    const R* residual =
        p.residual.data != nullptr ? row_of<const R>(p.residual, p.B, row) : nullptr;
#pragma unroll 4
    for (int64_t d = me.lane; d < D; d += Layout::lanes) {
      const float sum = to_float(x[d]) + (residual != nullptr ? to_float(residual[d]) : 0.f);
      s[d] = sum;
      square = fmaf(sum, sum, square);
    }
  }
  const float mean = sum_over_row<Layout>(square) / static_cast<float>(p.D);
  const float scale = rsqrtf(mean + p.eps);
  T* y = static_cast<T*>(p.y) + row * p.D;
#pragma unroll 4
  for (int64_t d = me.lane; d < D; d += Layout::lanes) {
    y[d] = from_float<T>(scale * s[d] * p.weight[d]);
  }
}

/// Adds up the rows of a block and stores its part of dweight.
template <class Layout>
__device__ __forceinline__ void store_part(const RmsNormCudaBwd& p, const Lane<Layout>& me,
                                           const float4 (&dweight)[Layout::fours]) {
  __shared__ float4 shared[Layout::fours][Layout::threads];
#pragma unroll
  for (int k = 0; k < Layout::fours; ++k) shared[k][threadIdx.x] = dweight[k];
  __syncthreads();
  if (me.row != 0) return;
#pragma unroll
  for (int k = 0; k < Layout::fours; ++k) {
    float4 sum = dweight[k];
    for (int row = 1; row < Layout::rows; ++row) {
      sum = sum + shared[k][row * Layout::lanes + me.lane];
    }
    if (me.feature(k) < p.D) {
      store_word(p.dweight_parts + blockIdx.x * p.D + me.feature(k), sum);
    }
  }
}

template <typename T, class Layout>
__global__ __launch_bounds__(Layout::threads) void norm_bwd(
    const __grid_constant__ RmsNormCudaBwd p) {
  constexpr int kFours = Layout::fours;
  const Lane<Layout> me;
  const float inverse_D = 1.f / static_cast<float>(p.D);
  float4 dweight[kFours] = {};
  Four<float> weight[kFours];
  me.load(p.weight, p.D, weight);
  const int64_t rows = p.T * p.B;
  for (int64_t first = int64_t{blockIdx.x} * Layout::rows; first < rows;
       first += p.parts * Layout::rows) {
    const int64_t row = first + me.row;
    const bool live = row < rows, reached = live && p.dy.data != nullptr;
    Four<float> s[kFours], dresidual[kFours];
    Four<T> dy[kFours];
    me.load(reached ? p.residual_out + row * p.D : nullptr, p.D, s);
    me.load(reached ? row_of<const T>(p.dy, p.B, row) : nullptr, p.D, dy);
    me.load(live && p.dresidual_out != nullptr ? p.dresidual_out + row * p.D : nullptr, p.D,
            dresidual);
    float square = 0, along = 0;
#pragma unroll
    for (int k = 0; k < kFours; ++k) {
      const float4 s_k = widen<float>(s[k]);
      square += dot(s_k, s_k);
      along += dot(widen<float>(weight[k]) * widen<T>(dy[k]), s_k);
    }
    const float mean = sum_over_row<Layout>(square) * inverse_D;
    const float scale = reached ? rsqrtf(mean + p.eps) : 0.f;
    const float pull = scale * scale * (sum_over_row<Layout>(along) * inverse_D);
#pragma unroll
    for (int k = 0; k < kFours; ++k) {
      if (!live || me.feature(k) >= p.D) continue;
      const float4 s_k = widen<float>(s[k]), dy_k = widen<T>(dy[k]);
      const float4 ds = scale * (widen<float>(weight[k]) * dy_k + -pull * s_k);
      store_word(p.dx + row * p.D + me.feature(k), ds + widen<float>(dresidual[k]));
      dweight[k] = dweight[k] + dy_k * (scale * s_k);
    }
  }
  store_part<Layout>(p, me, dweight);
}

/// dx of rows of any length and place.
template <typename T, class Layout>
__global__ __launch_bounds__(Layout::threads) void long_bwd(
    const __grid_constant__ RmsNormCudaBwd p) {
  const Lane<Layout> me;
  const int64_t row = int64_t{blockIdx.x} * Layout::rows + me.row;
  const int64_t D = row < p.T * p.B ? p.D : 0;
  const float* s = p.residual_out + row * p.D;
  const T* dy = D > 0 && p.dy.data != nullptr ? row_of<const T>(p.dy, p.B, row) : nullptr;
  float square = 0, along = 0;
#pragma unroll 4
  for (int64_t d = me.lane; d < D && dy != nullptr; d += Layout::lanes) {
    square = fmaf(s[d], s[d], square);
    along = fmaf(p.weight[d] * to_float(dy[d]), s[d], along);
  }
  const float inverse_D = 1.f / static_cast<float>(p.D);
  const float scale = rsqrtf(sum_over_row<Layout>(square) * inverse_D + p.eps);
  const float pull = scale * scale * (sum_over_row<Layout>(along) * inverse_D);
#pragma unroll 4
  for (int64_t d = me.lane; d < D; d += Layout::lanes) {
    const float ds = dy != nullptr ? scale * (p.weight[d] * to_float(dy[d]) - pull * s[d]) : 0.f;
    const float dresidual = p.dresidual_out != nullptr ? p.dresidual_out[row * p.D + d] : 0.f;
    p.dx[row * p.D + d] = ds + dresidual;
  }
  if (D > 0 && me.lane == 0) p.scales[row] = scale;
}

/// dweight of a part of the rows: a thread a feature.
template <typename T>
__global__ void long_dweight(const __grid_constant__ RmsNormCudaBwd p) {
  const int64_t index = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const int64_t part = index / p.D, d = index % p.D, rows = p.T * p.B;
  if (part >= p.parts) return;
  float sum = 0;
#pragma unroll 4
  for (int64_t row = part; row < rows && p.dy.data != nullptr; row += p.parts) {
    const float dy = to_float(row_of<const T>(p.dy, p.B, row)[d]);
    sum = fmaf(dy, p.residual_out[row * p.D + d] * p.scales[row], sum);
  }
  p.dweight_parts[index] = sum;
}

/// Whether rows fit into registers and all fours lie on their own boundary in memory.
bool in_fours(int64_t D, std::initializer_list<const void*> floats,
              std::initializer_list<std::pair<Activations, ActivationType>> all) {
  bool whole = D % 4 == 0 && D <= kLongest;
  for (const void* data : floats) whole = whole && lies_on(data, 16);
  for (const auto& [x, type] : all) whole = whole && lies_in_words(x, type, 4);
  return whole;
}

template <class Layout>
unsigned row_blocks(int64_t rows) {
  const int64_t blocks = (rows + Layout::rows - 1) / Layout::rows;
  if (blocks > INT32_MAX) throw std::runtime_error("rms_norm: too many rows");
  return static_cast<unsigned>(blocks);
}

template <typename T, typename R>
void launch_fwd(const RmsNormCudaFwd& p, CudaStream stream) {
  const int64_t rows = p.T * p.B;
  const bool whole = in_fours(p.D, {p.weight, p.y, p.residual_out},
                              {{p.x, p.type}, {p.residual, p.residual_type}});
  if (whole) {
    dispatch_rows(p.D, [&](auto layout) {
      using Layout = decltype(layout);
      norm_fwd<T, R, Layout><<<row_blocks<Layout>(rows), Layout::threads, 0, stream>>>(p);
    });
  } else {
    dispatch_long_rows(p.D, [&](auto layout) {
      using Layout = decltype(layout);
      long_fwd<T, R, Layout><<<row_blocks<Layout>(rows), Layout::threads, 0, stream>>>(p);
    });
  }
  check_launch("rms_norm: forward");
}

template <typename T>
void launch_bwd(const RmsNormCudaBwd& p, CudaStream stream) {
  const int64_t rows = p.T * p.B;
  if (in_fours(p.D, {p.weight, p.residual_out, p.dresidual_out, p.dx, p.dweight_parts},
               {{p.dy, p.type}})) {
    dispatch_rows(p.D, [&](auto layout) {
      using Layout = decltype(layout);
      norm_bwd<T, Layout><<<static_cast<unsigned>(p.parts), Layout::threads, 0, stream>>>(p);
    });
  } else {
    dispatch_long_rows(p.D, [&](auto layout) {
      using Layout = decltype(layout);
      if (rows == 0) return;
      long_bwd<T, Layout><<<row_blocks<Layout>(rows), Layout::threads, 0, stream>>>(p);
    });
    const auto blocks = static_cast<unsigned>((p.parts * p.D + 255) / 256);
    long_dweight<T><<<blocks, 256, 0, stream>>>(p);
  }
  check_launch("rms_norm: backward");
}

}  // namespace

int64_t rms_norm_cuda_parts(int64_t rows, int64_t D) {
  constexpr int64_t kMostSum = 4096;  // rows that a thread adds up where it takes one at a time
  int64_t at_once = 1, blocks = 528;  // that fill the device
  if (D <= kLongest) {
    dispatch_rows(D, [&](auto layout) {
      at_once = decltype(layout)::rows;
      blocks = 528 * 256 / decltype(layout)::threads;
    });
  }
  const int64_t wanted = std::max(blocks, rows / kMostSum);
  return std::clamp<int64_t>((rows + at_once - 1) / at_once, 1, wanted);
}

void rms_norm_cuda_fwd(const RmsNormCudaFwd& p, CudaStream stream) {
  if (p.T * p.B * p.D == 0) return;
  dispatch_activations(p.type, [&](auto element) {
    using T = decltype(element);
    if (p.residual_type == ActivationType::fp32) {
      launch_fwd<T, float>(p, stream);
    } else {
      launch_fwd<T, T>(p, stream);
    }
  });
}

void rms_norm_cuda_bwd(const RmsNormCudaBwd& p, CudaStream stream) {
  if (p.D == 0) return;
  dispatch_activations(p.type, [&](auto element) { launch_bwd<decltype(element)>(p, stream); });
  launch_sum_rows(p.parts, {{{p.dweight_parts, p.D, p.dweight}}}, stream);
}

}  // namespace retain::kernels
