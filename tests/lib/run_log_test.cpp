#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <retain/lib/io/checkpoint.h>
#include <retain/lib/io/run_log.h>

#include <cmath>
#include <limits>

#include "support/errors.h"
#include "support/files.h"

namespace retain {
namespace {

using ::testing::ElementsAre;
using testing::error_of;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using testing::read_bytes;
using testing::TemporaryFolder;
using testing::write_bytes;

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

std::vector<int64_t> updates_in(const TemporaryFolder& folder) {
  std::vector<int64_t> updates;
  for (const auto& row : read_metrics(folder.path())) updates.push_back(row.first);
  return updates;
}

void write_four_rows(const TemporaryFolder& folder) {
  RunLog log(folder.path(), "config");
  for (int64_t update = 1; update <= 4; ++update)
    log.append(update, {{"loss", 1.0 / static_cast<double>(update)}});
}

TEST(RunLog, AppendsOneJsonLineARow) {
  TemporaryFolder folder;
  RunLog log(folder.path(), "config");
  EXPECT_EQ(read_bytes(folder / "metrics.jsonl"), "");
  log.append(1, {{"z", 0.1}, {"a \"quoted\"", -3.0}});
  EXPECT_EQ(read_bytes(folder / "metrics.jsonl"),
            "{\"update\":1,\"z\":0.1,\"a \\\"quoted\\\"\":-3.0}\n");
  log.append(5, {});
  EXPECT_THAT(read_bytes(folder / "metrics.jsonl"), ::testing::EndsWith("\n{\"update\":5}\n"));
}

TEST(RunLog, WritesWhatIsNotFiniteAsNull) {
  TemporaryFolder folder;
  RunLog(folder.path(), "").append(0, {{"a", kNaN}, {"b", kInf}, {"c", -kInf}, {"d", 1e300}});
  EXPECT_EQ(read_bytes(folder / "metrics.jsonl"),
            "{\"update\":0,\"a\":null,\"b\":null,\"c\":null,\"d\":1e+300}\n");
  const auto row = read_metrics(folder.path()).at(0).second;
  EXPECT_TRUE(std::isnan(row.at(0).second));
  EXPECT_EQ(row.at(3).second, 1e300);
}

TEST(RunLog, NumbersComeBackBitForBit) {
  TemporaryFolder folder;
  RunLog log(folder.path(), "");
  MetricRow row;
  for (int i = 0; i < 200; ++i)
    row.emplace_back("m" + std::to_string(i), std::pow(-1.7, i - 100) / 3);
  row.emplace_back("least", std::numeric_limits<double>::denorm_min());
  log.append(1, row);
  EXPECT_EQ(read_metrics(folder.path()).at(0).second, row);
}

TEST(RunLog, ANewRunDropsAnOldLog) {
  TemporaryFolder folder;
  write_four_rows(folder);
  RunLog log(folder.path(), "config");
  EXPECT_THAT(updates_in(folder), IsEmpty());
}

TEST(RunLog, ResumeDropsTheRowsAfterTheResumedUpdate) {
  TemporaryFolder folder;
  write_four_rows(folder);
  const auto before = read_bytes(folder / "metrics.jsonl");
  RunLog log(folder.path(), "config", 2);
  EXPECT_THAT(updates_in(folder), ElementsAre(1, 2));
  for (int64_t update = 3; update <= 4; ++update)
    log.append(update, {{"loss", 1.0 / static_cast<double>(update)}});
  EXPECT_EQ(read_bytes(folder / "metrics.jsonl"), before);
}

TEST(RunLog, ResumeAtZeroDropsAllAndBeyondTheEndKeepsAll) {
  TemporaryFolder folder;
  write_four_rows(folder);
  RunLog(folder.path(), "config", 100);
  EXPECT_THAT(updates_in(folder), ElementsAre(1, 2, 3, 4));
  RunLog(folder.path(), "config", 0);
  EXPECT_THAT(updates_in(folder), IsEmpty());
}

TEST(RunLog, ResumeWithoutALogBeginsOne) {
  TemporaryFolder folder;
  RunLog log(folder.path(), "config", 7);
  log.append(8, {{"loss", 1}});
  EXPECT_THAT(updates_in(folder), ElementsAre(8));
}

TEST(RunLog, ALineTornAnywhereIsPassedOver) {
  TemporaryFolder folder;
  write_four_rows(folder);
  const auto whole = read_bytes(folder / "metrics.jsonl");
  const auto last = whole.rfind("{");
  for (size_t length = last; length < whole.size(); ++length) {
    write_bytes(folder / "metrics.jsonl", whole.substr(0, length));
    RunLog log(folder.path(), "config", 4);
    ASSERT_THAT(updates_in(folder), ElementsAre(1, 2, 3)) << length;
    log.append(4, {{"loss", 0.25}});
    ASSERT_EQ(read_bytes(folder / "metrics.jsonl"), whole) << length;
  }
}

TEST(RunLog, ABadLineInTheMiddleIsNamed) {
  for (const auto* bad :
       {"{\"update\":2,", "[2]", "{\"loss\":1}", "{\"update\":2,\"loss\":\"low\"}", ""}) {
    TemporaryFolder folder;
    write_bytes(folder / "metrics.jsonl",
                "{\"update\":1}\n" + std::string(bad) + "\n{\"update\":3}\n");
    EXPECT_EQ(error_of([&] { RunLog(folder.path(), "", 3); }),
              "cannot read \"" + (folder / "metrics.jsonl") + "\": line 2 is no row of metrics");
  }
}

TEST(RunLog, UpdatesMustGrow) {
  TemporaryFolder folder;
  RunLog log(folder.path(), "");
  log.append(3, {});
  EXPECT_THAT(error_of([&] { log.append(3, {}); }), HasSubstr("update must be above 3, got 3"));
  EXPECT_THAT(updates_in(folder), ElementsAre(3));
}

TEST(RunLog, AMissingFolderIsNamed) {
  EXPECT_THAT(error_of([] { RunLog("/nowhere/run", ""); }),
              HasSubstr("there is no folder \"/nowhere/run\""));
}

TEST(RunLog, WriteRunHoldsConfigAndOneVectorAMetric) {
  TemporaryFolder folder;
  {
    RunLog log(folder.path(), "world = recall\n");
    log.append(1, {{"return", 0.5}, {"loss", kInf}});
    log.append(2, {{"loss", 2.0}, {"accuracy", 1.0}});
  }
  RunLog log(folder.path(), "world = recall\n", 2);  // columns survive a resume
  log.append(4, {{"return", 0.75}});
  log.write_run();
  log.write_run();
  const CheckpointReader run(folder / "run.h5", "run");
  EXPECT_THAT(run.names(), ElementsAre("config", "update", "metrics/return", "metrics/loss",
                                       "metrics/accuracy"));
  EXPECT_EQ(run.text("config"), "world = recall\n");
  EXPECT_TRUE(at::equal(run.tensor("update"), at::tensor({1, 2, 4}, at::kLong)));
  const auto returns = run.tensor("metrics/return");
  EXPECT_EQ(returns.scalar_type(), at::kDouble);
  EXPECT_EQ(returns[0].item<double>(), 0.5);
  EXPECT_TRUE(std::isnan(returns[1].item<double>()));
  EXPECT_EQ(returns[2].item<double>(), 0.75);
}

TEST(RunLog, WriteRunOfNoRowsIsReadable) {
  TemporaryFolder folder;
  RunLog(folder.path(), "c").write_run();
  EXPECT_EQ(CheckpointReader(folder / "run.h5", "run").tensor("update").numel(), 0);
}

}  // namespace
}  // namespace retain
