#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/_foreach_copy.h>
#include <ATen/ops/empty_like.h>

#include <array>
#include <vector>

namespace retain {
using at::Tensor;

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
