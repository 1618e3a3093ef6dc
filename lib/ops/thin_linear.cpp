#include <retain/lib/ops/thin_linear.h>

#include <ATen/ATen.h>
#include <retain/lib/ops/checks.h>
#include <retain/lib/ops/find_op.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

namespace retain {
namespace {

Tensor checked_by_products(const Tensor& dy, const Tensor& x, const Tensor& columns,
                           const Tensor& dx) {
  check_thin_linear_bwd(dy, x, columns, dx);
  return thin_linear_bwd_by_products(dy, x, columns, dx);
}

}  // namespace

void check_thin_linear_bwd(const Tensor& dy, const Tensor& x, const Tensor& columns,
                           const Tensor& dx) {
  constexpr char kOp[] = "thin_linear_bwd";
  check_rank(kOp, "dy", dy, "[rows, out]");
  check_floating(kOp, "dy", dy);
  check_rank(kOp, "x", x, "[rows, in]");
  const auto rows = dy.sym_size(0), in = x.sym_size(1), out = dy.sym_size(1);
  const auto check = [&](const char* name, const Tensor& tensor, const char* layout,
                         std::initializer_list<c10::SymInt> sizes) {
    check_shape(kOp, name, tensor, layout, sizes);
    check_same(kOp, name, tensor, "dy", dy);
  };
  check("x", x, "[rows, in]", {rows, in});
  check("columns", columns, "[in, out]", {in, out});
  check("dx", dx, "[rows, in]", {rows, in});
  check_apart(kOp, "dx", dx);
  check_apart(kOp, "dx", dx, "dy", dy);
  check_apart(kOp, "dx", dx, "x", x);
}

Tensor thin_linear_bwd_by_products(const Tensor& dy, const Tensor& x, const Tensor& columns,
                                   const Tensor& dx) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  auto out = dx;
  at::mm_out(out, dy, columns.t());
  return at::mm(x.t(), dy);
}

Tensor thin_linear_bwd_into(const Tensor& dy, const Tensor& x, const Tensor& columns,
                            const Tensor& dx) {
  static const auto op = find_op<decltype(thin_linear_bwd_into)>("retain::thin_linear_bwd_into");
  return op.call(dy, x, columns, dx);
}

TORCH_LIBRARY_FRAGMENT(retain, m) {
  m.def(
      "thin_linear_bwd_into(Tensor dy, Tensor x, Tensor columns, Tensor(a!) dx) -> Tensor "
      "dcolumns");
}

TORCH_LIBRARY_IMPL(retain, CompositeExplicitAutograd, m) {
  m.impl("thin_linear_bwd_into", checked_by_products);
}

TORCH_LIBRARY_IMPL(retain, Autograd, m) {
  m.impl("thin_linear_bwd_into", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace retain
