#pragma once

#include <ATen/Parallel.h>
#include <ATen/ThreadLocalState.h>
#include <ATen/core/Tensor.h>
#include <torch/nn/module.h>

#include <algorithm>
#include <atomic>
#include <vector>

namespace retain {

/// Environments [N] of so many steps each in slices, of which one thread works out one at a time:
/// enough to pay for the calls, and few enough to stay in its cache. A policy takes about one
/// multiply-add a weight and step. How they are cut does not depend on the number of threads. On
/// other devices than the CPU there is one slice.
inline std::vector<at::Tensor> slices(const at::Tensor& environments, int64_t steps,
                                      const torch::nn::Module& policy) {
  constexpr int64_t kMultiplyAdds = 1 << 26;
  const auto weights = policy.parameters();
  int64_t size = 0;
  for (const auto& weight : weights) size += weight.numel();
  const int64_t count = environments.numel() * steps * size / kMultiplyAdds;
  const int64_t most = std::max<int64_t>(environments.numel(), 1);
  return environments.tensor_split(weights.front().is_cpu() ? std::clamp<int64_t>(count, 1, most)
                                                            : 1);
}

/// Calls run(i) for every i in [0, count), each on the next thread that is free, with the caller's
/// settings: autocast, for one.
template <typename Run>
void spread(int64_t count, const Run& run) {
  std::atomic<int64_t> next{0};
  const at::ThreadLocalState caller;
  at::parallel_for(0, count, 1, [&](int64_t, int64_t) {
    const at::ThreadLocalStateGuard settings(caller);
    for (int64_t i = next++; i < count; i = next++) run(i);
  });
}

}  // namespace retain
