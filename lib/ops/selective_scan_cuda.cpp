#include <ATen/ATen.h>
#include <c10/cuda/CUDAGuard.h>
#include <retain/kernels/selective_scan/selective_scan_cuda.h>
#include <retain/lib/dtype_name.h>
#include <retain/lib/ops/cuda_arguments.h>
#include <retain/lib/ops/selective_scan.h>
#include <retain/lib/ops/selective_scan_tensors.h>

namespace retain {
namespace {

/// B or C in `dtype`, a copy where rows of whole 16-byte words do not begin on one, as behind a
/// dt_rank that is no multiple of a word: a sequence read value by value takes two to four times as
/// long. One step does not pay for a copy.
Tensor with_rows_in_words(const Tensor& matrix, at::ScalarType dtype) {
  const auto rows = with_dense_rows(matrix, dtype);
  const int64_t word = 16 / rows.element_size();
  bool in_words = kernels::lies_on(rows.const_data_ptr(), 16);
  for (int64_t i = 0; i + 1 < rows.dim(); ++i) {
    in_words = in_words && (rows.size(i) <= 1 || rows.stride(i) % word == 0);
  }
  const bool could_be = rows.size(-1) % word == 0 && rows.size(0) > 1;
  return could_be && !in_words ? rows.clone(at::MemoryFormat::Contiguous) : rows;
}

/// The kernels' view of the arguments, and the tensors that it points into. The activations are of
/// one type: u's, or fp32 where they differ.
struct Prepared {
  at::ScalarType dtype;
  Tensor u, delta, z, B, C, A, D, delta_bias;
  kernels::SelectiveScanCudaInputs in;

  explicit Prepared(const SelectiveScanTensors& from)
      : dtype(common_dtype({from.u, from.delta, from.z, from.B, from.C})),
        u(with_dense_rows(from.u, dtype)),
        delta(with_dense_rows(from.delta, dtype)),
        z(with_dense_rows(from.z, dtype)),
        B(with_rows_in_words(from.B, dtype)),
        C(with_rows_in_words(from.C, dtype)),
        A(dense(from.A, at::kFloat)),
        D(dense(from.D, at::kFloat)),
        delta_bias(dense(from.delta_bias, at::kFloat)) {
    in.T = u.size(0);
    in.B = u.size(1);
    in.D = u.size(2);
    in.N = A.size(1);
    in.G = B.size(2);
    TORCH_CHECK(in.N <= kernels::kScanCudaMaxState, "selective_scan: d_state must be at most ",
                kernels::kScanCudaMaxState, " on CUDA, got ", in.N);
    in.type = activation_type(dtype);
    in.u = activations(u);
    in.delta = activations(delta);
    in.z = activations(z);
    in.B_matrix = activations(B);
    in.C_matrix = activations(C);
    in.B_stride_g = B.stride(2);
    in.C_stride_g = C.stride(2);
    in.A = pointer<float>(A);
    in.D_skip = pointer<float>(D);
    in.delta_bias = pointer<float>(delta_bias);
    in.delta_softplus = from.delta_softplus;
    in.reset = time_major<bool>(from.reset);
  }

  /// Checkpoints every so many steps, of that type.
  void keep(int64_t every, at::ScalarType kept_as) {
    constexpr auto kTile = kernels::kScanCudaTile;
    TORCH_CHECK(every > 0 && every % kTile == 0 && every <= INT32_MAX,
                "selective_scan: checkpoint_every must be a multiple of ", kTile,
                " below 2^31, got ", every);
    in.checkpoint_every = every;
    if (kept_as == at::kFloat) return;
    in.checkpoint_type = kernels::scan_checkpoint_type(in.N, in.type);
    TORCH_CHECK(kept_as == at::kBFloat16 && in.checkpoint_type == kernels::ActivationType::bf16 &&
                    every == kernels::scan_checkpoint_every(in.N, in.type),
                "selective_scan: states of ", dtype_name(dtype), " inputs with d_state ", in.N,
                " are not kept as ", dtype_name(kept_as), " every ", every, " steps");
  }

  at::TensorOptions activation_options() const { return u.options(); }
  at::TensorOptions float_options() const { return u.options().dtype(at::kFloat); }
};

/// Scratch memory of the segments, alive as long as the tensors are.
struct Segments {
  Tensor states, decays;

  Segments(Prepared& prepared, bool exact, bool backward) {
    auto& in = prepared.in;
    if (!exact) kernels::cut_into_segments(in, backward);
    if (in.segments == 1) return;
    states = at::empty({in.segments, in.B, in.D, in.N}, prepared.float_options());
    decays = at::empty_like(states);
    in.segment_states = mutable_pointer<float>(states);
    in.segment_decays = mutable_pointer<float>(decays);
  }
};

/// fp64 has no kernels.
ScanFwdOutputs reference(const SelectiveScanTensors& in) {
  auto [y, last_state] =
      selective_scan_reference(in.u, in.delta, in.A, in.B, in.C, in.D, in.z, in.delta_bias,
                               in.delta_softplus, in.initial_state, in.reset);
  return {y, last_state, at::empty({0}, last_state.options())};
}

ScanFwdOutputs fwd(const SelectiveScanTensors& tensors, int64_t checkpoint_every,
                   at::ScalarType checkpoint_dtype) {
  if (tensors.u.scalar_type() == at::kDouble) return reference(tensors);
  const c10::cuda::CUDAGuard guard(tensors.u.device());
  Prepared prepared(tensors);
  auto& in = prepared.in;
  const bool keep = checkpoint_every != 0;
  if (keep) prepared.keep(checkpoint_every, checkpoint_dtype);
  const Segments segments(prepared, tensors.exact, false);
  const auto initial_state = dense(tensors.initial_state, at::kFloat);
  const auto y = at::empty({in.T, in.B, in.D}, prepared.activation_options());
  const auto last_state = at::empty({in.B, in.D, in.N}, prepared.float_options());
  const int64_t kept = keep ? (in.T + checkpoint_every - 1) / checkpoint_every : 0;
  const auto kept_options = prepared.float_options().dtype(checkpoint_dtype);
  const auto checkpoints =
      keep ? at::empty({kept, in.B, in.D, in.N}, kept_options) : at::empty({0}, kept_options);
  const kernels::SelectiveScanCudaFwd params{
      .in = in,
      .initial_state = pointer<float>(initial_state),
      .y = mutable_activations(y),
      .last_state = mutable_pointer<float>(last_state),
      .checkpoints = keep ? checkpoints.mutable_data_ptr() : nullptr};
  if (in.T == 1 && !keep) {
    kernels::selective_scan_cuda_update(params, current_stream());
  } else {
    kernels::selective_scan_cuda_fwd(params, current_stream());
  }
  return {y.to(tensors.u.scalar_type()), last_state, checkpoints};
}

/// Whether a [T, B, G, N] tensor is rows of G N values of that type, one stride apart.
bool are_rows(const Tensor& x, at::ScalarType dtype) {
  const auto dense = [](int64_t size, int64_t stride, int64_t expected) {
    return size <= 1 || stride == expected;
  };
  return x.scalar_type() == dtype && dense(x.size(3), x.stride(3), 1) &&
         dense(x.size(2), x.stride(2), x.size(3)) &&
         dense(x.size(0), x.stride(0), x.size(1) * x.stride(1));
}

SelectiveScanGradients bwd(const Tensor& dy, const Tensor& dlast_state,
                           const SelectiveScanTensors& tensors, const Tensor& y, const Tensor& kept,
                           int64_t checkpoint_every, const SelectiveScanWritten& written) {
  const c10::cuda::CUDAGuard guard(tensors.u.device());
  const auto checkpoints = kept.contiguous();
  Prepared prepared(tensors);
  auto& in = prepared.in;
  prepared.keep(checkpoint_every, checkpoints.scalar_type());
  TORCH_CHECK(in.checkpoint_type == kernels::scan_checkpoint_type(in.N, in.type),
              "selective_scan: a backward pass of ", dtype_name(prepared.dtype),
              " inputs with d_state ", in.N, " does not take checkpoints in ",
              dtype_name(checkpoints.scalar_type()));
  const bool takes_y = scan_takes_y(checkpoints.scalar_type(), tensors.z.defined());
  TORCH_CHECK(!takes_y || y.defined(), "selective_scan_bwd: y must be there with ",
              dtype_name(checkpoints.scalar_type()), " checkpoints and z, got none");
  const Segments segments(prepared, tensors.exact, true);
  const auto activation = prepared.activation_options(), wide = prepared.float_options();
  const auto dout = with_dense_rows(dy, prepared.dtype);
  const auto y_rows = takes_y ? with_dense_rows(y, prepared.dtype) : Tensor();
  const auto dlast = dense(dlast_state, at::kFloat);
  const auto du = at::empty({in.T, in.B, in.D}, activation), ddelta = at::empty_like(du);
  // Where its type or layout is not the kernel's, a gradient is copied.
  const auto& dz_out = written.z;
  const bool dz_in_place = has_dense_rows(dz_out, prepared.dtype);
  const auto dz = dz_in_place || !dz_out.defined() ? dz_out : at::empty_like(du);
  const bool pairs_in_place = are_rows(written.B, prepared.dtype) &&
                              are_rows(written.C, prepared.dtype) &&
                              written.B.stride(1) == written.C.stride(1);
  const auto pairs_like = [&](const Tensor& out) {
    return pairs_in_place ? out : at::empty({in.T, in.B, in.G, in.N}, activation);
  };
  const auto dB = pairs_like(written.B), dC = pairs_like(written.C);
  const auto dA = at::empty({in.D, in.N}, wide),
             dinitial_state = at::empty({in.B, in.D, in.N}, wide);
  const auto dD = at::empty({tensors.D.defined() ? in.D : 0}, wide);
  const auto ddelta_bias = at::empty({tensors.delta_bias.defined() ? in.D : 0}, wide);
  const auto dB_blocks = at::empty({kernels::selective_scan_cuda_block_sums(in)}, wide),
             dC_blocks = at::empty_like(dB_blocks);
  const auto dA_rows = at::empty({in.segments, in.B, in.D, in.N}, wide);
  const auto dD_rows = at::empty({in.segments, in.B, in.D}, wide),
             dbias_rows = at::empty_like(dD_rows);
  kernels::selective_scan_cuda_bwd(
      {.in = in,
       .checkpoints = checkpoints.const_data_ptr(),
       .y = activations(y_rows),
       .dy = activations(dout),
       .dlast_state = pointer<float>(dlast),
       .du = mutable_activations(du),
       .ddelta = mutable_activations(ddelta),
       .dz = dz.defined() ? mutable_activations(dz) : kernels::Activations{},
       .dB = dB.mutable_data_ptr(),
       .dC = dC.mutable_data_ptr(),
       .pair_stride = dB.stride(1),
       .dA = mutable_pointer<float>(dA),
       .dD = dD.numel() > 0 ? mutable_pointer<float>(dD) : nullptr,
       .ddelta_bias = ddelta_bias.numel() > 0 ? mutable_pointer<float>(ddelta_bias) : nullptr,
       .dinitial_state = mutable_pointer<float>(dinitial_state),
       .dB_blocks = mutable_pointer<float>(dB_blocks),
       .dC_blocks = mutable_pointer<float>(dC_blocks),
       .dA_rows = mutable_pointer<float>(dA_rows),
       .dD_rows = mutable_pointer<float>(dD_rows),
       .ddelta_bias_rows = mutable_pointer<float>(dbias_rows)},
      current_stream());
  if (dz_out.defined() && !dz_in_place) Tensor(dz_out).copy_(dz);
  if (!pairs_in_place) {
    Tensor(written.B).copy_(dB);
    Tensor(written.C).copy_(dC);
  }
  return {.u = du,
          .delta = ddelta,
          .A = dA,
          .D = dD,
          .delta_bias = ddelta_bias,
          .initial_state = dinitial_state};
}

}  // namespace

TORCH_LIBRARY_IMPL(retain, CUDA, m) { SelectiveScanOps<fwd, bwd>::add_to(m); }

}  // namespace retain
