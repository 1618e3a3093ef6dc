#include <retain/agents/read_like.h>

#include <ATen/ATen.h>

namespace retain {

Tensor read_like(const CheckpointReader& reader, const std::string& name, const Tensor& expected) {
  TORCH_CHECK(reader.contains(name), reader.path(), ": no entry \"", name, "\"");
  auto tensor = reader.tensor(name);
  TORCH_CHECK(tensor.sizes() == expected.sizes() && tensor.dtype() == expected.dtype(),
              reader.path(), ": ", name, " must be ", expected.dtype(), " ", expected.sizes(),
              ", got ", tensor.dtype(), " ", tensor.sizes());
  return tensor;
}

}  // namespace retain
