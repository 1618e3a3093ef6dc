#include <gmock/gmock.h>
#include <retain/experiments/commands.h>
#include <retain/lib/io/checkpoint.h>
#include <retain/lib/io/run_log.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <iostream>
#include <nlohmann/json.hpp>
#include <sstream>

#include "support/files.h"

namespace retain {
namespace {

using ::testing::AllOf;
using ::testing::ContainsRegex;
using ::testing::HasSubstr;
using testing::TemporaryFolder;

struct Result {
  int code = 0;
  std::string out, error;
};

Result retain_run(const Arguments& arguments) {
  std::ostringstream out, error;
  auto* old_out = std::cout.rdbuf(out.rdbuf());
  auto* old_error = std::cerr.rdbuf(error.rdbuf());
  Result result;
  result.code = run_program(arguments);
  std::cout.rdbuf(old_out);
  std::cerr.rdbuf(old_error);
  return {result.code, out.str(), error.str()};
}

/// A run that takes no time, in `folder`.
Arguments tiny(const std::string& folder, const Arguments& more = {}) {
  Arguments arguments = {"train",  "--world",   "recall",    "--horizon", "6",
                         "--core", "gru",       "--d_model", "8",         "--num_envs",
                         "4",      "--updates", "3",         "--out",     folder};
  arguments.insert(arguments.end(), more.begin(), more.end());
  return arguments;
}

/// One line that names the command; exit code 2.
void expect_usage_error(const Arguments& arguments, const std::string& text) {
  const Result result = retain_run(arguments);
  EXPECT_EQ(result.code, 2) << text;
  EXPECT_THAT(result.error, HasSubstr(text));
  EXPECT_EQ(std::count(result.error.begin(), result.error.end(), '\n'), 1) << result.error;
  EXPECT_TRUE(result.error.starts_with("retain")) << result.error;
  EXPECT_EQ(result.out, "");
}

TEST(Program, AnUnknownCommandExitsWithTwo) {
  expect_usage_error({"trian"}, "retain trian: unknown command \"trian\"; nearest: train");
  expect_usage_error({}, "retain: no command given");
  expect_usage_error({"--verison"}, "retain: unknown command \"--verison\"");
}

TEST(Program, BadArgumentsOfTrainExitWithTwoAndMakeNoFolder) {
  TemporaryFolder folder;
  const std::string out = folder / "run";
  auto expect = [&](const Arguments& arguments, const std::string& text) {
    Arguments all = {"train", "--out", out};
    all.insert(all.end(), arguments.begin(), arguments.end());
    expect_usage_error(all, text);
  };
  expect({"--world", "recal"}, "unknown world \"recal\"; nearest: recall; valid: ");
  expect({"--core", "mambo"}, "unknown core \"mambo\"; nearest: mamba; valid: mamba, ");
  expect({"--horizon", "0"}, "--horizon must be a whole number >= 1, got \"0\"");
  expect({"--num_envs", "0"}, "--num_envs must be a whole number >= 1, got \"0\"");
  expect({"--updates", "many"}, "--updates must be a whole number >= 1, got \"many\"");
  expect({"--learnig_rate", "1"}, "unknown option --learnig_rate; nearest: --learning_rate");
  expect({"--gamma", "1.5"}, "--gamma must be a number >= 0 and <= 1, got \"1.5\"");
  expect({"--world_option", "num_cue=4"},
         "unknown option of world recall \"num_cue\"; nearest: num_cues");
  expect({"--world_option", "num_cues=one"}, "num_cues");
  expect({"--world_option", "horizon=5"}, "give it as --horizon");
  expect({"--world", "catch", "--horizon", "5"}, "--horizon: world catch has none");
  expect({"--world", "catch", "--dt_min", "1/horizon"}, "this world has no horizon");
  expect({"--dt_min", "x/horizon"}, "--dt_min must be a number > 0, got \"x\"");
  expect({"--device", "tpu"}, "--device must be cpu, cuda or cuda:N, got \"tpu\"");
  expect({"--device", "cuda:99"}, "--device cuda:99: this machine has ");
  expect({"--num_envs", "4", "--num_minibatches", "5"}, "num_minibatches");
  expect({"--config", folder / "none.ini"}, "cannot read ");
  expect({"--chrono_horizon", "2.5"}, "--chrono_horizon must be a whole number >= 2, got \"2.5\"");
  EXPECT_TRUE(folder.files().empty());
}

TEST(Program, BadArgumentsOfTheOthersExitWithTwo) {
  TemporaryFolder folder;
  expect_usage_error({"eval"}, "--checkpoint is missing");
  expect_usage_error({"eval", "--horizon", "3"}, "unknown option --horizon; nearest: --horizons");
  expect_usage_error({"inspect"}, "which FILE?");
  expect_usage_error({"compare", "a"}, "which two files?");
  expect_usage_error({"bench", "tain"}, "unknown benchmark \"tain\"; nearest: train");
  expect_usage_error({"bench", "train", "--cores", "grru"}, "unknown core \"grru\"");
  expect_usage_error({"bench", "scan", "--recompute"}, "--recompute: of a block alone");
  expect_usage_error({"bench", "scan", "--graph"}, "--graph: of a scan, conv, norm or block on a");
  expect_usage_error({"cores", "--core", "gru"}, "unknown option --core");
  expect_usage_error({"worlds", "recall"}, "unexpected argument \"recall\"");
  const std::string out = folder / "h";
  expect_usage_error({"horizon", "--arms", "gru", "gru", "--out", out}, "--arms names one twice");
  expect_usage_error({"horizon", "--horizons", "0", "--out", out},
                     "--horizons must be a whole number >= 1");
  expect_usage_error({"horizon", "--seed", "1", "--out", out},
                     "unknown option --seed; nearest: --seeds");
  expect_usage_error({"horizon", "--arms", "gruu", "--out", out}, "unknown core \"gruu\"");
  EXPECT_TRUE(folder.files().empty());
}

TEST(Program, EveryCommandExplainsItself) {
  EXPECT_THAT(retain_run({"--version"}).out, ContainsRegex("retain [0-9]+\\.[0-9]+"));
  const std::string help = retain_run({"--help"}).out;
  for (const char* name :
       {"train", "eval", "horizon", "bench", "worlds", "cores", "inspect", "compare"}) {
    EXPECT_THAT(help, HasSubstr(name));
    const Result result = retain_run({name, "--help"});
    EXPECT_EQ(result.code, 0);
    EXPECT_THAT(result.out, HasSubstr("Usage: retain " + std::string(name)));
    EXPECT_EQ(retain_run({"help", name}).out, result.out);
    EXPECT_EQ(retain_run({name, "-h"}).out, result.out);
  }
}

TEST(Program, WorldsAndCoresAreListed) {
  const Result worlds = retain_run({"worlds"});
  EXPECT_EQ(worlds.code, 0);
  EXPECT_THAT(worlds.out,
              AllOf(HasSubstr("\nrecall "), HasSubstr("\nt_maze "), HasSubstr("horizon=")));
  const Result cores = retain_run({"cores", "--d_model", "64"});
  EXPECT_EQ(cores.code, 0);
  EXPECT_THAT(cores.out, AllOf(HasSubstr("\nmamba "), HasSubstr("\ngru "), HasSubstr("\nmlp ")));
  EXPECT_THAT(cores.out, HasSubstr("layers.0.ssm [128, 16]"));
}

TEST(Program, ARunLeavesItsWholeFolder) {
  TemporaryFolder folder;
  const std::string run = folder / "run";
  ASSERT_EQ(retain_run(tiny(run)).code, 0);
  for (const char* name : {"config.ini", "metrics.jsonl", "run.h5", "checkpoint.h5"}) {
    EXPECT_TRUE(std::filesystem::exists(run + "/" + name)) << name;
  }
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(run), {}), 4);
  const auto rows = read_metrics(run);
  ASSERT_EQ(rows.size(), 3);
  EXPECT_EQ(rows.back().first, 3);
  const CheckpointReader checkpoint(run + "/checkpoint.h5");
  EXPECT_EQ(checkpoint.text("config"), testing::read_bytes(run + "/config.ini"));
  EXPECT_EQ(checkpoint.integer("progress/updates"), 3);
  EXPECT_THAT(retain_run({"inspect", run + "/checkpoint.h5"}).out, HasSubstr("progress"));
}

TEST(Program, ConfigIniRunsTheSameRunAgain) {
  TemporaryFolder folder;
  for (const Arguments& mode :
       {Arguments{}, Arguments{"--num_steps", "5", "--core", "mamba", "--d_state", "4"}}) {
    std::filesystem::remove_all(folder / "a");
    std::filesystem::remove_all(folder / "b");
    Arguments first = tiny(folder / "a");
    if (!mode.empty())
      first.erase(first.begin() + 5, first.begin() + 7);  // --core comes from the mode
    first.insert(first.end(), mode.begin(), mode.end());
    ASSERT_EQ(retain_run(first).code, 0);
    ASSERT_EQ(
        retain_run({"train", "--config", folder / "a/config.ini", "--out", folder / "b"}).code, 0);
    for (const char* file : {"checkpoint.h5", "run.h5"}) {
      const Result same = retain_run({"compare", folder / "a/" + file, folder / "b/" + file});
      EXPECT_EQ(same.code, 0) << same.out;
    }
    EXPECT_EQ(testing::read_bytes(folder / "a/config.ini"),
              testing::read_bytes(folder / "b/config.ini"));
  }
}

TEST(Program, CompareListsWhatDiffers) {
  TemporaryFolder folder;
  ASSERT_EQ(retain_run(tiny(folder / "a")).code, 0);
  ASSERT_EQ(retain_run(tiny(folder / "b", {"--seed", "2"})).code, 0);
  const Result result =
      retain_run({"compare", folder / "a/checkpoint.h5", folder / "b/checkpoint.h5"});
  EXPECT_EQ(result.code, 1);
  EXPECT_THAT(result.out,
              AllOf(HasSubstr("different: "), HasSubstr("model/"), HasSubstr(" numbers differ")));
}

TEST(Program, CompareCountsWhatDiffersBitForBit) {
  TemporaryFolder folder;
  const auto path_of = [&](const std::string& name, const Tensor& floats, const Tensor& integers) {
    CheckpointWriter writer(folder / name);
    writer.write("floats", floats);
    writer.write("integers", integers);
    writer.commit();
    return folder / name;
  };
  const int64_t large = int64_t{1} << 53;
  const Tensor a = at::tensor({0.f, NAN, NAN}), b = at::tensor({-0.f, NAN, NAN});
  const Result result =
      retain_run({"compare", path_of("a", a, at::tensor({large, large}, at::kLong)),
                  path_of("b", b, at::tensor({large, large + 1}, at::kLong))});
  EXPECT_EQ(result.code, 1);
  EXPECT_THAT(result.out, ContainsRegex("floats +1 of 3 numbers differ"));
  EXPECT_THAT(result.out, ContainsRegex("integers +1 of 2 numbers differ"));
}

TEST(Program, AFolderWithARunIsRefusedWithoutResume) {
  TemporaryFolder folder;
  const std::string run = folder / "run";
  ASSERT_EQ(retain_run(tiny(run)).code, 0);
  const std::string before = testing::read_bytes(run + "/checkpoint.h5");
  expect_usage_error(tiny(run), "holds a run: --resume goes on with it");
  EXPECT_EQ(testing::read_bytes(run + "/checkpoint.h5"), before);
}

TEST(Program, ResumeRefusesOtherOptionsAndNamesThem) {
  TemporaryFolder folder;
  const std::string run = folder / "run";
  ASSERT_EQ(retain_run(tiny(run)).code, 0);
  const std::string before = testing::read_bytes(run + "/checkpoint.h5");
  expect_usage_error({"train", "--resume", "--out", run, "--learning_rate", "0.5"},
                     "learning_rate was 0.001, not 0.5");
  expect_usage_error({"train", "--resume", "--out", run, "--world_option", "num_cues=5"},
                     "num_cues=4");
  expect_usage_error({"train", "--resume", "--out", run, "--updates", "2"}, "has done 3");
  EXPECT_EQ(testing::read_bytes(run + "/checkpoint.h5"), before);
}

TEST(Program, UpdatesMayGrowAndTheRunIsTheSame) {
  TemporaryFolder folder;
  ASSERT_EQ(retain_run(tiny(folder / "a", {"--checkpoint_every", "1"})).code, 0);
  ASSERT_EQ(retain_run({"train", "--resume", "--out", folder / "a", "--updates", "6"}).code, 0);
  Arguments whole = tiny(folder / "b");
  *(std::find(whole.begin(), whole.end(), "--updates") + 1) = "6";
  ASSERT_EQ(retain_run(whole).code, 0);
  const Result same =
      retain_run({"compare", folder / "a/checkpoint.h5", folder / "b/checkpoint.h5"});
  EXPECT_EQ(same.code, 0) << same.out;
  EXPECT_EQ(read_metrics(folder / "a").size(), 6);
}

TEST(Program, ResumeWithoutARunBeginsIt) {
  TemporaryFolder folder;
  const Result result = retain_run(tiny(folder / "run", {"--resume"}));
  EXPECT_EQ(result.code, 0);
  EXPECT_THAT(result.error, HasSubstr("no run in " + (folder / "run") + " yet"));
}

TEST(Program, EvalPrintsAndWritesItsTable) {
  TemporaryFolder folder;
  ASSERT_EQ(retain_run(tiny(folder / "run")).code, 0);
  const Arguments arguments = {
      "eval", "--checkpoint", folder / "run/checkpoint.h5", "--horizons", "4", "9", "--episodes",
      "32",   "--json",       folder / "out.json"};
  const Result result = retain_run(arguments);
  ASSERT_EQ(result.code, 0) << result.error;
  const auto json = nlohmann::json::parse(testing::read_bytes(folder / "out.json"));
  EXPECT_EQ(json.at("format"), 1);
  EXPECT_EQ(json.at("world"), "recall");
  EXPECT_EQ(json.at("core"), "gru");
  EXPECT_EQ(json.at("updates"), 3);
  ASSERT_EQ(json.at("results").size(), 2);
  for (const auto& row : json.at("results")) {
    EXPECT_EQ(row.at("episodes"), 32);
    EXPECT_LE(row.at("low").get<double>(), row.at("normalized_accuracy").get<double>());
    EXPECT_LE(row.at("normalized_accuracy").get<double>(), row.at("high").get<double>());
    EXPECT_GE(row.at("mean_return").get<double>(), 0);
    EXPECT_LE(row.at("mean_return").get<double>(), 1);
  }
  EXPECT_EQ(json.at("results")[1].at("horizon"), 9);
  EXPECT_EQ(retain_run(arguments).out, result.out);  // fixed seeds
}

TEST(Program, EvalRefusesWorldsThatThePolicyCannotPlay) {
  TemporaryFolder folder;
  ASSERT_EQ(retain_run(tiny(folder / "run")).code, 0);
  const auto refused = [&](const std::string& option, const std::string& text) {
    expect_usage_error(
        {"eval", "--checkpoint", folder / "run/checkpoint.h5", "--world_option", option}, text);
  };
  refused("horizon=8", "--world_option horizon: give it as --horizons");
  refused("num_cues=8", "--world_option: the policy was trained with horizon=6 ");
}

TEST(Program, ADamagedCheckpointFailsWithOneLine) {
  TemporaryFolder folder;
  ASSERT_EQ(retain_run(tiny(folder / "run")).code, 0);
  const std::string path = folder / "run/checkpoint.h5";
  std::string bytes = testing::read_bytes(path);
  auto expect_failure = [&](const Arguments& arguments) {
    const Result result = retain_run(arguments);
    EXPECT_EQ(result.code, 1) << result.error;
    EXPECT_EQ(std::count(result.error.begin(), result.error.end(), '\n'), 1) << result.error;
    EXPECT_THAT(result.error, HasSubstr("checkpoint.h5"));
  };
  bytes[bytes.size() / 2] ^= 1;
  testing::write_bytes(path, bytes);
  expect_failure({"eval", "--checkpoint", path});
  expect_failure({"train", "--resume", "--out", folder / "run"});
  expect_failure({"inspect", path});
  testing::write_bytes(path, bytes.substr(0, bytes.size() - 9));
  expect_failure({"compare", path, path});
  expect_failure({"eval", "--checkpoint", folder / "none/checkpoint.h5"});
}

/// Whether the Python that the program calls has matplotlib.
bool can_draw() {
  setenv("RETAIN_PYTHON", "python3", false);
  return std::system("\"$RETAIN_PYTHON\" -c 'import matplotlib' 2>/dev/null") == 0;
}

TEST(Program, HorizonMakesTableAndPictureAndResumes) {
  TemporaryFolder folder;
  testing::write_bytes(
      folder / "h.ini",
      "arms = slow gru\nhorizons = 12 16\nseeds = 1 2\nupdates = 2\nnum_envs = 4\nd_model = 8\n"
      "episodes = 16\n[arm.slow]\ncore = mamba\nd_state = 2\ndt_min = 1/horizon\n");
  const Arguments arguments = {"horizon", "--config", folder / "h.ini", "--out", folder / "out"};
  const Result result = retain_run(arguments);
  ASSERT_EQ(result.code, 0) << result.error;
  const auto json = nlohmann::json::parse(testing::read_bytes(folder / "out/table.json"));
  ASSERT_EQ(json.at("results").size(), 8);
  EXPECT_EQ(json.at("results")[0].at("arm"), "slow");
  EXPECT_GT(json.at("results")[0].at("parameters").get<int64_t>(), 0);
  EXPECT_GT(json.at("results")[0].at("state_bytes").get<int64_t>(), 0);
  const std::string text = testing::read_bytes(folder / "out/table.txt");
  EXPECT_EQ(std::count(text.begin(), text.end(), '\n'), 5);
  EXPECT_THAT(text, HasSubstr("/2"));
  EXPECT_EQ(std::filesystem::exists(folder / "out/horizon.png"), can_draw()) << result.out;
  expect_usage_error(arguments, "holds an experiment: --resume goes on with it");

  Arguments again = arguments;
  again.push_back("--resume");
  const Result resumed = retain_run(again);
  EXPECT_EQ(resumed.code, 0) << resumed.error;
  EXPECT_EQ(nlohmann::json::parse(testing::read_bytes(folder / "out/table.json")), json);
  const std::string before = std::getenv("RETAIN_PYTHON");
  setenv("RETAIN_PYTHON", "/no/such/python", true);
  const Result without = retain_run(again);
  setenv("RETAIN_PYTHON", before.c_str(), true);
  EXPECT_EQ(without.code, 0);
  EXPECT_THAT(without.out, HasSubstr("picture: none; draw it later with: /no/such/python"));
  const std::string config = testing::read_bytes(folder / "out/config.ini");
  const auto refused = [&](const std::string& name, const std::string& value,
                           const std::string& text) {
    Arguments other = again;
    other.insert(other.end(), {name, value});
    expect_usage_error(other, text);
    EXPECT_EQ(testing::read_bytes(folder / "out/config.ini"), config);
  };
  refused("--learning_rate", "0.5", "learning_rate was 0.001, not 0.5");
  refused("--updates", "1", "--updates 1: the run in ");
}

TEST(Program, AnExperimentGoesOnWithTheOptionsItWasBegunWith) {
  TemporaryFolder folder;
  const std::string out = folder / "out";
  testing::write_bytes(folder / "h.ini",
                       "arms = slow\nhorizons = 12\nseeds = 1\nupdates = 2\nnum_envs = 4\n"
                       "d_model = 8\nepisodes = 16\n[arm.slow]\ncore = mamba\nd_state = 2\n");
  ASSERT_EQ(retain_run({"horizon", "--config", folder / "h.ini", "--out", out}).code, 0);
  const std::string config = testing::read_bytes(out + "/config.ini");
  const std::string table = testing::read_bytes(out + "/table.json");
  ASSERT_EQ(retain_run({"horizon", "--resume", "--out", out}).code, 0);
  EXPECT_EQ(testing::read_bytes(out + "/config.ini"), config);
  EXPECT_EQ(testing::read_bytes(out + "/table.json"), table);
  ASSERT_EQ(retain_run({"horizon", "--resume", "--out", out, "--seeds", "1", "2"}).code, 0);
  const auto json = nlohmann::json::parse(testing::read_bytes(out + "/table.json"));
  ASSERT_EQ(json.at("results").size(), 2);
  EXPECT_EQ(json.at("results")[1].at("arm"), "slow");
}

TEST(Program, AnArmMayNotHaveABudgetOfItsOwn) {
  TemporaryFolder folder;
  for (const std::string name : {"updates", "num_envs", "num_steps", "threads"}) {
    testing::write_bytes(folder / "h.ini", "arms = gru\n[arm.gru]\n" + name + " = 9\n");
    expect_usage_error({"horizon", "--config", folder / "h.ini", "--out", folder / "out"},
                       "[arm.gru]: unknown option --" + name);
  }
  testing::write_bytes(folder / "i.ini", "arms = gru\n[arm.gruu]\nd_model = 9\n");
  expect_usage_error({"horizon", "--config", folder / "i.ini", "--out", folder / "out"},
                     "unknown arm \"gruu\"; nearest: gru");
}

TEST(Program, BenchMeasuresEveryCore) {
  TemporaryFolder folder;
  const Result result = retain_run({"bench", "train", "--smoke", "--json", folder / "bench.json"});
  ASSERT_EQ(result.code, 0) << result.error;
  const auto json = nlohmann::json::parse(testing::read_bytes(folder / "bench.json"));
  ASSERT_EQ(json.at("results").size(), 2);
  for (const auto& row : json.at("results")) {
    EXPECT_GT(row.at("steps_per_second").at("median").get<double>(), 0);
    EXPECT_GT(row.at("learn_seconds").at("low").get<double>(), 0);
  }
}

TEST(Program, BenchMeasuresWorldsWithoutAHorizon) {
  const Result result = retain_run({"bench", "train", "--smoke", "--world", "catch"});
  EXPECT_EQ(result.code, 0) << result.error;
}

TEST(Program, BenchSaysWhatLimitBindsAndItsShare) {
  TemporaryFolder folder;
  for (const char* op : {"scan", "block"}) {
    const Result result = retain_run({"bench", op, "--batch", "8", "--steps", "64", "--channels",
                                      "32", "--repetitions", "3", "--json", folder / "bench.json"});
    ASSERT_EQ(result.code, 0) << result.error;
    const auto json = nlohmann::json::parse(testing::read_bytes(folder / "bench.json"));
    EXPECT_GT(json.at("copy_bytes_per_second").get<double>(), 1e8);
    for (const char* pass : {"forward", "backward"}) {
      const auto& measured = json.at("results").at(0).at(pass);
      EXPECT_EQ(measured.at("limit"), "exp+fma") << op << " " << pass;
      EXPECT_GT(measured.at("share").get<double>(), 0) << op << " " << pass;
      EXPECT_LT(measured.at("share").get<double>(), 1.1) << op << " " << pass;
    }
  }
}

TEST(Program, BenchMeasuresEveryOp) {
  TemporaryFolder folder;
  for (const char* op : {"scan", "conv", "norm", "update", "step", "state", "block"}) {
    const Result result = retain_run({"bench", op, "--smoke", "--json", folder / "bench.json"});
    ASSERT_EQ(result.code, 0) << result.error;
    EXPECT_THAT(result.out, HasSubstr("of limit"));
    const auto json = nlohmann::json::parse(testing::read_bytes(folder / "bench.json"));
    const auto row = json.at("results").at(0);
    EXPECT_GT(row.at("forward").at("seconds").at("median").get<double>(), 0);
    const double backward = row.at("backward").at("seconds").at("median").get<double>();
    const bool trains = std::set<std::string>{"scan", "conv", "norm", "block"}.contains(op);
    EXPECT_EQ(backward > 0, trains);
    // Every op is compared with LibTorch's own, and says what bytes it must move.
    for (const char* pass : {"forward", "backward"}) {
      const auto& measured = row.at(pass);
      const bool ran = trains || std::string(pass) == "forward";
      EXPECT_EQ(measured.at("bytes").get<double>() > 0, ran) << op;
      EXPECT_EQ(measured.at("composed_seconds").is_number(), ran) << op;
    }
  }
  EXPECT_EQ(retain_run({"bench", "block", "--smoke", "--recompute"}).code, 0);
  expect_usage_error({"bench", "update", "--steps", "50"}, "--steps: an update has one");
  expect_usage_error({"bench", "conv", "--d_state", "7"}, "--d_state: a conv has none");
  expect_usage_error({"bench", "scan", "--table", "--batch", "3"},
                     "--batch: --table has sizes of its own");
  expect_usage_error({"bench", "scan", "--smoke", "--batch", "3"},
                     "--batch: --smoke has sizes of its own");
  expect_usage_error({"bench", "scan", "--table", "--smoke"}, "--smoke: --table has sizes of its");
  expect_usage_error({"bench", "norm", "--tf32"}, "--tf32: on a CUDA device alone");
  expect_usage_error({"bench", "scan", "--dtype", "fp8"}, "unknown dtype \"fp8\"");
  expect_usage_error({"bench", "scan", "--batch", "0"}, "--batch must be a whole number >= 1");
}

}  // namespace
}  // namespace retain
