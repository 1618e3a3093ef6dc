#pragma once

#include <retain/envs/environment.h>
#include <retain/envs/options.h>

namespace retain {

/// Keep b bits along a chain of N steps and name the one asked for (bsuite's memory_chain).
///
/// t = 0: the bits, as ±1. t = N − 1: the index q of a bit. The action there earns +1 if it is bit
/// q, else −1, and ends the episode; the actions before do nothing. Every observation has the time
/// 1 − t/N. Two things differ from bsuite's code, neither in what must be remembered: the
/// observation of t = 0 is given once, not twice, and the final one is all zeros. Observation: [0]
/// time, [1] q, [2, 2 + b) bits.
struct MemoryChain {
  using Action = int64_t;

  int64_t horizon = 100;  ///< N, actions an episode.
  int64_t num_bits = 1;   ///< b, bits to keep.

  int64_t t = 0, query = 0;
  uint64_t bits = 0;

  template <class V>
  void visit_options(V&& visit) {
    visit("horizon", horizon);
    visit("num_bits", num_bits);
  }

  EnvironmentSpec spec() const {
    check_option("memory_chain", "horizon", horizon, 1, INT64_C(1) << 40);
    check_option("memory_chain", "num_bits", num_bits, 1, 64);
    return {.name = "memory_chain",
            .observation_size = num_bits + 2,
            .action = {.num_values = {2}},
            .max_episode_steps = horizon,
            .memory_length = horizon - 1,
            .credit_length = 1,
            .chance_return = 0,
            .memoryless_return = horizon == 1 ? 1.0 : 0.0,
            .best_return = 1,
            .wrong_return = -1,
            .passive = true,
            .options = options_line(*this)};
  }

  RETAIN_HOST_DEVICE void reset(Rng& rng, float* observation) {
    bits = static_cast<uint64_t>(rng.bits()) << 32;
    bits |= rng.bits();
    query = rng.uniform_int(num_bits);
    t = 0;
    for (int64_t i = 0; i < num_bits; ++i) observation[2 + i] = bits >> i & 1 ? 1.0f : -1.0f;
    observe(observation);
  }

  RETAIN_HOST_DEVICE Outcome step(Action action, Rng&, float* observation) {
    const Action answer = oracle();
    ++t;
    if (t == horizon) {
      return {.reward = action == answer ? 1.0f : -1.0f, .discount = 0, .last = true};
    }
    observe(observation);
    return {};
  }

  RETAIN_HOST_DEVICE Action oracle() const { return static_cast<Action>(bits >> query & 1); }

  RETAIN_HOST_DEVICE void observe(float* observation) const {
    observation[0] =
        static_cast<float>(1.0 - static_cast<double>(t) / static_cast<double>(horizon));
    if (t == horizon - 1) observation[1] = static_cast<float>(query);
  }
};

}  // namespace retain
