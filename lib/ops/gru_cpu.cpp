#include <ATen/ATen.h>
#include <retain/kernels/gru/gru.h>
#include <retain/lib/ops/gru_tensors.h>
#include <retain/lib/ops/kernel_arguments.h>

#include <algorithm>

namespace retain {
namespace {

using kernels::kGruTileRows;

/// Sums of weight gradients are kept for at most so many ranges of rows and added in their order.
constexpr int64_t kMostRanges = 64;

/// The arguments as the kernels take them: one dtype, dense rows.
struct Arguments {
  at::ScalarType dtype;
  Tensor x, w_ih, w_hh, b_ih, b_hh, initial_state, reset, zeros;

  Arguments(const Tensor& x_, const Tensor& w_ih_, const Tensor& w_hh_, const OptionalTensor& b_ih_,
            const OptionalTensor& b_hh_, const OptionalTensor& initial_state_,
            const OptionalTensor& reset_)
      : dtype(state_dtype(x_)),
        x(with_dense_rows(x_, dtype)),
        w_ih(dense(w_ih_, dtype)),
        w_hh(dense(w_hh_, dtype)),
        b_ih(dense(b_ih_, dtype)),
        b_hh(dense(b_hh_, dtype)),
        initial_state(dense(initial_state_, dtype)),
        reset(value_or_undefined(reset_)),
        zeros(at::zeros({w_hh.size(1)}, w_hh.options())) {}

  int64_t T() const { return x.size(0); }
  int64_t B() const { return x.size(1); }
  int64_t I() const { return x.size(2); }
  int64_t H() const { return w_hh.size(1); }
  int64_t tiles() const { return (B() + kGruTileRows - 1) / kGruTileRows; }
  /// One pass over the weights for each step and row, at 25 multiply-adds a nanosecond.
  double nanoseconds() const {
    return static_cast<double>(T() * B()) * static_cast<double>(3 * H() * (I() + H())) / 25;
  }
  Tensor allocate(at::IntArrayRef sizes) const { return at::empty(sizes, w_hh.options()); }

  template <typename Scalar>
  kernels::GruWeights<Scalar> weights() const {
    return {.I = I(),
            .H = H(),
            .w_ih = pointer<Scalar>(w_ih),
            .w_hh = pointer<Scalar>(w_hh),
            .b_ih = pointer<Scalar>(b_ih),
            .b_hh = pointer<Scalar>(b_hh)};
  }
  template <typename Scalar>
  kernels::GruInputs<Scalar> inputs() const {
    return {.T = T(),
            .B = B(),
            .I = I(),
            .H = H(),
            .x = time_major<Scalar>(x),
            .initial_state = pointer<Scalar>(initial_state),
            .reset = time_major<bool>(reset),
            .zeros = pointer<Scalar>(zeros)};
  }
};

template <typename Scalar>
Tensor pack_fwd(const Arguments& args) {
  const auto packed = args.allocate({kernels::gru_packed_fwd_size<Scalar>(args.I(), args.H())});
  kernels::gru_pack_fwd(args.weights<Scalar>(), mutable_pointer<Scalar>(packed));
  return packed;
}

template <typename Scalar>
std::pair<Tensor, Tensor> pack_bwd(const Arguments& args, bool needs_dx) {
  const int64_t I = args.I(), H = args.H();
  const auto ih = needs_dx ? args.allocate({kernels::gru_packed_bwd_size<Scalar>(I, H)}) : Tensor();
  const auto hh = args.allocate({kernels::gru_packed_bwd_size<Scalar>(H, H)});
  kernels::gru_pack_bwd(args.weights<Scalar>(),
                        ih.defined() ? mutable_pointer<Scalar>(ih) : nullptr,
                        mutable_pointer<Scalar>(hh));
  return {ih, hh};
}

/// Runs the backward over fixed ranges of tiles; returns the sums over all rows of dw_ih, dw_hh and
/// the bias gradients as one flat array, in the kernel's layout.
template <typename Scalar>
Tensor run_bwd(const kernels::GruBwd<Scalar>& params, const Arguments& args) {
  const int64_t H = args.H(), size = kernels::gru_sums_size<Scalar>(args.I(), H);
  const int64_t tiles = args.tiles(), ranges = std::min(tiles, kMostRanges);
  const auto totals = at::zeros({std::max<int64_t>(ranges, 1), size}, at::kDouble);
  parallel_items(ranges, 2 * args.nanoseconds(), [&](int64_t begin, int64_t end) {
    const auto sums = at::zeros({size}, args.zeros.options());
    const auto scratch = at::zeros({kernels::gru_scratch_size<Scalar>(H)}, args.zeros.options());
    for (int64_t range = begin; range < end; ++range) {
      kernels::gru_bwd(params,
                       {.totals = mutable_pointer<double>(totals) + range * size,
                        .sums = mutable_pointer<Scalar>(sums),
                        .scratch = mutable_pointer<Scalar>(scratch)},
                       tiles * range / ranges * kGruTileRows,
                       std::min(args.B(), tiles * (range + 1) / ranges * kGruTileRows));
    }
  });
  auto total = totals[0];
  for (int64_t range = 1; range < ranges; ++range) total.add_(totals[range]);
  return total.to(args.dtype);
}

/// [3H, columns] from [columns, 3, padded H]; `first` is the place of the gate r.
Tensor unpack(const Tensor& flat, int64_t columns, int64_t H, int64_t first) {
  const int64_t padded = columns == 0 ? H : flat.numel() / (3 * columns);
  return flat.view({columns, 3, padded})
      .roll(-first, 1)
      .narrow(2, 0, H)
      .permute({1, 2, 0})
      .reshape({3 * H, columns})
      .contiguous();
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> gru_fwd_cpu(const Tensor& x, const Tensor& w_ih,
                                               const Tensor& w_hh, const OptionalTensor& b_ih,
                                               const OptionalTensor& b_hh,
                                               const OptionalTensor& initial_state,
                                               const OptionalTensor& reset, bool keep_gates) {
  check_gru(x, w_ih, w_hh, b_ih, b_hh, initial_state, reset);
  const Arguments args(x, w_ih, w_hh, b_ih, b_hh, initial_state, reset);
  const int64_t T = args.T(), B = args.B(), H = args.H();
  const auto y = args.allocate({T, B, H}), last_state = args.allocate({B, H});
  Tensor gates = args.allocate({0});
  AT_DISPATCH_FLOATING_TYPES(args.dtype, "gru", [&] {
    if (keep_gates) gates = args.allocate({T, B, 4, kernels::gru_padded<scalar_t>(H)});
    const auto packed = pack_fwd<scalar_t>(args);
    const kernels::GruFwd<scalar_t> params{
        .in = args.inputs<scalar_t>(),
        .packed = pointer<scalar_t>(packed),
        .y = mutable_pointer<scalar_t>(y),
        .last_state = mutable_pointer<scalar_t>(last_state),
        .gates = keep_gates ? mutable_pointer<scalar_t>(gates) : nullptr};
    parallel_items(args.tiles(), args.nanoseconds(), [&](int64_t begin, int64_t end) {
      kernels::gru_fwd(params, begin * kGruTileRows, std::min(B, end * kGruTileRows));
    });
  });
  return {y, last_state, gates};
}

std::tuple<Tensor, Tensor> gru_cpu(const Tensor& x, const Tensor& w_ih, const Tensor& w_hh,
                                   const OptionalTensor& b_ih, const OptionalTensor& b_hh,
                                   const OptionalTensor& initial_state,
                                   const OptionalTensor& reset) {
  const auto [y, last_state, gates] =
      gru_fwd_cpu(x, w_ih, w_hh, b_ih, b_hh, initial_state, reset, /*keep_gates=*/false);
  return {y.to(x.scalar_type()), last_state};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gru_bwd_cpu(
    const OptionalTensor& dy_in, const OptionalTensor& dlast_state, const Tensor& x,
    const Tensor& w_ih, const Tensor& w_hh, const OptionalTensor& initial_state,
    const OptionalTensor& reset, const Tensor& y_in, const Tensor& gates_in, bool needs_dx) {
  constexpr char kBwd[] = "gru_bwd";
  check_gru(x, w_ih, w_hh, {}, {}, initial_state, reset);
  const Arguments args(x, w_ih, w_hh, {}, {}, initial_state, reset);
  const int64_t T = args.T(), B = args.B(), I = args.I(), H = args.H();
  const int64_t padded =
      args.dtype == at::kDouble ? kernels::gru_padded<double>(H) : kernels::gru_padded<float>(H);
  const auto check = [&](const char* name, const OptionalTensor& tensor, const char* layout,
                         std::initializer_list<c10::SymInt> sizes) {
    check_if_present(kBwd, name, tensor, layout, sizes, "x", x);
  };
  check("dy", dy_in, "[T, B, H]", {T, B, H});
  check("dlast_state", dlast_state, "[B, H]", {B, H});
  check("y", y_in, "[T, B, H]", {T, B, H});
  check("gates", gates_in, "[T, B, 4, padded H]", {T, B, 4, padded});
  const auto y = y_in.contiguous(), gates = gates_in.contiguous();
  const auto dy = with_dense_rows(dy_in, args.dtype);
  const auto dstate = at::zeros({B, H}, args.zeros.options());
  if (present(dlast_state)) dstate.copy_(*dlast_state);
  const auto dx = needs_dx ? args.allocate(x.sizes()) : args.allocate({0});
  Tensor sums;
  AT_DISPATCH_FLOATING_TYPES(args.dtype, "gru_bwd", [&] {
    const auto [packed_ih, packed_hh] = pack_bwd<scalar_t>(args, needs_dx);
    sums = run_bwd<scalar_t>({.in = args.inputs<scalar_t>(),
                              .packed_ih = pointer<scalar_t>(packed_ih),
                              .packed_hh = pointer<scalar_t>(packed_hh),
                              .y = pointer<scalar_t>(y),
                              .gates = pointer<scalar_t>(gates),
                              .dy = time_major<scalar_t>(dy),
                              .dx = needs_dx ? mutable_pointer<scalar_t>(dx) : nullptr,
                              .dstate = mutable_pointer<scalar_t>(dstate)},
                             args);
  });
  const auto part = [&](int64_t first_row, int64_t rows) {
    return sums.narrow(0, first_row * padded, rows * padded);
  };
  return {dx,
          unpack(part(0, 3 * I), I, H, 1),
          unpack(part(3 * I, 3 * H), H, H, 0),
          unpack(part(3 * (I + H), 3), 1, H, 1).squeeze(1),
          unpack(part(3 * (I + H) + 1, 3), 1, H, 0).squeeze(1),
          dstate};
}

}  // namespace retain
