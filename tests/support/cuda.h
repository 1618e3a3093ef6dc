#pragma once

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <gtest/gtest.h>

#include "support/op_checks.h"

// The same claims on a GPU.
namespace retain::testing {

/// Whether this build has kernels for a GPU.
inline bool has_cuda_kernels() {
  return c10::Dispatcher::singleton()
      .findSchemaOrThrow("retain::selective_scan_bwd_into", "")
      .hasKernelForDispatchKey(c10::DispatchKey::CUDA);
}

/// A test of kernels that run on a GPU only.
#define RETAIN_NEEDS_CUDA()                                                                     \
  do {                                                                                          \
    if (!at::hasCUDA()) GTEST_SKIP() << "needs a GPU";                                          \
    if (!retain::testing::has_cuda_kernels()) GTEST_SKIP() << "this build has no CUDA kernels"; \
  } while (false)

inline at::Tensor cuda(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.to(at::kCUDA) : tensor;
}

inline Tensors cuda(const Tensors& tensors) {
  Tensors moved;
  for (const auto& tensor : tensors) moved.push_back(cuda(tensor));
  return moved;
}

inline Tensors cpu(const Tensors& tensors) {
  Tensors moved;
  for (const auto& tensor : tensors) moved.push_back(tensor.to(at::kCPU));
  return moved;
}

/// The op with its inputs moved to the GPU and its outputs back.
inline Op on_cuda(const Op& op) {
  return [=](const Tensors& in) { return cpu(op(cuda(in))); };
}

/// The op with inputs and outputs on the CPU, run there or on a GPU.
inline Op on(at::Device device, const Op& op) { return device.is_cuda() ? on_cuda(op) : op; }

/// Tests that claim the same of the CPU and of a GPU; a suite of them is made by
/// INSTANTIATE_TEST_SUITE_P(On, Suite, kCpuAndCuda, device_name).
class OnCpuAndCuda : public ::testing::TestWithParam<at::DeviceType> {
 protected:
  void SetUp() override {
    if (GetParam() == at::kCUDA) RETAIN_NEEDS_CUDA();
  }
  at::Device device() const { return GetParam(); }

  Tensors here(const Tensors& tensors) const {
    Tensors moved;
    for (const auto& tensor : tensors) moved.push_back(tensor.to(device()));
    return moved;
  }
};

inline const auto kCpuAndCuda = ::testing::Values(at::kCPU, at::kCUDA);
inline std::string device_name(const ::testing::TestParamInfo<at::DeviceType>& test) {
  return test.param == at::kCUDA ? "Cuda" : "Cpu";
}

}  // namespace retain::testing
