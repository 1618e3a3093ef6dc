#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <retain/agents/read_like.h>
#include <retain/agents/trainer.h>

#include <chrono>
#include <limits>

namespace retain {
namespace {

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

std::unique_ptr<VectorEnv> checked(std::unique_ptr<VectorEnv> env) {
  TORCH_CHECK(env && env->num_envs() > 0, "Trainer: env must hold an environment");
  return env;
}

std::shared_ptr<ActorCritic> make_policy(const EnvironmentSpec& spec,
                                         const TrainerOptions& options) {
  at::manual_seed(options.seed);
  auto policy = std::make_shared<ActorCritic>(spec, options.policy);
  policy->to(at::Device(options.device));
  return policy;
}

Tensor generator_state(at::Device device) {
  auto generator = at::globalContext().defaultGenerator(device);
  std::lock_guard<std::mutex> lock(generator.mutex());
  return generator.get_state();
}

/// Throws if set_generator_state() would.
void check_generator_state(at::Device device, const Tensor& state) {
  at::globalContext().defaultGenerator(device).clone().set_state(state);
}

void set_generator_state(at::Device device, const Tensor& state) {
  auto generator = at::globalContext().defaultGenerator(device);
  std::lock_guard<std::mutex> lock(generator.mutex());
  generator.set_state(state);
}

}  // namespace

Trainer::Trainer(std::unique_ptr<VectorEnv> env, const TrainerOptions& options)
    : options_(options),
      env_(checked(std::move(env))),
      policy_(make_policy(env_->spec(), options)),
      actor_(*env_, {.num_steps = options.num_steps, .seed = options.seed, .sweep = options.sweep}),
      ppo_(policy_, options.ppo) {
  ppo_.check_num_envs(env_->num_envs());
  if (options.normalize_reward) reward_normalizer_.emplace(env_->num_envs(), options.ppo.gamma);
}

TrainMetrics Trainer::update() {
  TrainMetrics metrics;
  auto start = std::chrono::steady_clock::now();
  auto rollout = actor_.collect(*policy_);
  metrics.rollout_seconds = seconds_since(start);

  start = std::chrono::steady_clock::now();
  if (reward_normalizer_) {
    rollout.reward = reward_normalizer_->update(rollout.reward, rollout.mask);
  }
  metrics.ppo = ppo_.update(rollout, options_.seed, updates_);
  // Only now: the learner must see observations exactly as the actor did.
  const auto counts = rollout.mask.flatten().nonzero().squeeze(1);
  if (options_.policy.normalize_observation) {
    policy_->observe(rollout.observation.flatten(0, 1).index_select(0, counts));
  }
  metrics.learn_seconds = seconds_since(start);
  ++updates_;
  env_steps_ += counts.numel();
  metrics.env_steps = env_steps_;
  metrics.episodes = rollout.episode_return.numel();
  metrics.mean_return = metrics.episodes > 0 ? rollout.episode_return.mean().item<double>()
                                             : std::numeric_limits<double>::quiet_NaN();
  return metrics;
}

void Trainer::save(CheckpointWriter& writer) const {
  const auto device = policy_->device();
  writer.write("setup/world", env_->spec().name);
  writer.write("setup/seed", static_cast<int64_t>(options_.seed));
  writer.write("setup/num_steps", options_.num_steps);
  writer.write("setup/normalize_reward", static_cast<int64_t>(options_.normalize_reward));
  save_policy(writer, *policy_);
  ppo_.save(writer);
  writer.write("rng/cpu", generator_state(at::kCPU));
  if (!device.is_cpu()) writer.write("rng/device", generator_state(device));
  writer.write("progress/updates", updates_);
  writer.write("progress/env_steps", env_steps_);
  actor_.save(writer);
  writer.write("envs/state", env_->save());
  if (reward_normalizer_) reward_normalizer_->save(writer);
}

void Trainer::check(const CheckpointReader& reader) const {
  TORCH_CHECK(reader.contains("setup/world"), reader.path(), ": holds no training run");
  const auto& world = env_->spec().name;
  TORCH_CHECK(reader.text("setup/world") == world, reader.path(), ": the world is \"",
              reader.text("setup/world"), "\", this run's is \"", world, "\"");
  const auto check_equal = [&](const char* name, int64_t ours) {
    const auto theirs = reader.integer(std::string("setup/") + name);
    TORCH_CHECK(theirs == ours, reader.path(), ": ", name, " is ", theirs, ", this run's is ",
                ours);
  };
  check_equal("seed", static_cast<int64_t>(options_.seed));
  check_equal("num_steps", options_.num_steps);
  check_equal("normalize_reward", options_.normalize_reward);
  check_policy(reader, *policy_);
  ppo_.check(reader);
  actor_.check(reader, *policy_);
  if (reward_normalizer_) reward_normalizer_->check(reader);
  reader.integer("progress/updates");
  reader.integer("progress/env_steps");
  read_like(reader, "rng/cpu", generator_state(at::kCPU));
  check_generator_state(at::kCPU, reader.tensor("rng/cpu"));
  const auto device = policy_->device();
  if (!device.is_cpu() && reader.contains("rng/device"))
    check_generator_state(device, reader.tensor("rng/device"));
}

void Trainer::load(const CheckpointReader& reader) {
  const auto device = policy_->device();
  check(reader);
  env_->load(reader.bytes("envs/state"));  // throws before it changes anything
  load_policy(reader, *policy_);
  ppo_.load(reader);
  actor_.load(reader, *policy_);
  if (reward_normalizer_) reward_normalizer_->load(reader);
  set_generator_state(at::kCPU, reader.tensor("rng/cpu"));
  if (!device.is_cpu() && reader.contains("rng/device")) {
    set_generator_state(device, reader.tensor("rng/device"));
  }
  updates_ = reader.integer("progress/updates");
  env_steps_ = reader.integer("progress/env_steps");
}

}  // namespace retain
