// Forward scan of one tile of channels: delta' = softplus(delta + bias); h = exp(delta' A) h +
// delta' B u; y = (C·h + D u) silu(z). A, h and a step's channels lie in memory as [N, lanes] and
// [lanes]: the vector runs over channels, the sum over n stays in registers, and B and C are
// broadcast.

#include <retain/kernels/selective_scan/selective_scan_tile.h>

namespace retain::kernels::RETAIN_CPU_ISA {
namespace {

/// h ← exp2(delta A_tile) h + delta u B;  y ← C·h.
template <typename T>
[[gnu::noinline]] void advance(int64_t N, const T* __restrict A, const T* __restrict B,
                               const T* __restrict C, const T* __restrict delta,
                               const T* __restrict u, T* __restrict h, T* __restrict y) {
  constexpr int64_t kLanes = kScanLanes<T>;
  T drive[kLanes], sum[kLanes];
  for (int64_t c = 0; c < kLanes; ++c) drive[c] = delta[c] * u[c];
  for (int64_t c = 0; c < kLanes; ++c) sum[c] = 0;
  for (int64_t n = 0; n < N; ++n) {
#pragma omp simd
    for (int64_t c = 0; c < kLanes; ++c) {
      const int64_t i = n * kLanes + c;
      const T next = exp2(delta[c] * A[i]) * h[i] + drive[c] * B[n];
      h[i] = next;
      sum[c] += C[n] * next;
    }
  }
  for (int64_t c = 0; c < kLanes; ++c) y[c] = sum[c];
}

/// y ← (y + D u) silu(z), the gate only where z is there.
template <typename T>
void finish(const SelectiveScanFwd<T>& p, const Tile& tile, const TileWeights<T>& weights,
            int64_t b, const Chunk<T>& chunk, StepLanes<T>& y) {
  constexpr int64_t kLanes = kScanLanes<T>;
  for (int64_t k = 0; k < chunk.span.count; ++k) {
#pragma omp simd
    for (int64_t c = 0; c < kLanes; ++c) {
      y.lane[k * kLanes + c] += weights.D.lane[c] * chunk.u.lane[k * kLanes + c];
    }
  }
  if (p.in.z.data != nullptr) {
    StepLanes<T> z;
    load_steps(p.in.z, tile, b, chunk.span, z);
#pragma omp simd
    for (int64_t i = 0; i < chunk.span.count * kLanes; ++i) y.lane[i] *= silu(z.lane[i]);
  }
  store_steps(y, tile, b, chunk.span, p.y);
}

/// One chunk of one tile. A sequence and its single steps go the same way, and so agree bit for
/// bit.
template <typename T>
void chunk_of_tile(const SelectiveScanFwd<T>& p, const Tile& tile, int64_t b, const Span& span,
                   T* h) {
  constexpr int64_t kLanes = kScanLanes<T>;
  const auto& size = p.in.size;
  const int64_t state = size.N * kLanes;
  const auto weights = tile_weights(p.in, tile);
  Chunk<T> chunk;
  StepLanes<T> y;
  chunk.span = span;
  load_chunk(p.in, tile, weights, b, false, chunk);
  if (p.checkpoints != nullptr) {
    const int64_t row = span.first / kScanChunk * size.B + b;
    store_tile(h, tile, size.N, p.checkpoints + row * size.D * size.N);
  }
  for (int64_t k = 0; k < span.count; ++k) {
    if (chunk.reset[k]) fill_zero(h, state);
    advance<T>(size.N, weights.A, chunk.B + k * chunk.B_stride, chunk.C + k * chunk.C_stride,
               chunk.delta.lane + k * kLanes, chunk.u.lane + k * kLanes, h, y.lane + k * kLanes);
  }
  finish(p, tile, weights, b, chunk, y);
}

template <typename T>
void row_of_block(const SelectiveScanFwd<T>& p, const Block& block, int64_t b, T* h) {
  const auto& size = p.in.size;
  const int64_t state = size.N * kScanLanes<T>;
  if (p.initial_state == nullptr) fill_zero(h, block.tiles * state);
  for (int64_t i = 0; p.initial_state != nullptr && i < block.tiles; ++i) {
    load_tile(p.initial_state + b * size.D * size.N, tile_at<T>(size, block.first_tile + i), size.N,
              h + i * state);
  }
  for (int64_t c = 0; c < size.chunks; ++c) {
    for (int64_t i = 0; i < block.tiles; ++i) {
      chunk_of_tile(p, tile_at<T>(size, block.first_tile + i), b, span_at(size, c, 1),
                    h + i * state);
    }
  }
  for (int64_t i = 0; i < block.tiles; ++i) {
    store_tile(h + i * state, tile_at<T>(size, block.first_tile + i), size.N,
               p.last_state + b * size.D * size.N);
  }
}

}  // namespace

template <typename T>
void selective_scan_fwd(const SelectiveScanFwd<T>& p, int64_t begin, int64_t end, T* h) {
  const auto& size = p.in.size;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / blocks(size);
    row_of_block(p, block_at(size, item - b * blocks(size)), b, h);
  }
}

template void selective_scan_fwd(const SelectiveScanFwd<float>&, int64_t, int64_t, float*);
template void selective_scan_fwd(const SelectiveScanFwd<double>&, int64_t, int64_t, double*);

}  // namespace retain::kernels::RETAIN_CPU_ISA
