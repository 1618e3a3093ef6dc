#pragma once
// Each CPU kernel file is compiled once for every instruction set below, inside the namespace
// RETAIN_CPU_ISA, and the entry points pick the best one that the machine has. The source is the
// same plain C++ for all.

namespace retain::kernels {

enum class CpuIsa { baseline, avx2 };

/// The widest instruction set that this build holds and this machine runs. Decided once.
inline CpuIsa cpu_isa() {
#if defined(RETAIN_HAS_AVX2)
  static const CpuIsa isa = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")
                                ? CpuIsa::avx2
                                : CpuIsa::baseline;
  return isa;
#else
  return CpuIsa::baseline;
#endif
}

}  // namespace retain::kernels

/// Defines `void name(const Params&, int64_t begin, int64_t end)` as a choice between the compiled
/// variants.
#if defined(RETAIN_HAS_AVX2)
#define RETAIN_DISPATCH_ISA(name, ...) \
  (cpu_isa() == CpuIsa::avx2 ? avx2::name(__VA_ARGS__) : baseline::name(__VA_ARGS__))
#else
#define RETAIN_DISPATCH_ISA(name, ...) baseline::name(__VA_ARGS__)
#endif
