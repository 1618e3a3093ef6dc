#pragma once

#include <ATen/ATen.h>

namespace retain::testing {

/// Normal numbers that depend on the seed alone.
inline at::Tensor randn(at::IntArrayRef sizes, uint64_t seed, at::ScalarType dtype = at::kFloat) {
  auto generator = at::detail::createCPUGenerator(seed);
  return at::randn(sizes, generator, at::TensorOptions().dtype(at::kDouble)).to(dtype);
}

/// Root-mean-square of a - b over the root-mean-square of b, in fp64.
inline double relative_error(const at::Tensor& a, const at::Tensor& b) {
  const auto difference = (a.to(at::kDouble) - b.to(at::kDouble)).square().sum().sqrt();
  return (difference / b.to(at::kDouble).square().sum().sqrt().clamp_min(1e-300)).item<double>();
}

}  // namespace retain::testing
