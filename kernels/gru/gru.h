#pragma once
// One layer of GRU over time with resets, rows of the batch in [begin, end) in the calling thread:
//   r = σ(x W_ir' + b_ir + h W_hr' + b_hr);  z = σ(x W_iz' + b_iz + h W_hz' + b_hz)
//   n = tanh(x W_in' + b_in + r ⊙ (h W_hn' + b_hn));  h' = (1 − z) ⊙ n + z ⊙ h
// (Cho et al. 2014, arXiv:1406.1078, in the variant and gate order r, z, n of torch.nn.GRU.)
//
// A row's values are sums over k = 0, 1, … in this order, whatever the tile it is computed in, so
// they depend neither on the rows beside it nor on how time is cut. Strides count elements; every
// pointer must stay valid during the call and nothing is kept after it.

#include <retain/kernels/common/time_major.h>

#include <cstdint>

namespace retain::kernels {

/// Hidden units side by side in one vector; rows of packed arrays are padded to a multiple of it.
template <typename Scalar>
inline constexpr int64_t kGruLanes = 32 / sizeof(Scalar);

template <typename Scalar>
constexpr int64_t gru_padded(int64_t size) {
  return (size + kGruLanes<Scalar> - 1) / kGruLanes<Scalar> * kGruLanes<Scalar>;
}

/// Rows of the batch that step together; a range should start at a multiple of it.
inline constexpr int64_t kGruTileRows = 16;

/// The weights as torch.nn.GRU holds them, contiguous.
template <typename Scalar>
struct GruWeights {
  int64_t I;           ///< input size
  int64_t H;           ///< hidden size
  const Scalar* w_ih;  ///< [3H, I], read
  const Scalar* w_hh;  ///< [3H, H], read
  const Scalar* b_ih;  ///< [3H], read; null = zeros
  const Scalar* b_hh;  ///< [3H], read; null = zeros
};

/// Sizes of the packed arrays, in elements.
template <typename Scalar>
constexpr int64_t gru_packed_fwd_size(int64_t I, int64_t H) {
  return gru_padded<Scalar>(H) * (4 + 3 * (I + H));
}
template <typename Scalar>
constexpr int64_t gru_packed_bwd_size(int64_t outputs, int64_t H) {
  const int64_t panel = 2 * kGruLanes<Scalar>;
  return (outputs + panel - 1) / panel * panel * 3 * gru_padded<Scalar>(H);
}

/// Writes `packed` [gru_packed_fwd_size(I, H)] for gru_fwd.
template <typename Scalar>
void gru_pack_fwd(const GruWeights<Scalar>& weights, Scalar* packed);

/// Writes `packed_ih` [gru_packed_bwd_size(I, H)] (null = skip) and `packed_hh`
/// [gru_packed_bwd_size(H, H)] for gru_bwd.
template <typename Scalar>
void gru_pack_bwd(const GruWeights<Scalar>& weights, Scalar* packed_ih, Scalar* packed_hh);

/// What both passes read.
template <typename Scalar>
struct GruInputs {
  int64_t T, B, I, H;
  TimeMajor<const Scalar> x;    ///< [T, B, I]
  const Scalar* initial_state;  ///< [B, H] contiguous; null = zeros
  TimeMajor<const bool> reset;  ///< [T, B]: the state is zero before step t; absent = none
  const Scalar* zeros;          ///< [H] zeros
};

template <typename Scalar>
struct GruFwd {
  GruInputs<Scalar> in;
  const Scalar* packed;  ///< from gru_pack_fwd

  Scalar* y;           ///< out: [T, B, H] contiguous; read back as the state
  Scalar* last_state;  ///< out: [B, H] contiguous; may not overlap initial_state
  Scalar* gates;  ///< out: [T, B, 4, gru_padded(H)] contiguous: r, z, n, W_hn h + b_hn; null = not
                  ///< kept
};

template <typename Scalar>
void gru_fwd(const GruFwd<Scalar>& params, int64_t begin, int64_t end);

template <typename Scalar>
struct GruBwd {
  GruInputs<Scalar> in;
  const Scalar* packed_ih;  ///< from gru_pack_bwd; null = no dx
  const Scalar* packed_hh;  ///< from gru_pack_bwd
  const Scalar* y;          ///< as the forward wrote it
  const Scalar* gates;      ///< as the forward wrote it

  TimeMajor<const Scalar> dy;  ///< [T, B, H]; absent = zeros
  Scalar* dx;                  ///< out: [T, B, I] contiguous; null if packed_ih is
  Scalar* dstate;  ///< in: the last state's gradient, out: the initial state's; [B, H] contiguous
};

/// Rows whose outer products are added to the weights' gradients at once.
inline constexpr int64_t kGruChunkRows = 128;
/// Chunks after which their sums are added to those in fp64.
inline constexpr int64_t kGruChunksACarry = 8;

/// From one row of the scratch memory to the next; not a multiple of the cache's stride.
template <typename Scalar>
constexpr int64_t gru_scratch_stride(int64_t H) {
  return 4 * gru_padded<Scalar>(H) + 16;
}
template <typename Scalar>
constexpr int64_t gru_scratch_size(int64_t H) {
  return kGruChunkRows * gru_scratch_stride<Scalar>(H);
}

/// The elements of the gradients of weights and biases: [I, 3, gru_padded(H)] of w_ih, [H, 3, …] of
/// w_hh, [4, …] of the biases. Gate gradients come in the order n (input side), r, z, n (hidden
/// side): the first three meet x, the last three meet h.
template <typename Scalar>
constexpr int64_t gru_sums_size(int64_t I, int64_t H) {
  return (3 * (I + H) + 4) * gru_padded<Scalar>(H);
}

/// What a range of rows is added to.
template <typename Scalar>
struct GruBwdSums {
  double* totals;   ///< in, out: [gru_sums_size(I, H)]
  Scalar* sums;     ///< in, out: zeros [gru_sums_size(I, H)], of the chunks on their way to totals
  Scalar* scratch;  ///< in, zeros or what another call left: [gru_scratch_size(H)]
};

template <typename Scalar>
void gru_bwd(const GruBwd<Scalar>& params, const GruBwdSums<Scalar>& sums, int64_t begin,
             int64_t end);

}  // namespace retain::kernels
