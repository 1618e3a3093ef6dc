#pragma once
// What a processor can do at best, to hold a kernel's time against.

namespace retain::kernels {

/// fp32 operations a second; 0 where unknown.
struct PeakRates {
  double exponentials = 0;
  double multiply_adds = 0;
};

/// Of the calling thread: measured on values in registers, in some ten milliseconds.
PeakRates peak_cpu();

/// Of the current GPU: its units times its highest clock; 0 in a build without CUDA.
PeakRates peak_cuda();

inline constexpr int kPeakValues = 96;  ///< that the measuring loops work on

}  // namespace retain::kernels
