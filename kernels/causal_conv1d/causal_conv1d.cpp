#include <retain/kernels/causal_conv1d/causal_conv1d.h>
#include <retain/kernels/common/cpu_isa.h>

namespace retain::kernels {

#define RETAIN_DECLARE(isa)                                                \
  namespace isa {                                                          \
  template <typename T>                                                    \
  void causal_conv1d_fwd(const CausalConv1dFwd<T>&, int64_t, int64_t);     \
  template <typename T>                                                    \
  void causal_conv1d_bwd(const CausalConv1dBwd<T>&, int64_t, int64_t, T*); \
  }
RETAIN_DECLARE(baseline)
RETAIN_DECLARE(avx2)
RETAIN_DECLARE(avx512)

int64_t causal_conv1d_bwd_scratch(const ConvSizes& size) { return (size.K + 1) * kConvLanes; }

template <typename T>
void causal_conv1d_fwd(const CausalConv1dFwd<T>& params, int64_t begin, int64_t end) {
  RETAIN_DISPATCH_ISA(causal_conv1d_fwd, params, begin, end);
}

template <typename T>
void causal_conv1d_bwd(const CausalConv1dBwd<T>& params, int64_t begin, int64_t end, T* scratch) {
  RETAIN_DISPATCH_ISA(causal_conv1d_bwd, params, begin, end, scratch);
}

template void causal_conv1d_fwd(const CausalConv1dFwd<float>&, int64_t, int64_t);
template void causal_conv1d_fwd(const CausalConv1dFwd<double>&, int64_t, int64_t);
template void causal_conv1d_bwd(const CausalConv1dBwd<float>&, int64_t, int64_t, float*);
template void causal_conv1d_bwd(const CausalConv1dBwd<double>&, int64_t, int64_t, double*);

}  // namespace retain::kernels
