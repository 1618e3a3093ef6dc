#pragma once

#include <retain/envs/environment.h>
#include <retain/envs/options.h>

#include <algorithm>

namespace retain {

/// Catch a falling ball with a paddle (bsuite's catch): needs no memory, a smoke test.
///
/// The ball starts in the top row, in a column by chance, and falls a row a step; the paddle starts
/// in the middle of the bottom row. Actions: 0 left, 1 stay, 2 right; walls block. When the ball
/// reaches the bottom row the episode ends: +1 if the paddle is there, else −1. Observation: rows ·
/// columns cells, row by row, 1 where the ball or the paddle is.
struct Catch {
  using Action = int64_t;

  int64_t rows = 10;    ///< Height of the board; an episode has rows − 1 actions.
  int64_t columns = 5;  ///< Width of the board.

  int64_t ball_row = 0, ball_column = 0, paddle = 0;

  template <class V>
  void visit_options(V&& visit) {
    visit("rows", rows);
    visit("columns", columns);
  }

  EnvironmentSpec spec() const {
    check_option("catch", "rows", rows, 2, 1 << 10);
    check_option("catch", "columns", columns, 2, 1 << 10);
    // The ball's column does not depend on the play, so any fixed place is right one time in
    // `columns`.
    const int64_t left = std::min(columns / 2, rows - 1);
    const int64_t right = std::min(columns - 1 - columns / 2, rows - 1);
    const double best = 2.0 * static_cast<double>(1 + left + right) / columns - 1;
    return {.name = "catch",
            .observation_size = rows * columns,
            .action = {.num_values = {3}},
            .max_episode_steps = rows - 1,
            .memory_length = 0,
            .credit_length = rows - 1,
            .chance_return = 2.0 / columns - 1,
            .memoryless_return = best,
            .best_return = best,
            .wrong_return = -1,
            .passive = false,
            .options = options_line(*this)};
  }

  RETAIN_HOST_DEVICE void reset(Rng& rng, float* observation) {
    ball_row = 0;
    ball_column = rng.uniform_int(columns);
    paddle = columns / 2;
    observe(observation);
  }

  RETAIN_HOST_DEVICE Outcome step(Action action, Rng&, float* observation) {
    const int64_t moved = paddle + action - 1;
    if (moved >= 0 && moved < columns) paddle = moved;
    ++ball_row;
    observe(observation);
    if (ball_row < rows - 1) return {};
    return {.reward = paddle == ball_column ? 1.0f : -1.0f, .discount = 0, .last = true};
  }

  RETAIN_HOST_DEVICE Action oracle() const {
    return paddle < ball_column ? 2 : paddle > ball_column ? 0 : 1;
  }

  RETAIN_HOST_DEVICE void observe(float* observation) const {
    observation[ball_row * columns + ball_column] = 1;
    observation[(rows - 1) * columns + paddle] = 1;
  }
};

}  // namespace retain
