#pragma once

#include <chrono>
#include <cstdint>
#include <ostream>
#include <string>

namespace retain {

/// What one update adds to the picture.
struct ProgressStep {
  int64_t updates = 0;     ///< Done so far, of the whole run.
  int64_t env_steps = 0;   ///< So far.
  int64_t episodes = 0;    ///< That ended in this update.
  double mean_return = 0;  ///< Of those.
  double normalized = 0;   ///< (mean_return − chance) / (best − chance)
};

/// How a progress line is shown.
struct ProgressStyle {
  bool terminal = false;  ///< Rewrite one line in place; else print a plain line now and then.
  bool unicode = false;   ///< Draw the bar with block characters.
  bool color = false;     ///< Draw the bar in colour.
  int64_t width = 80;     ///< Columns of the terminal.
  /// Of stderr, the locale and NO_COLOR.
  static ProgressStyle of_stderr();
};

/// The line that shows a run: bar, updates, env steps, steps/s, return, normalised accuracy, time
/// left. Return and accuracy are means over about the last ten updates.
class Progress {
 public:
  using Clock = std::chrono::steady_clock;

  Progress(std::ostream& out, ProgressStyle style, std::string title, int64_t updates);

  /// Where the run stands before its first update here.
  void start(int64_t updates, int64_t env_steps, Clock::time_point now = Clock::now());
  void show(const ProgressStep& step, Clock::time_point now = Clock::now());
  void finish();  ///< Leaves the last state of the line on the screen.

 private:
  void average(const ProgressStep& step);
  std::string line() const;
  std::string bar(int64_t cells) const;
  bool due(Clock::time_point now) const;

  std::ostream& out_;
  ProgressStyle style_;
  std::string title_;
  int64_t total_;
  int64_t first_update_ = 0, first_env_steps_ = 0;
  Clock::time_point begin_, shown_;
  int64_t shown_update_ = 0;
  double seconds_ = 0;
  ProgressStep step_;
  double episodes_ = 0, return_ = 0, normalized_ = 0;  // decaying sums, weighted by episodes
};

}  // namespace retain
