// Backward pass of the depthwise causal convolution with any number of taps and for channels that
// do not lie in fours; the equations are in causal_conv1d_bwd.cu. Three kernels: g, the gradient of
// the sum under the activation, goes into p.dsum; dx is gathered from it; dweight is summed from
// it, a thread one tap of four channels over a part of the rows and their runs of time. Inputs are
// read where they lie, once a tap.

#include <retain/kernels/causal_conv1d/causal_conv1d.cuh>

namespace retain::kernels {
namespace {

constexpr int kThreads = 128;

template <typename T>
__global__ void any_dsum(const __grid_constant__ CausalConv1dCudaBwd p, bool aligned) {
  const auto& in = p.in;
  const FlatPlace flat(in);
  if (!flat.live) return;
  ConvPlace place(in, flat.four, aligned);
  place.go_to(in, flat.run, flat.row);
  for (int64_t t = place.begin; t < place.end; ++t) {
    float g[4] = {}, sum[4];
    if (p.dy.data != nullptr) {
      unpack(widen<T>(load_four(place.at<const T>(p.dy, t), place.count, place.whole)), g);
    }
    if (in.silu) {
      weighted_sum<T>(in, place, t, sum);
#pragma unroll
      for (int c = 0; c < 4; ++c) g[c] = under_activation<true, true>(g[c], sum[c]);
    }
    store_four(p.dsum + (t * in.B + place.b) * in.D + place.channel, pack(g), place.count,
               place.whole);
  }
}

/// Adds gradient · factor to the sums, 0 times anything being 0.
__device__ __forceinline__ void add_products(const float (&gradient)[4], const float (&factor)[4],
                                             float (&sum)[4]) {
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    if (gradient[c] != 0.f) sum[c] = fmaf(gradient[c], factor[c], sum[c]);
  }
}

/// The gradient that reaches input s of the row.
__device__ __forceinline__ void gather_dx(const CausalConv1dCudaBwd& p, const ConvPlace& place,
                                          int64_t s, float (&dx)[4]) {
  const auto& in = p.in;
  unpack({}, dx);
  int64_t t = max(s, int64_t{0});
  for (; t < min(s + in.K, in.T) && !(t > s && place.reset(in, t)); ++t) {
    float g[4], tap[4];
    load_floats(p.dsum, (t * in.B + place.b) * in.D + place.channel, place, g);
    load_tap(in, place, in.K - 1 - (t - s), tap);
    add_products(g, tap, dx);
  }
  if (t < in.T || s < in.T - (in.K - 1) || p.dlast_state == nullptr) return;
  float dlast[4];
  load_floats(p.dlast_state, place.state(in, s - in.T), place, dlast);
#pragma unroll
  for (int c = 0; c < 4; ++c) dx[c] += dlast[c];
}

template <typename T>
__global__ void any_dx(const __grid_constant__ CausalConv1dCudaBwd p, bool aligned) {
  const FlatPlace flat(p.in);
  if (!flat.live) return;
  ConvPlace place(p.in, flat.four, aligned);
  place.go_to(p.in, flat.run, flat.row);
  for (int64_t s = place.begin == 0 ? 1 - p.in.K : place.begin; s < place.end; ++s) {
    float dx[4];
    gather_dx(p, place, s, dx);
    store_dx<T>(p, place, s, dx);
  }
}

/// A thread's part of the rows' runs for one tap of four channels; tap K is the bias.
template <typename T>
__global__ void any_dweight(const __grid_constant__ CausalConv1dCudaBwd p, bool aligned) {
  const auto& in = p.in;
  const int64_t fours = (in.D + 3) / 4, index = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const int64_t k = index / fours % (in.K + 1), part = index / fours / (in.K + 1);
  if (part >= p.parts) return;
  ConvPlace place(in, index % fours, aligned);
  float total[4] = {};
  for (int64_t i = part; i < conv_runs(in) * in.B; i += p.parts) {
    place.go_to(in, i / in.B, i % in.B);
    float run_total[4] = {};
    for (int64_t t = place.begin; t < place.end; ++t) {
      const int64_t s = t - (in.K - 1) + k;
      float g[4], x[4] = {1.f, 1.f, 1.f, 1.f};
      load_floats(p.dsum, (t * in.B + place.b) * in.D + place.channel, place, g);
      if (k < in.K) {
        if (s < oldest_input(in, place, t)) continue;
        load_input<T>(in, place, s, x);
      }
      add_products(g, x, run_total);
    }
#pragma unroll
    for (int c = 0; c < 4; ++c) total[c] += run_total[c];
  }
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    const int64_t d = part * in.D + place.channel + c;
    if (c < place.count)
      *(k < in.K ? p.dweight_parts + d * in.K + k : p.dbias_parts + d) = total[c];
  }
}

}  // namespace

void causal_conv1d_cuda_bwd_any(const CausalConv1dCudaBwd& p, bool aligned, CudaStream stream) {
  dispatch_activations(p.in.type, [&](auto element) {
    using T = decltype(element);
    const dim3 grid = flat_grid(p.in, kThreads);
    if (grid.x > 0) {
      any_dsum<T><<<grid, kThreads, 0, stream>>>(p, aligned);
      any_dx<T><<<grid, kThreads, 0, stream>>>(p, aligned);
    }
    const int64_t threads = p.parts * (p.in.K + 1) * ((p.in.D + 3) / 4);
    const auto blocks = static_cast<unsigned>((threads + kThreads - 1) / kThreads);
    any_dweight<T><<<blocks, kThreads, 0, stream>>>(p, aligned);
  });
  check_launch("causal_conv1d: backward of any number of taps");
}

}  // namespace retain::kernels
