// Backward scan of one block of tiles, chunk by chunk from the end, strip by strip. A strip is run
// forward again from the state that entered the chunk, keeping a = exp(delta' A) and a h_{t-1};
// then, with g = dL/dh_t = C dy + (a g)_{t+1},
//   dC = Σ_c dy h,  dB = Σ_c g delta' u,  du = delta' Σ_n g B + D dy,
//   ddelta' = u Σ_n g B + Σ_n g (a h_{t-1}) A,  dA = Σ_t g (a h_{t-1}) delta'.
// dB and dC gather lane by lane over the tiles of the block and are summed over lanes once a strip.

#include <retain/kernels/selective_scan/selective_scan_tile.h>

#include <initializer_list>

namespace retain::kernels::RETAIN_CPU_ISA {
namespace {

/// What the strips of one chunk read and add to, [steps, lanes] for each tile.
template <typename T>
struct Work {
  Chunk<T> chunk;
  StepLanes<T> slope[kScanTiles];  ///< d delta' / d delta
  StepLanes<T> dy[kScanTiles], dz[kScanTiles];
  StepLanes<T> y[kScanTiles];
  StepLanes<T> by_input[kScanTiles], by_decay[kScanTiles];  ///< Σ_n g B, Σ_n g (a h_{t-1}) A_tile
  bool silent[kScanTiles][kScanChunk];                      ///< dy is 0 in all lanes
  bool reached[kScanTiles][kScanChunk];                     ///< some gradient is not 0
};

/// One tile's part of it, from one vector of channels on.
template <typename T>
struct Lane {
  const T *delta, *drive, *dy, *A;
  T *y, *by_input, *by_decay;
  const bool* silent;
  bool* reached;

  RETAIN_INLINE Lane(Work<T>& work, const T* tile_A, int64_t tile, int64_t c)
      : delta(work.chunk.delta[tile].lane + c),
        drive(work.chunk.drive[tile].lane + c),
        dy(work.dy[tile].lane + c),
        A(tile_A + c),
        y(work.y[tile].lane + c),
        by_input(work.by_input[tile].lane + c),
        by_decay(work.by_decay[tile].lane + c),
        silent(work.silent[tile]),
        reached(work.reached[tile]) {}
};

/// What a strip keeps of the steps of a chunk.
template <int count, typename T>
struct Kept {
  Wide<T> decay[kScanChunk][count], carried[kScanChunk][count];  ///< carried = decay · h_{t-1}
};

/// Sums over the tiles of a block, [steps, count, lanes].
template <int count, typename T>
struct alignas(64) StripSums {
  T lane[kScanChunk * count * kScanLanes<T>];
};

/// Forward from the state h [count, lanes]; y += C·h, dC += dy h.
template <int count, typename T>
RETAIN_INLINE void recompute(const Chunk<T>& chunk, const Lane<T>& lane, int64_t n, const T* h,
                             Kept<count, T>& kept, T* dC) {
  constexpr int64_t kLanes = kScanLanes<T>;
  Wide<T> state[count];
#pragma GCC unroll 4
  for (int i = 0; i < count; ++i) state[i] = load_wide(h + i * kLanes);
  for (int64_t k = 0; k < chunk.span.count; ++k, dC += count * kLanes) {
    if (chunk.reset[k]) {
#pragma GCC unroll 4
      for (int i = 0; i < count; ++i) state[i] = Wide<T>{};
    }
    const T *B = chunk.B + k * chunk.B_stride + n, *C = chunk.C + k * chunk.C_stride + n;
    const auto delta = load_wide(lane.delta + k * kLanes);
    const auto drive = load_wide(lane.drive + k * kLanes);
    Wide<T> sum = load_wide(lane.y + k * kLanes);
    Pack<T, count> decay;
#pragma GCC unroll 4
    for (int i = 0; i < count; ++i) decay.part[i] = delta * load_wide(lane.A + (n + i) * kLanes);
    decay = exp2(decay);
#pragma GCC unroll 4
    for (int i = 0; i < count; ++i) {
      const Wide<T> carried = decay.part[i] * state[i];
      kept.decay[k][i] = decay.part[i];
      kept.carried[k][i] = carried;
      state[i] = carried + drive * B[i];
    }
#pragma GCC unroll 4
    for (int i = 0; i < count; ++i) sum += C[i] * state[i];
    store_wide(lane.y + k * kLanes, sum);
    if (lane.silent[k]) continue;  // 0 · NaN may not reach dC
    const auto dy = load_wide(lane.dy + k * kLanes);
#pragma GCC unroll 4
    for (int i = 0; i < count; ++i) {
      store_wide(dC + i * kLanes, load_wide(dC + i * kLanes) + dy * state[i]);
    }
  }
}

template <typename T>
RETAIN_INLINE bool all_zero(const T* values, int64_t count) {
  typename FloatTraits<T>::Bits any = 0;  // without the sign
  for (int64_t i = 0; i < count; ++i) {
    any |= __builtin_bit_cast(typename FloatTraits<T>::Bits, values[i]) << 1;
  }
  return any == 0;
}

template <int count, typename T>
RETAIN_INLINE bool all_zero(const Wide<T> (&values)[count]) {
  WideBits<T> any{};
#pragma GCC unroll 4
  for (int i = 0; i < count; ++i) any |= __builtin_bit_cast(WideBits<T>, values[i]);
  T together[kWide<T>];
  store_wide(together, __builtin_bit_cast(Wide<T>, any));
  return all_zero(together, kWide<T>);
}

/// Back in time: dh [count, lanes] ← dL/dh before the chunk; adds to dB, by_input, by_decay; dA is
/// the chunk's sum. A step that no gradient reaches adds nothing, even if its values are NaN.
template <int count, typename T>
RETAIN_INLINE void reverse(const Chunk<T>& chunk, const Lane<T>& lane, int64_t n,
                           const Kept<count, T>& kept, T* dh, T* dB, Wide<T> (&dA)[count]) {
  constexpr int64_t kLanes = kScanLanes<T>;
  Wide<T> dstate[count];
#pragma GCC unroll 4
  for (int i = 0; i < count; ++i) dstate[i] = load_wide(dh + i * kLanes);
#pragma GCC unroll 4
  for (int i = 0; i < count; ++i) dA[i] = Wide<T>{};
  for (int64_t k = chunk.span.count - 1; k >= 0; --k) {
    if (lane.silent[k] && all_zero<count, T>(dstate)) continue;
    lane.reached[k] = true;
    const T *B = chunk.B + k * chunk.B_stride + n, *C = chunk.C + k * chunk.C_stride + n;
    T* dB_k = dB + k * count * kLanes;
    const auto dy = load_wide(lane.dy + k * kLanes), delta = load_wide(lane.delta + k * kLanes);
    const auto drive = load_wide(lane.drive + k * kLanes);
    Wide<T> input_sum = load_wide(lane.by_input + k * kLanes);
    Wide<T> decay_sum = load_wide(lane.by_decay + k * kLanes);
#pragma GCC unroll 4
    for (int i = 0; i < count; ++i) {
      const Wide<T> g = dstate[i] + C[i] * dy;
      const Wide<T> through_decay = g * kept.carried[k][i];
      store_wide(dB_k + i * kLanes, load_wide(dB_k + i * kLanes) + g * drive);
      dA[i] += through_decay * delta;
      input_sum += g * B[i];
      decay_sum += through_decay * load_wide(lane.A + (n + i) * kLanes);
      dstate[i] = g * kept.decay[k][i];
    }
    store_wide(lane.by_input + k * kLanes, input_sum);
    store_wide(lane.by_decay + k * kLanes, decay_sum);
    if (chunk.reset[k]) {
#pragma GCC unroll 4
      for (int i = 0; i < count; ++i) dstate[i] = Wide<T>{};
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < count; ++i) store_wide(dh + i * kLanes, dstate[i]);
}

/// State indices n, …, n + count of one tile over a chunk; dA goes to the fp64 sums of the row
/// tile.
template <int count, typename T>
[[gnu::noinline]] void strip_of_tile(const T* tile_A, int64_t tile, int64_t n, Work<T>& work,
                                     const T* h, T* dh, T* dB, T* dC, double* dA_rows) {
  constexpr int64_t kLanes = kScanLanes<T>;
  Kept<count, T> kept;
  T dA_lanes[count * kLanes];
  for (int64_t c = 0; c < kLanes; c += kWide<T>) {
    const Lane<T> lane(work, tile_A, tile, c);
    Wide<T> dA[count];
    recompute<count>(work.chunk, lane, n, h + n * kLanes + c, kept, dC + c);
    reverse<count>(work.chunk, lane, n, kept, dh + n * kLanes + c, dB + c, dA);
#pragma GCC unroll 4
    for (int i = 0; i < count; ++i) store_wide(dA_lanes + i * kLanes + c, dA[i]);
  }
  for (int64_t i = 0; i < count * kLanes; ++i) dA_rows[n * kLanes + i] += dA_lanes[i];
}

/// The sum of `count` values, a power of two, halving them until `left` are left.
template <int64_t count, int64_t left, typename T>
RETAIN_INLINE void sum_halves(const T* values, T* sums) {
  if constexpr (count == left) {
    for (int64_t c = 0; c < left; ++c) sums[c] = values[c];
  } else {
    T halves[count / 2];
    for (int64_t c = 0; c < count / 2; ++c) halves[c] = values[c] + values[c + count / 2];
    sum_halves<count / 2, left>(halves, sums);
  }
}

/// [count, lanes] → [count].
template <int count, typename T>
RETAIN_INLINE void sum_lanes(const T* lanes, T* sums) {
  if constexpr (count == 4) {
    T quarters[16], columns[16];
    for (int i = 0; i < 4; ++i) {
      sum_halves<kScanLanes<T>, 4>(lanes + i * kScanLanes<T>, quarters + 4 * i);
    }
    transpose_block(quarters, 4, columns, 4);
    for (int i = 0; i < 4; ++i) {
      sums[i] = (columns[i] + columns[8 + i]) + (columns[4 + i] + columns[12 + i]);
    }
  } else {
    static_assert(count == 1);
    sum_halves<kScanLanes<T>, 1>(lanes, sums);
  }
}

/// One thread's scratch memory, [tiles, N, lanes] each.
template <typename T>
struct Scratch {
  T* dh;       ///< dL/dh from the later steps
  T* entered;  ///< the states that enter the chunk
};

/// State indices n, …, n + count of all tiles of a block over a chunk.
template <int count, typename T>
void strip_of_block(const SelectiveScanBwd<T>& p, const Block& block, int64_t b, int64_t n,
                    Work<T>& work, const Scratch<T>& scratch) {
  constexpr int64_t kLanes = kScanLanes<T>;
  const auto& size = p.in.size;
  const auto& span = work.chunk.span;
  const int64_t state = size.N * kLanes;
  StripSums<count, T> dB, dC;
  fill_zero(dB.lane, span.count * count * kLanes);
  fill_zero(dC.lane, span.count * count * kLanes);
  for (int64_t i = 0; i < block.tiles; ++i) {
    const Tile& tile = block.tile[i];
    strip_of_tile<count>(tile_A(p.in, tile), i, n, work, scratch.entered + i * state,
                         scratch.dh + i * state, dB.lane, dC.lane,
                         p.dA_rows + ((b / kScanRows) * size.tiles + tile.index) * state);
  }
  for (int64_t k = 0; k < span.count; ++k) {
    const int64_t step = (block.index * size.T + span.first + k) * size.B + b;
    const int64_t offset = (step * size.G + block.group) * size.N + n;
    sum_lanes<count>(dB.lane + k * count * kLanes, p.dB_blocks + offset);
    sum_lanes<count>(dC.lane + k * count * kLanes, p.dC_blocks + offset);
  }
}

/// dL/dout → dL/dy: dy ← dy silu(z); dz ← dy silu'(z), which still lacks the factor y. A zero stays
/// zero whatever z is.
template <typename T>
void gate(const SelectiveScanBwd<T>& p, const Block& block, int64_t b, Work<T>& work) {
  const auto& span = work.chunk.span;
  StepLanes<T> z[kScanTiles];
  load_steps(p.in.z, block, b, span, z);
  for (int64_t i = 0; i < block.tiles; ++i) {
    T *dy = work.dy[i].lane, *dz = work.dz[i].lane;
    for_each_pack<T>(span.count * kScanLanes<T>, [&](int64_t j, auto pack) {
      using V = decltype(pack);
      const V dout = V::load(dy + j);
      const V gate = where(dout == T(0), T(0), V::load(z[i].lane + j));
      const V open = sigmoid(gate);
      (dout * open * (T(1) + gate * (T(1) - open))).store(dz + j);
      (dout * (gate * open)).store(dy + j);
    });
  }
}

/// The states that enter the chunk of that step in row b.
template <typename T>
const T* entered_at(const SelectiveScanBwd<T>& p, int64_t step, int64_t b) {
  return p.checkpoints + (step / kScanChunk * p.in.size.B + b) * p.in.size.D * p.in.size.N;
}

/// The states that enter the next chunk, on their way from memory while this one is worked on.
template <typename T>
void prefetch_entered(const SelectiveScanBwd<T>& p, const Block& block, int64_t b,
                      const Span& span) {
  if (span.next_count == 0) return;
  const int64_t N = p.in.size.N;
  const T* entered = entered_at(p, span.next, b) + block.tile[0].channel * N;
  for (int64_t i = 0; i < block.tiles; ++i) {
    for (int64_t j = 0; j < block.tile[i].width * N; j += kScanLanes<T>) {
      __builtin_prefetch(entered + i * kScanLanes<T> * N + j);
    }
  }
}

/// Loads the chunk, and clears what the strips add to.
template <typename T>
void begin_chunk(const SelectiveScanBwd<T>& p, const Block& block, int64_t b, Work<T>& work,
                 const Scratch<T>& scratch) {
  constexpr int64_t kLanes = kScanLanes<T>;
  const auto& span = work.chunk.span;
  load_chunk(p.in, block, b, work.chunk, work.slope);
  for (int64_t i = 0; i < block.tiles; ++i) {
    load_tile(entered_at(p, span.first, b), block.tile[i], p.in.size.N,
              scratch.entered + i * p.in.size.N * kLanes);
  }
  prefetch_entered(p, block, b, span);
  for (int64_t i = 0; i < block.tiles; ++i) {
    for (auto* sum : {&work.y[i], &work.by_input[i], &work.by_decay[i], &work.dy[i]}) {
      fill_zero(sum->lane, span.count * kLanes);
    }
  }
  if (p.dy.data != nullptr) load_steps(p.dy, block, b, span, work.dy);
  if (p.in.z.data != nullptr) gate(p, block, b, work);
  for (int64_t i = 0; i < block.tiles; ++i) {
    for (int64_t k = 0; k < span.count; ++k) {
      work.silent[i][k] = all_zero(work.dy[i].lane + k * kLanes, kLanes);
      work.reached[i][k] = !work.silent[i][k];
    }
  }
}

/// dz ← dz y, of which the strips have left C·h.
template <typename T>
void finish_dz(const SelectiveScanBwd<T>& p, const Block& block, int64_t b, Work<T>& work) {
  constexpr int64_t kLanes = kScanLanes<T>;
  for (int64_t i = 0; i < block.tiles; ++i) {
    const Lanes<T> D = tile_D(p.in, block.tile[i]);
    const T* __restrict y = work.y[i].lane, * __restrict u = work.chunk.u[i].lane;
    T* __restrict dz = work.dz[i].lane;
    for (int64_t k = 0; k < work.chunk.span.count; ++k) {
#pragma omp simd
      for (int64_t c = 0; c < kLanes; ++c) {
        const int64_t j = k * kLanes + c;
        const T full = dz[j] * (y[j] + D.lane[c] * u[j]);
        dz[j] = dz[j] == T(0) ? T(0) : full;
      }
    }
  }
  store_steps(work.dz, block, b, work.chunk.span, p.dz);
}

/// One tile's du and ddelta, in place of by_input and by_decay, and the sums over the steps of dD
/// and ddelta. A step that no gradient reaches has zeros there, and keeps them.
template <typename T>
void finish_tile(int64_t i, const Lanes<T>& D, Work<T>& work, Lanes<T>& dD, Lanes<T>& dbias) {
  constexpr int64_t kLanes = kScanLanes<T>;
  for (int64_t k = 0; k < work.chunk.span.count; ++k) {
    if (!work.reached[i][k]) continue;
    const T* __restrict delta = work.chunk.delta[i].lane + k * kLanes;
    const T* __restrict u = work.chunk.u[i].lane + k * kLanes;
    const T* __restrict dy = work.dy[i].lane + k * kLanes;
    const T* __restrict slope = work.slope[i].lane + k * kLanes;
    T* __restrict du = work.by_input[i].lane + k * kLanes;
    T* __restrict ddelta = work.by_decay[i].lane + k * kLanes;
#pragma omp simd
    for (int64_t c = 0; c < kLanes; ++c) {
      const T by_input = du[c];
      const T by_delta = u[c] * by_input + ddelta[c] * T(0.69314718055994530942);
      du[c] = delta[c] * by_input + D.lane[c] * dy[c];
      ddelta[c] = by_delta * slope[c];
      dD.lane[c] += dy[c] * u[c];
      dbias.lane[c] += ddelta[c];
    }
  }
}

template <typename T>
void finish_chunk(const SelectiveScanBwd<T>& p, const Block& block, int64_t b, Work<T>& work) {
  constexpr int64_t kLanes = kScanLanes<T>;
  if (p.in.z.data != nullptr) finish_dz(p, block, b, work);
  for (int64_t i = 0; i < block.tiles; ++i) {
    const int64_t sums = (b / kScanRows) * p.in.size.tiles + block.tile[i].index;
    Lanes<T> dD{}, dbias{};
    finish_tile(i, tile_D(p.in, block.tile[i]), work, dD, dbias);
    for (int64_t c = 0; c < kLanes; ++c) p.dD_rows[sums * kLanes + c] += dD.lane[c];
    for (int64_t c = 0; c < kLanes; ++c) p.ddelta_bias_rows[sums * kLanes + c] += dbias.lane[c];
  }
  store_steps(work.by_input, block, b, work.chunk.span, p.du);
  store_steps(work.by_decay, block, b, work.chunk.span, p.ddelta);
}

template <typename T>
void chunk_of_block(const SelectiveScanBwd<T>& p, const Block& block, int64_t b, const Span& span,
                    const Scratch<T>& scratch) {
  Work<T> work;
  work.chunk.span = span;
  begin_chunk(p, block, b, work, scratch);
  for_each_strip(p.in.size.N, [&](int64_t n, auto count) {
    strip_of_block<decltype(count)::value>(p, block, b, n, work, scratch);
  });
  finish_chunk(p, block, b, work);
}

/// dh begins as the last state's gradient and becomes that of ever earlier ones.
template <typename T>
void row_of_block(const SelectiveScanBwd<T>& p, const Block& block, int64_t b,
                  const Scratch<T>& scratch) {
  const auto& size = p.in.size;
  const int64_t state = size.N * kScanLanes<T>, row = b * size.D * size.N;
  if (p.dlast_state == nullptr) fill_zero(scratch.dh, block.tiles * state);
  for (int64_t i = 0; p.dlast_state != nullptr && i < block.tiles; ++i) {
    load_tile(p.dlast_state + row, block.tile[i], size.N, scratch.dh + i * state);
  }
  for (int64_t chunk = size.chunks - 1; chunk >= 0; --chunk) {
    chunk_of_block(p, block, b, span_at(size, chunk, -1), scratch);
  }
  for (int64_t i = 0; p.dinitial_state != nullptr && i < block.tiles; ++i) {
    store_tile(scratch.dh + i * state, block.tile[i], size.N, p.dinitial_state + row);
  }
}

}  // namespace

template <typename T>
void selective_scan_bwd(const SelectiveScanBwd<T>& p, int64_t begin, int64_t end, T* memory) {
  const auto& size = p.in.size;
  const Scratch<T> scratch{memory, memory + kScanTiles * size.N * kScanLanes<T>};
  for (int64_t item = begin; item < end; ++item) {
    const int64_t row_tile = item / blocks(size);
    const Block block = block_at<T>(size, item - row_tile * blocks(size));
    const int64_t last = (row_tile + 1) * kScanRows;
    for (int64_t b = row_tile * kScanRows; b < (last < size.B ? last : size.B); ++b) {
      row_of_block(p, block, b, scratch);
    }
  }
}

template void selective_scan_bwd(const SelectiveScanBwd<float>&, int64_t, int64_t, float*);
template void selective_scan_bwd(const SelectiveScanBwd<double>&, int64_t, int64_t, double*);

}  // namespace retain::kernels::RETAIN_CPU_ISA
