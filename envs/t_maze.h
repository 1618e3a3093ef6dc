#pragma once

#include <retain/envs/environment.h>
#include <retain/envs/options.h>

#include <numeric>
#include <utility>
#include <vector>

namespace retain {

/// The T-maze of Ni et al. 2023 ("When do transformers shine in RL?"): passive for oracle_offset o
/// = 0, active for o > 0, where the goal must be looked up first.
///
/// A corridor x = 0 … o + L with L = `horizon`; goals at (o + L, ±1), the right one y* by chance.
/// The start is x = o. Actions 0 … 3: +x, +y, −x, −y; walls block. An episode is T = L + 2o + 1
/// steps, no earlier end. Observation (2): [0, y*] on the first visit of x = 0, [0, 0] elsewhere in
/// the corridor, [1, y] at x = o + L. Reward of the action that leads to time t: at t = T, 1 if y =
/// y*; before, −1/L if x < t − o (behind the best path, for good once behind) or, if `recoverable`,
/// −1/L if t > o and the action is not +x. Then, for o > 0, memoryless_return is a bound that is
/// not reached: nothing says when to turn.
struct TMaze {
  using Action = int64_t;
  static constexpr Action kRight = 0, kUp = 1, kLeft = 2, kDown = 3;

  int64_t horizon = 100;      ///< L, steps from the start to the junction.
  int64_t oracle_offset = 0;  ///< o, steps from the start back to where the goal is told.
  bool recoverable = false;   ///< Fine each action that strays, not each step behind the best path.

  int64_t t = 0, x = 0, y = 0, goal = 0;
  bool visited = false;  // x = 0 was seen

  template <class V>
  void visit_options(V&& visit) {
    visit("horizon", horizon);
    visit("oracle_offset", oracle_offset);
    visit("recoverable", recoverable);
  }

  EnvironmentSpec spec() const {
    check_option("t_maze", "horizon", horizon, 1, INT64_C(1) << 40);
    check_option("t_maze", "oracle_offset", oracle_offset, 0, 1 << 14);
    return {.name = "t_maze",
            .observation_size = 2,
            .action = {.num_values = {4}},
            .max_episode_steps = num_steps(),
            .memory_length = horizon + oracle_offset,
            .credit_length = oracle_offset > 0 ? num_steps() : 1,
            .chance_return = chance_return(),
            .memoryless_return = 0.5,
            .best_return = 1,
            .passive = false,
            .options = options_line(*this)};
  }

  RETAIN_HOST_DEVICE void reset(Rng& rng, float* observation) {
    t = 0;
    x = oracle_offset;
    y = 0;
    goal = 2 * rng.uniform_int(2) - 1;
    visited = false;
    observe(observation);
  }

  RETAIN_HOST_DEVICE Outcome step(Action action, Rng&, float* observation) {
    ++t;
    move(action);
    observe(observation);
    if (t == num_steps()) return {.reward = y == goal ? 1.0f : 0.0f, .discount = 0, .last = true};
    const bool wrong = recoverable ? action != kRight && t > oracle_offset : x < t - oracle_offset;
    return {.reward = wrong ? -1.0f / static_cast<float>(horizon) : 0.0f};
  }

  RETAIN_HOST_DEVICE Action oracle() const {
    if (t < oracle_offset) return kLeft;
    if (x < end()) return kRight;
    return goal > 0 ? kUp : kDown;
  }

  RETAIN_HOST_DEVICE int64_t num_steps() const { return horizon + 2 * oracle_offset + 1; }
  RETAIN_HOST_DEVICE int64_t end() const { return horizon + oracle_offset; }

  RETAIN_HOST_DEVICE void move(Action action) {
    if (action == kRight && x < end() && y == 0) ++x;
    if (action == kLeft && x > 0 && y == 0) --x;
    if (action == kUp && x == end() && y < 1) ++y;
    if (action == kDown && x == end() && y > -1) --y;
  }

  RETAIN_HOST_DEVICE void observe(float* observation) {
    if (x == 0 && !visited) {
      observation[1] = static_cast<float>(goal);
      visited = true;
    } else if (x == end()) {
      observation[0] = 1;
      observation[1] = static_cast<float>(y);
    }
  }

  double chance_return() const;
};

/// Follows the chances of the places that uniform random play can be at without having fallen
/// behind the best path (x < t − o); whoever has can no longer reach a goal. That band is 2o + 1
/// places wide.
inline double TMaze::chance_return() const {
  const int64_t o = oracle_offset, band = 2 * o + 1, steps = num_steps();
  std::vector<double> place(band + 3, 0.0);  // [1 + i]: x = t − o + i in the corridor; [0]: behind
  place[band] = 1;
  double junction = 0, side = 0, behind = 0;
  for (int64_t now = 1; now < steps; ++now) {
    for (int64_t i = 0; i <= band; ++i) {
      place[i] = 0.25 * place[i] + 0.5 * place[i + 1] + 0.25 * place[i + 2];
    }
    if (now <= o) place[1 + o - now] += std::exchange(place[o - now], 0.0);  // the wall at x = 0
    double arrived = 0;
    if (const int64_t i = steps - now; i <= band) {  // x = o + L
      arrived = std::exchange(place[i], 0.0);
      place[i - 1] += 0.25 * junction;
    }
    const double moved = 0.25 * junction + 0.25 * side + arrived;
    side = 0.75 * side + 0.5 * junction;
    junction = moved;
    place[0] = 0;
    const double ahead = std::accumulate(place.begin(), place.end(), junction + side);
    behind += 1 - ahead;
    if (ahead < 1e-16) {  // nothing more can happen but falling further behind
      behind += static_cast<double>(steps - 1 - now);
      side = junction = 0;
      break;
    }
  }
  const double wrong = recoverable ? 0.75 * static_cast<double>(steps - 1 - o) : behind;
  return (0.75 * side + 0.5 * junction) / 2 - wrong / static_cast<double>(horizon);
}

}  // namespace retain
