#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <retain/lib/ops/state_parts.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/library.h>

#include <algorithm>

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

bool wants_gradient(const std::vector<Tensor>& tensors) {
  return at::GradMode::is_enabled() &&
         std::any_of(tensors.begin(), tensors.end(),
                     [](const Tensor& tensor) { return tensor.requires_grad(); });
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
              "zero_rows: mask must be [B], bool, got ", mask.sizes(), " of ", mask.scalar_type());
  for (const Tensor& part : parts) {
    TORCH_CHECK(part.dim() > 0 && part.size(0) == mask.size(0),
                "zero_rows: each part must be [B, ...] with B = ", mask.size(0), " of mask, got ",
                part.sizes());
    TORCH_CHECK(part.device() == mask.device(), "zero_rows: mask must be on ", part.device(),
                " as the parts are, got ", mask.device());
  }
}

void copy_parts(const std::vector<Tensor>& from, const std::vector<Tensor>& to) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("retain::copy_parts", "")
                             .typed<decltype(copy_each)>();
  if (from.empty()) return;
  if (wants_gradient(from) || wants_gradient(to)) return copy_each(from, to);
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
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("retain::zero_rows", "")
                             .typed<decltype(zero_each)>();
  if (parts.empty()) return;
  if (wants_gradient(parts)) return zero_each(parts, mask);
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
