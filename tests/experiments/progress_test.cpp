#include <gmock/gmock.h>
#include <retain/experiments/progress.h>
#include <retain/experiments/text.h>

#include <algorithm>
#include <cmath>
#include <sstream>

namespace retain {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

/// What a run of `updates` updates of `milliseconds` each shows.
std::string shown(ProgressStyle style, int64_t updates, int64_t milliseconds) {
  std::ostringstream out;
  Progress progress(out, style, "recall 300 mamba seed 1", updates);
  Progress::Clock::time_point now;
  progress.start(0, 0, now);
  for (int64_t i = 1; i <= updates; ++i) {
    now += std::chrono::milliseconds(milliseconds);
    progress.show({.updates = i,
                   .env_steps = i * 1000,
                   .episodes = 10,
                   .mean_return = 0.75,
                   .normalized = 0.5},
                  now);
  }
  progress.finish();
  return out.str();
}

TEST(Progress, PlainLinesComeNowAndThen) {
  const std::string fast = shown({}, 1000, 20);
  EXPECT_THAT(fast, Not(HasSubstr("\r")));
  EXPECT_EQ(std::count(fast.begin(), fast.end(), '\n'), 10);
  const std::string slow = shown({}, 1000, 60'000);  // most of a day
  EXPECT_LT(std::count(slow.begin(), slow.end(), '\n'), 100);
}

TEST(Progress, TheLineTellsUpdatesStepsSpeedReturnAccuracyAndTime) {
  const std::string text = shown({}, 100, 100);
  EXPECT_THAT(text, HasSubstr(" 50/100  50.0k steps  10.0k steps/s  return 0.750  accuracy  50 %"));
  EXPECT_THAT(text, HasSubstr("5 s left"));
  EXPECT_THAT(text, HasSubstr("100/100"));
  EXPECT_THAT(text, HasSubstr("in 10 s\n"));
}

TEST(Progress, ATerminalLineIsRewrittenInPlaceAndFits) {
  for (int64_t width : {60, 80, 100, 140}) {
    const std::string text = shown({.terminal = true, .unicode = true, .width = width}, 50, 100);
    EXPECT_EQ(std::count(text.begin(), text.end(), '\n'), 1);
    std::istringstream lines(text);
    for (std::string line; std::getline(lines, line, '\r');) {
      EXPECT_LT(display_width(line.substr(0, line.find('\x1b'))), width) << line;
    }
  }
}

TEST(Progress, NothingIsAveragedBeforeTheFirstEpisodeEnds) {
  std::ostringstream out;
  Progress progress(out, {}, "t", 1);
  Progress::Clock::time_point now;
  progress.start(0, 0, now);
  progress.show(
      {.updates = 1, .env_steps = 5, .episodes = 0, .mean_return = NAN, .normalized = NAN},
      now + std::chrono::seconds(1));
  EXPECT_THAT(out.str(), HasSubstr("return     -  accuracy     -"));
}

TEST(Text, CountsAndTimesAreShort) {
  EXPECT_EQ(short_count(0), "0");
  EXPECT_EQ(short_count(999), "999");
  EXPECT_EQ(short_count(1000), "1.00k");
  EXPECT_EQ(short_count(41'240), "41.2k");
  EXPECT_EQ(short_count(999'800), "1.00M");
  EXPECT_EQ(short_count(2'730'000), "2.73M");
  EXPECT_EQ(short_time(6.6), "7 s");
  EXPECT_EQ(short_time(62), "1:02");
  EXPECT_EQ(short_time(2 * 3600 + 605), "2:10:05");
  EXPECT_EQ(fixed(-0.0001, 2), "0.00");
  EXPECT_EQ(percent(NAN), "-");
}

TEST(Text, ColumnsOfATableStandUnderEachOther) {
  EXPECT_EQ(table({{"core", "n"}, {"gru", "12"}, {"mämba", "3"}}),
            "core    n\ngru    12\nmämba   3\n");
}

}  // namespace
}  // namespace retain
