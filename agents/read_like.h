#pragma once

#include <retain/lib/io/checkpoint.h>

namespace retain {

/// The tensor `name` of a checkpoint, on the CPU. Throws unless it is there with the shape and
/// dtype of `expected`.
Tensor read_like(const CheckpointReader& reader, const std::string& name, const Tensor& expected);

}  // namespace retain
