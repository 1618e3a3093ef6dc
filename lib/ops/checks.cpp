#include <retain/lib/dtype_name.h>
#include <retain/lib/ops/checks.h>

#include <algorithm>
#include <string_view>
#include <utility>
#include <vector>

namespace retain {
namespace {

void check_defined(const char* op, const char* name, const Tensor& tensor) {
  TORCH_CHECK(tensor.defined(), op, ": ", name, " must be a tensor, got an undefined one");
}

void check_device(const char* op, const char* name, const Tensor& tensor, const char* input_name,
                  const Tensor& input) {
  TORCH_CHECK(tensor.device() == input.device(), op, ": ", name, " must be on the device of ",
              input_name, ", ", input.device(), ", got ", tensor.device());
}

/// The sizes and strides of all dimensions that have more than one element, the nearest first.
std::vector<std::pair<int64_t, int64_t>> steps_of(const Tensor& tensor) {
  std::vector<std::pair<int64_t, int64_t>> steps;
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    if (tensor.size(i) > 1) steps.emplace_back(tensor.stride(i), tensor.size(i));
  }
  std::sort(steps.begin(), steps.end());
  return steps;
}

/// The elements from the first to the last of a tensor's in memory.
int64_t extent_of(const Tensor& tensor) {
  int64_t extent = 1;
  for (const auto& [stride, size] : steps_of(tensor)) extent += stride * (size - 1);
  return extent;
}

bool is_symbolic(const Tensor& tensor) {
  return tensor.unsafeGetTensorImpl()->has_symbolic_sizes_strides();
}

}  // namespace

at::ScalarType state_dtype(const Tensor& input) {
  return input.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

void check_rank(const char* op, const char* name, const Tensor& tensor, const char* layout) {
  check_defined(op, name, tensor);
  const std::string_view names(layout);
  const auto rank = 1 + std::count(names.begin(), names.end(), ',');
  TORCH_CHECK(tensor.dim() == rank, op, ": ", name, " must be ", layout, ", got ",
              tensor.sym_sizes());
}

void check_shape(const char* op, const char* name, const Tensor& tensor, const char* layout,
                 std::initializer_list<c10::SymInt> sizes) {
  check_defined(op, name, tensor);
  const auto got = tensor.sym_sizes();
  TORCH_CHECK(std::equal(got.begin(), got.end(), sizes.begin(), sizes.end()), op, ": ", name,
              " must be ", layout, " = ", c10::SymIntArrayRef(sizes), ", got ", got);
}

void check_floating(const char* op, const char* name, const Tensor& tensor) {
  const auto dtype = tensor.scalar_type();
  TORCH_CHECK(
      dtype == at::kDouble || dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16,
      op, ": ", name, " must be float64, float32, float16 or bfloat16, got ", dtype_name(dtype));
}

void check_like(const char* op, const char* name, const Tensor& tensor, const char* input_name,
                const Tensor& input) {
  check_device(op, name, tensor, input_name, input);
  const auto dtype = tensor.scalar_type();
  TORCH_CHECK(dtype == input.scalar_type() || dtype == state_dtype(input), op, ": ", name,
              " must have the dtype of ", input_name, ", ", dtype_name(input.scalar_type()),
              state_dtype(input) == input.scalar_type() ? "" : ", or float32", ", got ",
              dtype_name(dtype));
}

void check_same(const char* op, const char* name, const Tensor& tensor, const char* input_name,
                const Tensor& input) {
  check_device(op, name, tensor, input_name, input);
  TORCH_CHECK(tensor.scalar_type() == input.scalar_type(), op, ": ", name,
              " must have the dtype of ", input_name, ", ", dtype_name(input.scalar_type()),
              ", got ", dtype_name(tensor.scalar_type()));
}

void check_if_present(const char* op, const char* name, const std::optional<Tensor>& tensor,
                      const char* layout, std::initializer_list<c10::SymInt> sizes,
                      const char* input_name, const Tensor& input) {
  if (!present(tensor)) return;
  check_shape(op, name, *tensor, layout, sizes);
  check_device(op, name, *tensor, input_name, input);
}

void check_reset(const char* op, const Tensor& reset, const char* layout,
                 std::initializer_list<c10::SymInt> sizes, const char* input_name,
                 const Tensor& input) {
  check_shape(op, "reset", reset, layout, sizes);
  TORCH_CHECK(reset.scalar_type() == at::kBool, op, ": reset must be bool, got ",
              dtype_name(reset.scalar_type()));
  check_device(op, "reset", reset, input_name, input);
}

void check_apart(const char* op, const char* name, const Tensor& tensor) {
  if (is_symbolic(tensor) || tensor.is_non_overlapping_and_dense()) return;
  int64_t extent = 1;
  bool apart = true;
  for (const auto& [stride, size] : steps_of(tensor)) {
    apart = apart && stride >= extent;
    extent += stride * (size - 1);
  }
  TORCH_CHECK(
      apart, op, ": ", name,
      " must not overlap itself, as an expanded tensor does, nor its dimensions interleave; "
      "got strides ",
      tensor.strides());
}

void check_apart(const char* op, const char* name, const Tensor& tensor, const char* other_name,
                 const Tensor& other) {
  if (is_symbolic(tensor) || is_symbolic(other)) return;
  if (tensor.numel() == 0 || other.numel() == 0 || !tensor.is_alias_of(other)) return;
  const auto at = [](const Tensor& x) { return x.storage_offset() * x.element_size(); };
  const auto bytes = [](const Tensor& x) { return extent_of(x) * x.element_size(); };
  bool apart = at(tensor) + bytes(tensor) <= at(other) || at(other) + bytes(other) <= at(tensor);
  // Side by side in rows that hold both.
  const int64_t row = tensor.stride(0) * tensor.element_size();
  if (!apart && row > 0 && row == other.stride(0) * other.element_size()) {
    const int64_t offset = ((at(other) - at(tensor)) % row + row) % row;
    apart = bytes(tensor[0]) <= offset && offset + bytes(other[0]) <= row;
  }
  TORCH_CHECK(apart, op, ": ", name, " and ", other_name,
              " must not overlap or interleave in memory, got strides ", tensor.strides(), " and ",
              other.strides(), " of one storage");
}

}  // namespace retain
