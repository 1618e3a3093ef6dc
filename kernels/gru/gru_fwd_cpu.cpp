// GRU forward on the CPU. For each tile of rows and each step, the hidden units are done a vector
// at a time: both products of their three gates stay in registers, then the gates are applied.
//
// Packed weights, for each vector of hidden units j: the biases b_ir + b_hr, b_iz + b_hz, b_in,
// b_hn [4][lanes], then W_ih [I][3][lanes], then W_hh [H][3][lanes].

#include <retain/kernels/gru/gru.h>
#include <retain/kernels/gru/row_product.h>

#include <cstring>

namespace retain::kernels::RETAIN_CPU_ISA {
namespace {

/// to[k][gate][lane] = w[gate · H + j + lane, k]; zero beyond H.
template <typename Scalar>
void pack_panel(const Scalar* w, int64_t columns, int64_t H, int64_t j, Scalar* to) {
  constexpr int64_t lanes = Lanes<Scalar>::kCount;
  const int64_t inside = H - j < lanes ? H - j : lanes;
  for (int64_t gate = 0; gate < 3; ++gate, to += lanes) {
    const Scalar* rows = w + (gate * H + j) * columns;
    for (int64_t k = 0; k < columns; ++k) {
      for (int64_t lane = 0; lane < lanes; ++lane) {
        to[k * 3 * lanes + lane] = lane < inside ? rows[lane * columns + k] : Scalar(0);
      }
    }
  }
}

template <typename Scalar>
void pack_biases(const GruWeights<Scalar>& weights, int64_t j, Scalar* to) {
  constexpr int64_t lanes = Lanes<Scalar>::kCount;
  const auto bias = [&](const Scalar* b, int64_t gate, int64_t unit) {
    return b && unit < weights.H ? b[gate * weights.H + unit] : Scalar(0);
  };
  for (int64_t lane = 0; lane < lanes; ++lane) {
    for (int64_t gate = 0; gate < 2; ++gate) {
      to[gate * lanes + lane] =
          bias(weights.b_ih, gate, j + lane) + bias(weights.b_hh, gate, j + lane);
    }
    to[2 * lanes + lane] = bias(weights.b_ih, 2, j + lane);
    to[3 * lanes + lane] = bias(weights.b_hh, 2, j + lane);
  }
}

/// The rows of one micro-tile at one step.
template <int MR, typename Scalar>
struct Rows {
  const Scalar* x[MR];
  const Scalar* h[MR];
  Scalar* y[MR];
  Scalar* gates[MR];
};

/// The four pre-activations r, z, n of x, n of h for MR rows and one vector of hidden units.
template <int MR, typename Scalar>
RETAIN_INLINE void preactivations(const Rows<MR, Scalar>& rows, int64_t I, int64_t H,
                                  const Scalar* panel, Scalar (&out)[4][MR * 32 / sizeof(Scalar)]) {
  constexpr int lanes = Lanes<Scalar>::kCount;
  Vector<Scalar> sum[MR][3], b_hn;
  for (int i = 0; i < MR; ++i) {
    for (int gate = 0; gate < 3; ++gate) load<Scalar>(sum[i][gate], panel + gate * lanes);
  }
  load<Scalar>(b_hn, panel + 3 * lanes);
  panel += 4 * lanes;
  add_rows_times_panel<MR, 3, Scalar>(sum, rows.x, I, panel);
  for (int i = 0; i < MR; ++i) {
    store<Scalar>(out[2] + i * lanes, sum[i][2]);
    sum[i][2] = b_hn;
  }
  add_rows_times_panel<MR, 3, Scalar>(sum, rows.h, H, panel + I * 3 * lanes);
  for (int i = 0; i < MR; ++i) {
    store<Scalar>(out[0] + i * lanes, sum[i][0]);
    store<Scalar>(out[1] + i * lanes, sum[i][1]);
    store<Scalar>(out[3] + i * lanes, sum[i][2]);
  }
}

/// A vector of a row, of which `inside` lanes exist.
template <typename Scalar>
RETAIN_INLINE void load_lanes(Scalar* to, const Scalar* from, int64_t inside) {
  if (inside == Lanes<Scalar>::kCount) {
    Vector<Scalar> value;
    load<Scalar>(value, from);
    store<Scalar>(to, value);
  } else {
    for (int64_t lane = 0; lane < Lanes<Scalar>::kCount; ++lane) {
      to[lane] = lane < inside ? from[lane] : Scalar(0);
    }
  }
}
template <typename Scalar>
RETAIN_INLINE void store_lanes(Scalar* to, const Scalar* from, int64_t inside) {
  if (inside == Lanes<Scalar>::kCount) {
    Vector<Scalar> value;
    load<Scalar>(value, from);
    store<Scalar>(to, value);
  } else {
    for (int64_t lane = 0; lane < inside; ++lane) to[lane] = from[lane];
  }
}

/// One step of MR rows for the hidden units j … j + lanes.
template <int MR, typename Scalar>
RETAIN_INLINE void step_units(const Rows<MR, Scalar>& rows, int64_t I, int64_t H, int64_t j,
                              const Scalar* panel) {
  constexpr int lanes = Lanes<Scalar>::kCount;
  constexpr int count = MR * lanes;
  const int64_t inside = H - j < lanes ? H - j : lanes;
  Scalar gates[4][count], h[count];
  preactivations<MR, Scalar>(rows, I, H, panel, gates);
  for (int i = 0; i < MR; ++i) load_lanes(h + i * lanes, rows.h[i] + j, inside);
#pragma omp simd
  for (int e = 0; e < count; ++e) {
    const Scalar r = sigmoid(gates[0][e]);
    const Scalar z = sigmoid(gates[1][e]);
    const Scalar n = tanh(gates[2][e] + r * gates[3][e]);
    h[e] = (Scalar(1) - z) * n + z * h[e];
    gates[0][e] = r;
    gates[1][e] = z;
    gates[2][e] = n;
  }
  for (int i = 0; i < MR; ++i) {
    store_lanes(rows.y[i] + j, h + i * lanes, inside);
    if (!rows.gates[i]) continue;
    for (int gate = 0; gate < 4; ++gate) {
      store_lanes(rows.gates[i] + gate * gru_padded<Scalar>(H) + j, gates[gate] + i * lanes, lanes);
    }
  }
}

template <typename Scalar>
const Scalar* state_before(const GruFwd<Scalar>& p, int64_t t, int64_t b) {
  if (p.in.reset.data && *p.in.reset.at(t, b)) return p.in.zeros;
  if (t > 0) return p.y + ((t - 1) * p.in.B + b) * p.in.H;
  return p.in.initial_state ? p.in.initial_state + b * p.in.H : p.in.zeros;
}

template <int MR, typename Scalar>
Rows<MR, Scalar> rows_at(const GruFwd<Scalar>& p, int64_t t, int64_t begin) {
  Rows<MR, Scalar> rows;
  for (int i = 0; i < MR; ++i) {
    const int64_t b = begin + i;
    rows.x[i] = p.in.x.at(t, b);
    rows.h[i] = state_before(p, t, b);
    rows.y[i] = p.y + (t * p.in.B + b) * p.in.H;
    rows.gates[i] = p.gates ? p.gates + (t * p.in.B + b) * 4 * gru_padded<Scalar>(p.in.H) : nullptr;
  }
  return rows;
}

constexpr int kMicroRows = 4;

/// One step of the rows [begin, end), at most a tile: the panel of weights is the outer loop.
template <typename Scalar>
void step_tile(const GruFwd<Scalar>& p, int64_t t, int64_t begin, int64_t end) {
  constexpr int64_t lanes = Lanes<Scalar>::kCount;
  Rows<kMicroRows, Scalar> groups[kGruTileRows / kMicroRows];
  const int64_t whole = (end - begin) / kMicroRows, rest = (end - begin) % kMicroRows;
  for (int64_t g = 0; g < whole; ++g) {
    groups[g] = rows_at<kMicroRows>(p, t, begin + g * kMicroRows);
  }
  const Scalar* panel = p.packed;
  for (int64_t j = 0; j < p.in.H; j += lanes, panel += lanes * (4 + 3 * (p.in.I + p.in.H))) {
    for (int64_t g = 0; g < whole; ++g) step_units(groups[g], p.in.I, p.in.H, j, panel);
    const int64_t b = end - rest;
    if (rest == 1) step_units(rows_at<1>(p, t, b), p.in.I, p.in.H, j, panel);
    if (rest == 2) step_units(rows_at<2>(p, t, b), p.in.I, p.in.H, j, panel);
    if (rest == 3) step_units(rows_at<3>(p, t, b), p.in.I, p.in.H, j, panel);
  }
}

}  // namespace

template <typename Scalar>
void gru_pack_fwd(const GruWeights<Scalar>& weights, Scalar* packed) {
  constexpr int64_t lanes = Lanes<Scalar>::kCount;
  for (int64_t j = 0; j < weights.H; j += lanes) {
    pack_biases(weights, j, packed);
    packed += 4 * lanes;
    pack_panel(weights.w_ih, weights.I, weights.H, j, packed);
    packed += 3 * lanes * weights.I;
    pack_panel(weights.w_hh, weights.H, weights.H, j, packed);
    packed += 3 * lanes * weights.H;
  }
}

template <typename Scalar>
void gru_fwd(const GruFwd<Scalar>& p, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; b += kGruTileRows) {
    const int64_t tile_end = b + kGruTileRows < end ? b + kGruTileRows : end;
    for (int64_t t = 0; t < p.in.T; ++t) step_tile(p, t, b, tile_end);
  }
  for (int64_t b = begin; b < end; ++b) {
    const Scalar* last = p.in.T > 0           ? p.y + ((p.in.T - 1) * p.in.B + b) * p.in.H
                         : p.in.initial_state ? p.in.initial_state + b * p.in.H
                                              : p.in.zeros;
    std::memcpy(p.last_state + b * p.in.H, last, p.in.H * sizeof(Scalar));
  }
}

template void gru_pack_fwd(const GruWeights<float>&, float*);
template void gru_pack_fwd(const GruWeights<double>&, double*);
template void gru_fwd(const GruFwd<float>&, int64_t, int64_t);
template void gru_fwd(const GruFwd<double>&, int64_t, int64_t);

}  // namespace retain::kernels::RETAIN_CPU_ISA
