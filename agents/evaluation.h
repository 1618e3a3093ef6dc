#pragma once

#include <retain/agents/actor_critic.h>
#include <retain/envs/vector_env.h>

namespace retain {

struct Evaluation {
  int64_t episodes = 0;
  double mean_return = 0;
  double normalized = 0;     ///< (mean_return − chance) / (best − chance)
  double low = 0, high = 0;  ///< 95 % interval of `normalized`.
};

/// Greedy play of one whole episode in each environment, with memory carried from FIRST to LAST. A
/// passive world is played in passes of bounded length, so that an episode of 10^6 steps fits in
/// memory. The interval is Wilson's where every episode is won or lost, with a return of 1 or of
/// the spec's wrong_return, else the normal one of the mean. Throws c10::Error if env holds no
/// environment, if an episode is open after more rows than the spec's max_episode_steps (0 = no
/// bound), and as summarize() does on the spec's returns.
Evaluation evaluate(ActorCritic& policy, VectorEnv& env);

/// The same from returns [E] alone. Throws c10::Error if there is none, if best_return equals
/// chance_return and if wrong_return is 1.
Evaluation summarize(const Tensor& episode_return, double chance_return, double best_return,
                     double wrong_return = 0);

}  // namespace retain
