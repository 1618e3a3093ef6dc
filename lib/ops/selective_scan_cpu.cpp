#include <ATen/ATen.h>
#include <retain/kernels/selective_scan/selective_scan.h>
#include <retain/lib/dtype_name.h>
#include <retain/lib/ops/checks.h>
#include <retain/lib/ops/kernel_arguments.h>
#include <retain/lib/ops/selective_scan_tensors.h>

namespace retain {
namespace {

using kernels::kScanLanes;
using kernels::ScanSizes;

/// The kernel's view of the arguments, and the tensors that it points into.
template <typename T>
struct Prepared {
  Tensor u, delta, z, B, C, D, delta_bias, A_tiles;
  kernels::SelectiveScanInputs<T> in;

  explicit Prepared(const SelectiveScanTensors& from) {
    const auto dtype = c10::CppTypeToScalarType<T>::value;
    u = with_dense_rows(from.u, dtype);
    delta = with_dense_rows(from.delta, dtype);
    z = with_dense_rows(from.z, dtype);
    B = with_dense_rows(from.B, dtype);
    C = with_dense_rows(from.C, dtype);
    D = dense(from.D, dtype);
    delta_bias = dense(from.delta_bias, dtype);
    in.size = kernels::scan_sizes<T>(u.size(0), u.size(1), u.size(2), from.A.size(1), B.size(2));
    const auto A = dense(from.A, dtype);
    A_tiles = at::empty({in.size.tiles, in.size.N, kScanLanes<T>}, u.options());
    kernels::selective_scan_pack(in.size, pointer<T>(A), mutable_pointer<T>(A_tiles));
    in.u = time_major<T>(u);
    in.delta = time_major<T>(delta);
    in.z = time_major<T>(z);
    in.B = time_major<T>(B);
    in.C = time_major<T>(C);
    in.B_stride_g = B.stride(2);
    in.C_stride_g = C.stride(2);
    in.A_tiles = pointer<T>(A_tiles);
    in.D = pointer<T>(D);
    in.delta_bias = pointer<T>(delta_bias);
    in.delta_softplus = from.delta_softplus;
    in.reset = time_major<bool>(from.reset);
  }
};

/// Runs kernel(params, begin, end, scratch) over all items; `cost` is the nanoseconds that one
/// state update takes.
template <typename T, typename Params>
void spread(void (*kernel)(const Params&, int64_t, int64_t, T*), const Params& params,
            int64_t items, int64_t scratch_size, double cost) {
  const auto& size = params.in.size;
  const int64_t updates = size.T * size.B * size.tiles * kScanLanes<T> * (size.N + 4);
  parallel_items(items, cost * static_cast<double>(updates), [&](int64_t begin, int64_t end) {
    const Tensor scratch = at::empty({scratch_size}, c10::CppTypeToScalarType<T>::value);
    kernel(params, begin, end, mutable_pointer<T>(scratch));
  });
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor> forward(const SelectiveScanTensors& tensors, bool keep) {
  const Prepared<T> prepared(tensors);
  const auto& size = prepared.in.size;
  const auto options = prepared.u.options();
  const auto initial_state = dense(tensors.initial_state, prepared.u.scalar_type());
  const auto y = at::empty({size.T, size.B, size.D}, options);
  const auto last_state = at::empty({size.B, size.D, size.N}, options);
  const auto checkpoints =
      keep ? at::empty({size.chunks, size.B, size.D, size.N}, options) : at::empty({0}, options);
  const kernels::SelectiveScanFwd<T> params{
      .in = prepared.in,
      .initial_state = pointer<T>(initial_state),
      .y = mutable_time_major<T>(y),
      .last_state = mutable_pointer<T>(last_state),
      .checkpoints = keep ? mutable_pointer<T>(checkpoints) : nullptr,
  };
  spread<T>(kernels::selective_scan_fwd<T>, params, size.B * size.G * size.blocks_per_group,
            kernels::selective_scan_fwd_scratch(size, kScanLanes<T>), 0.5);
  return {y.to(tensors.u.scalar_type()), last_state, checkpoints};
}

/// The sum over the first dimension, one after the other.
Tensor sum_in_order(const Tensor& parts) {
  auto sum = parts[0];
  for (int64_t i = 1; i < parts.size(0); ++i) sum.add_(parts[i]);
  return sum;
}

template <typename T>
Tensor sum_rows(const ScanSizes& size, const Tensor& rows, int64_t inner, at::IntArrayRef shape) {
  const Tensor sum = at::empty(shape, c10::CppTypeToScalarType<T>::value);
  kernels::selective_scan_unpack(size, inner, pointer<double>(rows), mutable_pointer<T>(sum));
  return sum;
}

template <typename T>
SelectiveScanGradients backward(const Tensor& dy, const Tensor& dlast_state,
                                const SelectiveScanTensors& tensors, const Tensor& kept,
                                const SelectiveScanWritten& written) {
  const auto checkpoints = kept.contiguous();
  const Prepared<T> inputs(tensors);
  const auto& size = inputs.in.size;
  const auto options = inputs.u.options(), wide = options.dtype(at::kDouble);
  const auto dout = with_dense_rows(dy, inputs.u.scalar_type());
  const auto dlast = dense(dlast_state, inputs.u.scalar_type());
  const auto du = at::empty({size.T, size.B, size.D}, options), ddelta = at::empty_like(du);
  // Where its type or layout is not the kernel's, dz is copied.
  const auto& dz_out = written.z;
  const bool dz_in_place = has_dense_rows(dz_out, du.scalar_type());
  const auto dz = dz_in_place || !dz_out.defined() ? dz_out : at::empty_like(du);
  const auto dB = at::empty({size.blocks_per_group, size.T, size.B, size.G, size.N}, options);
  const auto dC = at::empty_like(dB);
  const auto dA = at::zeros({size.row_tiles, size.tiles, size.N, kScanLanes<T>}, wide);
  const auto dD = at::zeros({size.row_tiles, size.tiles, kScanLanes<T>}, wide);
  const auto dbias = at::zeros_like(dD);
  const auto dinitial_state = at::empty({size.B, size.D, size.N}, options);
  const kernels::SelectiveScanBwd<T> params{
      .in = inputs.in,
      .checkpoints = pointer<T>(checkpoints),
      .dy = time_major<T>(dout),
      .dlast_state = pointer<T>(dlast),
      .du = mutable_time_major<T>(du),
      .ddelta = mutable_time_major<T>(ddelta),
      .dz = dz.defined() ? mutable_time_major<T>(dz) : kernels::TimeMajor<T>{},
      .dB_blocks = mutable_pointer<T>(dB),
      .dC_blocks = mutable_pointer<T>(dC),
      .dA_rows = mutable_pointer<double>(dA),
      .dD_rows = mutable_pointer<double>(dD),
      .ddelta_bias_rows = mutable_pointer<double>(dbias),
      .dinitial_state = mutable_pointer<T>(dinitial_state),
  };
  spread<T>(kernels::selective_scan_bwd<T>, params, size.row_tiles * size.G * size.blocks_per_group,
            kernels::selective_scan_bwd_scratch(size, kScanLanes<T>), 1.5);
  if (dz_out.defined() && !dz_in_place) Tensor(dz_out).copy_(dz);
  Tensor(written.B).copy_(sum_in_order(dB));
  Tensor(written.C).copy_(sum_in_order(dC));
  const auto none = at::empty({0}, options);
  const auto weight = [&](const Tensor& argument, const Tensor& rows) {
    return argument.defined() ? sum_rows<T>(size, rows, 1, {size.D}) : none;
  };
  return {.u = du,
          .delta = ddelta,
          .A = sum_rows<T>(size, dA, size.N, {size.D, size.N}),
          .D = weight(tensors.D, dD),
          .delta_bias = weight(tensors.delta_bias, dbias),
          .initial_state = dinitial_state};
}

void check_checkpoint_every(int64_t every) {
  TORCH_CHECK(every == 0 || every == kernels::kScanChunk,
              "selective_scan: checkpoint_every must be 0 or ", kernels::kScanChunk, ", got ",
              every);
}

ScanFwdOutputs fwd(const SelectiveScanTensors& in, int64_t checkpoint_every,
                   at::ScalarType checkpoint_dtype) {
  check_checkpoint_every(checkpoint_every);
  TORCH_CHECK(checkpoint_dtype == state_dtype(in.u), "selective_scan: states of ",
              dtype_name(in.u.scalar_type()), " inputs are not kept as ",
              dtype_name(checkpoint_dtype));
  const bool keep = checkpoint_every != 0;
  return state_dtype(in.u) == at::kDouble ? forward<double>(in, keep) : forward<float>(in, keep);
}

SelectiveScanGradients bwd(const Tensor& dy, const Tensor& dlast_state,
                           const SelectiveScanTensors& in, const Tensor& /*y*/,
                           const Tensor& checkpoints, int64_t checkpoint_every,
                           const SelectiveScanWritten& written) {
  check_checkpoint_every(checkpoint_every);
  return state_dtype(in.u) == at::kDouble
             ? backward<double>(dy, dlast_state, in, checkpoints, written)
             : backward<float>(dy, dlast_state, in, checkpoints, written);
}

}  // namespace

TORCH_LIBRARY_IMPL(retain, CPU, m) { SelectiveScanOps<fwd, bwd>::add_to(m); }

}  // namespace retain
