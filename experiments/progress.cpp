#include <retain/experiments/progress.h>
#include <retain/experiments/text.h>

#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <vector>

namespace retain {
namespace {

constexpr double kDecay = 0.9;             // of the averages, an update
constexpr double kRedrawSeconds = 0.1;     // on a terminal
constexpr double kPlainSeconds = 5;        // between plain lines, and a share of the time gone by
constexpr double kPlainShare = 0.1;        // of the updates
constexpr double kFewestPlainSeconds = 1;  // between plain lines of a fast run

double seconds_between(Progress::Clock::time_point from, Progress::Clock::time_point to) {
  return std::chrono::duration<double>(to - from).count();
}

bool locale_is_utf8() {
  for (const char* name : {"LC_ALL", "LC_CTYPE", "LANG"}) {
    const char* value = std::getenv(name);
    if (!value || !*value) continue;
    std::string text(value);
    std::transform(text.begin(), text.end(), text.begin(), ::tolower);
    return text.find("utf-8") != std::string::npos || text.find("utf8") != std::string::npos;
  }
  return false;
}

std::string right(const std::string& text, size_t width) {
  return std::string(width - std::min(width, text.size()), ' ') + text;
}

}  // namespace

ProgressStyle ProgressStyle::of_stderr() {
  ProgressStyle style;
  style.terminal = isatty(STDERR_FILENO);
  style.unicode = locale_is_utf8();
  style.color = style.terminal && !std::getenv("NO_COLOR");
  winsize size = {};
  if (style.terminal && ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0)
    style.width = size.ws_col;
  return style;
}

Progress::Progress(std::ostream& out, ProgressStyle style, std::string title, int64_t updates)
    : out_(out), style_(style), title_(std::move(title)), total_(updates) {}

void Progress::start(int64_t updates, int64_t env_steps, Clock::time_point now) {
  first_update_ = shown_update_ = step_.updates = updates;
  first_env_steps_ = step_.env_steps = env_steps;
  begin_ = shown_ = now;
  if (style_.terminal) out_ << "\r" << line() << "\x1b[K" << std::flush;
}

void Progress::show(const ProgressStep& step, Clock::time_point now) {
  average(step);
  step_ = step;
  seconds_ = seconds_between(begin_, now);
  if (!due(now)) return;
  shown_ = now;
  shown_update_ = step.updates;
  if (style_.terminal) {
    out_ << "\r" << line() << "\x1b[K" << std::flush;
  } else {
    out_ << line() << std::endl;
  }
}

void Progress::finish() {
  if (style_.terminal) {
    out_ << "\r" << line() << "\x1b[K" << std::endl;
  } else if (shown_update_ != step_.updates) {
    out_ << line() << std::endl;
  }
}

void Progress::average(const ProgressStep& step) {
  const auto episodes = static_cast<double>(step.episodes);
  episodes_ = kDecay * episodes_ + episodes;
  return_ = kDecay * return_ + (step.episodes > 0 ? episodes * step.mean_return : 0);
  normalized_ = kDecay * normalized_ + (step.episodes > 0 ? episodes * step.normalized : 0);
}

bool Progress::due(Clock::time_point now) const {
  const double since = seconds_between(shown_, now);
  if (style_.terminal) return since >= kRedrawSeconds || step_.updates == total_;
  const double share =
      static_cast<double>(step_.updates - shown_update_) / static_cast<double>(total_);
  return step_.updates == total_ || since >= std::max(kPlainSeconds, kPlainShare * seconds_) ||
         (share >= kPlainShare && since >= kFewestPlainSeconds);
}

std::string Progress::bar(int64_t cells) const {
  const double share =
      static_cast<double>(step_.updates) / static_cast<double>(std::max<int64_t>(1, total_));
  const auto full = std::min(cells, static_cast<int64_t>(share * static_cast<double>(cells)));
  std::string done, left;
  for (int64_t i = 0; i < full; ++i) done += style_.unicode ? "━" : "=";
  for (int64_t i = full; i < cells; ++i) left += style_.unicode ? "─" : "-";
  if (!style_.color) return done + left;
  return "\x1b[36m" + done + "\x1b[0;2m" + left + "\x1b[0m";
}

std::string Progress::line() const {
  const auto steps = static_cast<double>(step_.env_steps - first_env_steps_);
  const double rate = seconds_ > 0 ? steps / seconds_ : 0;
  const int64_t updates_here = step_.updates - first_update_;
  const double seconds_left = updates_here > 0 ? seconds_ / static_cast<double>(updates_here) *
                                                     static_cast<double>(total_ - step_.updates)
                                               : NAN;
  const std::string total = std::to_string(total_);
  const std::string time = step_.updates == total_ ? "in " + short_time(seconds_)
                           : updates_here > 0      ? short_time(seconds_left) + " left"
                                                   : "";
  // The rarer parts give way first on a narrow terminal; fixed widths keep the bar still.
  std::vector<std::pair<int, std::string>> parts = {
      {0, right(std::to_string(step_.updates), total.size()) + "/" + total},
      {3, right(short_count(static_cast<double>(step_.env_steps)), 5) + " steps"},
      {4, right(rate > 0 ? short_count(rate) : "-", 5) + " steps/s"},
      {2, "return " + right(fixed(episodes_ > 0 ? return_ / episodes_ : NAN, 3), 5)},
      {1, "accuracy " + right(percent(episodes_ > 0 ? normalized_ / episodes_ : NAN), 5)},
      {0, right(time, 9)}};
  constexpr int64_t kShortestBar = 8, kLongestBar = 24;
  auto text = [&] {
    std::string joined;
    for (const auto& part : parts) joined += "  " + part.second;
    return joined;
  };
  auto room = [&] { return style_.width - 1 - display_width(title_) - 2 - display_width(text()); };
  for (int rarest = 4; style_.terminal && rarest > 0 && room() < kShortestBar; --rarest) {
    std::erase_if(parts, [&](const auto& part) { return part.first == rarest; });
  }
  if (!style_.terminal) return title_ + text();
  return title_ + "  " + bar(std::clamp(room(), kShortestBar, kLongestBar)) + text();
}

}  // namespace retain
