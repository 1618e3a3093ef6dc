#include <retain/lib/dtype_name.h>
#include <retain/lib/ops/checks.h>

#include <algorithm>
#include <string_view>

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

}  // namespace retain
