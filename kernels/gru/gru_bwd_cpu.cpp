// GRU backward on the CPU. For each tile of rows, back in time: the gates' gradients from the saved
// gates, then dh' = dh ⊙ z + dgates · W_hh and dx = dgates · W_ih; the weights' gradients are sums
// of outer products over some steps at once, so that the gradients of the gates stay in the cache.
//
// A lane whose dh is 0 gives exactly 0, and a row of zeros is left out of the weights' gradients: a
// step that the loss does not see adds nothing, NaN or not.
//
// Packed weights, for each panel of 2 vectors of outputs: [3 gates][padded H][2 lanes], the gates
// in the order in which the gradients lie: n, r, z for W_ih and r, z, n for W_hh.

#include <retain/kernels/gru/gru.h>
#include <retain/kernels/gru/row_product.h>

#include <cstring>

namespace retain::kernels::RETAIN_CPU_ISA {
namespace {

/// packed[panel][g][k][lane] = w[order[g] · H + k, panel · width + lane]; zero outside.
template <typename Scalar>
void pack_transposed(const Scalar* w, int64_t columns, int64_t H, const int (&order)[3],
                     Scalar* packed) {
  constexpr int64_t width = 2 * Lanes<Scalar>::kCount;
  for (int64_t i = 0; i < columns; i += width) {
    const int64_t inside = columns - i < width ? columns - i : width;
    for (const int gate : order) {
      for (int64_t k = 0; k < gru_padded<Scalar>(H); ++k, packed += width) {
        const int64_t filled = k < H ? inside : 0;
        const Scalar* row = w + (gate * H + k) * columns + i;
        for (int64_t lane = 0; lane < filled; ++lane) packed[lane] = row[lane];
        for (int64_t lane = filled; lane < width; ++lane) packed[lane] = Scalar(0);
      }
    }
  }
}

/// to[i][0 … columns) = (add ? to : 0) + rows[i] · packed, for MR rows.
template <int MR, bool add, typename Scalar>
RETAIN_INLINE void multiply_rows(const Scalar* const* rows, Scalar* const* to, int64_t count,
                                 int64_t columns, int64_t first, const Scalar* panel) {
  constexpr int lanes = Lanes<Scalar>::kCount;
  constexpr int width = 2 * lanes;
  const int64_t inside = columns - first < width ? columns - first : width;
  const Scalar* from[MR];
  Scalar edge[width] = {};
  Vector<Scalar> sum[MR][2];
  for (int i = 0; i < MR; ++i) {
    from[i] = rows[i];
    const Scalar* start = edge;
    if (add && inside == width) start = to[i] + first;
    if (add && inside < width) std::memcpy(edge, to[i] + first, inside * sizeof(Scalar));
    for (int v = 0; v < 2; ++v) load<Scalar>(sum[i][v], start + v * lanes);
  }
  add_rows_times_panel<MR, 2, Scalar>(sum, from, count, panel);
  for (int i = 0; i < MR; ++i) {
    Scalar* out = inside == width ? to[i] + first : edge;
    for (int v = 0; v < 2; ++v) store<Scalar>(out + v * lanes, sum[i][v]);
    if (inside < width) std::memcpy(to[i] + first, edge, inside * sizeof(Scalar));
  }
}

/// The product of a tile of rows [n][count] with packed weights; one panel of weights at a time.
template <bool add, typename Scalar>
void multiply_tile(const Scalar* const* rows, Scalar* const* to, int64_t n, int64_t count,
                   int64_t columns, const Scalar* packed) {
  constexpr int64_t width = 2 * Lanes<Scalar>::kCount;
  for (int64_t first = 0; first < columns; first += width, packed += count * width) {
    int64_t i = 0;
    for (; i + 6 <= n; i += 6) {
      multiply_rows<6, add, Scalar>(rows + i, to + i, count, columns, first, packed);
    }
    for (; i + 4 <= n; i += 4) {
      multiply_rows<4, add, Scalar>(rows + i, to + i, count, columns, first, packed);
    }
    for (; i < n; ++i) {
      multiply_rows<1, add, Scalar>(rows + i, to + i, count, columns, first, packed);
    }
  }
}

/// Rows whose outer products wait to be added to the weights' gradients.
template <typename Scalar>
struct Chunk {
  int64_t slots = 0;  ///< rows of the scratch in use
  int64_t count = 0;  ///< rows among them that add something
  const Scalar* x[kGruChunkRows];
  const Scalar* h[kGruChunkRows];
  const Scalar* dgates[kGruChunkRows];
};

/// to[i][j] += Σ_n left[n][i] · right[n][offset + j]
template <int MR, typename Scalar>
RETAIN_INLINE void add_block(Scalar* to, int64_t ld, const Scalar* const* left, int64_t i,
                             const Scalar* const* right, int64_t offset, int64_t j, int64_t count) {
  constexpr int lanes = Lanes<Scalar>::kCount;
  Vector<Scalar> sum[MR][3];
  for (int r = 0; r < MR; ++r) {
    for (int v = 0; v < 3; ++v) load<Scalar>(sum[r][v], to + (i + r) * ld + j + v * lanes);
  }
  add_outer_products<MR, 3, Scalar>(sum, left, i, right, offset + j, count);
  for (int r = 0; r < MR; ++r) {
    for (int v = 0; v < 3; ++v) store<Scalar>(to + (i + r) * ld + j + v * lanes, sum[r][v]);
  }
}

/// to [rows, columns] += leftᵀ · right, columns a multiple of 3 vectors.
template <typename Scalar>
void add_products(Scalar* to, int64_t rows, int64_t columns, const Scalar* const* left,
                  const Scalar* const* right, int64_t offset, int64_t count) {
  for (int64_t j = 0; j < columns; j += 3 * Lanes<Scalar>::kCount) {
    int64_t i = 0;
    for (; i + 4 <= rows; i += 4) {
      add_block<4>(to, columns, left, i, right, offset, j, count);
    }
    for (; i < rows; ++i) add_block<1>(to, columns, left, i, right, offset, j, count);
  }
}

template <typename Scalar>
void flush(const GruBwd<Scalar>& p, const GruBwdSums<Scalar>& sums, Chunk<Scalar>& chunk) {
  const int64_t I = p.in.I, H = p.in.H, padded = gru_padded<Scalar>(H);
  Scalar *dw_ih = sums.sums, *dw_hh = dw_ih + 3 * I * padded, *dbias = dw_hh + 3 * H * padded;
  add_products(dw_ih, I, 3 * padded, chunk.x, chunk.dgates, 0, chunk.count);
  add_products(dw_hh, H, 3 * padded, chunk.h, chunk.dgates, padded, chunk.count);
  for (int64_t n = 0; n < chunk.count; ++n) {
    for (int64_t j = 0; j < 4 * padded; ++j) dbias[j] += chunk.dgates[n][j];
  }
  chunk.count = chunk.slots = 0;
}

/// Long sums in fp64: one number in fp32 would lose what later steps add to it.
template <typename Scalar>
void carry(const GruBwd<Scalar>& p, const GruBwdSums<Scalar>& sums) {
  for (int64_t i = 0; i < gru_sums_size<Scalar>(p.in.I, p.in.H); ++i) {
    sums.totals[i] += sums.sums[i];
    sums.sums[i] = 0;
  }
}

/// One row at one step. In: dh, the gradient of the state after it. Out: dgates, and dh ⊙ z in dh.
/// Returns whether any dh was not 0.
template <typename Scalar>
bool gate_gradients(const Scalar* gates, const Scalar* h, const Scalar* dy, int64_t H, Scalar* dh,
                    Scalar* dgates) {
  const int64_t padded = gru_padded<Scalar>(H);
  const Scalar *r = gates, *z = r + padded, *n = z + padded, *hidden_n = n + padded;
  Scalar *d_n_x = dgates, *d_r = d_n_x + padded, *d_z = d_r + padded, *d_n_h = d_z + padded;
  int seen = 0;
#pragma omp simd reduction(| : seen)
  for (int64_t j = 0; j < H; ++j) {
    const Scalar d = dy ? dh[j] + dy[j] : dh[j];
    const bool none = d == Scalar(0);
    const Scalar dn = d * (Scalar(1) - z[j]) * (Scalar(1) - n[j] * n[j]);
    const Scalar dr = dn * hidden_n[j] * r[j] * (Scalar(1) - r[j]);
    const Scalar dz = d * (h[j] - n[j]) * z[j] * (Scalar(1) - z[j]);
    d_n_x[j] = none ? Scalar(0) : dn;
    d_r[j] = none ? Scalar(0) : dr;
    d_z[j] = none ? Scalar(0) : dz;
    d_n_h[j] = none ? Scalar(0) : dn * r[j];
    dh[j] = none ? Scalar(0) : d * z[j];
    seen |= !none;
  }
  return seen != 0;
}

template <typename Scalar>
void step_back(const GruBwd<Scalar>& p, const GruBwdSums<Scalar>& sums, Chunk<Scalar>& chunk,
               int64_t t, int64_t begin, int64_t end) {
  const int64_t padded = gru_padded<Scalar>(p.in.H);
  const Scalar* dgates_x[kGruTileRows];
  const Scalar* dgates_h[kGruTileRows];
  Scalar* dh[kGruTileRows];
  Scalar* dx[kGruTileRows];
  bool cut[kGruTileRows];
  Scalar* slot = sums.scratch + chunk.slots * gru_scratch_stride<Scalar>(p.in.H);
  for (int64_t b = begin; b < end; ++b, slot += gru_scratch_stride<Scalar>(p.in.H)) {
    const int64_t i = b - begin, row = t * p.in.B + b;
    cut[i] = p.in.reset.data && *p.in.reset.at(t, b);
    const Scalar* start = p.in.initial_state ? p.in.initial_state + b * p.in.H : p.in.zeros;
    const Scalar* h = cut[i] ? p.in.zeros : t > 0 ? p.y + (row - p.in.B) * p.in.H : start;
    const Scalar* dy = p.dy.data ? p.dy.at(t, b) : nullptr;
    dh[i] = p.dstate + b * p.in.H;
    dx[i] = p.dx ? p.dx + row * p.in.I : nullptr;
    dgates_x[i] = slot;
    dgates_h[i] = slot + padded;
    if (gate_gradients(p.gates + row * 4 * padded, h, dy, p.in.H, dh[i], slot)) {
      chunk.x[chunk.count] = p.in.x.at(t, b);
      chunk.h[chunk.count] = h;
      chunk.dgates[chunk.count++] = slot;
    }
  }
  const int64_t n = end - begin;
  chunk.slots += n;
  multiply_tile<true, Scalar>(dgates_h, dh, n, 3 * padded, p.in.H, p.packed_hh);
  if (p.dx) multiply_tile<false, Scalar>(dgates_x, dx, n, 3 * padded, p.in.I, p.packed_ih);
  for (int64_t i = 0; i < n; ++i) {
    if (cut[i]) std::memset(dh[i], 0, p.in.H * sizeof(Scalar));
  }
}

}  // namespace

template <typename Scalar>
void gru_pack_bwd(const GruWeights<Scalar>& weights, Scalar* packed_ih, Scalar* packed_hh) {
  if (packed_ih) pack_transposed(weights.w_ih, weights.I, weights.H, {2, 0, 1}, packed_ih);
  pack_transposed(weights.w_hh, weights.H, weights.H, {0, 1, 2}, packed_hh);
}

template <typename Scalar>
void gru_bwd(const GruBwd<Scalar>& p, const GruBwdSums<Scalar>& sums, int64_t begin, int64_t end) {
  Chunk<Scalar> chunk;
  int64_t chunks = 0;
  for (int64_t b = begin; b < end; b += kGruTileRows) {
    const int64_t tile_end = b + kGruTileRows < end ? b + kGruTileRows : end;
    for (int64_t t = p.in.T - 1; t >= 0; --t) {
      step_back(p, sums, chunk, t, b, tile_end);
      if (chunk.slots + kGruTileRows <= kGruChunkRows) continue;
      flush(p, sums, chunk);
      if (++chunks % kGruChunksACarry == 0) carry(p, sums);
    }
  }
  flush(p, sums, chunk);
  carry(p, sums);
}

template void gru_pack_bwd(const GruWeights<float>&, float*, float*);
template void gru_pack_bwd(const GruWeights<double>&, double*, double*);
template void gru_bwd(const GruBwd<float>&, const GruBwdSums<float>&, int64_t, int64_t);
template void gru_bwd(const GruBwd<double>&, const GruBwdSums<double>&, int64_t, int64_t);

}  // namespace retain::kernels::RETAIN_CPU_ISA
