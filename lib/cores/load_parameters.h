#pragma once

#include <torch/nn/module.h>

#include <map>
#include <string>

namespace retain {
using at::Tensor;

/// Copies tensors into the parameters of the same names, as in a public model's weights: the names
/// of a Stack of Mamba1 are those of the public Mamba backbone. Values are converted to the
/// parameter's dtype and device. Throws c10::Error that lists every missing, unexpected and
/// mis-shaped name, and then changes nothing.
void load_parameters(torch::nn::Module& module, const std::map<std::string, Tensor>& tensors);

}  // namespace retain
