// Backward scan of one block of tiles, chunk by chunk from the end. A chunk is run forward again
// from the state that entered it, keeping a = exp(delta' A) and a h_{t-1}; then, with g = dL/dh_t =
// C dy + (a g)_{t+1},
//   dC = Σ_c dy h,  dB = Σ_c g delta' u,  du = delta' Σ_n g B + D dy,
//   ddelta' = u Σ_n g B + Σ_n g (a h_{t-1}) A,  dA = Σ_t g (a h_{t-1}) delta'.
// dB and dC gather lane by lane over the tiles of the block and are summed over lanes once a chunk.

#include <retain/kernels/selective_scan/selective_scan_tile.h>

namespace retain::kernels::RETAIN_CPU_ISA {
namespace {

/// One thread's scratch memory; every array is [.., N, lanes].
template <typename T>
struct Scratch {
  T *decay, *carried, *dB, *dC;  ///< [kScanChunk, …]; carried = decay · h_{t-1}
  T* dh;                         ///< [kScanTiles, …], dL/dh from the later steps
  T *dA, *h, *ignored;

  RETAIN_INLINE Scratch(T* memory, int64_t state) {
    decay = memory;
    carried = decay + kScanChunk * state;
    dB = carried + kScanChunk * state;
    dC = dB + kScanChunk * state;
    dh = dC + kScanChunk * state;
    dA = dh + kScanTiles * state;
    h = dA + state;
    ignored = h + state;
  }
};

/// One step forward from h; y ← C·h, dC += dy h.
template <typename T>
[[gnu::noinline]] void recompute(int64_t N, const T* __restrict A, const T* __restrict B,
                                 const T* __restrict C, const T* __restrict delta,
                                 const T* __restrict u, const T* __restrict dy, T* __restrict h,
                                 T* __restrict decay, T* __restrict carried, T* __restrict dC,
                                 T* __restrict y) {
  constexpr int64_t kLanes = kScanLanes<T>;
  T drive[kLanes], sum[kLanes];
  for (int64_t c = 0; c < kLanes; ++c) drive[c] = delta[c] * u[c];
  for (int64_t c = 0; c < kLanes; ++c) sum[c] = 0;
  for (int64_t n = 0; n < N; ++n) {
#pragma omp simd
    for (int64_t c = 0; c < kLanes; ++c) {
      const int64_t i = n * kLanes + c;
      const T a = exp2(delta[c] * A[i]);
      const T kept = a * h[i];
      const T next = kept + drive[c] * B[n];
      decay[i] = a;
      carried[i] = kept;
      h[i] = next;
      sum[c] += C[n] * next;
      dC[i] += dy[c] * next;
    }
  }
  for (int64_t c = 0; c < kLanes; ++c) y[c] = sum[c];
}

/// One step back: dh ← dL/dh_{t-1};  by_input = Σ_n g B,  by_decay = Σ_n g (a h_{t-1}) A_tile.
template <typename T>
[[gnu::noinline]] void reverse(int64_t N, const T* __restrict A, const T* __restrict B,
                               const T* __restrict C, const T* __restrict delta,
                               const T* __restrict u, const T* __restrict dy,
                               const T* __restrict decay, const T* __restrict carried,
                               T* __restrict dh, T* __restrict dA, T* __restrict dB,
                               T* __restrict by_input, T* __restrict by_decay) {
  constexpr int64_t kLanes = kScanLanes<T>;
  T drive[kLanes], input_sum[kLanes], decay_sum[kLanes];
  for (int64_t c = 0; c < kLanes; ++c) drive[c] = delta[c] * u[c];
  for (int64_t c = 0; c < kLanes; ++c) input_sum[c] = 0;
  for (int64_t c = 0; c < kLanes; ++c) decay_sum[c] = 0;
  for (int64_t n = 0; n < N; ++n) {
#pragma omp simd
    for (int64_t c = 0; c < kLanes; ++c) {
      const int64_t i = n * kLanes + c;
      const T g = dh[i] + C[n] * dy[c];
      const T through_decay = g * carried[i];
      dB[i] += g * drive[c];
      dA[i] += through_decay * delta[c];
      input_sum[c] += g * B[n];
      decay_sum[c] += through_decay * A[i];
      dh[i] = g * decay[i];
    }
  }
  for (int64_t c = 0; c < kLanes; ++c) by_input[c] = input_sum[c];
  for (int64_t c = 0; c < kLanes; ++c) by_decay[c] = decay_sum[c];
}

template <typename T>
RETAIN_INLINE bool all_zero(const T* values, int64_t count) {
  typename FloatTraits<T>::Bits any = 0;  // without the sign
  for (int64_t i = 0; i < count; ++i) {
    any |= __builtin_bit_cast(typename FloatTraits<T>::Bits, values[i]) << 1;
  }
  return any == 0;
}

/// dL/dout → dL/dy: dy ← dy silu(z); dz ← dy silu'(z), which still lacks the factor y. A zero stays
/// zero whatever z is.
template <typename T>
void gate(const SelectiveScanBwd<T>& p, const Tile& tile, int64_t b, const Chunk<T>& chunk,
          StepLanes<T>& dy, StepLanes<T>& dz) {
  StepLanes<T> z;
  load_steps(p.in.z, tile, b, chunk.span, z);
#pragma omp simd
  for (int64_t i = 0; i < chunk.span.count * kScanLanes<T>; ++i) {
    const T gate = dy.lane[i] == T(0) ? T(0) : z.lane[i];
    const T open = sigmoid(gate);
    dz.lane[i] = dy.lane[i] * open * (T(1) + gate * (T(1) - open));
    dy.lane[i] *= gate * open;
  }
}

template <typename T>
void forward_again(const SelectiveScanBwd<T>& p, const Tile& tile, const TileWeights<T>& weights,
                   int64_t b, const Chunk<T>& chunk, const Scratch<T>& scratch, StepLanes<T>& dy) {
  constexpr int64_t kLanes = kScanLanes<T>;
  const auto& size = p.in.size;
  const int64_t state = size.N * kLanes;
  const int64_t row = chunk.span.first / kScanChunk * size.B + b;
  load_tile(p.checkpoints + row * size.D * size.N, tile, size.N, scratch.h);
  StepLanes<T> y, dz;
  if (p.in.z.data != nullptr) gate(p, tile, b, chunk, dy, dz);
  for (int64_t k = 0; k < chunk.span.count; ++k) {
    if (chunk.reset[k]) fill_zero(scratch.h, state);
    // 0 · NaN may not reach dC.
    T* dC = all_zero(dy.lane + k * kLanes, kLanes) ? scratch.ignored : scratch.dC + k * state;
    recompute<T>(size.N, weights.A, chunk.B + k * chunk.B_stride, chunk.C + k * chunk.C_stride,
                 chunk.delta.lane + k * kLanes, chunk.u.lane + k * kLanes, dy.lane + k * kLanes,
                 scratch.h, scratch.decay + k * state, scratch.carried + k * state, dC,
                 y.lane + k * kLanes);
  }
  if (p.in.z.data == nullptr) return;
  for (int64_t k = 0; k < chunk.span.count; ++k) {
#pragma omp simd
    for (int64_t c = 0; c < kLanes; ++c) {
      const int64_t i = k * kLanes + c;
      const T full = dz.lane[i] * (y.lane[i] + weights.D.lane[c] * chunk.u.lane[i]);
      dz.lane[i] = dz.lane[i] == T(0) ? T(0) : full;
    }
  }
  store_steps(dz, tile, b, chunk.span, p.dz);
}

/// The chunk backwards; du, ddelta are stored, and the sums over its steps of dD and ddelta
/// returned. A step that no gradient reaches adds nothing, even if its values are NaN.
template <typename T>
void backward(const SelectiveScanBwd<T>& p, const Tile& tile, const TileWeights<T>& weights,
              int64_t b, const Chunk<T>& chunk, const StepLanes<T>& dy, const Scratch<T>& scratch,
              T* dh, Lanes<T>& dD, Lanes<T>& dbias) {
  constexpr int64_t kLanes = kScanLanes<T>;
  const int64_t state = p.in.size.N * kLanes;
  StepLanes<T> du, ddelta;  // first by_input and by_decay
  bool reached[kScanChunk];
  for (int64_t k = chunk.span.count - 1; k >= 0; --k) {
    reached[k] = !all_zero(dy.lane + k * kLanes, kLanes) || !all_zero(dh, state);
    if (!reached[k]) {
      fill_zero(du.lane + k * kLanes, kLanes);
      fill_zero(ddelta.lane + k * kLanes, kLanes);
      continue;
    }
    reverse<T>(p.in.size.N, weights.A, chunk.B + k * chunk.B_stride, chunk.C + k * chunk.C_stride,
               chunk.delta.lane + k * kLanes, chunk.u.lane + k * kLanes, dy.lane + k * kLanes,
               scratch.decay + k * state, scratch.carried + k * state, dh, scratch.dA,
               scratch.dB + k * state, du.lane + k * kLanes, ddelta.lane + k * kLanes);
    if (chunk.reset[k]) fill_zero(dh, state);
  }
  for (int64_t k = 0; k < chunk.span.count; ++k) {
    if (!reached[k]) continue;
#pragma omp simd
    for (int64_t c = 0; c < kLanes; ++c) {
      const int64_t i = k * kLanes + c;
      const T u = chunk.u.lane[i], by_input = du.lane[i];
      const T by_delta = u * by_input + ddelta.lane[i] * T(0.69314718055994530942);
      du.lane[i] = chunk.delta.lane[i] * by_input + weights.D.lane[c] * dy.lane[i];
      ddelta.lane[i] = by_delta * chunk.delta_slope.lane[i];
      dD.lane[c] += dy.lane[i] * u;
      dbias.lane[c] += ddelta.lane[i];
    }
  }
  store_steps(du, tile, b, chunk.span, p.du);
  store_steps(ddelta, tile, b, chunk.span, p.ddelta);
}

/// One chunk of one tile; its weight gradients are added to the fp64 sums of the row tile.
template <typename T>
void chunk_of_tile(const SelectiveScanBwd<T>& p, const Tile& tile, int64_t b, const Span& span,
                   const Scratch<T>& scratch, T* dh) {
  constexpr int64_t kLanes = kScanLanes<T>;
  const auto& size = p.in.size;
  const int64_t state = size.N * kLanes;
  const auto weights = tile_weights(p.in, tile);
  Chunk<T> chunk;
  chunk.span = span;
  load_chunk(p.in, tile, weights, b, true, chunk);
  StepLanes<T> dy;
  fill_zero(dy.lane, kScanChunk * kLanes);
  if (p.dy.data != nullptr) load_steps(p.dy, tile, b, span, dy);

  Lanes<T> dD{}, dbias{};
  fill_zero(scratch.dA, state);
  forward_again(p, tile, weights, b, chunk, scratch, dy);
  backward(p, tile, weights, b, chunk, dy, scratch, dh, dD, dbias);

  const int64_t sums = (b / kScanRows) * size.tiles + tile.index;
  for (int64_t i = 0; i < state; ++i) p.dA_rows[sums * state + i] += scratch.dA[i];
  for (int64_t c = 0; c < kLanes; ++c) p.dD_rows[sums * kLanes + c] += dD.lane[c];
  for (int64_t c = 0; c < kLanes; ++c) p.ddelta_bias_rows[sums * kLanes + c] += dbias.lane[c];
}

/// The sum of `count` values, a power of two, halving them until one is left.
template <int64_t count, typename T>
RETAIN_INLINE T sum_halves(const T* values) {
  if constexpr (count == 1) {
    return values[0];
  } else {
    T halves[count / 2];
    for (int64_t c = 0; c < count / 2; ++c) halves[c] = values[c] + values[c + count / 2];
    return sum_halves<count / 2>(halves);
  }
}

/// [N, lanes] → [N].
template <typename T>
void sum_lanes(int64_t N, const T* lanes, T* sums) {
  for (int64_t n = 0; n < N; ++n) sums[n] = sum_halves<kScanLanes<T>>(lanes + n * kScanLanes<T>);
}

template <typename T>
void chunk_of_block(const SelectiveScanBwd<T>& p, const Block& block, int64_t b, const Span& span,
                    const Scratch<T>& scratch) {
  const auto& size = p.in.size;
  const int64_t state = size.N * kScanLanes<T>;
  fill_zero(scratch.dB, span.count * state);
  fill_zero(scratch.dC, span.count * state);
  for (int64_t i = 0; i < block.tiles; ++i) {
    chunk_of_tile(p, tile_at<T>(size, block.first_tile + i), b, span, scratch,
                  scratch.dh + i * state);
  }
  for (int64_t k = 0; k < span.count; ++k) {
    const int64_t step = (block.index * size.T + span.first + k) * size.B + b;
    const int64_t offset = (step * size.G + block.group) * size.N;
    sum_lanes(size.N, scratch.dB + k * state, p.dB_blocks + offset);
    sum_lanes(size.N, scratch.dC + k * state, p.dC_blocks + offset);
  }
}

template <typename T>
void row_of_block(const SelectiveScanBwd<T>& p, const Block& block, int64_t b,
                  const Scratch<T>& scratch) {
  const auto& size = p.in.size;
  const int64_t state = size.N * kScanLanes<T>;
  if (p.dlast_state == nullptr) fill_zero(scratch.dh, block.tiles * state);
  for (int64_t i = 0; p.dlast_state != nullptr && i < block.tiles; ++i) {
    load_tile(p.dlast_state + b * size.D * size.N, tile_at<T>(size, block.first_tile + i), size.N,
              scratch.dh + i * state);
  }
  for (int64_t chunk = size.chunks - 1; chunk >= 0; --chunk) {
    chunk_of_block(p, block, b, span_at(size, chunk, -1), scratch);
  }
  for (int64_t i = 0; p.dinitial_state != nullptr && i < block.tiles; ++i) {
    store_tile(scratch.dh + i * state, tile_at<T>(size, block.first_tile + i), size.N,
               p.dinitial_state + b * size.D * size.N);
  }
}

}  // namespace

template <typename T>
void selective_scan_bwd(const SelectiveScanBwd<T>& p, int64_t begin, int64_t end, T* memory) {
  const auto& size = p.in.size;
  const Scratch<T> scratch(memory, size.N * kScanLanes<T>);
  fill_zero(scratch.ignored, size.N * kScanLanes<T>);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t row_tile = item / blocks(size);
    const Block block = block_at(size, item - row_tile * blocks(size));
    const int64_t last = (row_tile + 1) * kScanRows;
    for (int64_t b = row_tile * kScanRows; b < (last < size.B ? last : size.B); ++b) {
      row_of_block(p, block, b, scratch);
    }
  }
}

template void selective_scan_bwd(const SelectiveScanBwd<float>&, int64_t, int64_t, float*);
template void selective_scan_bwd(const SelectiveScanBwd<double>&, int64_t, int64_t, double*);

}  // namespace retain::kernels::RETAIN_CPU_ISA
