// Forward pass of the depthwise causal convolution (the short convolution of Gu & Dao 2023,
// arXiv:2312.00752):
//   y_t = act(bias + Σ_k weight[k] x_{t - (K - 1) + k}),  act = silu or identity.
// Layout: time-major, channels contiguous, so that neighbouring threads own neighbouring channels
// and every access is coalesced. Weights, bias and the window of the last K - 1 inputs live in
// registers; a reset puts zeros into the window, so that nothing beyond it is ever multiplied.
// Each output is the same sum in the same order, however time is cut into runs.

#include <retain/kernels/causal_conv1d/causal_conv1d.cuh>

namespace retain::kernels {
namespace {

constexpr int kThreads = 128;

/// Steps that a thread loads at once: 64 bytes.
template <typename T>
constexpr int kAtOnce = sizeof(T) == 4 ? 4 : 8;

/// A chunk's outputs. kCareful: fewer than kSteps, or resets among them.
template <typename T, int K, bool kSilu, int kSteps, bool kCareful>
__device__ __forceinline__ void convolve(const Chunk<T, kSteps>& chunk, unsigned resets, int steps,
                                         int64_t stride_t, ConvWindow<K, kSteps>& window, T* y) {
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    if (kCareful && (resets >> i & 1)) window.forget_before(i);
    unpack(widen<T>(chunk.four[i]), window.x[K - 1 + i]);
    const float4 outputs = window.template outputs<kSilu>(i);
    if (!kCareful || i < steps) store_word(y + i * stride_t, outputs);
  }
}

template <typename T, int K, bool kSilu, int kSteps>
__global__ __launch_bounds__(kThreads, kSteps == 1 ? 8 : 6) void conv_fwd(
    const __grid_constant__ CausalConv1dCudaFwd p) {
  const auto& in = p.in;
  const FlatPlace flat(in);
  if (!flat.live) return;
  ConvPlace place(flat.four);
  place.go_to(in, flat.run, flat.row);
  Chunk<T, kSteps> chunk;
  ConvWindow<K, kSteps> window;
  window.load_weights(in, place);
  warm_up<T, K>(in, place, window.x);
  for (int64_t t = place.begin; t < place.end; t += kSteps) {
    const int steps = static_cast<int>(min(place.end - t, int64_t{kSteps}));
    chunk.fetch(in.x, place, t, steps);
    const unsigned resets = place.template resets<kSteps>(in, t, steps);
    T* y = place.at<T>(p.y, t);
    if (resets == 0 && steps == kSteps) {
      convolve<T, K, kSilu, kSteps, false>(chunk, 0, kSteps, p.y.stride_t, window, y);
    } else {
      convolve<T, K, kSilu, kSteps, true>(chunk, resets, steps, p.y.stride_t, window, y);
    }
    window.go_on();
  }
  if (place.end != in.T) return;
  if (kSteps > 1) return store_last_state<T>(p, place);
#pragma unroll
  for (int i = 0; i < K - 1; ++i) {
    store_word(p.last_state + place.state(in, i - (K - 1)), pack(window.x[i]));
  }
}

/// Any number of taps.
template <typename T>
__global__ __launch_bounds__(kThreads) void conv_fwd_any(
    const __grid_constant__ CausalConv1dCudaFwd p, bool aligned) {
  const auto& in = p.in;
  const FlatPlace flat(in);
  if (!flat.live) return;
  ConvPlace place(in, flat.four, aligned);
  place.go_to(in, flat.run, flat.row);
  for (int64_t t = place.begin; t < place.end; ++t) {
    float sum[4];
    weighted_sum<T>(in, place, t, sum);
    if (in.silu) {
#pragma unroll
      for (int c = 0; c < 4; ++c) sum[c] = conv_silu(sum[c]);
    }
    store_four(place.at<T>(p.y, t), pack(sum), place.count, place.whole);
  }
  if (place.end == in.T) store_last_state<T>(p, place);
}

}  // namespace

void cut_into_runs(CausalConv1dCudaFwd& params) {
  constexpr int64_t kFull = 81920;  // threads that fill the device
  auto& in = params.in;
  const int64_t fours = in.T * in.B * ((in.D + 3) / 4);
  in.run_steps = std::clamp<int64_t>((fours / kFull + 7) / 8 * 8, 8, 64);
}

void causal_conv1d_cuda_fwd(const CausalConv1dCudaFwd& p, CudaStream stream) {
  const auto& in = p.in;
  if (in.B * in.D == 0) return;
  const bool aligned = in_fours(in, {in.x, p.y}, {in.bias, in.initial_state, p.last_state});
  const dim3 grid = flat_grid(in, kThreads);
  if (aligned && conv_window_in_registers(in.K)) {
    dispatch_conv(in, [&](auto element, auto taps, auto silu) {
      using T = decltype(element);
      const auto launch = [&](auto kernel) { kernel<<<grid, kThreads, 0, stream>>>(p); };
      in.T < 4 ? launch(conv_fwd<T, taps(), silu(), 1>)
               : launch(conv_fwd<T, taps(), silu(), kAtOnce<T>>);
    });
  } else {
    dispatch_activations(in.type, [&](auto element) {
      conv_fwd_any<decltype(element)><<<grid, kThreads, 0, stream>>>(p, aligned);
    });
  }
  check_launch("causal_conv1d: forward");
}

}  // namespace retain::kernels
