#pragma once

#include <retain/lib/io/checkpoint.h>
#include <torch/nn/module.h>

namespace retain {

/// Mean and variance of all rows seen so far, feature by feature, in fp64 (Chan et al. 1979,
/// eq. 2.1). Before the first row the mean is 0 and the variance 1.
class RunningMoments : public torch::nn::Module {
 public:
  explicit RunningMoments(int64_t size);

  void update(const Tensor& rows);          ///< rows [N, size]; N = 0 changes nothing.
  Tensor normalize(const Tensor& x) const;  ///< x [.., size], clipped to ±10 deviations; x's dtype.
  const Tensor& mean() const { return mean_; }          ///< [size]
  const Tensor& variance() const { return variance_; }  ///< [size], of the population
  const Tensor& count() const { return count_; }        ///< Scalar

 private:
  Tensor mean_, variance_, count_;
};

/// Scales rewards by the running deviation of the discounted return (Engstrom et al. 2020,
/// arXiv:2005.12729), so that values are of order 1. The return runs on across chunks and starts
/// anew with each episode.
class RewardNormalizer {
 public:
  RewardNormalizer(int64_t num_envs, double gamma);

  /// Takes one rollout into the statistics and returns its scaled rewards, unscaled while all
  /// returns so far are equal. All [T, B]; mask as in Rollout. Throws, and changes nothing, on
  /// another shape and where a reward that counts is not finite.
  Tensor update(const Tensor& reward, const Tensor& mask);

  void save(CheckpointWriter& writer) const;
  /// Throws, and changes nothing, if load() would fail.
  void check(const CheckpointReader& reader) const;
  void load(const CheckpointReader& reader);

 private:
  double gamma_;
  Tensor running_return_;  ///< [B], fp64
  RunningMoments moments_;
};

}  // namespace retain
