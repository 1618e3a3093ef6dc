#pragma once
// What the forward and the backward scan share: the channels of one tile over the steps of one
// chunk.

#include <retain/kernels/common/vector_math.h>
#include <retain/kernels/selective_scan/selective_scan.h>

namespace retain::kernels::RETAIN_CPU_ISA {

/// Where one tile of channels lies.
struct Tile {
  int64_t index;  ///< among all tiles
  int64_t group;
  int64_t channel;  ///< the first one
  int64_t width;    ///< channels that exist; the other lanes are zeros
};

template <typename T>
RETAIN_INLINE Tile tile_at(const ScanSizes& size, int64_t index) {
  const int64_t group = index / size.tiles_per_group;
  const int64_t offset = (index - group * size.tiles_per_group) * kScanLanes<T>;
  const int64_t rest = size.D / size.G - offset;
  return {index, group, group * (size.D / size.G) + offset,
          rest < kScanLanes<T> ? rest : kScanLanes<T>};
}

/// One step's channels, and those of all steps of a chunk.
template <typename T>
struct alignas(64) Lanes {
  T lane[kScanLanes<T>];
};
template <typename T>
struct alignas(64) StepLanes {
  T lane[kScanChunk * kScanLanes<T>];  ///< [steps, lanes]
};

/// The weights of one tile, zero where absent.
template <typename T>
struct TileWeights {
  const T* A;  ///< [N, lanes]
  Lanes<T> delta_bias, D;
};

/// One chunk of one tile of one row, ready for the recurrence.
template <typename T>
struct Chunk {
  int64_t first, count;      ///< steps [first, first + count)
  StepLanes<T> delta, u;     ///< delta is delta', after bias and softplus
  StepLanes<T> delta_slope;  ///< d delta' / d delta; filled for the backward pass only
  bool reset[kScanChunk];
  const T *B, *C;  ///< [N] of the first step
  int64_t B_stride, C_stride;
};

template <typename T>
RETAIN_INLINE void fill_zero(T* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) values[i] = T(0);
}

template <typename T>
RETAIN_INLINE void load_lanes(const T* from, int64_t width, T* to) {
  if (width == kScanLanes<T>) {
    __builtin_memcpy(to, from, sizeof(Lanes<T>));
  } else {
    fill_zero(to, kScanLanes<T>);
    for (int64_t c = 0; c < width; ++c) to[c] = from[c];
  }
}

template <typename T>
RETAIN_INLINE void store_lanes(const T* from, int64_t width, T* to) {
  if (width == kScanLanes<T>) {
    __builtin_memcpy(to, from, sizeof(Lanes<T>));
  } else {
    for (int64_t c = 0; c < width; ++c) to[c] = from[c];
  }
}

template <typename T>
RETAIN_INLINE void load_steps(const TimeMajor<const T>& from, const Tile& tile, int64_t b,
                              int64_t first, int64_t count, StepLanes<T>& to) {
  for (int64_t k = 0; k < count; ++k) {
    load_lanes(from.at(first + k, b) + tile.channel, tile.width, to.lane + k * kScanLanes<T>);
  }
}

template <typename T>
RETAIN_INLINE void store_steps(const StepLanes<T>& from, const Tile& tile, int64_t b, int64_t first,
                               int64_t count, const TimeMajor<T>& to) {
  for (int64_t k = 0; k < count; ++k) {
    store_lanes(from.lane + k * kScanLanes<T>, tile.width, to.at(first + k, b) + tile.channel);
  }
}

/// The tile's rows of a [D, N] matrix → [N, lanes].
template <typename T>
RETAIN_INLINE void load_tile(const T* matrix, const Tile& tile, int64_t N, T* packed) {
  const T* from = matrix + tile.channel * N;
  for (int64_t n = 0; n < N; ++n) {
    for (int64_t c = 0; c < kScanLanes<T>; ++c) {
      packed[n * kScanLanes<T> + c] = c < tile.width ? from[c * N + n] : T(0);
    }
  }
}

template <typename T>
RETAIN_INLINE void store_tile(const T* packed, const Tile& tile, int64_t N, T* matrix) {
  T* to = matrix + tile.channel * N;
  for (int64_t c = 0; c < tile.width; ++c) {
    for (int64_t n = 0; n < N; ++n) to[c * N + n] = packed[n * kScanLanes<T> + c];
  }
}

template <typename T>
RETAIN_INLINE TileWeights<T> tile_weights(const SelectiveScanInputs<T>& in, const Tile& tile) {
  TileWeights<T> weights{in.A_tiles + tile.index * in.size.N * kScanLanes<T>, {}, {}};
  if (in.delta_bias != nullptr) {
    load_lanes(in.delta_bias + tile.channel, tile.width, weights.delta_bias.lane);
  }
  if (in.D != nullptr) load_lanes(in.D + tile.channel, tile.width, weights.D.lane);
  return weights;
}

/// Loads delta, u, reset, and finds B and C; the padding lanes get delta' = u = 0.
template <typename T>
RETAIN_INLINE void load_chunk(const SelectiveScanInputs<T>& in, const Tile& tile,
                              const TileWeights<T>& weights, int64_t b, bool with_slope,
                              Chunk<T>& chunk) {
  constexpr int64_t kLanes = kScanLanes<T>;
  load_steps(in.u, tile, b, chunk.first, chunk.count, chunk.u);
  load_steps(in.delta, tile, b, chunk.first, chunk.count, chunk.delta);
  for (int64_t k = 0; k < chunk.count; ++k) {
    for (int64_t c = 0; c < kLanes; ++c) {
      chunk.delta.lane[k * kLanes + c] += weights.delta_bias.lane[c];
    }
    chunk.reset[k] = in.reset.data != nullptr && *in.reset.at(chunk.first + k, b);
  }
  if (with_slope) {
#pragma omp simd
    for (int64_t i = 0; i < chunk.count * kLanes; ++i) {
      const T slope = softplus_slope(chunk.delta.lane[i]);
      chunk.delta_slope.lane[i] = in.delta_softplus ? slope : T(1);
    }
  }
  if (in.delta_softplus) {
#pragma omp simd
    for (int64_t i = 0; i < chunk.count * kLanes; ++i) {
      chunk.delta.lane[i] = softplus(chunk.delta.lane[i]);
    }
  }
  chunk.B = in.B.at(chunk.first, b) + tile.group * in.B_stride_g;
  chunk.C = in.C.at(chunk.first, b) + tile.group * in.C_stride_g;
  chunk.B_stride = in.B.stride_t;
  chunk.C_stride = in.C.stride_t;
}

RETAIN_INLINE int64_t steps_in_chunk(const ScanSizes& size, int64_t first) {
  return size.T - first < kScanChunk ? size.T - first : kScanChunk;
}

}  // namespace retain::kernels::RETAIN_CPU_ISA
