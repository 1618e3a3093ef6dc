#pragma once

#include <retain/lib/cores/core.h>

#include <memory>

namespace retain {

/// core->forward(x, state, reset) that keeps nothing for its backward but x, the state and the
/// weights, and runs again there (gradient checkpointing; Chen et al. 2016, arXiv:1604.06174): a
/// forward more in time, the activations of one core at a time in memory. Values and gradients are
/// bit-equal to forward's, under the autocast of the call. Differentiable once.
CoreOutput recomputed_forward(const std::shared_ptr<Core>& core, const Tensor& x,
                              const State& state, const Tensor& reset = {});

}  // namespace retain
