#pragma once
// Each CPU kernel file is compiled once for every instruction set below, inside the namespace
// RETAIN_CPU_ISA, and the entry points pick the best one that the machine has. The source is the
// same plain C++ for all.

namespace retain::kernels {

/// From narrow to wide.
enum class CpuIsa { baseline, avx2, avx512 };

/// Whether this build holds the variant and this machine runs it.
bool has_cpu_isa(CpuIsa isa);

/// The variant that the kernels run: the widest there is, unless set_cpu_isa chose another.
CpuIsa cpu_isa();

/// For tests. Not while a kernel runs, and only what has_cpu_isa.
void set_cpu_isa(CpuIsa isa);

}  // namespace retain::kernels

#if defined(RETAIN_HAS_AVX2)
#define RETAIN_RUN_IF_AVX2(name, ...) \
  if (cpu_isa() == CpuIsa::avx2) return avx2::name(__VA_ARGS__);
#else
#define RETAIN_RUN_IF_AVX2(name, ...)
#endif
#if defined(RETAIN_HAS_AVX512)
#define RETAIN_RUN_IF_AVX512(name, ...) \
  if (cpu_isa() == CpuIsa::avx512) return avx512::name(__VA_ARGS__);
#else
#define RETAIN_RUN_IF_AVX512(name, ...)
#endif

/// The body of an entry point that returns nothing: calls the chosen variant of the function.
#define RETAIN_DISPATCH_ISA(name, ...)    \
  RETAIN_RUN_IF_AVX512(name, __VA_ARGS__) \
  RETAIN_RUN_IF_AVX2(name, __VA_ARGS__)   \
  return baseline::name(__VA_ARGS__)
