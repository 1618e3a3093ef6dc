#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>
#include <c10/cuda/CUDAGuard.h>
#include <retain/kernels/state/state_cuda.h>
#include <retain/lib/ops/cuda_arguments.h>
#include <retain/lib/ops/state_parts.h>
#include <torch/library.h>

namespace retain {
namespace {

/// Parts for one launch after the other.
template <typename Launch>
void in_launches(const std::vector<kernels::StatePart>& parts, int64_t B, const Launch& launch) {
  for (size_t first = 0; first < parts.size(); first += kernels::kMaxStateParts) {
    kernels::StatePartsCuda some{.B = B};
    while (some.count < kernels::kMaxStateParts && first + some.count < parts.size()) {
      some.part[some.count] = parts[first + some.count];
      ++some.count;
    }
    launch(some);
  }
}

int64_t row_bytes(const Tensor& part) {
  return part.size(0) == 0 ? 0 : static_cast<int64_t>(part.nbytes()) / part.size(0);
}

void copy_parts_cuda(at::TensorList from, at::TensorList to) {
  check_parts(from, to);
  if (to.empty()) return;
  const c10::OptionalDeviceGuard guard(to[0].device());
  std::vector<kernels::StatePart> parts;
  for (size_t i = 0; i < from.size(); ++i) {
    const bool alike = to[i].is_cuda() && from[i].device() == to[0].device() &&
                       to[i].device() == to[0].device() &&
                       from[i].scalar_type() == to[i].scalar_type() && from[i].is_contiguous() &&
                       to[i].is_contiguous() && from[i].sizes() == to[i].sizes() &&
                       to[i].dim() > 0 && to[i].size(0) == to[0].size(0);
    if (alike) {
      parts.push_back({from[i].const_data_ptr(), to[i].data_ptr(), row_bytes(to[i])});
    } else {
      Tensor(to[i]).copy_(from[i]);
    }
  }
  if (parts.empty()) return;
  in_launches(parts, to[0].size(0), [](const kernels::StatePartsCuda& some) {
    kernels::copy_state_cuda(some, current_stream());
  });
}

void zero_rows_cuda(at::TensorList all, const Tensor& mask) {
  check_rows(all, mask);
  const c10::cuda::CUDAGuard guard(mask.device());
  std::vector<kernels::StatePart> parts;
  for (const Tensor& part : all) {
    if (part.is_contiguous()) {
      parts.push_back({nullptr, part.data_ptr(), row_bytes(part)});
    } else {
      zero_rows(part, mask);
    }
  }
  in_launches(parts, mask.size(0), [&](const kernels::StatePartsCuda& some) {
    kernels::zero_state_cuda(some, mask.const_data_ptr<bool>(), mask.stride(0), current_stream());
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(retain, CUDA, m) {
  m.impl("copy_parts", copy_parts_cuda);
  m.impl("zero_rows", zero_rows_cuda);
}

}  // namespace retain
