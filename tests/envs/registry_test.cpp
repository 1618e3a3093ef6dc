#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <retain/envs/recall.h>
#include <retain/envs/registry.h>
#include <retain/envs/rewrite.h>
#include <retain/envs/vectorize.h>

namespace retain {
namespace {

using ::testing::ElementsAre;

std::string refusal(const std::string& world, const WorldOptions& options, int64_t num_envs = 2) {
  try {
    make_vector_env(world, options, num_envs, 1);
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "accepted";
}

TEST(Registry, ListsTheWorldsWithTheirOptions) {
  std::vector<std::string> names;
  for (const WorldInfo& info : worlds()) {
    names.push_back(info.name);
    EXPECT_FALSE(info.summary.empty());
    EXPECT_EQ(make_vector_env(info.name, {}, 1, 1)->spec().name, info.name);
    const WorldOptions defaults(info.options.begin(), info.options.end());
    EXPECT_EQ(make_vector_env(info.name, defaults, 1, 1)->spec().options,
              make_vector_env(info.name, {}, 1, 1)->spec().options);
  }
  EXPECT_THAT(names, ElementsAre("catch", "memory_chain", "recall", "repeat_previous", "rewrite",
                                 "t_maze"));
}

TEST(Registry, OptionsReachTheWorld) {
  auto env = make_vector_env(
      "recall",
      {{"horizon", "40"}, {"num_cues", "16"}, {"noise", "off"}, {"lengths", "log_uniform"}}, 2, 1);
  EXPECT_EQ(env->spec().options, "horizon=40 lengths=log_uniform noise=off num_cues=16");
  EXPECT_EQ(env->spec().observation_size, 18);
  EXPECT_EQ(env->spec().memory_length, 41);
  auto same = vectorize(
      Recall{.horizon = 40, .num_cues = 16, .noise = false, .lengths = Lengths::log_uniform}, 2, 1);
  env->reset();
  same->load(env->save());
  EXPECT_EQ(env->save(), same->save());
}

TEST(Registry, AnUnknownWorldIsAnsweredWithTheNearest) {
  EXPECT_EQ(refusal("recal", {}),
            "unknown world \"recal\"; valid: catch, memory_chain, recall, "
            "repeat_previous, rewrite, t_maze");
  EXPECT_EQ(
      refusal("chess", {}),
      "unknown world \"chess\"; valid: catch, memory_chain, recall, repeat_previous, rewrite, "
      "t_maze");
}

TEST(Registry, AnUnknownOptionIsAnsweredWithTheNearest) {
  EXPECT_EQ(refusal("recall", {{"horizn", "3"}}),
            "recall: unknown option \"horizn\"; valid: horizon, lengths, "
            "noise, num_cues");
  EXPECT_EQ(refusal("catch", {{"horizon", "3"}}),
            "catch: unknown option \"horizon\"; valid: columns, rows");
}

TEST(Registry, AMalformedValueIsNamed) {
  EXPECT_EQ(refusal("recall", {{"horizon", "10x"}}),
            "recall: horizon must be an integer, got \"10x\"");
  EXPECT_EQ(refusal("recall", {{"horizon", ""}}), "recall: horizon must be an integer, got \"\"");
  EXPECT_EQ(refusal("recall", {{"horizon", "99999999999999999999"}}),
            "recall: horizon must be an integer, got \"99999999999999999999\"");
  EXPECT_EQ(refusal("recall", {{"noise", "loud"}}),
            "recall: noise must be on or off, got \"loud\"");
  EXPECT_EQ(refusal("recall", {{"lengths", "long"}}),
            "recall: lengths must be fixed or log_uniform, got \"long\"");
}

TEST(Registry, AValueOutOfRangeIsNamed) {
  for (const char* world : {"recall", "rewrite", "memory_chain", "t_maze"}) {
    for (const char* horizon : {"0", "-5"}) {
      EXPECT_EQ(refusal(world, {{"horizon", horizon}}),
                std::string(world) + ": horizon must be at least 1, got " + horizon);
    }
  }
  EXPECT_EQ(refusal("recall", {{"horizon", "3"}, {"lengths", "log_uniform"}}),
            "recall: horizon must be at least 4, got 3");
  EXPECT_EQ(refusal("recall", {{"num_cues", "1"}}), "recall: num_cues must be at least 2, got 1");
  EXPECT_EQ(refusal("rewrite", {{"horizon", "3"}, {"rewrites", "4"}}),
            "rewrite: rewrites must be at most 3, got 4");
  EXPECT_EQ(refusal("rewrite", {{"rewrites", "5"}, {"lengths", "log_uniform"}}),
            "rewrite: rewrites must be at most 4, got 5");
  EXPECT_EQ(refusal("repeat_previous", {{"decks", "0"}}),
            "repeat_previous: decks must be at least 1, got 0");
  EXPECT_EQ(refusal("repeat_previous", {{"k", "52"}}),
            "repeat_previous: k must be at most 51, got 52");
  EXPECT_EQ(refusal("memory_chain", {{"num_bits", "65"}}),
            "memory_chain: num_bits must be at most 64, got 65");
  EXPECT_EQ(refusal("t_maze", {{"oracle_offset", "-1"}}),
            "t_maze: oracle_offset must be at least 0, got -1");
  EXPECT_EQ(refusal("catch", {{"rows", "1"}}), "catch: rows must be at least 2, got 1");
  EXPECT_EQ(refusal("catch", {{"columns", "1"}}), "catch: columns must be at least 2, got 1");
}

TEST(Registry, NumEnvsMustBePositive) {
  EXPECT_EQ(refusal("recall", {}, 0), "num_envs must be at least 1, got 0");
  EXPECT_EQ(refusal("recall", {}, -4), "num_envs must be at least 1, got -4");
}

}  // namespace
}  // namespace retain
