// A row at a time: its sums run in kLanes partial sums, which are then added in order, so that the
// compiler makes vectors of them and the result is the same everywhere.

#include <retain/kernels/rms_norm/rms_norm.h>

#include <algorithm>
#include <cmath>

namespace retain::kernels::RETAIN_CPU_ISA {
namespace {

constexpr int64_t kLanes = 16;

/// sum over d of term(d).
template <typename T, typename Term>
[[gnu::always_inline]] inline T sum_over(int64_t D, const Term& term) {
  T partial[kLanes] = {};
  int64_t d = 0;
  for (; d + kLanes <= D; d += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) partial[lane] += term(d + lane);
  }
  for (int64_t lane = 0; d < D; ++d, ++lane) partial[lane] += term(d);
  T total = 0;
  for (int64_t lane = 0; lane < kLanes; ++lane) total += partial[lane];
  return total;
}

template <typename T>
[[gnu::always_inline]] inline T reciprocal_rms(int64_t D, const T* s, double eps) {
  const T square = sum_over<T>(D, [s](int64_t d) { return s[d] * s[d]; });
  return T(1) / std::sqrt(square / static_cast<T>(D) + static_cast<T>(eps));
}

template <typename T>
void norm_row(const RmsNormFwd<T>& p, int64_t row) {
  const int64_t D = p.size.D;
  const T* x = p.x + row * D;
  T* s = p.residual_out + row * D;
  if (p.residual != nullptr) {
    const T* residual = p.residual + row * D;
    for (int64_t d = 0; d < D; ++d) s[d] = x[d] + residual[d];
  } else if (s != x) {
    std::copy_n(x, D, s);
  }
  const T scale = reciprocal_rms(D, s, p.eps);
  const T* __restrict weight = p.weight;
  T* __restrict y = p.y + row * D;
  for (int64_t d = 0; d < D; ++d) y[d] = s[d] * scale * weight[d];
}

/// ds = scale (weight dy − s scale² mean(weight dy s)) + dresidual_out, scale = 1 / rms(s).
template <typename T>
void backward_row(const RmsNormBwd<T>& p, int64_t row, T* __restrict dweight) {
  const int64_t D = p.size.D;
  const T* __restrict s = p.residual_out + row * D;
  const T* __restrict weight = p.weight;
  T* __restrict dx = p.dx + row * D;
  if (p.dy != nullptr) {
    const T* __restrict dy = p.dy + row * D;
    const T scale = reciprocal_rms(D, s, p.eps);
    const T dot = sum_over<T>(D, [&](int64_t d) { return weight[d] * dy[d] * s[d]; });
    const T pull = scale * scale * dot / static_cast<T>(D);
    for (int64_t d = 0; d < D; ++d) {
      dx[d] = scale * (weight[d] * dy[d] - s[d] * pull);
      dweight[d] += dy[d] * s[d] * scale;
    }
  } else {
    std::fill_n(dx, D, T(0));
  }
  if (p.dresidual_out != nullptr) {
    const T* __restrict dresidual = p.dresidual_out + row * D;
    for (int64_t d = 0; d < D; ++d) dx[d] += dresidual[d];
  }
}

}  // namespace

template <typename T>
void rms_norm_fwd(const RmsNormFwd<T>& p, int64_t begin, int64_t end) {
  const int64_t last = std::min(p.size.M, end * kNormRows);
  for (int64_t row = begin * kNormRows; row < last; ++row) norm_row(p, row);
}

template <typename T>
void rms_norm_bwd(const RmsNormBwd<T>& p, int64_t begin, int64_t end) {
  const int64_t last = std::min(p.size.M, end * kNormRows);
  for (int64_t row = begin * kNormRows; row < last; ++row) {
    backward_row(p, row, p.dweight_rows + row / kNormRows * p.size.D);
  }
}

template void rms_norm_fwd(const RmsNormFwd<float>&, int64_t, int64_t);
template void rms_norm_fwd(const RmsNormFwd<double>&, int64_t, int64_t);
template void rms_norm_bwd(const RmsNormBwd<float>&, int64_t, int64_t);
template void rms_norm_bwd(const RmsNormBwd<double>&, int64_t, int64_t);

}  // namespace retain::kernels::RETAIN_CPU_ISA
