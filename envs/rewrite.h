#pragma once

#include <retain/envs/environment.h>
#include <retain/envs/gap.h>
#include <retain/envs/options.h>

namespace retain {

/// Recall with cues that replace one another: a memory that cannot be overwritten fails.
///
/// t = 0: a cue, one-hot. t = 1 … L: `rewrites` of these steps, by chance, show a new cue (any of
/// the k, noise channel 0), the others noise of ±1. t = L + 1: the query flag; the action there
/// earns 1 if it is the last cue shown, else 0, and ends the episode (an all-zero observation). L
/// is `horizon`, or drawn anew for every episode. Before the query action 0 alone is legal.
/// Observation: [0, k) cue, [k] noise, [k + 1] query flag.
struct Rewrite {
  using Action = int64_t;

  int64_t horizon = 300;             ///< L, steps of the gap; the most where it is drawn.
  int64_t num_cues = 4;              ///< k, cues to tell apart.
  int64_t rewrites = 2;              ///< New cues shown in the gap.
  bool noise = true;                 ///< Off: the noise channel is 0 in the gap.
  Lengths lengths = Lengths::fixed;  ///< How L is chosen.

  int64_t gap = 0, t = 0, cue = 0, left = 0;

  template <class V>
  void visit_options(V&& visit) {
    visit("horizon", horizon);
    visit("num_cues", num_cues);
    visit("rewrites", rewrites);
    visit("noise", noise);
    visit("lengths", lengths);
  }

  EnvironmentSpec spec() const {
    check_gap("rewrite", horizon, lengths);
    check_option("rewrite", "num_cues", num_cues, 2, kMostCues);
    check_option("rewrite", "rewrites", rewrites, 0,
                 lengths == Lengths::fixed ? horizon : kShortestGap);
    return {.name = "rewrite",
            .observation_size = num_cues + 2,
            .action = {.num_values = {num_cues}},
            .max_episode_steps = horizon + 2,
            .memory_length = horizon + 1 - rewrites,
            .credit_length = 1,
            .chance_return = 1.0 / num_cues,
            .memoryless_return = 1.0 / num_cues,
            .best_return = 1,
            .passive = true,
            .options = options_line(*this)};
  }

  RETAIN_HOST_DEVICE void reset(Rng& rng, float* observation) {
    gap = draw_gap(rng, horizon, lengths);
    t = 0;
    left = rewrites;
    show_cue(rng, observation);
  }

  RETAIN_HOST_DEVICE Outcome step(Action action, Rng& rng, float* observation) {
    ++t;
    if (t > gap + 1) return {.reward = action == cue ? 1.0f : 0.0f, .discount = 0, .last = true};
    if (t == gap + 1) {
      observation[num_cues + 1] = 1;
    } else if (left > 0 && rng.uniform_int(gap + 1 - t) < left) {  // every choice of steps alike
      --left;
      show_cue(rng, observation);
    } else if (noise) {
      observation[num_cues] = draw_sign(rng);
    }
    return {};
  }

  RETAIN_HOST_DEVICE void legal_actions(bool* legal) const {
    for (int64_t a = 0; a < num_cues; ++a) legal[a] = a == 0 || t == gap + 1;
  }

  RETAIN_HOST_DEVICE Action oracle() const { return t == gap + 1 ? cue : 0; }

  RETAIN_HOST_DEVICE void show_cue(Rng& rng, float* observation) {
    cue = rng.uniform_int(num_cues);
    observation[cue] = 1;
  }
};

}  // namespace retain
