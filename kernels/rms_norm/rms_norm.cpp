#include <retain/kernels/common/cpu_isa.h>
#include <retain/kernels/rms_norm/rms_norm.h>

namespace retain::kernels {

#define RETAIN_DECLARE(isa)                                  \
  namespace isa {                                            \
  template <typename T>                                      \
  void rms_norm_fwd(const RmsNormFwd<T>&, int64_t, int64_t); \
  template <typename T>                                      \
  void rms_norm_bwd(const RmsNormBwd<T>&, int64_t, int64_t); \
  }
RETAIN_DECLARE(baseline)
RETAIN_DECLARE(avx2)
RETAIN_DECLARE(avx512)

template <typename T>
void rms_norm_fwd(const RmsNormFwd<T>& params, int64_t begin, int64_t end) {
  RETAIN_DISPATCH_ISA(rms_norm_fwd, params, begin, end);
}

template <typename T>
void rms_norm_bwd(const RmsNormBwd<T>& params, int64_t begin, int64_t end) {
  RETAIN_DISPATCH_ISA(rms_norm_bwd, params, begin, end);
}

template void rms_norm_fwd(const RmsNormFwd<float>&, int64_t, int64_t);
template void rms_norm_fwd(const RmsNormFwd<double>&, int64_t, int64_t);
template void rms_norm_bwd(const RmsNormBwd<float>&, int64_t, int64_t);
template void rms_norm_bwd(const RmsNormBwd<double>&, int64_t, int64_t);

}  // namespace retain::kernels
