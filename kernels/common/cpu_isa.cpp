#include <retain/kernels/common/cpu_isa.h>

#include <initializer_list>

namespace retain::kernels {
namespace {

CpuIsa widest() {
  for (const CpuIsa isa : {CpuIsa::avx512, CpuIsa::avx2}) {
    if (has_cpu_isa(isa)) return isa;
  }
  return CpuIsa::baseline;
}

CpuIsa& chosen() {
  static CpuIsa isa = widest();
  return isa;
}

}  // namespace

bool has_cpu_isa(CpuIsa isa) {
#if defined(RETAIN_HAS_AVX2)
  if (isa == CpuIsa::avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
#if defined(RETAIN_HAS_AVX512)
  if (isa == CpuIsa::avx512) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("fma");
  }
#endif
  return isa == CpuIsa::baseline;
}

CpuIsa cpu_isa() { return chosen(); }

void set_cpu_isa(CpuIsa isa) { chosen() = isa; }

}  // namespace retain::kernels
