#include <gtest/gtest.h>

#include <sstream>

#include "envs/play.h"
#include "envs/worlds.h"

// One episode a world, played by hand and written down: what is seen, done and earned. The text
// also pins the random numbers, so that a seed means the same episode for good.

namespace retain {
namespace {

using namespace retain::testing;

/// A line a step: type, reward, discount | observation | legal actions (if masked) → the action
/// taken on it.
std::string playthrough(VectorEnv& env, const std::vector<int64_t>& actions) {
  std::ostringstream text;
  TimeSteps now = env.reset();
  for (size_t t = 0;; ++t) {
    const char* names[] = {"FIRST", "MID", "LAST"};
    text << names[now.step_type.item<uint8_t>()] << ' ' << now.reward.item<float>() << ' '
         << now.discount.item<float>() << " |";
    for (int64_t i = 0; i < now.observation.numel(); ++i) {
      text << ' ' << now.observation.view(-1)[i].item<float>();
    }
    if (now.legal_actions.defined()) {
      text << " |";
      for (int64_t a = 0; a < now.legal_actions.numel(); ++a) {
        if (now.legal_actions.view(-1)[a].item<bool>()) text << ' ' << a;
      }
    }
    if (t == actions.size()) return text.str() + '\n';
    text << " -> " << actions[t] << '\n';
    now = env.step(at::tensor({actions[t]}));
  }
}

template <class W>
std::string playthrough(const W& world, const std::vector<int64_t>& actions) {
  return '\n' + playthrough(*vectorize(world, 1, 1), actions);
}

TEST(Playthrough, Recall) {
  EXPECT_EQ(playthrough(Recall{.horizon = 3}, {0, 0, 0, 0, 3, 2}), R"(
FIRST 0 1 | 0 0 0 1 0 0 | 0 -> 0
MID 0 1 | 0 0 0 0 1 0 | 0 -> 0
MID 0 1 | 0 0 0 0 1 0 | 0 -> 0
MID 0 1 | 0 0 0 0 1 0 | 0 -> 0
MID 0 1 | 0 0 0 0 0 1 | 0 1 2 3 -> 3
LAST 1 0 | 0 0 0 0 0 0 | 0 -> 2
FIRST 0 1 | 1 0 0 0 0 0 | 0
)");
}

TEST(Playthrough, Rewrite) {
  EXPECT_EQ(playthrough(Rewrite{.horizon = 5, .rewrites = 2}, {0, 0, 0, 0, 0, 0, 3, 0}), R"(
FIRST 0 1 | 0 0 0 1 0 0 | 0 -> 0
MID 0 1 | 0 0 0 0 -1 0 | 0 -> 0
MID 0 1 | 0 0 0 0 -1 0 | 0 -> 0
MID 0 1 | 0 0 0 0 1 0 | 0 -> 0
MID 0 1 | 0 0 1 0 0 0 | 0 -> 0
MID 0 1 | 0 0 0 1 0 0 | 0 -> 0
MID 0 1 | 0 0 0 0 0 1 | 0 1 2 3 -> 3
LAST 1 0 | 0 0 0 0 0 0 | 0 -> 0
FIRST 0 1 | 0 0 0 1 0 0 | 0
)");
}

TEST(Playthrough, RepeatPrevious) {  // the first answer is due at the third card
  EXPECT_EQ(playthrough(RepeatPrevious{.decks = 1, .k = 3}, {0, 0, 3, 2, 3, 3, 2, 1}), R"(
FIRST 0 1 | 0 0 0 1 -> 0
MID 0 1 | 0 0 1 0 -> 0
MID 0 1 | 0 0 0 1 -> 3
MID 0.0204082 1 | 0 0 0 1 -> 2
MID 0.0204082 1 | 0 0 1 0 -> 3
MID 0.0204082 1 | 1 0 0 0 -> 3
MID 0.0204082 1 | 1 0 0 0 -> 2
MID 0.0204082 1 | 1 0 0 0 -> 1
MID -0.0204082 1 | 0 0 0 1
)");
}

TEST(Playthrough, MemoryChain) {
  EXPECT_EQ(playthrough(MemoryChain{.horizon = 4, .num_bits = 2}, {0, 1, 1, 0, 0}), R"(
FIRST 0 1 | 1 0 -1 -1 -> 0
MID 0 1 | 0.75 0 0 0 -> 1
MID 0 1 | 0.5 0 0 0 -> 1
MID 0 1 | 0.25 1 0 0 -> 0
LAST 1 0 | 0 0 0 0 -> 0
FIRST 0 1 | 1 0 1 1
)");
}

TEST(Playthrough, TMazeActive) {  // left to the oracle, along the corridor, up to the goal
  EXPECT_EQ(playthrough(TMaze{.horizon = 3, .oracle_offset = 1}, {2, 0, 0, 0, 0, 1, 0}), R"(
FIRST 0 1 | 0 0 -> 2
MID 0 1 | 0 1 -> 0
MID 0 1 | 0 0 -> 0
MID 0 1 | 0 0 -> 0
MID 0 1 | 0 0 -> 0
MID 0 1 | 1 0 -> 1
LAST 1 0 | 1 1 -> 0
FIRST 0 1 | 0 0
)");
}

TEST(Playthrough,
     TMazePassive) {  // a step lost is paid for at every later one; x = 0 tells but once
  EXPECT_EQ(playthrough(TMaze{.horizon = 3}, {0, 2, 0, 0, 0}), R"(
FIRST 0 1 | 0 1 -> 0
MID 0 1 | 0 0 -> 2
MID -0.333333 1 | 0 0 -> 0
MID -0.333333 1 | 0 0 -> 0
LAST 0 0 | 0 0 -> 0
FIRST 0 1 | 0 -1
)");
}

TEST(Playthrough,
     TMazeRecoverable) {  // a wrong step is paid for once, and only after the oracle's time
  EXPECT_EQ(playthrough(TMaze{.horizon = 3, .oracle_offset = 1, .recoverable = true},
                        {0, 2, 2, 0, 0, 0, 0}),
            R"(
FIRST 0 1 | 0 0 -> 0
MID 0 1 | 0 0 -> 2
MID -0.333333 1 | 0 0 -> 2
MID -0.333333 1 | 0 1 -> 0
MID 0 1 | 0 0 -> 0
MID 0 1 | 0 0 -> 0
LAST 0 0 | 0 0 -> 0
FIRST 0 1 | 0 0
)");
}

TEST(Playthrough, Catch) {
  EXPECT_EQ(playthrough(Catch{.rows = 4, .columns = 3}, {0, 0, 2, 0, 1, 2, 1}), R"(
FIRST 0 1 | 0 0 1 0 0 0 0 0 0 0 1 0 -> 0
MID 0 1 | 0 0 0 0 0 1 0 0 0 1 0 0 -> 0
MID 0 1 | 0 0 0 0 0 0 0 0 1 1 0 0 -> 2
LAST -1 0 | 0 0 0 0 0 0 0 0 0 0 1 1 -> 0
FIRST 0 1 | 0 0 1 0 0 0 0 0 0 0 1 0 -> 1
MID 0 1 | 0 0 0 0 0 1 0 0 0 0 1 0 -> 2
MID 0 1 | 0 0 0 0 0 0 0 0 1 0 0 1 -> 1
LAST 1 0 | 0 0 0 0 0 0 0 0 0 0 0 1
)");
}

}  // namespace
}  // namespace retain
