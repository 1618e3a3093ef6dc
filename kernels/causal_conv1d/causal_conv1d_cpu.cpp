// One block of channels of one batch row is swept over time; the vector runs over channels. A step
// reads its K inputs where they lie, in x or in the initial state, and skips those on the far side
// of a reset, so that nothing beyond it is ever multiplied. The backward recomputes the sum under
// the silu; where dy is 0 it adds exactly 0, so that a step that the loss does not see leaves no
// NaN in the weights' gradients.

#include <retain/kernels/causal_conv1d/causal_conv1d.h>
#include <retain/kernels/common/vector_math.h>

#include <algorithm>

namespace retain::kernels::RETAIN_CPU_ISA {
namespace {

/// One row's window on time: which inputs a step may read, and where they lie.
template <typename T>
struct Window {
  const CausalConv1dInputs<T>& in;
  int64_t b, channel, width;
  int64_t first;  ///< the oldest input that still counts; below zero lies the initial state

  Window(const CausalConv1dInputs<T>& inputs, int64_t row, int64_t block)
      : in(inputs),
        b(row),
        channel(block * kConvLanes),
        width(std::min(kConvLanes, inputs.size.D - channel)),
        first(inputs.initial_state == nullptr ? 0 : 1 - inputs.size.K) {}

  void step(int64_t t) {
    if (in.reset.data != nullptr && *in.reset.at(t, b)) first = t;
  }
  int64_t oldest(int64_t t) const { return std::max(first, t - (in.size.K - 1)); }
  int64_t state_offset(int64_t s) const {
    return (b * (in.size.K - 1) + in.size.K - 1 + s) * in.size.D + channel;
  }
  const T* input(int64_t s) const {
    return s < 0 ? in.initial_state + state_offset(s) : in.x.at(s, b) + channel;
  }
  const T* tap(int64_t lag) const {
    return in.weight + (in.size.K - 1 - lag) * in.size.D + channel;
  }
};

/// bias + sum over taps, the oldest first.
template <typename T>
RETAIN_INLINE void weighted_sum(const Window<T>& window, int64_t t, T* __restrict sum) {
  const int64_t width = window.width;
  for (int64_t c = 0; c < width; ++c) {
    sum[c] = window.in.bias == nullptr ? T(0) : window.in.bias[window.channel + c];
  }
  for (int64_t s = window.oldest(t); s <= t; ++s) {
    const T* __restrict input = window.input(s);
    const T* __restrict tap = window.tap(t - s);
    for (int64_t c = 0; c < width; ++c) sum[c] += tap[c] * input[c];
  }
}

template <typename T>
void convolve_row(const CausalConv1dFwd<T>& p, int64_t b, int64_t block) {
  const auto& size = p.in.size;
  Window<T> window(p.in, b, block);
  T sum[kConvLanes];
  for (int64_t t = 0; t < size.T; ++t) {
    window.step(t);
    weighted_sum(window, t, sum);
    T* __restrict y = p.y.at(t, b) + window.channel;
    if (p.in.silu) {
      for (int64_t c = 0; c < window.width; ++c) y[c] = silu(sum[c]);
    } else {
      for (int64_t c = 0; c < window.width; ++c) y[c] = sum[c];
    }
  }
  for (int64_t s = size.T - (size.K - 1); s < size.T; ++s) {
    T* kept = p.last_state + window.state_offset(s - size.T);
    if (s < window.first) {
      std::fill_n(kept, window.width, T(0));
    } else {
      std::copy_n(window.input(s), window.width, kept);
    }
  }
}

/// dsum: the gradient that reaches the sum under the activation.
template <typename T>
RETAIN_INLINE void load_dsum(const CausalConv1dBwd<T>& p, const Window<T>& window, int64_t t,
                             T* __restrict dsum) {
  const T* __restrict dy = p.dy.at(t, window.b) + window.channel;
  if (!p.in.silu) {
    for (int64_t c = 0; c < window.width; ++c) dsum[c] = dy[c];
    return;
  }
  weighted_sum(window, t, dsum);
  for (int64_t c = 0; c < window.width; ++c) {
    const T gate = sigmoid(dsum[c]);
    const T slope = gate * (T(1) + dsum[c] * (T(1) - gate));
    dsum[c] = dy[c] == T(0) ? T(0) : dy[c] * slope;
  }
}

/// sum += a ⊙ b, where 0 times anything is 0.
template <typename T>
RETAIN_INLINE void add_product(int64_t width, const T* __restrict a, const T* __restrict b,
                               T* __restrict sum) {
  for (int64_t c = 0; c < width; ++c) sum[c] += a[c] == T(0) ? T(0) : a[c] * b[c];
}

template <typename T>
T* dinput(const CausalConv1dBwd<T>& p, const Window<T>& window, int64_t s) {
  if (s >= 0) return p.dx.at(s, window.b) + window.channel;
  return p.dinitial_state == nullptr ? nullptr : p.dinitial_state + window.state_offset(s);
}

template <typename T>
void flush(const ConvSizes& size, int64_t width, T* dweight, double* rows) {
  for (int64_t k = 0; k <= size.K; ++k) {
    for (int64_t c = 0; c < width; ++c) {
      rows[k * size.D + c] += static_cast<double>(dweight[k * kConvLanes + c]);
      dweight[k * kConvLanes + c] = 0;
    }
  }
}

template <typename T>
void backward_step(const CausalConv1dBwd<T>& p, const Window<T>& window, int64_t t,
                   T* __restrict dweight) {
  T* dx = p.dx.at(t, window.b) + window.channel;
  std::fill_n(dx, window.width, T(0));
  if (p.dy.data == nullptr) return;
  T dsum[kConvLanes];
  load_dsum(p, window, t, dsum);
  for (int64_t s = window.oldest(t); s <= t; ++s) {
    const int64_t lag = t - s;
    T* target = dinput(p, window, s);
    if (target != nullptr) add_product(window.width, dsum, window.tap(lag), target);
    add_product(window.width, dsum, window.input(s),
                dweight + (p.in.size.K - 1 - lag) * kConvLanes);
  }
  T* __restrict dbias = dweight + p.in.size.K * kConvLanes;
  for (int64_t c = 0; c < window.width; ++c) dbias[c] += dsum[c];
}

template <typename T>
void backward_row(const CausalConv1dBwd<T>& p, int64_t b, int64_t block, T* dweight) {
  const auto& size = p.in.size;
  Window<T> window(p.in, b, block);
  double* rows = p.dweight_rows + b / kConvRows * (size.K + 1) * size.D + window.channel;
  for (int64_t t = 0; t < size.T; ++t) {
    window.step(t);
    backward_step(p, window, t, dweight);
    if (t % kConvChunk == kConvChunk - 1) flush(size, window.width, dweight, rows);
  }
  flush(size, window.width, dweight, rows);
  if (p.dlast_state == nullptr) return;
  for (int64_t s = std::max(window.first, size.T - (size.K - 1)); s < size.T; ++s) {
    T* target = dinput(p, window, s);
    if (target == nullptr) continue;
    const T* dlast = p.dlast_state + window.state_offset(s - size.T);
    for (int64_t c = 0; c < window.width; ++c) target[c] += dlast[c];
  }
}

/// Calls row(b, block) for every row of the items.
template <typename Row>
void for_each_row(const ConvSizes& size, int64_t begin, int64_t end, const Row& row) {
  for (int64_t item = begin; item < end; ++item) {
    const int64_t tile = item / size.blocks(), block = item % size.blocks();
    const int64_t last = std::min(size.B, (tile + 1) * kConvRows);
    for (int64_t b = tile * kConvRows; b < last; ++b) row(b, block);
  }
}

}  // namespace

template <typename T>
void causal_conv1d_fwd(const CausalConv1dFwd<T>& p, int64_t begin, int64_t end) {
  for_each_row(p.in.size, begin, end, [&](int64_t b, int64_t block) { convolve_row(p, b, block); });
}

template <typename T>
void causal_conv1d_bwd(const CausalConv1dBwd<T>& p, int64_t begin, int64_t end, T* scratch) {
  std::fill_n(scratch, (p.in.size.K + 1) * kConvLanes, T(0));
  for_each_row(p.in.size, begin, end,
               [&](int64_t b, int64_t block) { backward_row(p, b, block, scratch); });
}

template void causal_conv1d_fwd(const CausalConv1dFwd<float>&, int64_t, int64_t);
template void causal_conv1d_fwd(const CausalConv1dFwd<double>&, int64_t, int64_t);
template void causal_conv1d_bwd(const CausalConv1dBwd<float>&, int64_t, int64_t, float*);
template void causal_conv1d_bwd(const CausalConv1dBwd<double>&, int64_t, int64_t, double*);

}  // namespace retain::kernels::RETAIN_CPU_ISA
