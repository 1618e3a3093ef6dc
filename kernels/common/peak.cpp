#include <retain/kernels/common/cpu_isa.h>
#include <retain/kernels/common/peak.h>

#include <algorithm>
#include <chrono>

namespace retain::kernels {

#define RETAIN_DECLARE(isa)                  \
  namespace isa {                            \
  void repeat_exp2(int64_t, float*);         \
  void repeat_multiply_add(int64_t, float*); \
  }
RETAIN_DECLARE(baseline)
RETAIN_DECLARE(avx2)
RETAIN_DECLARE(avx512)

namespace {

void repeat_exp2(int64_t rounds, float* values) {
  RETAIN_DISPATCH_ISA(repeat_exp2, rounds, values);
}

void repeat_multiply_add(int64_t rounds, float* values) {
  RETAIN_DISPATCH_ISA(repeat_multiply_add, rounds, values);
}

/// Operations a second, the best of a few tries.
double rate(void (*repeat)(int64_t, float*)) {
  constexpr int64_t kRounds = 10000;
  float values[kPeakValues] = {};
  double best = 0;
  for (int i = 0; i < 10; ++i) {
    const auto start = std::chrono::steady_clock::now();
    repeat(kRounds, values);
    const std::chrono::duration<double> time = std::chrono::steady_clock::now() - start;
    best = std::max(best, kRounds * kPeakValues / time.count());
  }
  volatile float used = values[0];  // or the loops could be left out
  static_cast<void>(used);
  return best;
}

}  // namespace

PeakRates peak_cpu() { return {rate(repeat_exp2), rate(repeat_multiply_add)}; }

}  // namespace retain::kernels
