#pragma once
// Small matrix products with a fixed order of summation, held in registers: a few rows times a
// panel of NV vectors. Include it only in files that are compiled once an instruction set.

#include <retain/kernels/common/vector_math.h>

#include <cstdint>

namespace retain::kernels::RETAIN_CPU_ISA {

/// 32 bytes of Scalars; narrower machines split it.
template <typename Scalar>
struct Lanes {
  typedef Scalar Vector __attribute__((vector_size(32)));
  typedef Scalar Unaligned __attribute__((vector_size(32), aligned(alignof(Scalar)), may_alias));
  static constexpr int kCount = 32 / sizeof(Scalar);
};
template <typename Scalar>
using Vector = typename Lanes<Scalar>::Vector;

template <typename Scalar>
RETAIN_INLINE void load(Vector<Scalar>& to, const Scalar* from) {
  to = *reinterpret_cast<const typename Lanes<Scalar>::Unaligned*>(from);
}
template <typename Scalar>
RETAIN_INLINE void store(Scalar* to, const Vector<Scalar>& from) {
  *reinterpret_cast<typename Lanes<Scalar>::Unaligned*>(to) = from;
}

/// sum[i][v] += Σ_k rows[i][k] · panel[k][v], k = 0, 1, …; panel [count, NV vectors] contiguous.
template <int MR, int NV, typename Scalar>
RETAIN_INLINE void add_rows_times_panel(Vector<Scalar> (&sum)[MR][NV],
                                        const Scalar* const (&rows)[MR], int64_t count,
                                        const Scalar* panel) {
  for (int64_t k = 0; k < count; ++k, panel += NV * Lanes<Scalar>::kCount) {
    Vector<Scalar> w[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) load<Scalar>(w[v], panel + v * Lanes<Scalar>::kCount);
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) sum[i][v] += rows[i][k] * w[v];
    }
  }
}

/// sum[i][v] += Σ_n left[n][i] · right[n][v], n = 0, 1, …; one pointer a row on either side.
template <int MR, int NV, typename Scalar>
RETAIN_INLINE void add_outer_products(Vector<Scalar> (&sum)[MR][NV], const Scalar* const* left,
                                      int64_t left_offset, const Scalar* const* right,
                                      int64_t right_offset, int64_t count) {
  for (int64_t n = 0; n < count; ++n) {
    Vector<Scalar> g[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
      load<Scalar>(g[v], right[n] + right_offset + v * Lanes<Scalar>::kCount);
    }
    const Scalar* row = left[n] + left_offset;
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) sum[i][v] += row[i] * g[v];
    }
  }
}

}  // namespace retain::kernels::RETAIN_CPU_ISA
