#pragma once

#include <ATen/autocast_mode.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/_foreach_copy.h>
#include <ATen/ops/empty_like.h>
#include <retain/lib/ops/checks.h>

#include <array>
#include <vector>

namespace retain {
using at::Tensor;

/// Whether autocast is on for devices of a type, which it may not know at all.
inline bool autocast_is_on(c10::DeviceType device) {
  return at::autocast::is_autocast_available(device) && at::autocast::is_autocast_enabled(device);
}

/// In autocast's type, if it is on.
inline Tensor autocasted(const Tensor& t) {
  const auto device = t.device().type();
  if (!autocast_is_on(device)) return t;
  return at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), t, device);
}

/// In fp32, or in fp64 as it is; undefined stays so.
inline Tensor at_least_fp32(const Tensor& t) { return t.defined() ? t.to(state_dtype(t)) : t; }

/// Each tensor in its type; undefined ones stay so. All that change their type do so by one launch.
template <size_t kCount>
std::array<Tensor, kCount> cast_together(std::array<Tensor, kCount> tensors,
                                         const std::array<at::ScalarType, kCount>& types) {
  std::vector<Tensor> from, to;
  for (size_t i = 0; i < kCount; ++i) {
    auto& tensor = tensors[i];
    if (!tensor.defined() || tensor.scalar_type() == types[i]) continue;
    from.push_back(tensor);
    tensor = at::empty_like(tensor, tensor.options().dtype(types[i]));
    to.push_back(tensor);
  }
  if (!to.empty()) at::_foreach_copy_(to, from);
  return tensors;
}

}  // namespace retain
