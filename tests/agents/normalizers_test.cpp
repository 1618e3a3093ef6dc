#include <gtest/gtest.h>
#include <retain/agents/normalizers.h>

#include "support/random_tensors.h"

namespace retain {
namespace {

using testing::randn;

TEST(RunningMoments, PartsGiveTheMomentsOfTheWhole) {
  const auto rows = randn({60, 3}, 1) * 4 + 7;
  RunningMoments moments(3);
  for (const auto& part : rows.split_with_sizes({1, 40, 0, 19})) moments.update(part);
  const auto x = rows.to(at::kDouble);
  EXPECT_TRUE(at::allclose(moments.mean(), x.mean(0), 1e-12, 1e-12));
  EXPECT_TRUE(at::allclose(moments.variance(), x.var(0, false), 1e-12, 1e-12));
}

TEST(RunningMoments, NormalizedRowsHaveMeanZeroAndDeviationOne) {
  const auto rows = randn({500, 2}, 2) * 4 + 7;
  RunningMoments moments(2);
  EXPECT_TRUE(at::allclose(moments.normalize(randn({4, 2}, 3)), randn({4, 2}, 3)));
  moments.update(rows);
  const auto y = moments.normalize(rows);
  EXPECT_EQ(y.scalar_type(), at::kFloat);
  EXPECT_LT(y.mean(0).abs().max().item<float>(), 1e-5);
  EXPECT_NEAR(y.var(0, false).min().item<float>(), 1, 1e-4);
}

TEST(RunningMoments, ConstantFeatureStaysFinite) {
  RunningMoments moments(1);
  moments.update(at::full({10, 1}, 5.0));
  EXPECT_EQ(moments.normalize(at::full({1}, 5.0)).item<double>(), 0);
  EXPECT_EQ(moments.normalize(at::full({1}, 6.0)).item<double>(), 10);
}

TEST(RunningMoments, WrongWidthNamesTheArgument) {
  RunningMoments moments(3);
  EXPECT_THROW(moments.update(at::zeros({5, 2})), c10::Error);
}

TEST(RewardNormalizer, ScalesByTheDeviationOfTheDiscountedReturn) {
  RewardNormalizer normalizer(1, 0.5);
  // The returns of the two episodes: 1, 1.5, 1.75 | 4, and the row between them does not count.
  const auto reward = at::tensor({1., 1., 1., 0., 4.}).unsqueeze(1);
  const auto mask = at::tensor({1, 1, 1, 0, 1}).to(at::kBool).unsqueeze(1);
  const auto deviation = at::tensor({1., 1.5, 1.75, 4.}, at::kDouble).std(false).item<double>();
  const auto scaled = normalizer.update(reward, mask);
  EXPECT_TRUE(at::allclose(scaled, reward / deviation, 1e-6));
}

TEST(RewardNormalizer, WrongShapesAndWhatIsNotFiniteChangeNothing) {
  RewardNormalizer normalizer(2, 0.5);
  const auto mask = at::ones({3, 2}, at::kBool);
  EXPECT_THROW(normalizer.update(at::ones({3, 1}), at::ones({3, 1}, at::kBool)), c10::Error);
  EXPECT_THROW(normalizer.update(at::ones({3, 2}), at::ones({3, 1}, at::kBool)), c10::Error);
  EXPECT_THROW(normalizer.update(at::full({3, 2}, INFINITY), mask), c10::Error);
  const auto reward = at::arange(6, at::kFloat).view({3, 2});
  EXPECT_TRUE(normalizer.update(reward, mask).equal(RewardNormalizer(2, 0.5).update(reward, mask)));
}

TEST(RewardNormalizer, EqualReturnsAreLeftAsTheyAre) {
  RewardNormalizer normalizer(2, 0.5);
  const auto reward = at::ones({1, 2});
  EXPECT_TRUE(at::equal(normalizer.update(reward, at::ones({1, 2}, at::kBool)), reward));
}

TEST(RewardNormalizer, ReturnsRunOnAcrossChunks) {
  const auto reward = randn({12, 2}, 4);
  const auto mask = randn({12, 2}, 5) > -1;
  RewardNormalizer whole(2, 0.9), parts(2, 0.9);
  whole.update(reward, mask);
  parts.update(reward.slice(0, 0, 5), mask.slice(0, 0, 5));
  parts.update(reward.slice(0, 5), mask.slice(0, 5));
  const auto probe = at::ones({1, 2});
  const auto one = at::ones({1, 2}, at::kBool);
  EXPECT_TRUE(at::allclose(whole.update(probe, one), parts.update(probe, one), 1e-6));
}

}  // namespace
}  // namespace retain
