#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace retain {
using at::Tensor;

/// Copies each of `from` into its like of `to`, [B, …] each. On CUDA one launch for all that are
/// contiguous and of one type, where no gradient is wanted.
void copy_parts(const std::vector<Tensor>& from, const std::vector<Tensor>& to);

/// Zeros in the rows of each part, [B, …], that mask [B] bool names, by selection. On CUDA one
/// launch for all that are contiguous, where no gradient is wanted.
void zero_rows(const std::vector<Tensor>& parts, const Tensor& mask);

/// The same for one part, by LibTorch's own op.
void zero_rows(const Tensor& part, const Tensor& mask);

/// What the ops ask of their arguments: as many parts as targets; parts of [B, …] on the mask's
/// device.
void check_parts(at::TensorList from, at::TensorList to);
void check_rows(at::TensorList parts, const Tensor& mask);

}  // namespace retain
