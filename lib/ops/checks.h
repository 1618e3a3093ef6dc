#pragma once

#include <ATen/core/Tensor.h>

#include <initializer_list>
#include <optional>

// The public door of every op: each check throws c10::Error that names the op, the argument, the
// rule and what came, as in "selective_scan: delta must be [T, B, d_inner] = [64, 8, 256], got [64,
// 8, 128]".
namespace retain {
using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

/// Whether an optional tensor is there; an undefined one is not.
inline bool present(const std::optional<Tensor>& tensor) {
  return tensor.has_value() && tensor->defined();
}

/// The tensor, or an undefined one.
inline Tensor value_or_undefined(const std::optional<Tensor>& tensor) {
  return tensor.value_or(Tensor());
}

/// The same, with an undefined tensor as absent: what the dispatcher wants.
inline std::optional<Tensor> if_present(const std::optional<Tensor>& tensor) {
  return present(tensor) ? tensor : std::nullopt;
}

/// The type of states and sums: float64 for float64 inputs, else float32.
at::ScalarType state_dtype(const Tensor& input);

/// The tensor is defined and has as many dimensions as `layout`, such as "[T, B, d_inner]", names.
void check_rank(const char* op, const char* name, const Tensor& tensor, const char* layout);

/// The sizes are those given; T = 0 and B = 0 are sizes like any other.
void check_shape(const char* op, const char* name, const Tensor& tensor, const char* layout,
                 std::initializer_list<c10::SymInt> sizes);

/// float64, float32, float16 or bfloat16.
void check_floating(const char* op, const char* name, const Tensor& tensor);

/// The device of `input` and its dtype, or float32 beside a half type.
void check_like(const char* op, const char* name, const Tensor& tensor, const char* input_name,
                const Tensor& input);

/// The device and the dtype of `input`.
void check_same(const char* op, const char* name, const Tensor& tensor, const char* input_name,
                const Tensor& input);

/// Where it is there, what a backward pass takes has these sizes and the device of `input`.
void check_if_present(const char* op, const char* name, const std::optional<Tensor>& tensor,
                      const char* layout, std::initializer_list<c10::SymInt> sizes,
                      const char* input_name, const Tensor& input);

/// reset is [T, B], or [B] where `layout` says so, bool, and on the device of `input`.
void check_reset(const char* op, const Tensor& reset, const char* layout,
                 std::initializer_list<c10::SymInt> sizes, const char* input_name,
                 const Tensor& input);

/// What is written in place lies in memory such that no two of its elements share a place.
void check_apart(const char* op, const char* name, const Tensor& tensor);

/// Nor do any of two tensors, or their rows lie side by side in rows that hold both.
void check_apart(const char* op, const char* name, const Tensor& tensor, const char* other_name,
                 const Tensor& other);

}  // namespace retain
