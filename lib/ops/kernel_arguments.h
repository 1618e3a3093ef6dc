#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <retain/kernels/common/cuda_types.h>
#include <retain/kernels/common/time_major.h>
#include <retain/lib/ops/checks.h>

#include <algorithm>
#include <cmath>
#include <optional>

// How ops hand tensors to kernels.
namespace retain {
using at::Tensor;

/// A [T, B, …] tensor, read only; its innermost dimension must be contiguous. Undefined = absent.
template <typename T>
kernels::TimeMajor<const T> time_major(const Tensor& tensor) {
  if (!tensor.defined()) return {};
  return {tensor.const_data_ptr<T>(), tensor.stride(0), tensor.stride(1)};
}

template <typename T>
kernels::TimeMajor<T> mutable_time_major(const Tensor& tensor) {
  return {tensor.mutable_data_ptr<T>(), tensor.stride(0), tensor.stride(1)};
}

/// The type that all those which are there share; fp32 where they differ.
inline at::ScalarType common_dtype(c10::ArrayRef<Tensor> tensors) {
  const auto first = tensors.begin()->scalar_type();
  const bool same = std::all_of(tensors.begin(), tensors.end(), [&](const Tensor& tensor) {
    return !tensor.defined() || tensor.scalar_type() == first;
  });
  return same ? first : at::kFloat;
}

inline kernels::ActivationType activation_type(at::ScalarType dtype) {
  if (dtype == at::kHalf) return kernels::ActivationType::fp16;
  if (dtype == at::kBFloat16) return kernels::ActivationType::bf16;
  TORCH_INTERNAL_ASSERT(dtype == at::kFloat);
  return kernels::ActivationType::fp32;
}

/// nullptr for an undefined tensor.
template <typename T>
const T* pointer(const Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr<T>() : nullptr;
}
inline const void* address(const Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr() : nullptr;
}
template <typename T>
T* mutable_pointer(const Tensor& tensor) {
  return tensor.defined() ? tensor.mutable_data_ptr<T>() : nullptr;
}

/// Whether a tensor is there, in `dtype`, its last dimension contiguous.
inline bool has_dense_rows(const Tensor& tensor, at::ScalarType dtype) {
  return tensor.defined() && tensor.scalar_type() == dtype &&
         (tensor.size(-1) <= 1 || tensor.stride(-1) == 1);
}

/// The tensor in `dtype`, its last dimension contiguous; copied only if it has to be. Absent =
/// undefined.
inline Tensor with_dense_rows(const std::optional<Tensor>& tensor, at::ScalarType dtype) {
  if (!present(tensor)) return {};
  const auto cast = tensor->to(dtype);
  return has_dense_rows(cast, dtype) ? cast : cast.contiguous();
}

inline Tensor dense(const std::optional<Tensor>& tensor, at::ScalarType dtype) {
  return present(tensor) ? tensor->to(dtype).contiguous() : Tensor();
}

/// Whether the fused kernels of an op run where the tensor lies; elsewhere the composed reference
/// does. CUDA kernels, where the build has them, know no fp64. `bwd` names the op's backward.
inline bool has_kernels(const char* bwd, const Tensor& tensor) {
  if (!tensor.is_cuda()) return tensor.is_cpu() || tensor.is_meta();
  return tensor.scalar_type() != at::kDouble &&
         c10::Dispatcher::singleton().findSchemaOrThrow(bwd, "").hasKernelForDispatchKey(
             c10::DispatchKey::CUDA);
}

/// Calls run(begin, end) over ranges of [0, items) in the process's thread pool. `nanoseconds`
/// estimates the work of all items in one thread: waking a second one must pay.
template <typename Run>
void parallel_items(int64_t items, double nanoseconds, const Run& run) {
  constexpr double kLeast = 20e3;
  const double grain = static_cast<double>(items) * kLeast / std::max(nanoseconds, 1.0);
  at::parallel_for(0, items,
                   std::clamp<int64_t>(std::llround(grain), 1, std::max<int64_t>(items, 1)), run);
}

}  // namespace retain
