#include <retain/agents/normalizers.h>
#include <retain/agents/read_like.h>

#include <cmath>

namespace retain {
namespace {

constexpr double kClip = 10;
constexpr double kEpsilon = 1e-8;
constexpr auto kRewardPath = "normalizers/reward/";

}  // namespace

RunningMoments::RunningMoments(int64_t size)
    : mean_(register_buffer("mean", at::zeros({size}, at::kDouble))),
      variance_(register_buffer("variance", at::ones({size}, at::kDouble))),
      count_(register_buffer("count", at::zeros({}, at::kDouble))) {}

void RunningMoments::update(const Tensor& rows) {
  TORCH_CHECK(rows.dim() == 2 && rows.size(1) == mean_.size(0),
              "RunningMoments: rows must be [N, size] = [N, ", mean_.size(0), "], got ",
              rows.sizes());
  if (rows.size(0) == 0) return;
  at::NoGradGuard no_grad;
  const auto x = rows.to(at::kDouble);
  const auto n = static_cast<double>(x.size(0));
  const auto mean = x.mean(0);
  const auto variance = (x - mean).square().mean(0);
  const auto total = count_ + n;
  const auto shift = mean - mean_;
  variance_.copy_((variance_ * count_ + variance * n + shift.square() * count_ * n / total) /
                  total);
  mean_.add_(shift * n / total);
  count_.copy_(total);
}

Tensor RunningMoments::normalize(const Tensor& x) const {
  const auto scale = (variance_ + kEpsilon).rsqrt();
  return ((x - mean_.to(x.scalar_type())) * scale.to(x.scalar_type())).clamp(-kClip, kClip);
}

RewardNormalizer::RewardNormalizer(int64_t num_envs, double gamma)
    : gamma_(gamma), running_return_(at::zeros({num_envs}, at::kDouble)), moments_(1) {}

Tensor RewardNormalizer::update(const Tensor& reward, const Tensor& mask) {
  at::NoGradGuard no_grad;
  TORCH_CHECK(reward.dim() == 2 && reward.size(1) == running_return_.size(0),
              "RewardNormalizer: reward must be [T, ", running_return_.size(0), "], got ",
              reward.sizes());
  TORCH_CHECK(mask.sizes() == reward.sizes(), "RewardNormalizer: mask must be ", reward.sizes(),
              ", got ", mask.sizes());
  const auto rewards = reward.to(at::kCPU, at::kDouble);
  const auto counts = mask.to(at::kCPU);
  const auto odd = rewards.masked_select(counts & rewards.isfinite().logical_not());
  TORCH_CHECK(odd.numel() == 0, "RewardNormalizer: reward must be finite where mask is set, got ",
              odd[0].item<double>());
  auto returns = at::empty_like(rewards);
  for (int64_t t = 0; t < rewards.size(0); ++t) {
    // A row that does not count ends the episode: what follows starts from 0.
    running_return_ = at::where(counts[t], gamma_ * running_return_ + rewards[t], 0.0);
    returns[t].copy_(running_return_);
  }
  moments_.update(returns.masked_select(counts).unsqueeze(1));
  const auto variance = moments_.variance().item<double>();
  if (variance == 0) return reward.clone();  // nothing to scale by yet
  return reward / std::sqrt(variance + kEpsilon);
}

void RewardNormalizer::save(CheckpointWriter& writer) const {
  const std::string path = kRewardPath;
  writer.write(path + "running_return", running_return_);
  for (const auto& buffer : moments_.named_buffers()) {
    writer.write(path + buffer.key(), buffer.value());
  }
}

void RewardNormalizer::check(const CheckpointReader& reader) const {
  const std::string path = kRewardPath;
  read_like(reader, path + "running_return", running_return_);
  for (const auto& buffer : moments_.named_buffers()) {
    read_like(reader, path + buffer.key(), buffer.value());
  }
}

void RewardNormalizer::load(const CheckpointReader& reader) {
  check(reader);
  const std::string path = kRewardPath;
  running_return_ = reader.tensor(path + "running_return").clone();
  for (auto& buffer : moments_.named_buffers())
    buffer.value().copy_(reader.tensor(path + buffer.key()));
}

}  // namespace retain
