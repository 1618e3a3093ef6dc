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

/// A block of tiles of one group.
struct Block {
  int64_t group, index;  ///< index within the group
  int64_t first_tile, tiles;
};

RETAIN_INLINE int64_t blocks(const ScanSizes& size) { return size.G * size.blocks_per_group; }

RETAIN_INLINE Block block_at(const ScanSizes& size, int64_t index) {
  const int64_t group = index / size.blocks_per_group;
  const int64_t in_group = index - group * size.blocks_per_group;
  const int64_t rest = size.tiles_per_group - in_group * kScanTiles;
  return {group, in_group, group * size.tiles_per_group + in_group * kScanTiles,
          rest < kScanTiles ? rest : kScanTiles};
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

/// Steps [first, first + count), while those of the next chunk are on their way from memory.
struct Span {
  int64_t first, count, next, next_count;
};

/// One chunk of one tile of one row, ready for the recurrence.
template <typename T>
struct Chunk {
  Span span;
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
                              const Span& span, StepLanes<T>& to) {
  for (int64_t k = 0; k < span.next_count; ++k) {
    __builtin_prefetch(from.at(span.next + k, b) + tile.channel);
  }
  for (int64_t k = 0; k < span.count; ++k) {
    load_lanes(from.at(span.first + k, b) + tile.channel, tile.width, to.lane + k * kScanLanes<T>);
  }
}

template <typename T>
RETAIN_INLINE void store_steps(const StepLanes<T>& from, const Tile& tile, int64_t b,
                               const Span& span, const TimeMajor<T>& to) {
  for (int64_t k = 0; k < span.count; ++k) {
    store_lanes(from.lane + k * kScanLanes<T>, tile.width, to.at(span.first + k, b) + tile.channel);
  }
  for (int64_t k = 0; k < span.next_count; ++k) {
    __builtin_prefetch(to.at(span.next + k, b) + tile.channel, 1);
  }
}

/// to[j · to_stride + i] = from[i · from_stride + j] for a 4 by 4 block.
RETAIN_INLINE void transpose_block(const float* from, int64_t from_stride, float* to,
                                   int64_t to_stride) {
  typedef float Quad __attribute__((vector_size(16)));
  Quad row[4];
  for (int i = 0; i < 4; ++i) __builtin_memcpy(&row[i], from + i * from_stride, sizeof(Quad));
  const Quad low01 = __builtin_shufflevector(row[0], row[1], 0, 4, 1, 5);
  const Quad low23 = __builtin_shufflevector(row[2], row[3], 0, 4, 1, 5);
  const Quad high01 = __builtin_shufflevector(row[0], row[1], 2, 6, 3, 7);
  const Quad high23 = __builtin_shufflevector(row[2], row[3], 2, 6, 3, 7);
  const Quad column[4] = {__builtin_shufflevector(low01, low23, 0, 1, 4, 5),
                          __builtin_shufflevector(low01, low23, 2, 3, 6, 7),
                          __builtin_shufflevector(high01, high23, 0, 1, 4, 5),
                          __builtin_shufflevector(high01, high23, 2, 3, 6, 7)};
  for (int j = 0; j < 4; ++j) __builtin_memcpy(to + j * to_stride, &column[j], sizeof(Quad));
}

RETAIN_INLINE void transpose_block(const double* from, int64_t from_stride, double* to,
                                   int64_t to_stride) {
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < 4; ++j) to[j * to_stride + i] = from[i * from_stride + j];
  }
}

/// [rows, columns] → [columns, rows], in blocks where the sizes allow.
template <typename T>
RETAIN_INLINE void transpose(const T* from, int64_t from_stride, int64_t rows, int64_t columns,
                             T* to, int64_t to_stride) {
  const int64_t row_blocks = rows / 4 * 4, column_blocks = columns / 4 * 4;
  for (int64_t i = 0; i < row_blocks; i += 4) {
    for (int64_t j = 0; j < column_blocks; j += 4) {
      transpose_block(from + i * from_stride + j, from_stride, to + j * to_stride + i, to_stride);
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = i < row_blocks ? column_blocks : 0; j < columns; ++j) {
      to[j * to_stride + i] = from[i * from_stride + j];
    }
  }
}

/// The tile's rows of a [D, N] matrix → [N, lanes].
template <typename T>
RETAIN_INLINE void load_tile(const T* matrix, const Tile& tile, int64_t N, T* packed) {
  if (tile.width < kScanLanes<T>) fill_zero(packed, N * kScanLanes<T>);
  transpose(matrix + tile.channel * N, N, tile.width, N, packed, kScanLanes<T>);
}

template <typename T>
RETAIN_INLINE void store_tile(const T* packed, const Tile& tile, int64_t N, T* matrix) {
  transpose(packed, kScanLanes<T>, N, tile.width, matrix + tile.channel * N, N);
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
  load_steps(in.u, tile, b, chunk.span, chunk.u);
  load_steps(in.delta, tile, b, chunk.span, chunk.delta);
  for (int64_t k = 0; k < chunk.span.count; ++k) {
#pragma omp simd
    for (int64_t c = 0; c < kLanes; ++c) {
      chunk.delta.lane[k * kLanes + c] += weights.delta_bias.lane[c];
    }
    chunk.reset[k] = in.reset.data != nullptr && *in.reset.at(chunk.span.first + k, b);
  }
  if (with_slope) {
#pragma omp simd
    for (int64_t i = 0; i < chunk.span.count * kLanes; ++i) {
      const T slope = softplus_slope(chunk.delta.lane[i]);
      chunk.delta_slope.lane[i] = in.delta_softplus ? slope : T(1);
    }
  }
  if (in.delta_softplus) {
#pragma omp simd
    for (int64_t i = 0; i < chunk.span.count * kLanes; ++i) {
      chunk.delta.lane[i] = softplus(chunk.delta.lane[i]);
    }
  }
  chunk.B = in.B.at(chunk.span.first, b) + tile.group * in.B_stride_g;
  chunk.C = in.C.at(chunk.span.first, b) + tile.group * in.C_stride_g;
  chunk.B_stride = in.B.stride_t;
  chunk.C_stride = in.C.stride_t;
}

/// Chunk `index`; `direction` (1 or -1) says which chunk comes next.
RETAIN_INLINE Span span_at(const ScanSizes& size, int64_t index, int64_t direction) {
  const auto count = [&](int64_t first) {
    const int64_t rest = size.T - first;
    return first < 0 || rest < 0 ? 0 : rest < kScanChunk ? rest : kScanChunk;
  };
  const int64_t first = index * kScanChunk, next = first + direction * kScanChunk;
  return {first, count(first), next, count(next)};
}

}  // namespace retain::kernels::RETAIN_CPU_ISA
