#pragma once
// What the forward and the backward scan share: the channels of one block of tiles over the steps
// of one chunk, and strips: the recurrence runs over all steps of the chunk for a vector of
// channels and kStrip state indices at a time, whose states stay in registers.

#include <retain/kernels/common/vector_math.h>
#include <retain/kernels/common/wide.h>
#include <retain/kernels/selective_scan/selective_scan.h>

#include <type_traits>

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

/// A block of tiles of one group; their channels lie side by side.
struct Block {
  int64_t group, index;  ///< index within the group
  int64_t tiles;
  Tile tile[kScanTiles];
};

RETAIN_INLINE int64_t blocks(const ScanSizes& size) { return size.G * size.blocks_per_group; }

template <typename T>
RETAIN_INLINE Block block_at(const ScanSizes& size, int64_t index) {
  const int64_t group = index / size.blocks_per_group;
  const int64_t in_group = index - group * size.blocks_per_group;
  const int64_t rest = size.tiles_per_group - in_group * kScanTiles;
  Block block{group, in_group, rest < kScanTiles ? rest : kScanTiles, {}};
  for (int64_t i = 0; i < block.tiles; ++i) {
    block.tile[i] = tile_at<T>(size, group * size.tiles_per_group + in_group * kScanTiles + i);
  }
  return block;
}

/// One step's channels of a tile, and those of all steps of a chunk.
template <typename T>
struct alignas(64) Lanes {
  T lane[kScanLanes<T>];
};
template <typename T>
struct alignas(64) StepLanes {
  T lane[kScanChunk * kScanLanes<T>];  ///< [steps, lanes]
};

/// State indices whose recurrences run side by side: one alone waits for each of its operations.
inline constexpr int kStrip = 4;

/// Calls run(first, count) for state indices first, …, the count, kStrip or 1, known when compiled.
template <typename Run>
RETAIN_INLINE void for_each_strip(int64_t N, const Run& run) {
  int64_t n = 0;
  for (; n + kStrip <= N; n += kStrip) run(n, std::integral_constant<int, kStrip>());
  for (; n < N; ++n) run(n, std::integral_constant<int, 1>());
}

/// Steps [first, first + count), while those of the next chunk are on their way from memory.
struct Span {
  int64_t first, count, next, next_count;
};

/// One chunk of one block of one row, ready for the recurrence.
template <typename T>
struct Chunk {
  Span span;
  StepLanes<T> delta[kScanTiles], u[kScanTiles];  ///< delta is delta', after bias and softplus
  StepLanes<T> drive[kScanTiles];                 ///< delta' u
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
    for (int64_t c = 0; c < kScanLanes<T>; c += kWide<T>) store_wide(to + c, load_wide(from + c));
  } else {
    fill_zero(to, kScanLanes<T>);
    for (int64_t c = 0; c < width; ++c) to[c] = from[c];
  }
}

template <typename T>
RETAIN_INLINE void store_lanes(const T* from, int64_t width, T* to) {
  if (width == kScanLanes<T>) {
    for (int64_t c = 0; c < kScanLanes<T>; c += kWide<T>) store_wide(to + c, load_wide(from + c));
  } else {
    for (int64_t c = 0; c < width; ++c) to[c] = from[c];
  }
}

/// to[tile] [steps, lanes], one step of the whole block after the other, as they lie in memory.
template <typename T>
RETAIN_INLINE void load_steps(const TimeMajor<const T>& from, const Block& block, int64_t b,
                              const Span& span, StepLanes<T>* to) {
  for (int64_t k = 0; k < span.next_count; ++k) {
    for (int64_t i = 0; i < block.tiles; ++i) {
      __builtin_prefetch(from.at(span.next + k, b) + block.tile[i].channel);
    }
  }
  for (int64_t k = 0; k < span.count; ++k) {
    for (int64_t i = 0; i < block.tiles; ++i) {
      load_lanes(from.at(span.first + k, b) + block.tile[i].channel, block.tile[i].width,
                 to[i].lane + k * kScanLanes<T>);
    }
  }
}

template <typename T>
RETAIN_INLINE void store_steps(const StepLanes<T>* from, const Block& block, int64_t b,
                               const Span& span, const TimeMajor<T>& to) {
  for (int64_t k = 0; k < span.count; ++k) {
    for (int64_t i = 0; i < block.tiles; ++i) {
      store_lanes(from[i].lane + k * kScanLanes<T>, block.tile[i].width,
                  to.at(span.first + k, b) + block.tile[i].channel);
    }
  }
  for (int64_t k = 0; k < span.next_count; ++k) {
    for (int64_t i = 0; i < block.tiles; ++i) {
      __builtin_prefetch(to.at(span.next + k, b) + block.tile[i].channel, 1);
    }
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

/// A tile's part of A_tiles, and of the skip weights, zero where absent.
template <typename T>
RETAIN_INLINE const T* tile_A(const SelectiveScanInputs<T>& in, const Tile& tile) {
  return in.A_tiles + tile.index * in.size.N * kScanLanes<T>;
}

template <typename T>
RETAIN_INLINE Lanes<T> tile_D(const SelectiveScanInputs<T>& in, const Tile& tile) {
  Lanes<T> D{};
  if (in.D != nullptr) load_lanes(in.D + tile.channel, tile.width, D.lane);
  return D;
}

/// Loads delta, u, reset, and finds B and C; the padding lanes get delta' = u = 0. With `slope`,
/// d delta' / d delta too.
template <typename T>
RETAIN_INLINE void load_chunk(const SelectiveScanInputs<T>& in, const Block& block, int64_t b,
                              Chunk<T>& chunk, StepLanes<T>* slope = nullptr) {
  constexpr int64_t kLanes = kScanLanes<T>;
  const int64_t steps = chunk.span.count;
  load_steps(in.u, block, b, chunk.span, chunk.u);
  load_steps(in.delta, block, b, chunk.span, chunk.delta);
  for (int64_t k = 0; k < steps; ++k) {
    chunk.reset[k] = in.reset.data != nullptr && *in.reset.at(chunk.span.first + k, b);
  }
  for (int64_t i = 0; i < block.tiles; ++i) {
    T* delta = chunk.delta[i].lane;
    Lanes<T> bias{};
    if (in.delta_bias != nullptr) {
      load_lanes(in.delta_bias + block.tile[i].channel, block.tile[i].width, bias.lane);
    }
    for_each_pack<T>(steps * kLanes, [&](int64_t j, auto pack) {
      using V = decltype(pack);
      V raw;
      for (int64_t w = 0; w < V::kCount; w += kWide<T>) {
        raw.part[w / kWide<T>] = load_wide(delta + j + w) + load_wide(bias.lane + (j + w) % kLanes);
      }
      if (slope != nullptr) {
        (in.delta_softplus ? softplus_slope(raw) : filled<V>(T(1))).store(slope[i].lane + j);
      }
      const V positive = in.delta_softplus ? softplus(raw) : raw;
      positive.store(delta + j);
      (positive * V::load(chunk.u[i].lane + j)).store(chunk.drive[i].lane + j);
    });
  }
  chunk.B = in.B.at(chunk.span.first, b) + block.group * in.B_stride_g;
  chunk.C = in.C.at(chunk.span.first, b) + block.group * in.C_stride_g;
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
