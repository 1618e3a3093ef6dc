#include <retain/kernels/common/cpu_isa.h>
#include <retain/kernels/common/flush_denormals.h>
#include <retain/kernels/gru/gru.h>

#define RETAIN_DECLARE(isa)                                                         \
  namespace isa {                                                                   \
  template <typename Scalar>                                                        \
  void gru_pack_fwd(const GruWeights<Scalar>&, Scalar*);                            \
  template <typename Scalar>                                                        \
  void gru_pack_bwd(const GruWeights<Scalar>&, Scalar*, Scalar*);                   \
  template <typename Scalar>                                                        \
  void gru_fwd(const GruFwd<Scalar>&, int64_t, int64_t);                            \
  template <typename Scalar>                                                        \
  void gru_bwd(const GruBwd<Scalar>&, const GruBwdSums<Scalar>&, int64_t, int64_t); \
  }

namespace retain::kernels {

RETAIN_DECLARE(baseline)
RETAIN_DECLARE(avx2)
RETAIN_DECLARE(avx512)

template <typename Scalar>
void gru_pack_fwd(const GruWeights<Scalar>& weights, Scalar* packed) {
  RETAIN_DISPATCH_ISA(gru_pack_fwd, weights, packed);
}

template <typename Scalar>
void gru_pack_bwd(const GruWeights<Scalar>& weights, Scalar* packed_ih, Scalar* packed_hh) {
  RETAIN_DISPATCH_ISA(gru_pack_bwd, weights, packed_ih, packed_hh);
}

template <typename Scalar>
void gru_fwd(const GruFwd<Scalar>& params, int64_t begin, int64_t end) {
  const FlushDenormals guard;
  RETAIN_DISPATCH_ISA(gru_fwd, params, begin, end);
}

template <typename Scalar>
void gru_bwd(const GruBwd<Scalar>& params, const GruBwdSums<Scalar>& sums, int64_t begin,
             int64_t end) {
  const FlushDenormals guard;
  RETAIN_DISPATCH_ISA(gru_bwd, params, sums, begin, end);
}

template void gru_pack_fwd(const GruWeights<float>&, float*);
template void gru_pack_fwd(const GruWeights<double>&, double*);
template void gru_pack_bwd(const GruWeights<float>&, float*, float*);
template void gru_pack_bwd(const GruWeights<double>&, double*, double*);
template void gru_fwd(const GruFwd<float>&, int64_t, int64_t);
template void gru_fwd(const GruFwd<double>&, int64_t, int64_t);
template void gru_bwd(const GruBwd<float>&, const GruBwdSums<float>&, int64_t, int64_t);
template void gru_bwd(const GruBwd<double>&, const GruBwdSums<double>&, int64_t, int64_t);

}  // namespace retain::kernels
