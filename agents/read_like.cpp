#include <retain/agents/read_like.h>

#include <ATen/ATen.h>
#include <retain/lib/dtype_name.h>

namespace retain {

Tensor read_like(const CheckpointReader& reader, const std::string& name, const Tensor& expected) {
  TORCH_CHECK(reader.contains(name), reader.path(), ": no entry \"", name, "\"");
  auto tensor = reader.tensor(name);
  TORCH_CHECK(tensor.sizes() == expected.sizes() && tensor.dtype() == expected.dtype(),
              reader.path(), ": ", name, " must be ", dtype_name(expected.scalar_type()), " ",
              expected.sizes(), ", got ", dtype_name(tensor.scalar_type()), " ", tensor.sizes());
  return tensor;
}

}  // namespace retain
