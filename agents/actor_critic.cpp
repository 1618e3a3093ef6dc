#include <retain/agents/actor_critic.h>
#include <retain/agents/read_like.h>

namespace retain {
namespace {

PolicyHeadOptions head_options(const ActionSpec& action, int64_t d_model, double gain) {
  using Kind = ActionSpec::Kind;
  const auto kind = action.kind == Kind::categorical      ? ActionKind::categorical
                    : action.kind == Kind::multi_discrete ? ActionKind::multi_discrete
                                                          : ActionKind::gaussian;
  return {.d_model = d_model,
          .kind = kind,
          .num_values = action.num_values,
          .gain = gain,
          .action_size = action.size};
}

/// Every parameter and buffer with its path.
std::vector<std::pair<std::string, Tensor>> named_tensors(const torch::nn::Module& module) {
  std::vector<std::pair<std::string, Tensor>> tensors;
  for (const auto& item : module.named_parameters()) tensors.emplace_back(item.key(), item.value());
  for (const auto& item : module.named_buffers()) tensors.emplace_back(item.key(), item.value());
  return tensors;
}

}  // namespace

ActorCritic::ActorCritic(const EnvironmentSpec& spec, const ActorCriticOptions& options)
    : core_name_(options.core.name), activates_encoder_(options.activate_encoder) {
  TORCH_CHECK(spec.observation_size > 0,
              "ActorCritic: spec.observation_size must be positive, got ", spec.observation_size);
  const auto d_model = options.core.d_model;
  if (options.normalize_observation) {
    observation_moments_ = register_module("observation_moments",
                                           std::make_shared<RunningMoments>(spec.observation_size));
  }
  encoder_ = register_module("encoder", std::make_shared<Encoder>(spec.observation_size, d_model,
                                                                  options.activate_encoder));
  core_ = register_module("core", make_core(options.core));
  policy_head_ = register_module("policy_head", std::make_shared<PolicyHead>(head_options(
                                                    spec.action, d_model, options.policy_gain)));
  value_head_ = register_module("value_head", std::make_shared<ValueHead>(d_model));
}

at::Device ActorCritic::device() const { return parameters().front().device(); }

CoreOutput ActorCritic::features(const Tensor& observation, const State& state,
                                 const Tensor& reset) {
  const auto& x = observation_moments_ ? observation_moments_->normalize(observation) : observation;
  return core_->forward(encoder_->forward(x), state, reset);
}

std::unique_ptr<Distribution> ActorCritic::policy(const Tensor& features, const Tensor& legal) {
  return policy_head_->forward(features, legal);
}

PolicyOutput ActorCritic::forward(const Tensor& observation, const State& state,
                                  const Tensor& reset, const Tensor& legal) {
  auto out = features(observation, state, reset);
  return {policy(out.y, legal), value(out.y), std::move(out.state)};
}

void ActorCritic::observe(const Tensor& observation) {
  if (observation_moments_) observation_moments_->update(observation);
}

void save_policy(CheckpointWriter& writer, const ActorCritic& policy) {
  writer.write("setup/core", policy.core_name());
  writer.write("setup/activate_encoder", static_cast<int64_t>(policy.activates_encoder()));
  for (const auto& [name, tensor] : named_tensors(policy)) {
    writer.write("model/" + name, tensor.detach());
  }
}

void check_policy(const CheckpointReader& reader, const ActorCritic& policy) {
  TORCH_CHECK(reader.contains("setup/core"), reader.path(), ": holds no policy");
  const auto core = reader.text("setup/core");
  TORCH_CHECK(core == policy.core_name(), reader.path(), ": the policy's core is \"", core,
              "\", this one's is \"", policy.core_name(), "\"");
  const std::string activated = "setup/activate_encoder";  // not in files before it was written
  TORCH_CHECK(
      !reader.contains(activated) || (reader.integer(activated) != 0) == policy.activates_encoder(),
      reader.path(), ": activate_encoder is ", policy.activates_encoder() ? "off" : "on",
      ", this policy's is ", policy.activates_encoder() ? "on" : "off");
  const auto tensors = named_tensors(policy);
  for (const auto& [name, tensor] : tensors) read_like(reader, "model/" + name, tensor);
  const auto stored = reader.names("model").size();
  TORCH_CHECK(stored == tensors.size(), reader.path(), ": model has ", stored,
              " entries, this policy has ", tensors.size());
}

void load_policy(const CheckpointReader& reader, ActorCritic& policy) {
  check_policy(reader, policy);
  at::NoGradGuard no_grad;
  for (auto& [name, tensor] : named_tensors(policy)) tensor.copy_(reader.tensor("model/" + name));
}

}  // namespace retain
