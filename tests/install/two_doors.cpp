// A world of one's own and a Mamba agent that learns it: the light shows one of two doors, eight
// dark steps later the agent must open that one.

#include <retain/agents/trainer.h>
#include <retain/envs/vectorize.h>

#include <cstdio>

struct TwoDoors {
  using Action = int64_t;
  static constexpr int64_t kDark = 8;
  int64_t door = 0, time = 0;

  retain::EnvironmentSpec spec() const {
    return {.name = "two_doors",
            .observation_size = 3,
            .action = {.num_values = {2}},
            .max_episode_steps = kDark + 1,
            .memory_length = kDark,
            .chance_return = 0.5,
            .memoryless_return = 0.5,
            .best_return = 1,
            .passive = true};
  }
  void observe(float* observation) const {
    observation[0] = time == 0 && door == 0;
    observation[1] = time == 0 && door == 1;
    observation[2] = time == kDark;
  }
  void reset(retain::Rng& rng, float* observation) {
    door = rng.uniform_int(2);
    time = 0;
    observe(observation);
  }
  retain::Outcome step(int64_t action, retain::Rng&, float* observation) {
    const bool last = ++time > kDark;
    observe(observation);
    return {
        .reward = last && action == door ? 1.f : 0.f, .discount = last ? 0.f : 1.f, .last = last};
  }
};

int main() {
  retain::TrainerOptions options;
  options.policy.core = {.name = "mamba", .d_model = 16, .d_state = 8};
  options.ppo.learning_rate = 1e-2;
  retain::Trainer trainer(retain::vectorize(TwoDoors{}, 128, 1), options);

  double mean_return = 0;
  for (int64_t update = 0; update < 150 && mean_return < 0.95; ++update)
    mean_return = trainer.update().mean_return;
  std::printf("mean return %.3f after %ld updates\n", mean_return,
              static_cast<long>(trainer.updates()));
  return mean_return >= 0.95 ? 0 : 1;
}
