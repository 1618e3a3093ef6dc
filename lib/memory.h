#pragma once

#include <retain/lib/cores/core.h>

#include <memory>

namespace retain {

/// Holds the memory of `batch_size` agents that act with one core. Storage is allocated once;
/// step(), set() and zero() write into it, so that its addresses stay valid inside a captured CUDA
/// graph. Only to() gives new ones.
class Memory {
 public:
  /// Throws c10::Error if there is no core or batch_size is negative.
  Memory(std::shared_ptr<Core> core, int64_t batch_size);
  Memory(const Memory& other);  ///< Has storage of its own.
  Memory(Memory&&) = default;
  Memory& operator=(Memory other);  ///< Has other storage than before.

  int64_t batch_size() const { return state_.batch_size(); }
  State get() const;             ///< A copy: later steps do not change it.
  void set(const State& state);  ///< Copies in. Throws if `state` belongs to another core, batch
                                 ///< size or device.
  void zero(const Tensor& mask = {});  ///< mask [B] bool; undefined = all rows.
  /// Moves the memory. The core's owner moves its weights: core->to(device).
  void to(at::Device device);

  /// One acting step without gradients: x [B, d_model], reset [B] bool (undefined = none) → y [B,
  /// d_model]. Throws c10::Error naming the argument on a wrong shape or dtype, and if x, memory
  /// and weights are on different devices.
  Tensor step(const Tensor& x, const Tensor& reset = {});

 private:
  std::shared_ptr<Core> core_;
  State state_;
};

}  // namespace retain
