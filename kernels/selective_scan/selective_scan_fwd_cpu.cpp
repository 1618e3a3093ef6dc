// Forward scan of one block of tiles, chunk by chunk: delta' = softplus(delta + bias); h =
// exp(delta' A) h + delta' B u; y = (C·h + D u) silu(z). A, h and a step's channels lie in memory
// as [N, lanes] and [lanes]: the vector runs over channels, and B and C are broadcast.

#include <retain/kernels/selective_scan/selective_scan_tile.h>

namespace retain::kernels::RETAIN_CPU_ISA {
namespace {

/// Over the steps of a chunk, for one vector of channels and `count` state indices:
/// h ← exp2(delta A) h + drive B;  y += C·h. A and h are [N, lanes], y [steps, lanes].
template <int count, typename T>
RETAIN_INLINE void advance(const Chunk<T>& chunk, const T* delta, const T* drive, const T* A,
                           const T* B, const T* C, T* h, T* y) {
  constexpr int64_t kLanes = kScanLanes<T>;
  Wide<T> state[count];
#pragma GCC unroll 4
  for (int i = 0; i < count; ++i) state[i] = load_wide(h + i * kLanes);
  for (int64_t k = 0; k < chunk.span.count; ++k) {
    if (chunk.reset[k]) {
#pragma GCC unroll 4
      for (int i = 0; i < count; ++i) state[i] = Wide<T>{};
    }
    const auto delta_k = load_wide(delta + k * kLanes), drive_k = load_wide(drive + k * kLanes);
    Wide<T> sum = load_wide(y + k * kLanes);
    Pack<T, count> decay;
#pragma GCC unroll 4
    for (int i = 0; i < count; ++i) decay.part[i] = delta_k * load_wide(A + i * kLanes);
    decay = exp2(decay);
#pragma GCC unroll 4
    for (int i = 0; i < count; ++i) {
      state[i] = decay.part[i] * state[i] + drive_k * B[k * chunk.B_stride + i];
    }
#pragma GCC unroll 4
    for (int i = 0; i < count; ++i) sum += C[k * chunk.C_stride + i] * state[i];
    store_wide(y + k * kLanes, sum);
  }
#pragma GCC unroll 4
  for (int i = 0; i < count; ++i) store_wide(h + i * kLanes, state[i]);
}

/// h [N, lanes] of one tile over a chunk; y ← C·h.
template <typename T>
[[gnu::noinline]] void advance_tile(const SelectiveScanInputs<T>& in, const Block& block,
                                    int64_t tile, const Chunk<T>& chunk, T* h, StepLanes<T>& y) {
  constexpr int64_t kLanes = kScanLanes<T>;
  const T* A = tile_A(in, block.tile[tile]);
  fill_zero(y.lane, chunk.span.count * kLanes);
  for_each_strip(in.size.N, [&](int64_t n, auto count) {
    for (int64_t c = 0; c < kLanes; c += kWide<T>) {
      advance<decltype(count)::value>(chunk, chunk.delta[tile].lane + c, chunk.drive[tile].lane + c,
                                      A + n * kLanes + c, chunk.B + n, chunk.C + n,
                                      h + n * kLanes + c, y.lane + c);
    }
  });
}

/// y ← (y + D u) silu(z), the gate only where z is there.
template <typename T>
void finish(const SelectiveScanFwd<T>& p, const Block& block, int64_t b, const Chunk<T>& chunk,
            StepLanes<T>* y) {
  constexpr int64_t kLanes = kScanLanes<T>;
  const int64_t steps = chunk.span.count;
  StepLanes<T> z[kScanTiles];
  if (p.in.z.data != nullptr) load_steps(p.in.z, block, b, chunk.span, z);
  for (int64_t i = 0; i < block.tiles; ++i) {
    const Lanes<T> D = tile_D(p.in, block.tile[i]);
    for (int64_t k = 0; k < steps; ++k) {
#pragma omp simd
      for (int64_t c = 0; c < kLanes; ++c) {
        y[i].lane[k * kLanes + c] += D.lane[c] * chunk.u[i].lane[k * kLanes + c];
      }
    }
    if (p.in.z.data == nullptr) continue;
    for_each_pack<T>(steps * kLanes, [&](int64_t j, auto pack) {
      using V = decltype(pack);
      (V::load(y[i].lane + j) * silu(V::load(z[i].lane + j))).store(y[i].lane + j);
    });
  }
  store_steps(y, block, b, chunk.span, p.y);
}

/// One chunk of one block. A sequence and its single steps go the same way, and so agree bit for
/// bit.
template <typename T>
void chunk_of_block(const SelectiveScanFwd<T>& p, const Block& block, int64_t b, const Span& span,
                    T* h) {
  const auto& size = p.in.size;
  const int64_t state = size.N * kScanLanes<T>;
  Chunk<T> chunk;
  StepLanes<T> y[kScanTiles];
  chunk.span = span;
  load_chunk(p.in, block, b, chunk);
  if (p.checkpoints != nullptr) {
    T* row = p.checkpoints + (span.first / kScanChunk * size.B + b) * size.D * size.N;
    for (int64_t i = 0; i < block.tiles; ++i) {
      store_tile(h + i * state, block.tile[i], size.N, row);
    }
  }
  for (int64_t i = 0; i < block.tiles; ++i) {
    advance_tile(p.in, block, i, chunk, h + i * state, y[i]);
  }
  finish(p, block, b, chunk, y);
}

template <typename T>
void row_of_block(const SelectiveScanFwd<T>& p, const Block& block, int64_t b, T* h) {
  const auto& size = p.in.size;
  const int64_t state = size.N * kScanLanes<T>;
  if (p.initial_state == nullptr) fill_zero(h, block.tiles * state);
  for (int64_t i = 0; p.initial_state != nullptr && i < block.tiles; ++i) {
    load_tile(p.initial_state + b * size.D * size.N, block.tile[i], size.N, h + i * state);
  }
  for (int64_t c = 0; c < size.chunks; ++c) chunk_of_block(p, block, b, span_at(size, c, 1), h);
  for (int64_t i = 0; i < block.tiles; ++i) {
    store_tile(h + i * state, block.tile[i], size.N, p.last_state + b * size.D * size.N);
  }
}

}  // namespace

template <typename T>
void selective_scan_fwd(const SelectiveScanFwd<T>& p, int64_t begin, int64_t end, T* h) {
  const auto& size = p.in.size;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / blocks(size);
    row_of_block(p, block_at<T>(size, item - b * blocks(size)), b, h);
  }
}

template void selective_scan_fwd(const SelectiveScanFwd<float>&, int64_t, int64_t, float*);
template void selective_scan_fwd(const SelectiveScanFwd<double>&, int64_t, int64_t, double*);

}  // namespace retain::kernels::RETAIN_CPU_ISA
