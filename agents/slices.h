#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <atomic>
#include <vector>

namespace retain {

/// Environments [N] in slices of some thousand steps each, of which one thread works out one at a
/// time: enough to pay for the calls, and few enough to stay in its cache. How they are cut does
/// not depend on the number of threads. On other devices than the CPU there is one slice.
inline std::vector<at::Tensor> slices(const at::Tensor& environments, int64_t steps,
                                      at::Device device) {
  constexpr int64_t kSliceSteps = 2048;
  const int64_t count = environments.numel() * steps / kSliceSteps;
  const int64_t most = std::max<int64_t>(environments.numel(), 1);
  return environments.tensor_split(device.is_cpu() ? std::clamp<int64_t>(count, 1, most) : 1);
}

/// Calls run(i) for every i in [0, count), each on the next thread that is free.
template <typename Run>
void spread(int64_t count, const Run& run) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, count, 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < count; i = next++) run(i);
  });
}

}  // namespace retain
