#include <ATen/ATen.h>
#include <retain/lib/dtype_name.h>
#include <retain/lib/ops/find_op.h>
#include <retain/lib/ops/gradients.h>
#include <retain/lib/ops/state_parts.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/library.h>

namespace retain {
namespace {

void copy_each(at::TensorList from, at::TensorList to) {
  check_parts(from, to);
  for (size_t i = 0; i < from.size(); ++i) Tensor(to[i]).copy_(from[i]);
}

void zero_each(at::TensorList parts, const Tensor& mask) {
  check_rows(parts, mask);
  for (const Tensor& part : parts) zero_rows(part, mask);
}

void bump_versions(const std::vector<Tensor>& tensors) {
  for (const auto& tensor : tensors) {
    if (!tensor.is_inference()) torch::autograd::impl::bump_version(tensor);
  }
}

}  // namespace

void check_parts(at::TensorList from, at::TensorList to) {
  TORCH_CHECK(from.size() == to.size(), "copy_parts: there must be a target for each part, got ",
              from.size(), " parts and ", to.size(), " targets");
}

void check_rows(at::TensorList parts, const Tensor& mask) {
  TORCH_CHECK(mask.dim() == 1 && mask.scalar_type() == at::kBool,
              "zero_rows: mask must be [B], bool, got ", mask.sizes(), " of ",
              dtype_name(mask.scalar_type()));
  for (const Tensor& part : parts) {
    TORCH_CHECK(part.dim() > 0 && part.size(0) == mask.size(0),
                "zero_rows: each part must be [B, ...] with B = ", mask.size(0), " of mask, got ",
                part.sizes());
    TORCH_CHECK(part.device() == mask.device(), "zero_rows: mask must be on ", part.device(),
                " as the parts are, got ", mask.device());
  }
}

void copy_parts(const std::vector<Tensor>& from, const std::vector<Tensor>& to) {
  static const auto op = find_op<decltype(copy_each)>("retain::copy_parts");
  if (from.empty()) return;
  if (needs_gradient(from) || needs_gradient(to)) return copy_each(from, to);
  const at::AutoDispatchBelowADInplaceOrView no_gradients;
  op.call(from, to);
  bump_versions(to);
}

void zero_rows(const Tensor& part, const Tensor& mask) {
  std::vector<int64_t> sizes(static_cast<size_t>(part.dim()), 1);
  sizes[0] = part.size(0);
  Tensor(part).masked_fill_(mask.view(sizes), 0);
}

void zero_rows(const std::vector<Tensor>& parts, const Tensor& mask) {
  static const auto op = find_op<decltype(zero_each)>("retain::zero_rows");
  if (parts.empty()) return;
  if (needs_gradient(parts)) return zero_each(parts, mask);
  const at::AutoDispatchBelowADInplaceOrView no_gradients;
  op.call(parts, mask);
  bump_versions(parts);
}

TORCH_LIBRARY_FRAGMENT(retain, m) {
  m.def("copy_parts(Tensor[] source, Tensor(a!)[] target) -> ()");
  m.def("zero_rows(Tensor(a!)[] parts, Tensor mask) -> ()");
}

TORCH_LIBRARY_IMPL(retain, CompositeExplicitAutograd, m) {
  m.impl("copy_parts", copy_each);
  m.impl("zero_rows", zero_each);
}

}  // namespace retain
