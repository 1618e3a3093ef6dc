#pragma once

#include <Random123/philox.h>

#include <cstdint>
#include <stdexcept>

/// Marks what also runs on a GPU when nvcc compiles it.
#ifdef __CUDACC__
#define RETAIN_HOST_DEVICE __host__ __device__
#else
#define RETAIN_HOST_DEVICE
#endif

namespace retain {

/// What a random number is for: numbers of different streams never meet.
enum class Stream : uint32_t { world = 0, action = 1, shuffle = 2, evaluation = 3 };

/// Counter-based random numbers (Philox4x32-10; Salmon et al. 2011, "Parallel random numbers: as
/// easy as 1, 2, 3") keyed by (seed, stream, environment, step): the same numbers whatever the
/// device, the threads or the batch. An Rng is made anew for every step, costs nothing until it is
/// drawn from, and there is no state to save. Ranges: stream < 2^8, environment < 2^40, step <
/// 2^48, 2^34 draws of 32 bits a step.
class Rng {
 public:
  static constexpr int64_t kEnvironments = int64_t{1} << 40, kSteps = int64_t{1} << 48;

  RETAIN_HOST_DEVICE Rng(uint64_t seed, Stream stream, uint64_t environment, uint64_t step) {
    key_.v[0] = static_cast<uint32_t>(seed);
    key_.v[1] = static_cast<uint32_t>(seed >> 32);
    counter_.v[0] = 0;
    counter_.v[1] = static_cast<uint32_t>(step);
    counter_.v[2] = static_cast<uint32_t>(environment);
    counter_.v[3] = static_cast<uint32_t>(stream) << 24 |
                    (static_cast<uint32_t>(environment >> 32) & 0xFF) << 16 |
                    (static_cast<uint32_t>(step >> 32) & 0xFFFF);
  }

  /// 32 uniform bits.
  RETAIN_HOST_DEVICE uint32_t bits() {
    if (next_ == 4) {
      block_ = philox4x32_R(10, counter_, key_);
      ++counter_.v[0];
      next_ = 0;
    }
    return block_.v[next_++];
  }

  /// In (0, 1), both ends excluded: 2^23 values, symmetric about 1/2.
  RETAIN_HOST_DEVICE float uniform() {
    return (static_cast<float>(bits() >> 9) + 0.5f) * (1.0f / 8388608.0f);
  }

  /// In [0, n), without bias, n >= 1. (Lemire 2019, "Fast random integer generation in an
  /// interval".)
  RETAIN_HOST_DEVICE int64_t uniform_int(int64_t n) {
#ifndef __CUDA_ARCH__
    if (n < 1) throw std::invalid_argument("uniform_int: n must be at least 1");
#endif
    if (n > INT64_C(0xFFFFFFFF)) return uniform_int_wide(static_cast<uint64_t>(n));
    const uint32_t range = static_cast<uint32_t>(n);
    uint64_t product = static_cast<uint64_t>(bits()) * range;
    if (static_cast<uint32_t>(product) < range) {
      const uint32_t threshold = (0u - range) % range;
      while (static_cast<uint32_t>(product) < threshold) {
        product = static_cast<uint64_t>(bits()) * range;
      }
    }
    return static_cast<int64_t>(product >> 32);
  }

 private:
  RETAIN_HOST_DEVICE int64_t uniform_int_wide(uint64_t range) {
    const uint64_t threshold = (UINT64_C(0) - range) % range;
    uint64_t value;
    do {
      value = static_cast<uint64_t>(bits()) << 32;
      value |= bits();
    } while (value < threshold);
    return static_cast<int64_t>(value % range);
  }

  philox4x32_key_t key_;
  philox4x32_ctr_t counter_;
  philox4x32_ctr_t block_;
  uint32_t next_ = 4;
};

}  // namespace retain
