#pragma once
// The backward pass of the causal convolution as a thread walks it over a run of time, with the
// windows of x and of the unfinished dx in registers; the equations are in causal_conv1d_bwd.cu.

#include <retain/kernels/causal_conv1d/causal_conv1d_product.cuh>

namespace retain::kernels {

constexpr int kSteps = 4;  ///< of a chunk; no fewer than K - 1

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
    const unsigned none = 0;
    const auto nothing = *reinterpret_cast<const Two<T>*>(&none);
    Two<T> zero[2] = {nothing, nothing};
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      zero[0] = __hfma2(*reinterpret_cast<const Two<T>*>(&four[i].x), nothing, zero[0]);
      zero[1] = __hfma2(*reinterpret_cast<const Two<T>*>(&four[i].y), nothing, zero[1]);
    }
    const Two<T> sum = __hadd2(zero[0], zero[1]);
    return (*reinterpret_cast<const unsigned*>(&sum) & 0x7fff7fffu) == 0;
  }
}

/// x and dy as a thread reads them, a chunk at a time, while copies bring the next to shared
/// memory. In registers all that is on its way would be waited for with the first that is read. A
/// copy brings kFours: the thread's own, or two of its warp's, whose lanes then lie side by side.
template <typename T, int kFours>
class Inputs {
 public:
  /// Bytes of a block's shared memory.
  static __host__ __device__ __forceinline__ constexpr int bytes(int threads) {
    return 2 * kSlot * threads * int{sizeof(Four<T>)};
  }

  __device__ __forceinline__ Inputs(const CausalConv1dCudaBwd& p, const ConvPlace& place,
                                    char* memory)
      : x_(place.at<const T>(p.in.x, place.begin)),
        dy_(place.at<const T>(p.dy, place.begin)),
        x_stride_(p.in.x.stride_t),
        dy_stride_(p.dy.stride_t),
        own_(reinterpret_cast<Four<T>*>(memory) + threadIdx.x),
        row_(blockDim.x) {
    if (kFours == 1) return;
    x_ += step() * x_stride_ + 4 * aside();
    dy_ += step() * dy_stride_ + 4 * aside();
  }

  /// Starts to bring the next chunk, of which `steps` exist, if any; zeros for the others.
  __device__ __forceinline__ void fetch(int64_t steps) {
    Four<T>* to = own_ + next_ + step() * row_ + aside();
    const auto copy = [](Four<T>* to, const T* from, bool there) {
      kFours == 1 ? copy_four<T>(to, from, there) : copy_word(to, from, there);
    };
    if (steps >= kSteps) {
#pragma unroll
      for (int i = 0; i < kSteps; i += kFours) {
        copy(to + i * row_, x_ + i * x_stride_, true);
        copy(to + (kSteps + i) * row_, dy_ + i * dy_stride_, true);
      }
    } else if (steps > 0) {
#pragma unroll
      for (int i = 0; i < kSteps; i += kFours) {
        const bool there = i + step() < steps;
        copy(to + i * row_, x_ + (there ? i * x_stride_ : -step() * x_stride_), there);
        copy(to + (kSteps + i) * row_, dy_ + (there ? i * dy_stride_ : -step() * dy_stride_),
             there);
      }
    }
    x_ += kSteps * x_stride_;
    dy_ += kSteps * dy_stride_;
  }

  /// Waits for the chunk that was fetched, which is read from now on.
  __device__ __forceinline__ void take() {
    wait_for_copies();
    if (kFours > 1) __syncwarp();
    now_ = next_;
    next_ = kSlot * row_ - next_;
  }

  __device__ __forceinline__ Four<T> x(int step) const { return own_[now_ + step * row_]; }
  __device__ __forceinline__ Four<T> dy(int step) const {
    return own_[now_ + (kSteps + step) * row_];
  }

 private:
  static constexpr int kSlot = 2 * kSteps;  ///< rows of a chunk, a four for each thread

  /// Where the thread's copies lie beside what it reads: steps, and fours of its warp.
  static __device__ __forceinline__ int step() { return kFours == 1 ? 0 : threadIdx.x % 32 / 16; }
  static __device__ __forceinline__ int aside() {
    const int lane = threadIdx.x % 32;
    return kFours == 1 ? 0 : lane % 16 * 2 - lane;
  }

  const T *x_, *dy_;  ///< what the thread brings next
  const int64_t x_stride_, dy_stride_;
  Four<T>* own_;            ///< the thread's first
  const int row_;           ///< fours from row to row
  int now_ = 0, next_ = 0;  ///< where the chunks lie that are read and fetched
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
  Channels<K>& channels;
  Addend& addend;
  Inputs<T, Addend::kFours> inputs;
  float x[K - 1 + kSteps][4], dx[K - 1 + kSteps][4];  ///< before a chunk, then its own
  int first;    ///< the first input that counts, from the chunk's first step on
  bool finite;  ///< the inputs before the chunk

  __device__ __forceinline__ Walk(const CausalConv1dCudaBwd& p, const ConvPlace& place,
                                  int64_t stop, char* memory, Channels<K>& all, Addend& besides)
      : channels(all), addend(besides), inputs(p, place, memory) {
    inputs.fetch(stop - place.begin);
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
  /// are NaN.
  template <bool kSums, bool kCareful>
  __device__ __forceinline__ void steps(unsigned resets, int at) {
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      if (kCareful && (resets >> i & 1)) first = i;
      float dy[4];
      unpack(widen<T>(inputs.dy(i)), dy);
      if constexpr (Addend::kThere) {
        float besides[4];
        unpack(addend.at(at + i), besides);
#pragma unroll
        for (int c = 0; c < 4; ++c) dy[c] += besides[c];
      }
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

  /// Comes to a chunk, behind which `left` steps are left. Returns whether some of its inputs, or
  /// those before, do not count or are NaN.
  __device__ __forceinline__ bool take(unsigned resets, int64_t left) {
    inputs.take();
    Four<T> four[kSteps];
#pragma unroll
    for (int i = 0; i < kSteps; ++i) four[i] = inputs.x(i);
    inputs.fetch(left);
    const bool now_finite = all_finite<T>(four);
    const bool careful = resets != 0 || first > 1 - K || !finite || !now_finite;
    finite = now_finite;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) unpack(widen<T>(four[i]), x[K - 1 + i]);
    return careful;
  }

  /// Stores the gradients that the chunk finishes.
  __device__ __forceinline__ void store_whole(T* to, int64_t stride_t) const {
#pragma unroll
    for (int i = 0; i < kSteps; ++i) store_word(to + i * stride_t, pack(dx[i]));
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
    walk.store_whole(place.at<T>(p.dx, first), p.dx.stride_t);
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
                                         char* memory, Channels<K>& channels, Addend& addend) {
  const auto& in = p.in;
  const int64_t stop = min(place.end + kSteps, in.T);
  if constexpr (Addend::kThere) addend.fetch(place.begin, place.b, stop);
  Walk<T, K, kSilu, Addend> walk(p, place, stop, memory, channels, addend);
  ResetFlags flags(in, place);  // a product brings its own
  flags.fetch(static_cast<int>(min(stop - place.begin, int64_t{kSteps})));
  for (int64_t t = place.begin;;) {
    int at = 0;
    bool careful = false;
    unsigned resets;
    if constexpr (Addend::kThere) {
      at = static_cast<int>(t - place.begin) % kProductSteps;
      if (at == 0) addend.make(t + kProductSteps, place.b, stop);
      // Chunks that need no care, with one of the run before them and a whole one behind.
      const int64_t made = t - at, whole = stop - made - 2 * kSteps + 1;
      const int end = t == place.begin ? 0 : static_cast<int>(min(whole, int64_t{kProductSteps}));
      T* to = place.at<T>(p.dx, t - (K - 1));
#pragma unroll 1
      for (; at < end; at += kSteps) {
        careful = walk.take(addend.resets(at), kSteps);
        if (careful) break;
        walk.template steps<true, false>(0, at);
        walk.store_whole(to, p.dx.stride_t);
        walk.shift();
        to += kSteps * p.dx.stride_t;
      }
      t = made + at;
      if (at == kProductSteps) continue;
      resets = addend.resets(at);
    } else {
      resets = flags.bits();
      flags.fetch(static_cast<int>(min(stop - t - kSteps, int64_t{kSteps})));
    }
    if (!careful) careful = walk.take(resets, stop - t - kSteps);
    if (t < place.end) {
      careful ? walk.template steps<true, true>(resets, at)
              : walk.template steps<true, false>(0, at);
    } else {
      careful ? walk.template steps<false, true>(resets, at)
              : walk.template steps<false, false>(0, at);
    }
    if (t + kSteps >= in.T) return store_last<T>(p, place, t, walk);
    store_finished<T>(p, place, t, walk);
    if (t + kSteps >= stop) return;
    walk.shift();
    t += kSteps;
  }
}

}  // namespace retain::kernels
