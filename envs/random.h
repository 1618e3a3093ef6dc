#pragma once

#include <Random123/philox.h>

#include <cstdint>

namespace retain {

/// What a random number is for: numbers of different streams never meet.
enum class Stream : uint32_t { world = 0, action = 1, shuffle = 2, evaluation = 3 };

/// Counter-based random numbers (Philox4x32-10; Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3")
/// keyed by (seed, stream, environment, step): the same numbers whatever the device, the threads or the batch.
class Rng {
 public:
  Rng(uint64_t seed, Stream stream, uint64_t environment, uint64_t step);
  uint32_t bits();                    ///< 32 uniform bits.
  float uniform();                    ///< In (0, 1), both ends excluded.
  int64_t uniform_int(int64_t n);     ///< In [0, n), without bias.
  // ... a small buffer of the block and a draw counter
};

}  // namespace retain
