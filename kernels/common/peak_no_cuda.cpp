#include <retain/kernels/common/peak.h>

namespace retain::kernels {

PeakRates peak_cuda() { return {}; }

}  // namespace retain::kernels
