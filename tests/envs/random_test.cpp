#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <retain/envs/vector_env.h>

#include <array>
#include <cmath>
#include <set>

namespace retain {
namespace {

struct KnownAnswer {
  std::array<uint32_t, 4> counter;
  std::array<uint32_t, 2> key;
  std::array<uint32_t, 4> answer;
};

// philox4x32, 10 rounds, from tests/kat_vectors of Random123.
constexpr KnownAnswer kKnownAnswers[] = {
    {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
    {{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff},
     {0xffffffff, 0xffffffff},
     {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
    {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
     {0xa4093822, 0x299f31d0},
     {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}}};

std::array<uint32_t, 4> philox(std::array<uint32_t, 4> c, std::array<uint32_t, 2> k) {
  const philox4x32_ctr_t counter = {{c[0], c[1], c[2], c[3]}};
  const philox4x32_key_t key = {{k[0], k[1]}};
  const philox4x32_ctr_t out = philox4x32_R(10, counter, key);
  return {out.v[0], out.v[1], out.v[2], out.v[3]};
}

TEST(Rng, PhiloxGivesThePublishedAnswers) {
  for (const KnownAnswer& known : kKnownAnswers) {
    EXPECT_EQ(philox(known.counter, known.key), known.answer);
  }
}

TEST(Rng, SeedStreamEnvironmentAndStepAreTheWordsOfKeyAndCounter) {
  Rng zero(0, Stream::world, 0, 0);
  for (uint32_t word : kKnownAnswers[0].answer) EXPECT_EQ(zero.bits(), word);
  for (uint32_t word : philox({1, 0, 0, 0}, {0, 0})) EXPECT_EQ(zero.bits(), word);  // next block

  Rng rng(0x0123456789abcdef, Stream::evaluation, 0xab'11223344, 0xbeef'55667788);
  for (uint32_t word : philox({0, 0x55667788, 0x11223344, 0x03abbeef}, {0x89abcdef, 0x01234567})) {
    EXPECT_EQ(rng.bits(), word);
  }
}

TEST(Rng, EveryPartOfTheKeyMatters) {
  std::set<uint32_t> seen;
  seen.insert(Rng(1, Stream::world, 1, 1).bits());
  seen.insert(Rng(2, Stream::world, 1, 1).bits());
  seen.insert(Rng(1 + (UINT64_C(1) << 32), Stream::world, 1, 1).bits());
  seen.insert(Rng(1, Stream::action, 1, 1).bits());
  seen.insert(Rng(1, Stream::world, 2, 1).bits());
  seen.insert(Rng(1, Stream::world, 1, 2).bits());
  EXPECT_EQ(seen.size(), 6u);
}

TEST(Rng, UniformIsInsideTheOpenIntervalAndFlat) {
  double sum = 0, squares = 0;
  const int n = 100000;
  for (int i = 0; i < n; ++i) {
    const float u = Rng(5, Stream::action, 0, i).uniform();
    ASSERT_GT(u, 0.0f);
    ASSERT_LT(u, 1.0f);
    sum += u;
    squares += u * u;
  }
  EXPECT_NEAR(sum / n, 0.5, 4 * std::sqrt(1.0 / 12 / n));
  EXPECT_NEAR(squares / n, 1.0 / 3, 4 * std::sqrt(4.0 / 45 / n));
  const float largest = (static_cast<float>(0xffffffffu >> 9) + 0.5f) * (1.0f / 8388608.0f);
  EXPECT_LT(largest, 1.0f);  // the formula's extremes
  EXPECT_GT(0.5f * (1.0f / 8388608.0f), 0.0f);
}

TEST(Rng, UniformIntIsInRangeAndUnbiased) {
  for (int64_t n : {1, 2, 3, 4, 7, 52}) {
    std::vector<double> count(n, 0.0);
    Rng rng(9, Stream::shuffle, static_cast<uint64_t>(n), 0);
    const int draws = 20000;
    for (int i = 0; i < draws; ++i) ++count.at(rng.uniform_int(n));
    double chi_square = 0;
    for (double c : count) chi_square += (c - 1.0 * draws / n) * (c - 1.0 * draws / n) * n / draws;
    EXPECT_LE(chi_square, (n - 1) + 4 * std::sqrt(2.0 * n)) << n;
  }
}

// Multiply-shift without rejection would give every third value of [0, 3·2^30) twice as often.
TEST(Rng, UniformIntRejectsWhatWouldBias) {
  const int64_t n = INT64_C(3) << 30;
  Rng rng(11, Stream::shuffle, 0, 0);
  const int draws = 30000;
  std::array<double, 3> thirds{};
  for (int i = 0; i < draws; ++i) {
    const int64_t value = rng.uniform_int(n);
    ASSERT_GE(value, 0);
    ASSERT_LT(value, n);
    ++thirds[value % 3];
  }
  for (double third : thirds) EXPECT_NEAR(third / draws, 1.0 / 3, 4 * std::sqrt(2.0 / 9 / draws));
}

TEST(Rng, UniformIntReachesBeyondThirtyTwoBits) {
  const int64_t n = INT64_C(3) << 40;
  Rng rng(13, Stream::shuffle, 0, 0);
  double sum = 0;
  const int draws = 20000;
  for (int i = 0; i < draws; ++i) {
    const int64_t value = rng.uniform_int(n);
    ASSERT_GE(value, 0);
    ASSERT_LT(value, n);
    sum += static_cast<double>(value) / static_cast<double>(n);
  }
  EXPECT_NEAR(sum / draws, 0.5, 4 * std::sqrt(1.0 / 12 / draws));
}

TEST(Rng, UniformIntRefusesAnEmptyRange) {
  EXPECT_THROW(Rng(1, Stream::world, 0, 0).uniform_int(0), std::invalid_argument);
  EXPECT_THROW(Rng(1, Stream::world, 0, 0).uniform_int(-3), std::invalid_argument);
}

TEST(Uniforms, AreTheDrawsOfEveryEnvironmentAndStep) {
  const Tensor u = uniforms(17, Stream::action, 5, 3, 4, 6, 10);
  ASSERT_EQ(u.sizes(), (std::vector<int64_t>{3, 4, 6}));
  for (int64_t t = 0; t < 3; ++t) {
    for (int64_t b = 0; b < 4; ++b) {
      Rng rng(17, Stream::action, 10 + b, 5 + t);
      for (int64_t i = 0; i < 6; ++i) EXPECT_EQ(u[t][b][i].item<float>(), rng.uniform());
    }
  }
  EXPECT_TRUE(u.slice(1, 2).equal(uniforms(17, Stream::action, 5, 3, 2, 6, 12)));
  EXPECT_TRUE(u.slice(0, 1).equal(uniforms(17, Stream::action, 6, 2, 4, 6, 10)));
  EXPECT_EQ(uniforms(17, Stream::action, 0, 0, 4, 1).numel(), 0);
}

TEST(Uniforms, RefuseNegativeSizesByName) {
  try {
    uniforms(1, Stream::action, 0, 2, -1, 1);
    FAIL();
  } catch (const c10::Error& error) {
    EXPECT_NE(error.msg().find("num_envs -1"), std::string::npos) << error.msg();
  }
}

}  // namespace
}  // namespace retain
