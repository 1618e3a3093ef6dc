#include <retain/kernels/common/peak.h>

namespace retain::kernels {

// CUDA C++ Programming Guide, arithmetic instructions, compute capability 8 and 9: 16 exponentials
// and 128 multiply-adds a clock and multiprocessor.
PeakRates peak_cuda() {
  int device = 0, processors = 0, kilohertz = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  cudaDeviceGetAttribute(&kilohertz, cudaDevAttrClockRate, device);
  const double clocks = 1e3 * processors * kilohertz;
  return {16 * clocks, 128 * clocks};
}

}  // namespace retain::kernels
