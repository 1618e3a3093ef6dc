#pragma once

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace retain::kernels {

/// While it lives, numbers below the smallest normal one count as zero in this thread. Gradients
/// that fade over many steps pass through them, and the processor is some hundred times slower
/// there.
class FlushDenormals {
 public:
#if defined(__SSE__)
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | kFlushToZero | kDenormalsAreZero); }
  ~FlushDenormals() { _mm_setcsr(saved_); }
#else
  FlushDenormals() {}
#endif
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;

#if defined(__SSE__)
 private:
  static constexpr unsigned kFlushToZero = 0x8000, kDenormalsAreZero = 0x0040;
  unsigned saved_;
#endif
};

}  // namespace retain::kernels
