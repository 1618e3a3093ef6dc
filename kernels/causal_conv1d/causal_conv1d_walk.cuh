#pragma once
// The backward pass of the causal convolution as a thread walks it over a run of time, with the
// windows of x and of the unfinished dx in registers; the equations are in causal_conv1d_bwd.cu.

#include <retain/kernels/causal_conv1d/causal_conv1d_product.cuh>

namespace retain::kernels {

constexpr int kSteps = 4;  ///< that a thread loads at once; no fewer than K - 1

/// Adds 0 x: `zero` becomes NaN if one of four elements is not finite.
__device__ __forceinline__ void add_zeros(const float (&x)[4], float& zero) {
#pragma unroll
  for (int c = 0; c < 4; ++c) zero = fmaf(x[c], 0.f, zero);
}

/// Whether all elements of a chunk are finite; two at a time where they are of a half type.
template <typename T>
__device__ __forceinline__ bool all_finite(const Four<T> (&four)[kSteps]) {
  if constexpr (std::is_same_v<T, float>) {
    float zero[kSteps] = {};
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      float x[4];
      unpack(widen<T>(four[i]), x);
      add_zeros(x, zero[i]);
    }
    return zero[0] + zero[1] + (zero[2] + zero[3]) == 0.f;
  } else {
    using Two = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
    const unsigned none = 0;
    const Two nothing = *reinterpret_cast<const Two*>(&none);
    Two zero[2] = {nothing, nothing};
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      zero[0] = __hfma2(*reinterpret_cast<const Two*>(&four[i].x), nothing, zero[0]);
      zero[1] = __hfma2(*reinterpret_cast<const Two*>(&four[i].y), nothing, zero[1]);
    }
    const Two sum = __hadd2(zero[0], zero[1]);
    return (*reinterpret_cast<const unsigned*>(&sum) & 0x7fff7fffu) == 0;
  }
}

/// A [T, B, D] input, a chunk at a time.
template <typename T>
struct Stream {
  const T* from;  ///< where the chunk lies
  int64_t stride_t;
  Four<T> four[kSteps];

  __device__ __forceinline__ Stream(const Activations& x, const ConvPlace& place)
      : from(place.at<const T>(x, place.begin)), stride_t(x.stride_t) {}

  __device__ __forceinline__ void fetch(int i) {
    four[i] = *reinterpret_cast<const Four<T>*>(from + i * stride_t);
  }

  /// Its first `steps`, and zeros.
  __device__ __forceinline__ void fetch_part(int64_t steps) {
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      four[i] = {};
      if (i < steps) fetch(i);
    }
  }
};

/// The resets of a chunk on their way from memory.
struct ResetFlags {
  const unsigned char* from;  ///< where the next chunk's lie
  int64_t stride_t;
  unsigned char flag[kSteps] = {};

  __device__ __forceinline__ ResetFlags(const CausalConv1dCudaInputs& in, const ConvPlace& place)
      : from(reinterpret_cast<const unsigned char*>(in.reset.data)), stride_t(in.reset.stride_t) {
    if (from != nullptr) from += place.begin * stride_t + place.b * in.reset.stride_b;
  }

  /// The next chunk's, of which `left` steps exist.
  __device__ __forceinline__ void fetch(int left) {
    if (from == nullptr) return;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      flag[i] = 0;
      if (i < left) flag[i] = from[i * stride_t];
    }
    from += kSteps * stride_t;
  }

  /// Bit i stands for step i.
  __device__ __forceinline__ unsigned bits() const {
    unsigned all = 0;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) all |= unsigned{flag[i] != 0} << i;
    return all;
  }
};

/// What a thread keeps of its channels.
template <int K>
struct Channels {
  float tap[K][4], bias[4];
  float dtap[K][4] = {}, dbias[4] = {};
};

/// A walk over a run.
template <typename T, int K, bool kSilu, class Addend>
struct Walk {
  static constexpr bool kAhead = sizeof(T) == 2;  ///< chunks are loaded while one is worked on
  Channels<K>& channels;
  Addend& addend;
  Stream<T> x_stream, dy_stream;
  float x[K - 1 + kSteps][4], dx[K - 1 + kSteps][4];  ///< before a chunk, then its own
  int first;    ///< the first input that counts, from the chunk's first step on
  bool finite;  ///< the inputs before the chunk

  __device__ __forceinline__ Walk(const CausalConv1dCudaBwd& p, const ConvPlace& place,
                                  int64_t stop, Channels<K>& all, Addend& besides)
      : channels(all), addend(besides), x_stream(p.in.x, place), dy_stream(p.dy, place) {
    x_stream.fetch_part(stop - place.begin);
    dy_stream.fetch_part(stop - place.begin);
    first = warm_up<T, K>(p.in, place, x);
    float zero = 0;
#pragma unroll
    for (int i = 0; i < K - 1; ++i) {
      unpack({}, dx[i]);
      add_zeros(x[i], zero);
    }
    finite = zero == 0.f;
  }

  /// A chunk's terms. kSums: its steps belong to the run. kCareful: some inputs do not count, or
  /// are NaN. `more` loads dy's next chunk on the way.
  template <bool kSums, bool kCareful>
  __device__ __forceinline__ void steps(unsigned resets, bool more, int at) {
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      if (kCareful && (resets >> i & 1)) first = i;
      float dy[4];
      unpack(widen<T>(dy_stream.four[i]), dy);
      if constexpr (Addend::kThere) {
        float besides[4];
        unpack(addend.at(at + i), besides);
#pragma unroll
        for (int c = 0; c < 4; ++c) dy[c] += besides[c];
      }
      if (more) dy_stream.fetch(i);
      unpack({}, dx[K - 1 + i]);
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        float sum = channels.bias[c];
#pragma unroll
        for (int k = 0; k < K; ++k) {
          const bool counts = !kCareful || i + k - (K - 1) >= first;
          sum = fmaf(channels.tap[k][c], counts ? x[i + k][c] : 0.f, sum);
        }
        const float g = under_activation<kSilu, kCareful>(dy[c], sum);
        if (kSums) channels.dbias[c] += g;
#pragma unroll
        for (int k = 0; k < K; ++k) {
          float &dtap = channels.dtap[k][c], &dinput = dx[i + k][c];
          const bool counts = !kCareful || (i + k - (K - 1) >= first && g != 0.f);
          if (kSums) dtap = counts ? fmaf(g, x[i + k][c], dtap) : dtap;
          dinput = counts ? fmaf(g, channels.tap[k][c], dinput) : dinput;
        }
      }
    }
  }

  /// The chunk's terms, from step `at` of the product on; `more`: the next one is whole, and loaded
  /// meanwhile or right after.
  __device__ __forceinline__ void take(unsigned resets, bool sums, bool more, int at) {
    const bool now_finite = all_finite<T>(x_stream.four);
    const bool careful = resets != 0 || first > 1 - K || !finite || !now_finite;
    finite = now_finite;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) unpack(widen<T>(x_stream.four[i]), x[K - 1 + i]);
    if (more) {
      x_stream.from += kSteps * x_stream.stride_t;
      dy_stream.from += kSteps * dy_stream.stride_t;
    }
    if (kAhead && more) fetch_x();
    const bool ahead = kAhead && more;
    if (sums) {
      careful ? steps<true, true>(resets, ahead, at) : steps<true, false>(0, ahead, at);
    } else {
      careful ? steps<false, true>(resets, ahead, at) : steps<false, false>(0, ahead, at);
    }
    if (kAhead || !more) return;
    fetch_x();
#pragma unroll
    for (int i = 0; i < kSteps; ++i) dy_stream.fetch(i);
  }

  __device__ __forceinline__ void fetch_x() {
#pragma unroll
    for (int i = 0; i < kSteps; ++i) x_stream.fetch(i);
  }

  /// Loads the first `steps` of the next chunk.
  __device__ __forceinline__ void fetch_part(int64_t steps) {
    x_stream.from += kSteps * x_stream.stride_t;
    dy_stream.from += kSteps * dy_stream.stride_t;
    x_stream.fetch_part(steps);
    dy_stream.fetch_part(steps);
  }

  __device__ __forceinline__ void shift() {
#pragma unroll
    for (int i = 0; i < K - 1; ++i) {
      unpack(pack(x[kSteps + i]), x[i]);
      unpack(pack(dx[kSteps + i]), dx[i]);
    }
    first = max(first - kSteps, 1 - K);
  }
};

/// The gradients of a chunk's inputs that no later step adds to; t: its first step.
template <typename T, int K, bool kSilu, class Addend>
__device__ __forceinline__ void store_finished(const CausalConv1dCudaBwd& p, const ConvPlace& place,
                                               int64_t t, const Walk<T, K, kSilu, Addend>& walk) {
  const int64_t first = t - (K - 1);
  if (first >= place.begin && first + kSteps <= place.end) {
    T* to = place.at<T>(p.dx, first);
#pragma unroll
    for (int i = 0; i < kSteps; ++i) store_word(to + i * p.dx.stride_t, pack(walk.dx[i]));
  } else {
#pragma unroll
    for (int i = 0; i < kSteps; ++i) store_dx<T>(p, place, first + i, walk.dx[i]);
  }
}

/// The same for the row's last chunk: all its inputs, and the gradient of the last state in them.
template <typename T, int K, bool kSilu, class Addend>
__device__ __forceinline__ void store_last(const CausalConv1dCudaBwd& p, const ConvPlace& place,
                                           int64_t t, Walk<T, K, kSilu, Addend>& walk) {
#pragma unroll
  for (int i = 0; i < K - 1 + kSteps; ++i) {
    const int64_t s = t - (K - 1) + i, from_end = s - p.in.T;
    if (from_end >= 0) continue;
    if (from_end >= 1 - K && i - (K - 1) >= walk.first && p.dlast_state != nullptr) {
      float dlast[4];
      load_floats(p.dlast_state, place.state(p.in, from_end), place, dlast);
#pragma unroll
      for (int c = 0; c < 4; ++c) walk.dx[i][c] += dlast[c];
    }
    store_dx<T>(p, place, s, walk.dx[i]);
  }
}

/// One run, and a chunk behind it.
template <typename T, int K, bool kSilu, class Addend>
__device__ __forceinline__ void walk_run(const CausalConv1dCudaBwd& p, const ConvPlace& place,
                                         Channels<K>& channels, Addend& addend) {
  const auto& in = p.in;
  const int64_t stop = min(place.end + kSteps, in.T);
  if constexpr (Addend::kThere) addend.fetch(place.begin, place.b, stop);
  Walk<T, K, kSilu, Addend> walk(p, place, stop, channels, addend);
  ResetFlags flags(in, place);
  flags.fetch(static_cast<int>(min(stop - place.begin, int64_t{kSteps})));
  for (int64_t t = place.begin;; t += kSteps) {
    const unsigned resets = flags.bits();
    flags.fetch(static_cast<int>(min(stop - t - kSteps, int64_t{kSteps})));
    const bool more = t + 2 * kSteps <= stop;
    int at = 0;
    if constexpr (Addend::kThere) {
      at = static_cast<int>(t - place.begin) % kProductSteps;
      if (at == 0) addend.make(t + kProductSteps, place.b, stop);
    }
    walk.take(resets, t < place.end, more, at);
    if (t + kSteps >= in.T) return store_last<T>(p, place, t, walk);
    store_finished<T>(p, place, t, walk);
    if (t + kSteps >= stop) return;
    if (!more) walk.fetch_part(stop - t - kSteps);
    walk.shift();
  }
}

}  // namespace retain::kernels
