// Loops whose time is that of one operation, on values that stay in registers.

#include <retain/kernels/common/peak.h>
#include <retain/kernels/common/vector_math.h>

namespace retain::kernels::RETAIN_CPU_ISA {
namespace {

template <typename Step>
RETAIN_INLINE void repeat(int64_t rounds, float* values, const Step& step) {
  float x[kPeakValues];
  for (int i = 0; i < kPeakValues; ++i) x[i] = values[i];
  for (int64_t round = 0; round < rounds; ++round) {
#pragma omp simd
    for (int i = 0; i < kPeakValues; ++i) x[i] = step(x[i]);
  }
  for (int i = 0; i < kPeakValues; ++i) values[i] = x[i];
}

}  // namespace

void repeat_exp2(int64_t rounds, float* values) {
  repeat(rounds, values, [](float x) { return exp2(x) - 1.5f; });
}

void repeat_multiply_add(int64_t rounds, float* values) {
  repeat(rounds, values, [](float x) { return x * 0.75f + 0.125f; });
}

}  // namespace retain::kernels::RETAIN_CPU_ISA
