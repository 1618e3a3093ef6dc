#include <retain/agents/read_like.h>
#include <retain/agents/rollout.h>
#include <retain/agents/slices.h>

namespace retain {
namespace {

using Kind = ActionSpec::Kind;

/// Actions [T, B] or [T, B, K] that stand in while a passive world shows what it will show anyway.
Tensor placeholder_actions(const ActionSpec& action, int64_t rows, int64_t num_envs) {
  if (action.kind == Kind::categorical) return at::zeros({rows, num_envs}, at::kLong);
  if (action.kind == Kind::continuous) return at::zeros({rows, num_envs, action.size});
  return at::zeros({rows, num_envs, static_cast<int64_t>(action.num_values.size())}, at::kLong);
}

/// What the world is told: on the CPU, and within the bounds that continuous actions have.
Tensor playable(const Tensor& action, const ActionSpec& spec) {
  const auto on_cpu = action.to(at::kCPU);
  return spec.kind == Kind::continuous ? on_cpu.clamp(-1, 1) : on_cpu;
}

Tensor move(const Tensor& x, at::Device device) { return x.defined() ? x.to(device) : x; }

/// What `change` makes of each part that is there.
template <typename Change>
TimeSteps each_part(const TimeSteps& steps, const Change& change) {
  const auto part = [&](const Tensor& x) { return x.defined() ? change(x) : x; };
  return {part(steps.observation), part(steps.reward), part(steps.discount), part(steps.step_type),
          part(steps.legal_actions)};
}

TimeSteps with_time(const TimeSteps& steps) {
  return each_part(steps, [](const Tensor& x) { return x.unsqueeze(0); });
}

TimeSteps join_in_time(const std::vector<TimeSteps>& parts) {
  const auto cat = [&](Tensor TimeSteps::*field) {
    std::vector<Tensor> tensors;
    for (const auto& part : parts) tensors.push_back(part.*field);
    return tensors.front().defined() ? at::cat(tensors) : Tensor();
  };
  return {cat(&TimeSteps::observation), cat(&TimeSteps::reward), cat(&TimeSteps::discount),
          cat(&TimeSteps::step_type), cat(&TimeSteps::legal_actions)};
}

TimeSteps slice(const TimeSteps& steps, int64_t begin, int64_t end) {
  return each_part(steps, [&](const Tensor& x) { return x.slice(0, begin, end); });
}

/// Environments [first, first + count).
TimeSteps columns(const TimeSteps& steps, int64_t first, int64_t count) {
  return each_part(steps, [&](const Tensor& x) { return x.narrow(1, first, count); });
}

/// For each row of last [T, B], how many LAST rows lie before it.
Tensor lasts_before(const Tensor& last) { return last.cumsum(0) - last.to(at::kLong); }

/// [T, B] of what came with the step after each row; 0 where that step was not played.
Tensor earned(const Tensor& x, int64_t rows) {
  const auto next = x.slice(0, 1);
  return at::constant_pad_nd(next, {0, 0, 0, rows - next.size(0)});
}

/// [T, B]: the action counts and was a choice.
Tensor has_choice(const Tensor& mask, const Tensor& legal_actions) {
  return legal_actions.defined() ? mask & (legal_actions.sum(-1) > 1) : mask;
}

}  // namespace

Actor::Actor(VectorEnv& env, const ActorOptions& options)
    : env_(env), options_(options), episode_return_(at::zeros({env.num_envs()}, at::kDouble)) {
  TORCH_CHECK(options.num_steps >= 0, "Actor: num_steps must not be negative, got ",
              options.num_steps);
  TORCH_CHECK(options.num_steps > 0 || env.spec().max_episode_steps > 0,
              "Actor: num_steps = 0 plays whole episodes, but the world \"", env.spec().name,
              "\" sets no bound on their length; choose num_steps > 0");
}

Rollout Actor::collect(ActorCritic& policy) {
  at::NoGradGuard no_grad;
  if (whole_episodes() || memory_.batch_size() == 0 || interrupted_) {
    env_.reset();
    memory_ = policy.initial_state(env_.num_envs());
    episode_return_.zero_();
  }
  interrupted_ = true;  // unless all goes well
  Rollout rollout;
  rollout.initial_state = memory_;
  auto played = options_.sweep && env_.spec().passive ? sweep(policy) : step(policy);
  rollout.final_state = memory_;
  fill(rollout, played, policy);
  interrupted_ = false;
  return rollout;
}

Actor::Choice Actor::join(const std::vector<Decision>& decisions) {
  if (decisions.size() == 1) return decisions[0].choice;
  const auto cat = [&](Tensor Choice::*field) {
    std::vector<Tensor> tensors;
    for (const auto& decision : decisions) tensors.push_back(decision.choice.*field);
    return at::cat(tensors, 1);
  };
  return {cat(&Choice::action), cat(&Choice::log_prob), cat(&Choice::value)};
}

Actor::Decision Actor::decide(ActorCritic& policy, const TimeSteps& steps, const State& memory,
                              int64_t first) const {
  const at::NoGradGuard no_grad;
  const auto device = policy.device();
  auto out = policy.forward(steps.observation.to(device), memory, steps.first().to(device),
                            move(steps.legal_actions, device));
  const auto draw = [&] {
    const auto numbers =
        uniforms(options_.seed, Stream::action, rows_, steps.observation.size(0),
                 memory.batch_size(), out.policy->uniforms(), env_.first_environment() + first);
    return out.policy->sample(numbers.to(device));
  };
  const auto action = options_.greedy ? out.policy->mode() : draw();
  return {{action, out.policy->log_prob(action), out.value}, std::move(out.state)};
}

Actor::Choice Actor::choose(ActorCritic& policy, const TimeSteps& steps) {
  const auto rows = steps.observation.size(0);
  const auto environments = at::arange(env_.num_envs());
  // A single step has its threads inside.
  const auto parts =
      rows == 1 ? std::vector<Tensor>{environments} : slices(environments, rows, policy);
  std::vector<Decision> decisions(parts.size());
  if (parts.size() == 1) {
    decisions[0] = decide(policy, steps, memory_, 0);
    memory_ = std::move(decisions[0].state);
  } else {
    spread(static_cast<int64_t>(parts.size()), [&](int64_t i) {
      const auto first = parts[i][0].item<int64_t>();
      decisions[i] =
          decide(policy, columns(steps, first, parts[i].numel()), memory_.rows(parts[i]), first);
    });
    memory_ = memory_.clone();  // the rollout keeps the one before
    for (size_t i = 0; i < parts.size(); ++i) memory_.set_rows(parts[i], decisions[i].state);
  }
  rows_ += rows;
  return join(decisions);
}

Actor::Played Actor::step(ActorCritic& policy) {
  std::vector<TimeSteps> steps{with_time(env_.current())};
  std::vector<Tensor> action, log_prob, value;
  auto ended = at::zeros({1, env_.num_envs()}, at::kBool);
  for (int64_t t = 0; t < max_rows(); ++t) {
    auto choice = choose(policy, steps.back());
    action.push_back(choice.action);
    log_prob.push_back(choice.log_prob);
    value.push_back(choice.value);
    ended.logical_or_(steps.back().last());
    if (whole_episodes() && ended.all().item<bool>()) break;
    steps.push_back(with_time(env_.step(playable(choice.action[0], env_.spec().action))));
  }
  return {join_in_time(steps), {at::cat(action), at::cat(log_prob), at::cat(value)}};
}

Actor::Played Actor::sweep(ActorCritic& policy) {
  const auto start = env_.save();
  const auto now = with_time(env_.current());
  const auto& action = env_.spec().action;
  // Whatever is done, a passive world shows the same: look at all of it, then act on all of it at
  // once.
  auto num_steps = whole_episodes() ? max_rows() - 1 : max_rows();
  auto steps =
      join_in_time({now, env_.sweep(placeholder_actions(action, num_steps, env_.num_envs()))});
  env_.load(start);
  if (whole_episodes()) {
    const auto open = (lasts_before(steps.last()) == 0).any(1);
    num_steps = open.sum().item<int64_t>() - 1;
    steps = slice(steps, 0, num_steps + 1);
  }
  auto choice = choose(policy, whole_episodes() ? steps : slice(steps, 0, num_steps));
  const auto earned = env_.sweep(playable(choice.action.slice(0, 0, num_steps), action));
  steps.reward = at::cat({now.reward, earned.reward});
  steps.discount = at::cat({now.discount, earned.discount});
  return {std::move(steps), std::move(choice)};
}

void Actor::fill(Rollout& rollout, Played& played, ActorCritic& policy) {
  const auto device = policy.device();
  const auto rows = played.choice.action.size(0);
  const auto steps = slice(played.steps, 0, rows);
  // Rows of an episode; what a world does after the only episode of a rollout is padding.
  const auto inside =
      whole_episodes() ? lasts_before(steps.last()) == 0 : at::ones_like(steps.last());
  const auto last = steps.last() & inside;
  TORCH_CHECK(!whole_episodes() || last.any(0).all().item<bool>(),
              "Actor: an episode of the world \"", env_.spec().name,
              "\" is longer than its max_episode_steps = ", env_.spec().max_episode_steps);
  const auto mask = inside & last.logical_not();
  const auto reward = at::where(mask, earned(played.steps.reward, rows), 0);
  const auto discount = at::where(mask, earned(played.steps.discount, rows), 1);
  rollout.episode_return = close_episodes(reward, last);
  rollout.observation = steps.observation.to(device);
  rollout.reset = steps.first().to(device);
  rollout.legal_actions = move(steps.legal_actions, device);
  rollout.action = std::move(played.choice.action);
  rollout.log_prob = std::move(played.choice.log_prob);
  rollout.value = std::move(played.choice.value);
  rollout.reward = reward.to(device);
  rollout.discount = discount.to(device);
  rollout.mask = mask.to(device);
  rollout.decision = has_choice(mask, steps.legal_actions).to(device);
  rollout.bootstrap_value = whole_episodes()
                                ? at::zeros({env_.num_envs()}, rollout.value.options())
                                : next_value(policy, slice(played.steps, rows, rows + 1));
}

Tensor Actor::next_value(ActorCritic& policy, const TimeSteps& next) const {
  const auto device = policy.device();
  const auto observation = next.observation.to(device), reset = next.first().to(device);
  return policy.value(policy.features(observation, memory_, reset).y)[0];
}

Tensor Actor::close_episodes(const Tensor& reward, const Tensor& ended) {
  std::vector<double> closed;
  auto open = episode_return_.accessor<double, 1>();
  const auto rewards = reward.accessor<float, 2>();
  const auto ends = ended.accessor<bool, 2>();
  for (int64_t t = 0; t < reward.size(0); ++t) {
    for (int64_t b = 0; b < reward.size(1); ++b) {
      open[b] += rewards[t][b];
      if (ends[t][b]) closed.push_back(std::exchange(open[b], 0.0));
    }
  }
  return at::tensor(closed, at::kDouble);
}

void Actor::save(CheckpointWriter& writer) const {
  writer.write("progress/rows", rows_);
  writer.write("progress/episode_return", episode_return_);
  for (const auto& [name, part] : memory_.parts()) writer.write("state/" + name, part);
}

void Actor::check(const CheckpointReader& reader, const ActorCritic& policy) const {
  read_like(reader, "progress/episode_return", episode_return_);
  if (reader.integer("progress/rows") == 0) return;
  const auto expected = policy.initial_state(env_.num_envs());
  for (const auto& [name, part] : expected.parts()) read_like(reader, "state/" + name, part);
}

void Actor::load(const CheckpointReader& reader, const ActorCritic& policy) {
  check(reader, policy);
  interrupted_ = false;
  rows_ = reader.integer("progress/rows");
  episode_return_ = reader.tensor("progress/episode_return").clone();
  memory_ = State();
  if (rows_ == 0) return;
  memory_ = policy.initial_state(env_.num_envs());
  for (const auto& [name, part] : memory_.parts()) part.copy_(reader.tensor("state/" + name));
}

}  // namespace retain
