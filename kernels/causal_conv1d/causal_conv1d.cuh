#pragma once
// Device pieces that the passes of the causal convolution share.
//
// A thread owns four neighbouring channels of one batch row and walks over a run of time steps.
// With few taps, and channels that lie in fours, it keeps the last K - 1 inputs in registers and
// loads several steps at once; a run first reads the K - 1 inputs before it. Otherwise it reads
// inputs where they lie, once a tap. Both make the same sums in the same order.

#include <retain/kernels/causal_conv1d/causal_conv1d_cuda.h>
#include <retain/kernels/common/device.cuh>

#include <algorithm>
#include <initializer_list>
#include <limits>
#include <stdexcept>
#include <type_traits>

namespace retain::kernels {

/// Runs of time that each row is cut into. The last one is at least K - 1 steps long, unless it is
/// the only one.
__host__ __device__ inline int64_t conv_runs(const CausalConv1dCudaInputs& in) {
  const int64_t rest = in.T - (in.K - 1);
  return rest <= in.run_steps ? 1 : (rest + in.run_steps - 1) / in.run_steps;
}

/// Where a thread works.
struct ConvPlace {
  int64_t b, channel;  ///< row; first of the four channels
  int count;           ///< of the four channels that exist
  bool whole;          ///< all four exist, on their own boundary in memory
  int64_t begin, end;  ///< time steps

  __device__ __forceinline__ ConvPlace(const CausalConv1dCudaInputs& in, int64_t four, bool aligned)
      : channel(4 * four),
        count(static_cast<int>(min(in.D - channel, int64_t{4}))),
        whole(aligned && count == 4) {}

  /// Where all channels lie in fours.
  __device__ __forceinline__ explicit ConvPlace(int64_t four)
      : channel(4 * four), count(4), whole(true) {}

  __device__ __forceinline__ void go_to(const CausalConv1dCudaInputs& in, int64_t run,
                                        int64_t row) {
    b = row;
    begin = run * in.run_steps;
    end = run == conv_runs(in) - 1 ? in.T : begin + in.run_steps;
  }

  template <typename T>
  __device__ __forceinline__ T* at(const Activations& x, int64_t t) const {
    return static_cast<T*>(x.data) + t * x.stride_t + b * x.stride_b + channel;
  }

  /// Offset of input s < 0 in a [B, K - 1, D] state.
  __device__ __forceinline__ int64_t state(const CausalConv1dCudaInputs& in, int64_t s) const {
    return (b * (in.K - 1) + in.K - 1 + s) * in.D + channel;
  }

  __device__ __forceinline__ bool reset(const CausalConv1dCudaInputs& in, int64_t t) const {
    return in.reset.data != nullptr && in.reset.data[t * in.reset.stride_t + b * in.reset.stride_b];
  }

  /// Bit i says that step t + i, one of `steps`, is a reset.
  template <int kSteps>
  __device__ __forceinline__ unsigned resets(const CausalConv1dCudaInputs& in, int64_t t,
                                             int steps) const {
    if (in.reset.data == nullptr) return 0;
    const bool* from = in.reset.data + t * in.reset.stride_t + b * in.reset.stride_b;
    unsigned bits = 0;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      bits |= (i < steps && from[i * in.reset.stride_t] ? 1u : 0u) << i;
    }
    return bits;
  }
};

/// The place of a thread among all fours of all rows and runs: neighbours in the channel.
struct FlatPlace {
  unsigned four, row, run;
  bool live;

  __device__ __forceinline__ explicit FlatPlace(const CausalConv1dCudaInputs& in) {
    const unsigned fours = static_cast<unsigned>((in.D + 3) / 4);
    const unsigned rows = static_cast<unsigned>(in.B);
    unsigned rest = blockIdx.x * blockDim.x + threadIdx.x;
    four = rest % fours;
    rest /= fours;
    row = rest % rows;
    run = rest / rows;
    live = run < conv_runs(in);
  }
};

inline dim3 flat_grid(const CausalConv1dCudaInputs& in, int threads) {
  const int64_t items = conv_runs(in) * in.B * ((in.D + 3) / 4);
  if (items > std::numeric_limits<unsigned>::max() - threads) {
    throw std::runtime_error("causal_conv1d: too many rows and channels");
  }
  return dim3(static_cast<unsigned>((items + threads - 1) / threads));
}

/// Whether every four channels lie on their own boundary in memory.
inline bool in_fours(const CausalConv1dCudaInputs& in, std::initializer_list<Activations> all,
                     std::initializer_list<const float*> states) {
  bool whole = in.D % 4 == 0 && lies_on(in.weight, 16);
  for (const auto& x : all) whole = whole && lies_in_words(x, in.type, 4);
  for (const float* state : states) whole = whole && lies_on(state, 16);
  return whole;
}

/// Whether a window of K inputs fits into registers.
inline bool conv_window_in_registers(int64_t K) { return K >= 2 && K <= 4; }

/// Calls run(T{}, integral_constant<int, K>, bool_constant<silu>) for K that fit into registers.
template <typename Run>
void dispatch_conv(const CausalConv1dCudaInputs& in, const Run& run) {
  dispatch_activations(in.type, [&](auto element) {
    const auto with_taps = [&](auto taps) {
      in.silu ? run(element, taps, std::true_type{}) : run(element, taps, std::false_type{});
    };
    if (in.K == 2) with_taps(std::integral_constant<int, 2>{});
    if (in.K == 3) with_taps(std::integral_constant<int, 3>{});
    if (in.K == 4) with_taps(std::integral_constant<int, 4>{});
  });
}

__device__ __forceinline__ void unpack(float4 from, float (&to)[4]) {
  to[0] = from.x;
  to[1] = from.y;
  to[2] = from.z;
  to[3] = from.w;
}

__device__ __forceinline__ float4 pack(const float (&from)[4]) {
  return {from[0], from[1], from[2], from[3]};
}

/// Four of a [.., D] array of floats; 0 where it is absent.
__device__ __forceinline__ void load_floats(const float* from, int64_t offset,
                                            const ConvPlace& place, float (&to)[4]) {
  if (from == nullptr) return unpack({}, to);
  unpack(widen<float>(load_four(from + offset, place.count, place.whole)), to);
}

/// The taps of four channels, the oldest first.
template <int K>
__device__ __forceinline__ void load_taps(const float* weight, const ConvPlace& place,
                                          float (&taps)[K][4]) {
  float flat[K][4];
#pragma unroll
  for (int i = 0; i < K; ++i) {
    const int left = place.count * K - 4 * i;
    unpack(widen<float>(load_four(weight + place.channel * K + 4 * i, left, place.whole)), flat[i]);
  }
#pragma unroll
  for (int i = 0; i < 4 * K; ++i) taps[i % K][i / K] = flat[i / 4][i % 4];
}

/// kSteps steps of an activation on their way from memory.
template <typename T, int kSteps>
struct Chunk {
  Four<T> four[kSteps];

  /// The first `steps` from step t on; zeros after them, and where it is absent.
  __device__ __forceinline__ void fetch(const Activations& x, const ConvPlace& place, int64_t t,
                                        int steps) {
    const T* from = place.at<T>(x, t);
    if (x.data == nullptr) steps = 0;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      four[i] = {};
      if (i < steps) four[i] = *reinterpret_cast<const Four<T>*>(from + i * x.stride_t);
    }
  }
};

/// The K - 1 inputs before the place's run, zeros where a reset cut them. Returns the first that
/// counts, as a step after the run's beginning: at most 0, and 1 - K if all do.
template <typename T, int K, int kRows>
__device__ __forceinline__ int warm_up(const CausalConv1dCudaInputs& in, const ConvPlace& place,
                                       float (&x)[kRows][4]) {
#pragma unroll
  for (int i = 0; i < K - 1; ++i) {
    const int64_t s = place.begin - (K - 1) + i;
    if (s < 0) {
      load_floats(in.initial_state, place.state(in, s), place, x[i]);
    } else {
      unpack(widen<T>(load_four(place.at<const T>(in.x, s), place.count, place.whole)), x[i]);
    }
  }
  int first = 1 - K;
  if (in.reset.data == nullptr) return first;
#pragma unroll
  for (int i = 1; i < K - 1; ++i) {
    const int64_t s = place.begin - (K - 1) + i;
    if (s >= 0 && place.reset(in, s)) first = i - (K - 1);
  }
#pragma unroll
  for (int i = 0; i < K - 2; ++i) {
    if (i - (K - 1) < first) unpack({}, x[i]);
  }
  return first;
}

__device__ __forceinline__ float conv_silu(float x) { return x * sigmoid(x); }

/// What a thread keeps on its way forward.
template <int K, int kSteps>
struct ConvWindow {
  float tap[K][4], bias[4];
  float x[K - 1 + kSteps][4];  ///< the inputs before some steps, then their own

  __device__ __forceinline__ void load_weights(const CausalConv1dCudaInputs& in,
                                               const ConvPlace& place) {
    load_taps(in.weight, place, tap);
    load_floats(in.bias, place.channel, place, bias);
  }

  /// Step i is a reset.
  __device__ __forceinline__ void forget_before(int i) {
#pragma unroll
    for (int k = 0; k < K - 1; ++k) unpack({}, x[i + k]);
  }

  /// Step i's outputs.
  template <bool kSilu>
  __device__ __forceinline__ float4 outputs(int i) const {
    float sum[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      sum[c] = bias[c];
#pragma unroll
      for (int k = 0; k < K; ++k) sum[c] = fmaf(tap[k][c], x[i + k][c], sum[c]);
      if (kSilu) sum[c] = conv_silu(sum[c]);
    }
    return pack(sum);
  }

  __device__ __forceinline__ void go_on() {
#pragma unroll
    for (int i = 0; i < K - 1; ++i) unpack(pack(x[kSteps + i]), x[i]);
  }
};

// Backward

/// g = dy act'(sum); 0 where dy is 0.
template <bool kSilu, bool kCareful>
__device__ __forceinline__ float under_activation(float dy, float sum) {
  if (!kSilu) return dy;
  const float gate = sigmoid(sum);
  const float slope = fmaf(gate * sum, 1.f - gate, gate);
  return kCareful && dy == 0.f ? 0.f : dy * slope;
}

/// Stores the gradient of input s if it is the run's: of x, or of the initial state before it.
template <typename T>
__device__ __forceinline__ void store_dx(const CausalConv1dCudaBwd& p, const ConvPlace& place,
                                         int64_t s, const float (&dx)[4]) {
  if (s >= place.begin && s < place.end) {
    store_four(place.at<T>(p.dx, s), pack(dx), place.count, place.whole);
  } else if (s < 0 && place.begin == 0 && p.dinitial_state != nullptr) {
    store_four(p.dinitial_state + place.state(p.in, s), pack(dx), place.count, place.whole);
  }
}

/// The backward by p.dsum, for any number of taps and any place of the channels.
void causal_conv1d_cuda_bwd_any(const CausalConv1dCudaBwd& p, bool aligned, CudaStream stream);

// Any number of taps: inputs are read where they lie, once a tap.

/// The first input that counts at step t of the place's row: at most t, and at least t - (K - 1).
__device__ __forceinline__ int64_t oldest_input(const CausalConv1dCudaInputs& in,
                                                const ConvPlace& place, int64_t t) {
  const int64_t least = t - (in.K - 1);
  if (in.reset.data == nullptr) return least;
  for (int64_t s = t; s > least && s >= 0; --s) {
    if (place.reset(in, s)) return s;
  }
  return least;
}

/// Input s, from x or from the initial state.
template <typename T>
__device__ __forceinline__ void load_input(const CausalConv1dCudaInputs& in, const ConvPlace& place,
                                           int64_t s, float (&x)[4]) {
  if (s < 0) return load_floats(in.initial_state, place.state(in, s), place, x);
  unpack(widen<T>(load_four(place.at<const T>(in.x, s), place.count, place.whole)), x);
}

/// The state after the place's run, the last of its row.
template <typename T>
__device__ __forceinline__ void store_last_state(const CausalConv1dCudaFwd& p,
                                                 const ConvPlace& place) {
  const auto& in = p.in;
  const int64_t first = in.T > 0 ? oldest_input(in, place, in.T - 1) : 1 - in.K;
  for (int64_t s = in.T - (in.K - 1); s < in.T; ++s) {
    float x[4] = {};
    if (s >= first) load_input<T>(in, place, s, x);
    store_four(p.last_state + place.state(in, s - in.T), pack(x), place.count, place.whole);
  }
}

/// weight[channel + c, k] of the four channels.
__device__ __forceinline__ void load_tap(const CausalConv1dCudaInputs& in, const ConvPlace& place,
                                         int64_t k, float (&tap)[4]) {
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    tap[c] = c < place.count ? in.weight[(place.channel + c) * in.K + k] : 0.f;
  }
}

/// bias + Σ over taps at step t, the oldest first.
template <typename T>
__device__ __forceinline__ void weighted_sum(const CausalConv1dCudaInputs& in,
                                             const ConvPlace& place, int64_t t, float (&sum)[4]) {
  load_floats(in.bias, place.channel, place, sum);
  for (int64_t s = oldest_input(in, place, t); s <= t; ++s) {
    float x[4], tap[4];
    load_input<T>(in, place, s, x);
    load_tap(in, place, in.K - 1 - (t - s), tap);
#pragma unroll
    for (int c = 0; c < 4; ++c) sum[c] = fmaf(tap[c], x[c], sum[c]);
  }
}

}  // namespace retain::kernels
