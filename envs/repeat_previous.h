#pragma once

#include <retain/envs/environment.h>
#include <retain/envs/options.h>

#include <algorithm>

namespace retain {

/// Repeat the suit seen k − 1 steps before (POPGym's RepeatPrevious, v1.0.7; k = 1 is the current
/// card).
///
/// n = 52 · decks cards are dealt without replacement, one a step, and their suit shown. As soon as
/// k cards were seen every action is an answer: +1/(n − k) if right, −1/(n − k) if wrong. The step
/// that deals the last card is LAST, a termination: the deck is empty. POPGym's easy, medium and
/// hard: (decks, k) = (1, 4), (2, 32), (3, 64). Observation: [0, 4) suit, one-hot.
struct RepeatPrevious {
  using Action = int64_t;
  static constexpr int64_t kSuits = 4;
  static constexpr int64_t kMostSteps = 256;  // what fits into `seen`

  int64_t decks = 1;  ///< Decks of 52 cards that are dealt as one.
  int64_t k = 4;      ///< The suit to name is that of k − 1 steps before.

  int64_t dealt = 0;
  int64_t left[kSuits] = {};      // cards of each suit still in the deck
  uint8_t seen[kMostSteps] = {};  // the last k suits, a ring

  template <class V>
  void visit_options(V&& visit) {
    visit("decks", decks);
    visit("k", k);
  }

  EnvironmentSpec spec() const {
    check_option("repeat_previous", "decks", decks, 1, 1 << 20);
    check_option("repeat_previous", "k", k, 1, std::min(kMostSteps, num_cards() - 1));
    // Without memory the current suit says: the one asked for is a little likelier another.
    const double other = 13.0 * decks / (num_cards() - 1.0);
    return {.name = "repeat_previous",
            .observation_size = kSuits,
            .action = {.num_values = {kSuits}},
            .max_episode_steps = num_cards() - 1,
            .memory_length = k - 1,
            .credit_length = 1,
            .chance_return = -0.5,
            .memoryless_return = k == 1 ? 1 : 2 * other - 1,
            .best_return = 1,
            .passive = true,
            .options = options_line(*this)};
  }

  RETAIN_HOST_DEVICE void reset(Rng& rng, float* observation) {
    dealt = 0;
    for (int64_t suit = 0; suit < kSuits; ++suit) left[suit] = 13 * decks;
    deal(rng, observation);
  }

  RETAIN_HOST_DEVICE Outcome step(Action action, Rng& rng, float* observation) {
    Outcome outcome;
    if (dealt >= k) {
      const float share = 1.0f / static_cast<float>(num_cards() - k);
      outcome.reward = action == oracle() ? share : -share;
    }
    deal(rng, observation);
    outcome.last = dealt == num_cards();
    outcome.discount = outcome.last ? 0.0f : 1.0f;
    return outcome;
  }

  RETAIN_HOST_DEVICE Action oracle() const { return dealt >= k ? seen[(dealt - k) % k] : 0; }

  RETAIN_HOST_DEVICE int64_t num_cards() const { return 52 * decks; }

  /// A card by chance is a suit in proportion to what is left of it.
  RETAIN_HOST_DEVICE void deal(Rng& rng, float* observation) {
    int64_t card = rng.uniform_int(num_cards() - dealt);
    uint8_t suit = 0;
    while (card >= left[suit]) card -= left[suit++];
    --left[suit];
    seen[dealt++ % k] = suit;
    observation[suit] = 1;
  }
};

}  // namespace retain
