#include <retain/agents/ppo.h>
#include <retain/agents/read_like.h>
#include <retain/agents/returns.h>
#include <retain/agents/slices.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/nn/utils/clip_grad.h>

#include <cmath>
#include <numeric>

namespace retain {
namespace {

/// What the loss reads of a rollout, for some of its environments.
struct Batch {
  Tensor observation, reset, legal_actions, action, log_prob, mask, decision, advantage, returns;
  State initial_state;
};

Batch select(const Batch& batch, const Tensor& index) {
  const auto environments = index.to(batch.mask.device());
  const auto pick = [&](const Tensor& x) {
    return x.defined() ? x.index_select(1, environments) : x;
  };
  return {pick(batch.observation),   pick(batch.reset),
          pick(batch.legal_actions), pick(batch.action),
          pick(batch.log_prob),      pick(batch.mask),
          pick(batch.decision),      pick(batch.advantage),
          pick(batch.returns),       batch.initial_state.rows(environments)};
}

/// The sum of x in an order that the number of threads does not change: LibTorch cuts what is
/// longer than a block among them.
Tensor sum_in_blocks(const Tensor& x) {
  constexpr int64_t kBlock = 1 << 14;
  if (x.numel() <= kBlock) return x.sum();
  const auto whole = x.numel() / kBlock * kBlock;
  const auto flat = x.flatten();
  const auto blocks = flat.narrow(0, 0, whole).view({-1, kBlock}).sum(1);
  return sum_in_blocks(at::cat({blocks, flat.narrow(0, whole, flat.numel() - whole)}));
}

Tensor normalize(const Tensor& advantage, const Tensor& decision) {
  const auto chosen = advantage.masked_select(decision);
  const auto count = chosen.numel();
  if (count < 2) return advantage;
  const auto mean = sum_in_blocks(chosen) / count;
  const auto deviation = (sum_in_blocks((chosen - mean).square()) / (count - 1)).sqrt();
  return (advantage - mean) / (deviation + 1e-8);
}

/// A permutation of [0, n) that (seed, update, epoch) alone decides.
Tensor permutation(int64_t n, uint64_t seed, int64_t update_index, int64_t epoch) {
  Rng rng(seed, Stream::shuffle, epoch, update_index);
  auto order = at::empty({n}, at::kLong);
  auto* index = order.data_ptr<int64_t>();
  std::iota(index, index + n, 0);
  for (int64_t i = n - 1; i > 0; --i) std::swap(index[i], index[rng.uniform_int(i + 1)]);
  return order;
}

Batch make_batch(const Rollout& rollout, const PPOOptions& options) {
  const auto estimates =
      gae(rollout.reward, rollout.discount, rollout.value, rollout.bootstrap_value, rollout.mask,
          options.gamma, options.gae_lambda);
  const auto& advantage = estimates.advantage;
  return {rollout.observation,
          rollout.reset,
          rollout.legal_actions,
          rollout.action,
          rollout.log_prob,
          rollout.mask,
          rollout.decision,
          options.normalize_advantage ? normalize(advantage, rollout.decision) : advantage,
          estimates.returns,
          rollout.initial_state.detach()};
}

/// Steps that the means of a loss are taken over.
struct Counts {
  int64_t decisions = 0, valued = 0;
};

/// Of some environments; the parts of a batch add up to it.
struct Loss {
  Tensor total;
  Tensor metrics;      ///< policy_loss, value_loss, entropy, approx_kl, clip_fraction
  Tensor ratio_error;  ///< max |ratio − 1|
};

const Tensor& valued_steps(const Batch& batch, const PPOOptions& options) {
  return options.value_on_decisions ? batch.decision : batch.mask;
}

/// What x adds to a mean over `count` values.
Tensor share(const Tensor& x, int64_t count) {
  return sum_in_blocks(x) / std::max<int64_t>(count, 1);
}

Loss loss(ActorCritic& policy, const Batch& batch, const Counts& counts,
          const PPOOptions& options) {
  const auto features = policy.features(batch.observation, batch.initial_state, batch.reset).y;
  // Only steps with a choice reach the policy head.
  const auto decisions = batch.decision.flatten().nonzero().squeeze(1);
  const auto pick = [&](const Tensor& x) {
    return x.defined() ? x.flatten(0, 1).index_select(0, decisions) : x;
  };
  const auto mean = [&](const Tensor& x) { return share(x, counts.decisions); };
  const auto distribution = policy.policy(pick(features), pick(batch.legal_actions));
  const auto log_ratio = distribution->log_prob(pick(batch.action)) - pick(batch.log_prob);
  const auto ratio = log_ratio.exp();
  const auto advantage = pick(batch.advantage);
  const auto clipped = ratio.clamp(1 - options.clip_coef, 1 + options.clip_coef);
  const auto policy_loss = -mean(at::minimum(ratio * advantage, clipped * advantage));
  const auto entropy = mean(distribution->entropy());

  const auto& valued = valued_steps(batch, options);
  const auto value = policy.value(features).masked_select(valued);
  const auto value_loss =
      0.5 * share((value - batch.returns.masked_select(valued)).square(), counts.valued);
  const auto total = policy_loss + options.vf_coef * value_loss - options.ent_coef * entropy;

  at::NoGradGuard no_grad;
  const auto distance = (ratio - 1).abs();
  const auto approx_kl = mean((ratio - 1) - log_ratio);
  const auto clip_fraction = mean((distance > options.clip_coef).to(ratio.scalar_type()));
  const auto metrics = at::stack({policy_loss, value_loss, entropy, approx_kl, clip_fraction});
  return {total, metrics, distance.numel() > 0 ? distance.max() : at::zeros({})};
}

/// What one minibatch says about the weights.
struct Lesson {
  std::vector<Tensor> gradients;  ///< One a parameter; undefined where there is none.
  Tensor metrics, ratio_error;    ///< As in Loss.
};

Lesson learn_from(ActorCritic& policy, const Batch& batch, const Counts& counts,
                  const PPOOptions& options) {
  const at::AutoGradMode with_gradients(true);
  const auto result = loss(policy, batch, counts, options);
  return {torch::autograd::grad({result.total}, policy.parameters(), {}, false, false, true),
          result.metrics, result.ratio_error};
}

void add_to(Lesson& sum, const Lesson& part) {
  for (size_t i = 0; i < sum.gradients.size(); ++i) {
    auto& total = sum.gradients[i];
    if (part.gradients[i].defined()) {
      total = total.defined() ? total + part.gradients[i] : part.gradients[i];
    }
  }
  sum.metrics += part.metrics;
  sum.ratio_error = at::maximum(sum.ratio_error, part.ratio_error);
}

Lesson learn_from_minibatch(ActorCritic& policy, const Batch& whole, const Tensor& environments,
                            const PPOOptions& options) {
  const auto on_device = environments.to(whole.mask.device());
  const auto count = [&](const Tensor& steps) {
    return steps.index_select(1, on_device).sum().item<int64_t>();
  };
  const Counts counts{count(whole.decision), count(valued_steps(whole, options))};
  const auto parts = slices(environments, whole.mask.size(0), policy);
  std::vector<Lesson> lessons(parts.size());
  spread(static_cast<int64_t>(parts.size()), [&](int64_t i) {
    lessons[i] = learn_from(policy, select(whole, parts[i]), counts, options);
  });
  for (size_t i = 1; i < lessons.size(); ++i) add_to(lessons[0], lessons[i]);
  return std::move(lessons[0]);
}

void check_options(const PPOOptions& options) {
  const auto positive = [](const char* name, double value) {
    TORCH_CHECK(value > 0, "PPO: ", name, " must be positive, got ", value);
    TORCH_CHECK(std::isfinite(value), "PPO: ", name, " must be finite, got ", value);
  };
  const auto fraction = [](const char* name, double value) {
    TORCH_CHECK(value >= 0 && value <= 1, "PPO: ", name, " must be in [0, 1], got ", value);
  };
  positive("learning_rate", options.learning_rate);
  positive("update_epochs", options.update_epochs);
  positive("num_minibatches", options.num_minibatches);
  positive("clip_coef", options.clip_coef);
  positive("max_grad_norm", options.max_grad_norm);
  positive("adam_eps", options.adam_eps);
  fraction("gamma", options.gamma);
  fraction("gae_lambda", options.gae_lambda);
  TORCH_CHECK(options.ent_coef >= 0, "PPO: ent_coef must not be negative, got ", options.ent_coef);
  TORCH_CHECK(options.vf_coef >= 0, "PPO: vf_coef must not be negative, got ", options.vf_coef);
  TORCH_CHECK(options.target_kl >= 0, "PPO: target_kl must not be negative, got ",
              options.target_kl);
  TORCH_CHECK(!options.anneal || options.num_updates > 0,
              "PPO: anneal needs num_updates, the planned number of updates, got ",
              options.num_updates);
}

/// From the sums of Loss::metrics and of the gradient's norm.
void set_means(PPOMetrics& metrics, const Tensor& sums, int64_t steps) {
  const auto n = static_cast<double>(steps);
  const auto* sum = sums.const_data_ptr<double>();
  metrics.policy_loss = sum[0] / n;
  metrics.value_loss = sum[1] / n;
  metrics.entropy = sum[2] / n;
  metrics.approx_kl = sum[3] / n;
  metrics.clip_fraction = sum[4] / n;
  metrics.grad_norm /= n;
}

torch::optim::AdamOptions adam_options(const PPOOptions& options) {
  check_options(options);
  return torch::optim::AdamOptions(options.learning_rate).eps(options.adam_eps);
}

}  // namespace

PPO::PPO(std::shared_ptr<ActorCritic> policy, const PPOOptions& options)
    : policy_(std::move(policy)),
      options_(options),
      optimizer_(policy_->parameters(), adam_options(options)) {
  // Moments exist from the start, so that a checkpoint before the first update is like any other.
  for (const auto& parameter : policy_->parameters()) {
    auto moments = std::make_unique<torch::optim::AdamParamState>();
    moments->step(0);
    moments->exp_avg(at::zeros_like(parameter));
    moments->exp_avg_sq(at::zeros_like(parameter));
    optimizer_.state()[parameter.unsafeGetTensorImpl()] = std::move(moments);
  }
}

void PPO::check_num_envs(int64_t num_envs) const {
  TORCH_CHECK(options_.num_minibatches <= num_envs,
              "PPO: num_minibatches must be at most num_envs = ", num_envs, ", got ",
              options_.num_minibatches);
}

PPOMetrics PPO::update(const Rollout& rollout, uint64_t seed, int64_t update_index) {
  const auto num_envs = rollout.mask.size(1), num_minibatches = options_.num_minibatches;
  check_num_envs(num_envs);
  set_learning_rate(update_index);
  const auto whole = make_batch(rollout, options_);
  PPOMetrics metrics;
  auto sums = at::zeros({5}, at::kDouble);
  int64_t steps = 0;
  double epoch_kl = 0;
  do {
    epoch_kl = 0;
    const auto order = permutation(num_envs, seed, update_index, metrics.epochs);
    for (const auto& part : order.tensor_split(num_minibatches)) {
      const auto lesson = learn_from_minibatch(*policy_, whole, part, options_);
      if (steps++ == 0) metrics.first_ratio_error = lesson.ratio_error.item<double>();
      metrics.grad_norm += step(lesson.gradients, update_index);
      const auto values = lesson.metrics.to(at::kCPU, at::kDouble);
      epoch_kl += values[3].item<double>() / static_cast<double>(num_minibatches);
      sums += values;
    }
    ++metrics.epochs;
  } while (metrics.epochs < options_.update_epochs &&
           (options_.target_kl == 0 || epoch_kl <= options_.target_kl));
  set_means(metrics, sums, steps);
  return metrics;
}

void PPO::set_learning_rate(int64_t update_index) {
  const auto passed = static_cast<double>(update_index) / std::max<double>(options_.num_updates, 1);
  const auto rate = options_.learning_rate * (options_.anneal ? std::max(0.0, 1 - passed) : 1.0);
  optimizer_.param_groups()[0].options().set_lr(rate);
}

double PPO::step(const std::vector<Tensor>& gradients, int64_t update_index) {
  const auto parameters = policy_->parameters();
  for (size_t i = 0; i < parameters.size(); ++i) parameters[i].mutable_grad() = gradients[i];
  const auto norm = torch::nn::utils::clip_grad_norm_(parameters, options_.max_grad_norm);
  TORCH_CHECK(std::isfinite(norm), "PPO: the gradient of update ", update_index,
              " is not finite; no weight was changed in this minibatch");
  optimizer_.step();
  return norm;
}

std::vector<std::pair<std::string, torch::optim::AdamParamState*>> PPO::moments() const {
  std::vector<std::pair<std::string, torch::optim::AdamParamState*>> all;
  for (const auto& item : policy_->named_parameters()) {
    auto& state = *optimizer_.state().at(item.value().unsafeGetTensorImpl());
    all.emplace_back("optimizer/" + item.key(), static_cast<torch::optim::AdamParamState*>(&state));
  }
  return all;
}

void PPO::save(CheckpointWriter& writer) const {
  for (const auto& [path, state] : moments()) {
    writer.write(path + "/step", state->step());
    writer.write(path + "/exp_avg", state->exp_avg());
    writer.write(path + "/exp_avg_sq", state->exp_avg_sq());
  }
}

void PPO::check(const CheckpointReader& reader) const {
  for (const auto& [path, state] : moments()) {
    reader.integer(path + "/step");
    read_like(reader, path + "/exp_avg", state->exp_avg());
    read_like(reader, path + "/exp_avg_sq", state->exp_avg_sq());
  }
}

void PPO::load(const CheckpointReader& reader) {
  check(reader);
  for (const auto& [path, state] : moments()) {
    state->step(reader.integer(path + "/step"));
    state->exp_avg().copy_(reader.tensor(path + "/exp_avg"));
    state->exp_avg_sq().copy_(reader.tensor(path + "/exp_avg_sq"));
  }
}

}  // namespace retain
