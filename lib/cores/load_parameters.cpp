#include <ATen/ATen.h>
#include <retain/lib/cores/load_parameters.h>

#include <sstream>

namespace retain {

void load_parameters(torch::nn::Module& module, const std::map<std::string, Tensor>& tensors) {
  auto parameters = module.named_parameters();
  std::ostringstream faults;
  for (const auto& parameter : parameters) {
    const auto found = tensors.find(parameter.key());
    if (found == tensors.end()) {
      faults << "\n  missing: " << parameter.key();
    } else if (found->second.sizes() != parameter.value().sizes()) {
      faults << "\n  mis-shaped: " << parameter.key() << " must be " << parameter.value().sizes()
             << ", got " << found->second.sizes();
    }
  }
  for (const auto& [name, tensor] : tensors) {
    if (!parameters.contains(name)) faults << "\n  unexpected: " << name;
  }
  TORCH_CHECK(faults.str().empty(),
              "load_parameters: tensors do not fit the module:", faults.str());
  at::NoGradGuard no_grad;
  for (auto& parameter : parameters) parameter.value().copy_(tensors.at(parameter.key()));
}

}  // namespace retain
