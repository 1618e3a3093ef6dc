#include <ATen/Parallel.h>
#include <ATen/autocast_mode.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <retain/agents/ppo.h>
#include <retain/agents/returns.h>

#include <torch/csrc/autograd/autograd.h>

#include <cmath>
#include <numeric>

#include "agents/fixtures.h"
#include "support/random_tensors.h"

namespace retain {
namespace {

using testing::Aim;
using ::testing::HasSubstr;
using testing::make_policy;
using testing::Pair;
using testing::recall;
using ::testing::ThrowsMessage;
using testing::Walk;

constexpr int64_t kEnvs = 6;

std::vector<Tensor> weights(const ActorCritic& policy) {
  std::vector<Tensor> copies;
  for (const auto& parameter : policy.parameters()) copies.push_back(parameter.detach().clone());
  return copies;
}

bool equal_weights(const std::vector<Tensor>& a, const std::vector<Tensor>& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(),
                    [](const Tensor& x, const Tensor& y) { return x.equal(y); });
}

/// The weights after one update on a rollout of Walk that `change` has altered.
std::vector<Tensor> learned(int64_t num_steps, const std::function<void(Rollout&)>& change) {
  const auto env = vectorize(Walk{}, kEnvs, 3);
  const auto policy = make_policy(env->spec(), "mamba");
  auto rollout = Actor(*env, {.num_steps = num_steps}).collect(*policy);
  change(rollout);
  PPO(policy, {.gamma = 0.9, .gae_lambda = 0.8}).update(rollout, 1, 0);
  return weights(*policy);
}

void expect_ratio_one(VectorEnv& env, int64_t num_steps, bool sweep) {
  for (const auto& core : core_names()) {
    SCOPED_TRACE(core);
    const auto policy = make_policy(env.spec(), core);
    Actor actor(env, {.num_steps = num_steps, .sweep = sweep});
    PPO ppo(policy, {.learning_rate = 1e-2, .num_minibatches = 2});
    for (int64_t update = 0; update < 3; ++update) {
      const auto rollout = actor.collect(*policy);
      EXPECT_LE(ppo.update(rollout, 1, update).first_ratio_error, 1e-5);
      EXPECT_TRUE(num_steps == 0 || rollout.reset.slice(0, 1).any().item<bool>());
    }
  }
}

TEST(PPO, FirstRatioIsOneOverChunksWithResetsInside) {
  expect_ratio_one(*vectorize(Walk{}, kEnvs, 3), 20, true);
  expect_ratio_one(*recall(9, kEnvs), 40, true);
  expect_ratio_one(*recall(9, kEnvs), 40, false);
}

TEST(PPO, FirstRatioIsOneOverWholeEpisodes) {
  expect_ratio_one(*vectorize(Walk{}, kEnvs, 3), 0, true);
  expect_ratio_one(*recall(9, kEnvs), 0, true);
  expect_ratio_one(*recall(9, kEnvs), 0, false);
}

TEST(PPO, EveryMinibatchTakesItsEnvironmentsMemory) {
  const auto env = vectorize(Walk{}, kEnvs, 3);
  for (const auto& core : core_names()) {
    const auto policy = make_policy(env->spec(), core);
    Actor actor(*env, {.num_steps = 5});
    actor.collect(*policy);
    // At this rate the weights stand still, so every ratio of every minibatch must be 1.
    PPO ppo(policy, {.learning_rate = 1e-30, .update_epochs = 2, .num_minibatches = 4});
    const auto metrics = ppo.update(actor.collect(*policy), 1, 0);
    EXPECT_LE(metrics.approx_kl, 1e-6) << core;  // what rounding leaves of ratio - 1 - log ratio
    EXPECT_EQ(metrics.clip_fraction, 0);
    EXPECT_EQ(metrics.epochs, 2);
  }
}

TEST(PPO, AutoResetRowIsNotTrainedOn) {
  const auto untouched = learned(20, [](Rollout&) {});
  const auto ignored = learned(20, [](Rollout& rollout) {
    const auto last = rollout.mask.logical_not();
    rollout.action.masked_fill_(last, 1);
    rollout.log_prob.masked_fill_(last, -3);
    rollout.reward.masked_fill_(last, 100);
    rollout.discount.masked_fill_(last, 0.5);
  });
  EXPECT_TRUE(equal_weights(ignored, untouched));
  const auto reward =
      learned(20, [](Rollout& rollout) { rollout.reward.masked_fill_(rollout.mask, 100); });
  EXPECT_FALSE(equal_weights(reward, untouched));
}

TEST(PPO, TruncationBootstrapsFromTheObservationBeforeTheReset) {
  const auto truncated = [](const Rollout& rollout) {
    return rollout.mask.slice(0, 0, -1) & rollout.mask.slice(0, 1).logical_not() &
           (rollout.discount.slice(0, 0, -1) == 1);
  };
  const auto untouched =
      learned(20, [&](Rollout& r) { ASSERT_TRUE(truncated(r).any().item<bool>()); });
  const auto before =
      learned(20, [&](Rollout& r) { r.value.slice(0, 1).masked_fill_(truncated(r), 9); });
  EXPECT_FALSE(equal_weights(before, untouched));
  // A termination's LAST has a value too, and it must not be read.
  const auto terminated = learned(20, [&](Rollout& r) {
    r.value.slice(0, 1).masked_fill_(r.discount.slice(0, 0, -1) == 0, 9);
  });
  EXPECT_TRUE(equal_weights(terminated, untouched));
}

TEST(PPO, PaddingIsNotTrainedOn) {
  const auto untouched = learned(0, [](Rollout&) {});
  const auto padded = learned(0, [](Rollout& rollout) {
    const auto length = rollout.mask.sum(0);
    const auto row = at::arange(rollout.mask.size(0)).unsqueeze(1);
    const auto padding = row > length;  // row `length` is LAST, which may bootstrap
    ASSERT_TRUE(padding.any().item<bool>());
    rollout.observation.masked_fill_(padding.unsqueeze(2), 50);
    rollout.value.masked_fill_(padding, std::numeric_limits<float>::quiet_NaN());
    rollout.reward.masked_fill_(padding, std::numeric_limits<float>::infinity());
    rollout.log_prob.masked_fill_(padding, -7);
  });
  EXPECT_TRUE(equal_weights(padded, untouched));
}

TEST(PPO, MeansAreNotTakenOverPadding) {
  const auto metrics = [](bool lengthen) {
    const auto env = vectorize(Walk{}, kEnvs, 3);
    const auto policy = make_policy(env->spec(), "gru");
    auto rollout = Actor(*env, {}).collect(*policy);
    if (lengthen) {
      for (auto* x :
           {&rollout.observation, &rollout.reset, &rollout.action, &rollout.log_prob,
            &rollout.value, &rollout.reward, &rollout.discount, &rollout.mask, &rollout.decision}) {
        *x = at::cat({*x, at::zeros_like(*x)});
      }
      rollout.legal_actions =
          at::cat({rollout.legal_actions, at::ones_like(rollout.legal_actions)});
    }
    return PPO(policy, {}).update(rollout, 1, 0);
  };
  const auto plain = metrics(false), padded = metrics(true);
  EXPECT_NEAR(plain.value_loss, padded.value_loss, 1e-6);
  EXPECT_NEAR(plain.policy_loss, padded.policy_loss, 1e-6);
  EXPECT_NEAR(plain.entropy, padded.entropy, 1e-6);
  EXPECT_NEAR(plain.grad_norm, padded.grad_norm, 1e-5);
  EXPECT_GT(plain.value_loss, 1e-3);
}

TEST(PPO, PolicyTermsAreMeansOverDecisions) {
  const auto env = recall(9, kEnvs);
  const auto policy = make_policy(env->spec(), "gru");
  const auto rollout = Actor(*env, {}).collect(*policy);
  const auto out = policy->forward(rollout.observation, rollout.initial_state, rollout.reset,
                                   rollout.legal_actions);
  const auto entropy = out.policy->entropy().masked_select(rollout.decision);
  ASSERT_EQ(entropy.numel(), kEnvs);
  const auto metrics = PPO(policy, {}).update(rollout, 1, 0);
  EXPECT_NEAR(metrics.entropy, entropy.mean().item<double>(), 1e-5);
  // Normalised over the same steps, the advantages have mean 0, and at ratio 1 the loss is minus
  // that.
  EXPECT_NEAR(metrics.policy_loss, 0, 1e-5);
}

/// So many that a minibatch of them is worked out in several slices.
constexpr int64_t kManyEnvs = 70000;

TEST(PPO, MeansAreTakenOverTheWholeMinibatch) {
  const auto env = recall(9, kManyEnvs);
  const auto policy = make_policy(env->spec(), "mamba");
  const auto rollout = Actor(*env, {}).collect(*policy);
  const auto out = policy->forward(rollout.observation, rollout.initial_state, rollout.reset,
                                   rollout.legal_actions);
  const auto returns = gae(rollout.reward, rollout.discount, rollout.value, rollout.bootstrap_value,
                           rollout.mask, 1, 1)
                           .returns;
  const auto entropy = out.policy->entropy().masked_select(rollout.decision).mean();
  const auto error = (out.value - returns).masked_select(rollout.mask).square().mean();
  const auto metrics = PPO(policy, {}).update(rollout, 1, 0);
  EXPECT_NEAR(metrics.entropy, entropy.item<double>(), 1e-5);
  EXPECT_NEAR(metrics.value_loss, 0.5 * error.item<double>(), 1e-5);
  EXPECT_NEAR(metrics.policy_loss, 0, 1e-5);
  EXPECT_LE(metrics.first_ratio_error, 1e-5);
}

/// What autocast rounds does not depend on who works it out.
TEST(PPO, AutocastReachesEveryThread) {
  const auto env = recall(9, kManyEnvs);
  const auto rollout = Actor(*env, {}).collect(*make_policy(env->spec(), "mamba"));
  const int available = at::get_num_threads();
  const auto learned = [&](int threads, bool autocast) {
    at::set_num_threads(threads);
    at::autocast::set_autocast_enabled(at::kCPU, autocast);
    const auto policy = make_policy(env->spec(), "mamba");
    PPO(policy, {}).update(rollout, 1, 0);
    at::autocast::set_autocast_enabled(at::kCPU, false);
    at::autocast::clear_cache();
    return weights(*policy);
  };
  const auto one = learned(1, true);
  EXPECT_TRUE(equal_weights(learned(2, true), one));
  EXPECT_FALSE(equal_weights(learned(2, false), one));
  at::set_num_threads(available);
}

TEST(PPO, WeightsAreTheSameWithAnyThreads) {
  const auto env = recall(9, kManyEnvs);
  const auto rollout = Actor(*env, {}).collect(*make_policy(env->spec(), "mamba"));
  const int available = at::get_num_threads();
  const auto learned = [&](int threads) {
    at::set_num_threads(threads);
    const auto policy = make_policy(env->spec(), "mamba");
    PPO(policy, {}).update(rollout, 1, 0);
    return weights(*policy);
  };
  const auto one = learned(1), two = learned(2), three = learned(3);
  at::set_num_threads(available);
  EXPECT_TRUE(equal_weights(one, two));
  EXPECT_TRUE(equal_weights(one, three));
}

TEST(PPO, RolloutWithoutDecisionsIsLearnedFromWithoutNaN) {
  const auto env = recall(9, 2);
  const auto policy = make_policy(env->spec(), "gru");
  const auto rollout = Actor(*env, {.num_steps = 3}).collect(*policy);
  ASSERT_FALSE(rollout.decision.any().item<bool>());
  const auto metrics = PPO(policy, {}).update(rollout, 1, 0);
  EXPECT_EQ(metrics.policy_loss, 0);
  EXPECT_TRUE(std::isfinite(metrics.grad_norm));
}

/// Three epochs of minibatches worked out by hand in fp64 where it matters: advantages, the clipped
/// surrogate, the value's loss, the entropy, the norm's bound, Adam, the falling rate, the shuffle.
struct ByHand {
  PPOOptions options;
  uint64_t seed;
  int64_t update;
  PPOMetrics metrics = {};

  void learn(ActorCritic& policy, const Rollout& rollout) {
    const auto advantage = normalized(advantages(rollout), rollout.decision).to(at::kFloat);
    const auto returns = (advantages(rollout) + rollout.value).to(at::kFloat);
    const auto parameters = policy.parameters();
    std::vector<Tensor> mean, square;
    for (const auto& parameter : parameters) {
      mean.push_back(at::zeros_like(parameter));
      square.push_back(at::zeros_like(parameter));
    }
    int64_t steps = 0;
    for (int64_t epoch = 0; epoch < options.update_epochs; ++epoch) {
      const auto order = shuffled(rollout.mask.size(1), epoch);
      for (const auto& index : order.tensor_split(options.num_minibatches)) {
        const auto gradients = gradients_of(policy, rollout, index, advantage, returns);
        double norm = 0;
        for (const auto& x : gradients) norm += x.defined() ? x.square().sum().item<double>() : 0;
        norm = std::sqrt(norm);
        metrics.grad_norm += norm;
        const double scale = std::min(1.0, options.max_grad_norm / norm);
        const double rate = options.learning_rate * (1 - double(update) / options.num_updates);
        ++steps;
        const at::NoGradGuard no_grad;
        for (size_t i = 0; i < parameters.size(); ++i) {
          if (!gradients[i].defined()) continue;
          const auto x = gradients[i] * scale;
          mean[i] = 0.9 * mean[i] + 0.1 * x;
          square[i] = 0.999 * square[i] + 0.001 * x * x;
          const auto root = (square[i] / (1 - std::pow(0.999, steps))).sqrt() + options.adam_eps;
          parameters[i].sub_(rate * (mean[i] / (1 - std::pow(0.9, steps))) / root);
        }
      }
    }
    for (double* sum : {&metrics.policy_loss, &metrics.value_loss, &metrics.entropy,
                        &metrics.approx_kl, &metrics.clip_fraction, &metrics.grad_norm}) {
      *sum /= static_cast<double>(steps);
    }
  }

  Tensor advantages(const Rollout& rollout) const {
    const auto wide = [](const Tensor& x) { return x.to(at::kDouble); };
    const auto value = at::cat({wide(rollout.value), wide(rollout.bootstrap_value).unsqueeze(0)});
    const auto T = rollout.mask.size(0);
    auto result = at::zeros({T + 1, rollout.mask.size(1)}, at::kDouble);
    for (int64_t t = T - 1; t >= 0; --t) {
      const auto discount = options.gamma * wide(rollout.discount[t]);
      const auto delta = wide(rollout.reward[t]) + discount * value[t + 1] - value[t];
      result[t] = wide(rollout.mask[t]) * (delta + options.gae_lambda * discount * result[t + 1]);
    }
    return result.slice(0, 0, T);
  }

  static Tensor normalized(const Tensor& advantage, const Tensor& decision) {
    const auto chosen = advantage.masked_select(decision);
    return (advantage - chosen.mean()) / (chosen.std() + 1e-8);
  }

  Tensor shuffled(int64_t n, int64_t epoch) const {
    Rng rng(seed, Stream::shuffle, epoch, update);
    std::vector<int64_t> order(n);
    std::iota(order.begin(), order.end(), 0);
    for (int64_t i = n - 1; i > 0; --i) std::swap(order[i], order[rng.uniform_int(i + 1)]);
    return at::tensor(order);
  }

  std::vector<Tensor> gradients_of(ActorCritic& policy, const Rollout& rollout, const Tensor& index,
                                   const Tensor& advantage, const Tensor& returns) {
    const auto pick = [&](const Tensor& x) { return x.index_select(1, index); };
    const auto out = policy.forward(pick(rollout.observation), rollout.initial_state.rows(index),
                                    pick(rollout.reset), pick(rollout.legal_actions));
    const auto decision = pick(rollout.decision), a = pick(advantage);
    const auto valued = options.value_on_decisions ? decision : pick(rollout.mask);
    const auto action = pick(rollout.action).where(decision, 0);
    const auto ratio = (out.policy->log_prob(action) - pick(rollout.log_prob)).exp();
    const auto limit =
        at::where(a >= 0, at::full({}, 1 + options.clip_coef), at::full({}, 1 - options.clip_coef));
    const auto bounded = at::where(a >= 0, at::minimum(ratio, limit), at::maximum(ratio, limit));
    const auto of_decisions = [&](const Tensor& x) { return x.masked_select(decision).mean(); };
    const auto policy_loss = -of_decisions(bounded * a);
    const auto entropy = of_decisions(out.policy->entropy());
    const auto error = (out.value - pick(returns)).masked_select(valued);
    const auto value_loss = error.square().mean() / 2;
    const auto add = [](double& sum, const Tensor& x) { sum += x.item<double>(); };
    add(metrics.policy_loss, policy_loss);
    add(metrics.value_loss, value_loss);
    add(metrics.entropy, entropy);
    add(metrics.approx_kl, of_decisions(ratio - 1 - ratio.log()));
    add(metrics.clip_fraction,
        of_decisions(((ratio - 1).abs() > options.clip_coef).to(at::kFloat)));
    const auto total = policy_loss + options.vf_coef * value_loss - options.ent_coef * entropy;
    return torch::autograd::grad({total}, policy.parameters(), {}, false, false, true);
  }
};

TEST(PPO, AnUpdateIsWhatTheEquationsSay) {
  for (const auto& core : core_names()) {
    for (const bool value_on_decisions : {false, true}) {
      for (const int64_t num_steps : {0, 20}) {
        for (const int64_t num_minibatches : {1, 3}) {
          SCOPED_TRACE(::testing::Message() << core << " " << value_on_decisions << " " << num_steps
                                            << " " << num_minibatches);
          const auto env = recall(9, kEnvs);
          const auto policy = make_policy(env->spec(), core), twin = make_policy(env->spec(), core);
          Actor actor(*env, {.num_steps = num_steps});
          actor.collect(*policy);
          auto rollout = actor.collect(*policy);
          rollout.log_prob = rollout.log_prob + 0.4 * testing::randn(rollout.log_prob.sizes(), 5);
          const PPOOptions options{.learning_rate = 3e-3,
                                   .anneal = true,
                                   .num_updates = 8,
                                   .update_epochs = 3,
                                   .num_minibatches = num_minibatches,
                                   .gamma = 0.9,
                                   .gae_lambda = 0.7,
                                   .clip_coef = 0.15,
                                   .ent_coef = 0.03,
                                   .vf_coef = 0.7,
                                   .value_on_decisions = value_on_decisions,
                                   .adam_eps = 1e-4,
                                   .max_grad_norm = 0.3};
          const auto got = PPO(policy, options).update(rollout, 11, 2);
          ByHand expected{options, 11, 2};
          expected.learn(*twin, rollout);
          const auto weight = policy->parameters(), right = twin->parameters();
          for (size_t i = 0; i < weight.size(); ++i)
            EXPECT_LE(testing::distance(weight[i], right[i]), 2e-5) << i;
          const auto& metrics = expected.metrics;
          EXPECT_NEAR(got.policy_loss, metrics.policy_loss, 1e-5);
          EXPECT_NEAR(got.value_loss, metrics.value_loss, 1e-5 * (1 + metrics.value_loss));
          EXPECT_NEAR(got.entropy, metrics.entropy, 1e-5);
          EXPECT_NEAR(got.approx_kl, metrics.approx_kl, 1e-5);
          EXPECT_NEAR(got.clip_fraction, metrics.clip_fraction, 1e-5);
          EXPECT_NEAR(got.grad_norm, metrics.grad_norm, 1e-4 * (1 + metrics.grad_norm));
          EXPECT_GT(got.clip_fraction, 0.2);
        }
      }
    }
  }
}

TEST(PPO, TargetKlStopsTheEpochs) {
  const auto env = vectorize(Walk{}, kEnvs, 3);
  const auto epochs = [&](double target_kl) {
    const auto policy = make_policy(env->spec(), "gru");
    const auto rollout = Actor(*env, {.num_steps = 20}).collect(*policy);
    PPO ppo(policy, {.learning_rate = 0.05, .update_epochs = 6, .target_kl = target_kl});
    return ppo.update(rollout, 1, 0).epochs;
  };
  EXPECT_EQ(epochs(0), 6);
  EXPECT_LT(epochs(1e-4), 6);
}

TEST(PPO, AnnealedRateEndsAtZero) {
  const auto env = vectorize(Walk{}, kEnvs, 3);
  const auto policy = make_policy(env->spec(), "gru");
  const auto rollout = Actor(*env, {.num_steps = 20}).collect(*policy);
  PPO ppo(policy, {.anneal = true, .num_updates = 10});
  const auto before = weights(*policy);
  ppo.update(rollout, 1, 10);
  EXPECT_TRUE(equal_weights(before, weights(*policy)));
  ppo.update(rollout, 1, 9);
  EXPECT_FALSE(equal_weights(before, weights(*policy)));
}

TEST(PPO, LearnsFromEveryKindOfAction) {
  const auto update = [](VectorEnv& env) {
    const auto policy = make_policy(env.spec(), "mamba");
    Actor actor(env, {.num_steps = 10});
    PPO ppo(policy, {.update_epochs = 2, .num_minibatches = 2});
    const auto before = weights(*policy);
    const auto metrics = ppo.update(actor.collect(*policy), 1, 0);
    EXPECT_LE(metrics.first_ratio_error, 1e-5);
    EXPECT_FALSE(equal_weights(before, weights(*policy)));
  };
  update(*vectorize(Pair{}, kEnvs, 1));
  update(*vectorize(Aim{}, kEnvs, 1));
}

TEST(PPO, GradientThatIsNotFiniteChangesNoWeight) {
  const auto env = vectorize(Walk{}, kEnvs, 3);
  const auto policy = make_policy(env->spec(), "gru");
  auto rollout = Actor(*env, {.num_steps = 20}).collect(*policy);
  rollout.reward[3][1] = std::numeric_limits<float>::infinity();
  const auto before = weights(*policy);
  PPO ppo(policy, {});
  EXPECT_THAT([&] { ppo.update(rollout, 1, 7); },
              ThrowsMessage<c10::Error>(HasSubstr("gradient of update 7 is not finite")));
  EXPECT_TRUE(equal_weights(before, weights(*policy)));
}

TEST(PPO, BadOptionIsNamed) {
  const auto policy = make_policy(Walk{}.spec(), "mlp");
  const auto expect_named = [&](const PPOOptions& options, const char* message) {
    EXPECT_THAT([&] { PPO(policy, options); }, ThrowsMessage<c10::Error>(HasSubstr(message)));
  };
  expect_named({.learning_rate = 0}, "learning_rate must be positive, got 0");
  expect_named({.anneal = true}, "anneal needs num_updates");
  expect_named({.update_epochs = 0}, "update_epochs must be positive, got 0");
  expect_named({.num_minibatches = -1}, "num_minibatches must be positive, got -1");
  expect_named({.gamma = 1.5}, "gamma must be in [0, 1], got 1.5");
  expect_named({.gae_lambda = -0.5}, "gae_lambda must be in [0, 1], got -0.5");
  expect_named({.clip_coef = 0}, "clip_coef must be positive");
  expect_named({.ent_coef = -1}, "ent_coef must not be negative, got -1");
  expect_named({.max_grad_norm = 0}, "max_grad_norm must be positive, got 0");

  const auto env = vectorize(Walk{}, 2, 3);
  const auto rollout = Actor(*env, {.num_steps = 2}).collect(*policy);
  PPO ppo(policy, {.num_minibatches = 3});
  EXPECT_THAT(
      [&] { ppo.update(rollout, 1, 0); },
      ThrowsMessage<c10::Error>(HasSubstr("num_minibatches must be at most num_envs = 2, got 3")));
}

}  // namespace
}  // namespace retain
