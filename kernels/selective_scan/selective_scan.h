#pragma once
// The selective scan of Mamba-1 (Gu & Dao 2023, arXiv:2312.00752, Algorithm 2) over pointers and
// strides.
//
// Channels are worked on in tiles of kScanLanes, state index outermost inside a tile, so that every
// vector load is contiguous: "[tiles, N, lanes]" is the packed form of a [D, N] matrix, zero where
// a tile is wider than its group of channels. Time runs in chunks of kScanChunk steps: the forward
// pass keeps the state that enters each chunk, and the backward pass recomputes the chunk from it.
//
// No pointer is owned or kept: all of them need to live only as long as the call. The calls work on
// a range of independent items in one thread, and no result depends on how the items are spread.

#include <retain/kernels/common/time_major.h>

#include <cstdint>

namespace retain::kernels {

inline constexpr int64_t kScanChunk = 16;  ///< time steps between two kept states
/// batch rows whose weight gradients are summed in one item
inline constexpr int64_t kScanRows = 8;
/// tiles in a block, over which dB and dC are summed at once
inline constexpr int64_t kScanTiles = 4;
template <typename T>
inline constexpr int64_t kScanLanes = 64 / static_cast<int64_t>(sizeof(T));

/// Sizes of one call, and of its tiles.
struct ScanSizes {
  int64_t T = 0;  ///< time steps
  int64_t B = 0;  ///< batch rows
  int64_t D = 0;  ///< channels (d_inner)
  int64_t N = 0;  ///< state indices (d_state)
  int64_t G = 1;  ///< groups of channels that share B and C; divides D
  int64_t tiles_per_group = 0;
  int64_t tiles = 0;             ///< G · tiles_per_group
  int64_t blocks_per_group = 0;  ///< ceil(tiles_per_group / kScanTiles)
  int64_t chunks = 0;            ///< ceil(T / kScanChunk)
  int64_t row_tiles = 0;         ///< ceil(B / kScanRows)
};

/// The sizes for elements of type T (float or double).
template <typename T>
ScanSizes scan_sizes(int64_t time, int64_t batch, int64_t dim, int64_t d_state, int64_t groups);

/// What both passes read.
template <typename T>
struct SelectiveScanInputs {
  ScanSizes size;
  TimeMajor<const T> u;      ///< [T, B, D]
  TimeMajor<const T> delta;  ///< [T, B, D], before bias and softplus
  TimeMajor<const T> z;      ///< [T, B, D] gate, or absent
  TimeMajor<const T> B;      ///< [T, B, G, N]
  TimeMajor<const T> C;      ///< [T, B, G, N]
  int64_t B_stride_g = 0;
  int64_t C_stride_g = 0;
  const T* A_tiles = nullptr;     ///< [tiles, N, lanes], A times log2(e), from selective_scan_pack
  const T* D = nullptr;           ///< [D] skip weights, or nullptr
  const T* delta_bias = nullptr;  ///< [D], or nullptr
  bool delta_softplus = false;
  TimeMajor<const bool> reset;  ///< [T, B]: clear the state before step t; or absent
};

template <typename T>
struct SelectiveScanFwd {
  SelectiveScanInputs<T> in;
  const T* initial_state = nullptr;  ///< [B, D, N] contiguous, or nullptr for zero
  TimeMajor<T> y;                    ///< out: [T, B, D]
  T* last_state = nullptr;           ///< out: [B, D, N] contiguous; may not overlap initial_state
  /// out: [chunks, B, D, N], the state that enters each chunk; or nullptr
  T* checkpoints = nullptr;
};

template <typename T>
struct SelectiveScanBwd {
  SelectiveScanInputs<T> in;
  const T* checkpoints = nullptr;  ///< as the forward pass wrote them
  TimeMajor<const T> dy;           ///< [T, B, D], or absent for zero
  const T* dlast_state = nullptr;  ///< [B, D, N] contiguous, or nullptr for zero
  TimeMajor<T> du;                 ///< out: [T, B, D]
  TimeMajor<T> ddelta;             ///< out: [T, B, D]
  TimeMajor<T> dz;                 ///< out: [T, B, D]; absent where z is
  T* dB_blocks = nullptr;  ///< out: [blocks_per_group, T, B, G, N]; dB is their sum, in order
  T* dC_blocks = nullptr;  ///< out: [blocks_per_group, T, B, G, N]
  /// in, zeros; out: [row_tiles, tiles, N, lanes], for selective_scan_unpack
  double* dA_rows = nullptr;
  double* dD_rows = nullptr;           ///< in, zeros; out: [row_tiles, tiles, lanes]
  double* ddelta_bias_rows = nullptr;  ///< in, zeros; out: [row_tiles, tiles, lanes]
  T* dinitial_state = nullptr;         ///< out: [B, D, N] contiguous, or nullptr
};

/// A [D, N] contiguous → A_tiles.
template <typename T>
void selective_scan_pack(const ScanSizes& size, const T* A, T* A_tiles);

/// Sums [row_tiles, tiles, inner, lanes] over row tiles in order → [D, inner] contiguous.
template <typename T>
void selective_scan_unpack(const ScanSizes& size, int64_t inner, const double* rows, T* sum);

/// Elements of T that one thread needs as scratch memory, uninitialised.
int64_t selective_scan_fwd_scratch(const ScanSizes& size, int64_t lanes);
int64_t selective_scan_bwd_scratch(const ScanSizes& size, int64_t lanes);

/// Items [begin, end) of B · G · blocks_per_group; an item is one row and one block of tiles.
template <typename T>
void selective_scan_fwd(const SelectiveScanFwd<T>& params, int64_t begin, int64_t end, T* scratch);

/// Items [begin, end) of row_tiles · G · blocks_per_group; an item is kScanRows rows and one block
/// of tiles.
template <typename T>
void selective_scan_bwd(const SelectiveScanBwd<T>& params, int64_t begin, int64_t end, T* scratch);

}  // namespace retain::kernels
