#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <optional>

// What autograd has to know of an op.
namespace retain {
using at::Tensor;

/// Whether autograd is on and one of them asks for a gradient, or has a tangent, which autograd
/// then refuses; undefined ones do not.
inline bool needs_gradient(at::ArrayRef<Tensor> tensors) {
  const bool on = at::GradMode::is_enabled();
  return std::any_of(tensors.begin(), tensors.end(), [&](const Tensor& t) {
    return t.defined() && ((on && t.requires_grad()) || t._fw_grad(/*level=*/0).defined());
  });
}

/// While it lives, a node's backward calls ops below autograd, at a fraction of the cost; not where
/// gradients of its gradients are asked for, of which the ops then say that there are none.
class Unrecorded {
 public:
  Unrecorded() {
    if (!at::GradMode::is_enabled()) below_autograd_.emplace();
  }

 private:
  std::optional<at::AutoDispatchBelowADInplaceOrView> below_autograd_;
};

}  // namespace retain
