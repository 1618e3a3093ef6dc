#include <gmock/gmock.h>
#include <retain/experiments/options.h>

#include "support/errors.h"
#include "support/files.h"

namespace retain {
namespace {

using ::testing::ElementsAre;
using testing::error_of;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;
using ::testing::Pair;

/// A command with one option of each kind.
struct Sample {
  int64_t updates = 300;
  std::optional<int64_t> horizon;
  uint64_t seed = 1;
  double learning_rate = 1e-3;
  bool anneal = false, resume = false;
  std::string world = "recall";
  std::vector<std::string> arms = {"mamba", "gru"}, files;
  std::vector<int64_t> horizons;
  std::map<std::string, std::string> world_option;
  Options options{"retain sample [options]", "Samples."};

  Sample() {
    options.add("updates", updates, {.min = 1}, "Updates.");
    options.add("horizon", horizon, {.min = 1}, "Horizon.");
    options.add("seed", seed, "Seed.");
    options.add("learning_rate", learning_rate, {.min = 0, .max = 1, .open = true}, "Step size.");
    options.add("anneal", anneal, "Anneal.");
    options.add("world", world, "World.");
    options.add("arms", arms, "Arms.");
    options.add("horizons", horizons, {.min = 1}, "Horizons.");
    options.add("world_option", world_option, "name=value.");
    options.add_flag("resume", resume, "Resume.");
    options.add_positional("FILE", files, 1, "A file.");
    options.allow_config("arm");
  }
};

std::string error(const Options::Values& arguments) {
  return error_of([&] { Sample().options.parse(arguments); });
}

TEST(Names, EditDistanceCountsSwapsAsOne) {
  EXPECT_EQ(edit_distance("", "abc"), 3);
  EXPECT_EQ(edit_distance("recall", "recall"), 0);
  EXPECT_EQ(edit_distance("recall", "recal"), 1);
  EXPECT_EQ(edit_distance("trian", "train"), 1);
  EXPECT_EQ(edit_distance("kitten", "sitting"), 3);
}

TEST(Names, NearestComesFirstAndTheFarStaysOut) {
  EXPECT_THAT(nearest("grU", {"mamba", "gru_chrono", "gru"}), ElementsAre("gru"));
  EXPECT_THAT(nearest("learning", {"learning_rate", "horizon"}), ElementsAre("learning_rate"));
  EXPECT_THAT(nearest("qqqq", {"mamba", "gru"}), IsEmpty());
}

TEST(Names, AnUnknownNameListsAllValidOnes) {
  EXPECT_EQ(error_of([] {
              check_name("core", "mambo", {"mamba", "gru"});
            }),
            "unknown core \"mambo\"; nearest: mamba; valid: mamba, gru");
}

TEST(Values, NumbersComeBackBitForBit) {
  for (double value : {0.1, 1e-300, -2.5, 1.0 / 3, 12345678.9}) {
    EXPECT_EQ(parse_number("x", to_text(value)), value);
  }
}

TEST(Options, TheCommandLineWinsOverTheFile) {
  testing::TemporaryFolder folder;
  testing::write_bytes(folder / "a.ini",
                       "# a comment\nupdates = 7\nhorizons = 1 2, 3\nworld_option = a=1 b=2\n");
  Sample sample;
  sample.options.parse({"--updates", "9", "--config", folder / "a.ini", "--world_option", "b=5"});
  EXPECT_EQ(sample.updates, 9);
  EXPECT_THAT(sample.horizons, ElementsAre(1, 2, 3));
  EXPECT_THAT(sample.world_option, ElementsAre(Pair("a", "1"), Pair("b", "5")));
  EXPECT_TRUE(sample.options.given("horizons"));
  EXPECT_FALSE(sample.options.given("seed"));
}

TEST(Options, WhatIniWritesReadsBackTheSame) {
  Sample sample;
  sample.options.parse({"--updates", "5", "--learning_rate", "0.3", "--anneal", "true", "--horizon",
                        "12", "--horizons", "4", "5", "--world_option", "k=v", "--resume", "file"});
  Sample again;
  again.options.parse_ini(sample.options.ini(), "here");
  EXPECT_EQ(again.options.ini(), sample.options.ini());
  EXPECT_EQ(again.updates, 5);
  EXPECT_EQ(again.learning_rate, 0.3);
  EXPECT_EQ(again.horizon, 12);
  EXPECT_TRUE(again.anneal);
  EXPECT_THAT(again.horizons, ElementsAre(4, 5));
  EXPECT_THAT(sample.options.ini(), Not(HasSubstr("resume")));
  EXPECT_THAT(sample.files, ElementsAre("file"));
  sample.world = "recall#2";
  EXPECT_EQ(error_of([&] { sample.options.ini(); }),
            "--world may hold neither # nor a line break, got \"recall#2\"");
}

TEST(Options, SectionsKeepTheirOrder) {
  Sample sample;
  sample.options.parse_ini(
      "seed = 3\n[arm.z]\ncore = gru\n[arm.a]\ncore = mamba\ndt_min = 1/horizon\n", "here");
  ASSERT_EQ(sample.options.sections().size(), 2);
  EXPECT_EQ(sample.options.sections()[0].first, "z");
  EXPECT_THAT(sample.options.sections()[1].second,
              ElementsAre(Pair("core", "mamba"), Pair("dt_min", "1/horizon")));
}

TEST(Options, AMistakeNamesTheOptionTheRuleAndWhatCame) {
  EXPECT_EQ(error({"--updates", "0"}), "--updates must be a whole number >= 1, got \"0\"");
  EXPECT_EQ(error({"--updates", "1e3"}), "--updates must be a whole number >= 1, got \"1e3\"");
  EXPECT_EQ(error({"--updates", "99999999999999999999"}),
            "--updates must be a whole number >= 1, got \"99999999999999999999\"");
  EXPECT_EQ(error({"--seed", "-1"}), "--seed must be a whole number >= 0, got \"-1\"");
  EXPECT_EQ(error({"--learning_rate", "0"}),
            "--learning_rate must be a number > 0 and <= 1, got \"0\"");
  EXPECT_EQ(error({"--learning_rate", "nan"}),
            "--learning_rate must be a number > 0 and <= 1, got \"nan\"");
  EXPECT_EQ(error({"--anneal", "yes"}), "--anneal must be true or false, got \"yes\"");
  EXPECT_EQ(error({"--horizons", "4", "x"}), "--horizons must be a whole number >= 1, got \"x\"");
  EXPECT_EQ(error({"--world_option", "k"}), "--world_option must be name=value, got \"k\"");
}

TEST(Options, AMisspeltOptionNamesTheNearest) {
  EXPECT_EQ(error({"--learnig_rate", "1"}),
            "unknown option --learnig_rate; nearest: --learning_rate");
  EXPECT_EQ(error({"--num-zzz", "1"}), "unknown option --num-zzz; --help lists the valid ones");
}

TEST(Options, TheShapeOfTheCommandLineIsChecked) {
  EXPECT_EQ(error({"--updates"}), "--updates needs a value");
  EXPECT_EQ(error({"--updates="}), "--updates needs a value");
  EXPECT_EQ(error({"--resume=1"}), "--resume takes no value");
  EXPECT_EQ(error({"--updates", "1", "--updates", "2"}), "--updates is given twice");
  EXPECT_EQ(error({"a", "b"}), "too many arguments");
  Options none("retain none", "None.");
  EXPECT_EQ(error_of([&] { none.parse({"zzz"}); }), "unexpected argument \"zzz\"");
}

TEST(Options, AMistakeInAFileNamesTheFile) {
  testing::TemporaryFolder folder;
  const std::string path = folder / "b.ini";
  auto error_with = [&](const std::string& text) {
    testing::write_bytes(path, text);
    return error({"--config", path});
  };
  EXPECT_EQ(error_with("updatez = 3\n"), path + ": unknown option --updatez; nearest: --updates");
  EXPECT_EQ(error_with("updates = x\n"),
            path + ": --updates must be a whole number >= 1, got \"x\"");
  EXPECT_EQ(error_with("updates 3\n"), path + ": a line must be name = value, got \"updates 3\"");
  EXPECT_EQ(error_with("[arm.z]\nk = 1\nk = 2\n"), path + ": [arm.z] gives k twice");
  EXPECT_EQ(error_with("resume = true\n"), path + ": resume belongs on the command line");
  testing::write_bytes(path, "updates = 3\n");
  EXPECT_EQ(error({"--config", path, "--config", path}), "--config is given twice");
  EXPECT_EQ(error({"--config", folder / "none.ini"}), "cannot read " + (folder / "none.ini"));
  EXPECT_EQ(error({"--config", folder.path()}), "cannot read " + folder.path());
}

TEST(Options, HelpNamesEveryOptionWithItsDefault) {
  const std::string help = Sample().options.help();
  EXPECT_THAT(help, HasSubstr("--updates 300"));
  EXPECT_THAT(help, HasSubstr("--arms mamba gru"));
  EXPECT_THAT(help, HasSubstr("--config FILE"));
  EXPECT_THAT(help, HasSubstr("Usage: retain sample [options]"));
}

}  // namespace
}  // namespace retain
