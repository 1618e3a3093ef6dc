#include <retain/kernels/common/cpu_isa.h>
#include <retain/kernels/common/flush_denormals.h>
#include <retain/kernels/selective_scan/selective_scan.h>

#include <algorithm>
#include <cmath>
#include <limits>

namespace retain::kernels {

#define RETAIN_DECLARE_SCAN(isa)                                             \
  namespace isa {                                                            \
  template <typename T>                                                      \
  void selective_scan_fwd(const SelectiveScanFwd<T>&, int64_t, int64_t, T*); \
  template <typename T>                                                      \
  void selective_scan_bwd(const SelectiveScanBwd<T>&, int64_t, int64_t, T*); \
  }
RETAIN_DECLARE_SCAN(baseline)
RETAIN_DECLARE_SCAN(avx2)
RETAIN_DECLARE_SCAN(avx512)

namespace {
int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
}  // namespace

template <typename T>
ScanSizes scan_sizes(int64_t time, int64_t batch, int64_t dim, int64_t d_state, int64_t groups) {
  ScanSizes size{.T = time, .B = batch, .D = dim, .N = d_state, .G = groups};
  size.tiles_per_group = ceil_div(dim / groups, kScanLanes<T>);
  size.tiles = groups * size.tiles_per_group;
  size.blocks_per_group = ceil_div(size.tiles_per_group, kScanTiles);
  size.chunks = ceil_div(time, kScanChunk);
  size.row_tiles = ceil_div(batch, kScanRows);
  return size;
}

template <typename T>
void selective_scan_pack(const ScanSizes& size, const T* A, T* A_tiles) {
  constexpr int64_t kLanes = kScanLanes<T>;
  const int64_t per_group = size.D / size.G;
  std::fill_n(A_tiles, size.tiles * size.N * kLanes, T(0));
  for (int64_t d = 0; d < size.D; ++d) {
    const int64_t tile = (d / per_group) * size.tiles_per_group + (d % per_group) / kLanes;
    T* packed = A_tiles + tile * size.N * kLanes + (d % per_group) % kLanes;
    for (int64_t n = 0; n < size.N; ++n) {
      // Finite where A is infinite: 0 times it is 0.
      const T rate = A[d * size.N + n] * T(1.4426950408889634074);
      packed[n * kLanes] =
          std::isinf(rate) ? std::copysign(std::numeric_limits<T>::max(), rate) : rate;
    }
  }
}

template <typename T>
void selective_scan_unpack(const ScanSizes& size, int64_t inner, const double* rows, T* sum) {
  constexpr int64_t kLanes = kScanLanes<T>;
  const int64_t per_group = size.D / size.G;
  for (int64_t d = 0; d < size.D; ++d) {
    const int64_t tile = (d / per_group) * size.tiles_per_group + (d % per_group) / kLanes;
    for (int64_t n = 0; n < inner; ++n) {
      double total = 0;
      for (int64_t row = 0; row < size.row_tiles; ++row) {
        const double* packed = rows + (row * size.tiles + tile) * inner * kLanes;
        total += packed[n * kLanes + (d % per_group) % kLanes];
      }
      sum[d * inner + n] = static_cast<T>(total);
    }
  }
}

int64_t selective_scan_fwd_scratch(const ScanSizes& size, int64_t lanes) {
  return kScanTiles * size.N * lanes;
}

int64_t selective_scan_bwd_scratch(const ScanSizes& size, int64_t lanes) {
  return 2 * kScanTiles * size.N * lanes;
}

template <typename T>
void selective_scan_fwd(const SelectiveScanFwd<T>& params, int64_t begin, int64_t end, T* scratch) {
  const FlushDenormals flush;
  RETAIN_DISPATCH_ISA(selective_scan_fwd, params, begin, end, scratch);
}

template <typename T>
void selective_scan_bwd(const SelectiveScanBwd<T>& params, int64_t begin, int64_t end, T* scratch) {
  const FlushDenormals flush;
  RETAIN_DISPATCH_ISA(selective_scan_bwd, params, begin, end, scratch);
}

#define RETAIN_INSTANTIATE_SCAN(T)                                                    \
  template ScanSizes scan_sizes<T>(int64_t, int64_t, int64_t, int64_t, int64_t);      \
  template void selective_scan_pack(const ScanSizes&, const T*, T*);                  \
  template void selective_scan_unpack(const ScanSizes&, int64_t, const double*, T*);  \
  template void selective_scan_fwd(const SelectiveScanFwd<T>&, int64_t, int64_t, T*); \
  template void selective_scan_bwd(const SelectiveScanBwd<T>&, int64_t, int64_t, T*);
RETAIN_INSTANTIATE_SCAN(float)
RETAIN_INSTANTIATE_SCAN(double)

}  // namespace retain::kernels
