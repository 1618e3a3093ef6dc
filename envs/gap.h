#pragma once

#include <retain/envs/options.h>
#include <retain/envs/random.h>

namespace retain {

constexpr int64_t kShortestGap = 4;     // of a drawn length
constexpr int64_t kMostCues = 1 << 16;  // an observation and a mask of that size a step

/// Throws unless gaps of up to `horizon` steps can be drawn.
inline void check_gap(const char* world, int64_t horizon, Lengths lengths) {
  check_option(world, "horizon", horizon, lengths == Lengths::fixed ? 1 : kShortestGap,
               INT64_C(1) << 40);
}

/// The length of a new episode's gap. Log-uniform draws use integers alone, so that they are exact
/// and the same on every device: an octave [low, 2·low) by chance, a length in it by chance, kept
/// with probability low/length.
RETAIN_HOST_DEVICE inline int64_t draw_gap(Rng& rng, int64_t horizon, Lengths lengths) {
  if (lengths == Lengths::fixed) return horizon;
  int64_t octaves = 0;
  while (kShortestGap << octaves <= horizon) ++octaves;
  for (;;) {
    const int64_t low = kShortestGap << rng.uniform_int(octaves);
    const int64_t length = low + rng.uniform_int(low);
    if (length <= horizon && rng.uniform_int(length) < low) return length;
  }
}

/// −1 or +1.
RETAIN_HOST_DEVICE inline float draw_sign(Rng& rng) { return rng.bits() >> 31 ? 1.0f : -1.0f; }

}  // namespace retain
