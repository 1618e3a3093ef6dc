#pragma once

#include <retain/envs/environment.h>
#include <retain/envs/gap.h>
#include <retain/envs/options.h>

namespace retain {

/// Remember one of k cues over a gap and name it at the end.
///
/// t = 0: the cue, one-hot. t = 1 … L: noise of ±1. t = L + 1: the query flag; the action there
/// earns 1 if it is the cue, else 0, and ends the episode (an all-zero observation). L is
/// `horizon`, or drawn anew for every episode. There is no clock: nothing but the cue tells one
/// episode from another before the query, and the noise tells nothing. In the gap (and at the cue)
/// action 0 alone is legal: no decision is made there. Observation: [0, k) cue, [k] noise, [k + 1]
/// query flag.
struct Recall {
  using Action = int64_t;

  int64_t horizon = 300;             ///< L, steps of the gap; the most where it is drawn.
  int64_t num_cues = 4;              ///< k, cues to tell apart.
  bool noise = true;                 ///< Off: the noise channel is 0 in the gap.
  Lengths lengths = Lengths::fixed;  ///< How L is chosen.

  int64_t gap = 0, t = 0, cue = 0;

  template <class V>
  void visit_options(V&& visit) {
    visit("horizon", horizon);
    visit("num_cues", num_cues);
    visit("noise", noise);
    visit("lengths", lengths);
  }

  EnvironmentSpec spec() const {
    check_gap("recall", horizon, lengths);
    check_option("recall", "num_cues", num_cues, 2, kMostCues);
    return {.name = "recall",
            .observation_size = num_cues + 2,
            .action = {.num_values = {num_cues}},
            .max_episode_steps = horizon + 2,
            .memory_length = horizon + 1,
            .credit_length = 1,
            .chance_return = 1.0 / num_cues,
            .memoryless_return = 1.0 / num_cues,
            .best_return = 1,
            .passive = true,
            .options = options_line(*this)};
  }

  RETAIN_HOST_DEVICE void reset(Rng& rng, float* observation) {
    gap = draw_gap(rng, horizon, lengths);
    cue = rng.uniform_int(num_cues);
    t = 0;
    observation[cue] = 1;
  }

  RETAIN_HOST_DEVICE Outcome step(Action action, Rng& rng, float* observation) {
    ++t;
    if (t > gap + 1) return {.reward = action == cue ? 1.0f : 0.0f, .discount = 0, .last = true};
    if (t == gap + 1) {
      observation[num_cues + 1] = 1;
    } else if (noise) {
      observation[num_cues] = draw_sign(rng);
    }
    return {};
  }

  RETAIN_HOST_DEVICE void legal_actions(bool* legal) const {
    for (int64_t a = 0; a < num_cues; ++a) legal[a] = a == 0 || t == gap + 1;
  }

  RETAIN_HOST_DEVICE Action oracle() const { return t == gap + 1 ? cue : 0; }
};

}  // namespace retain
