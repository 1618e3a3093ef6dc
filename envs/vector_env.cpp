#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/eq.h>
#include <c10/util/Exception.h>
#include <retain/envs/vector_env.h>

namespace retain {

Tensor TimeSteps::first() const { return step_type.eq(static_cast<int64_t>(StepType::first)); }

Tensor TimeSteps::last() const { return step_type.eq(static_cast<int64_t>(StepType::last)); }

Tensor uniforms(uint64_t seed, Stream stream, int64_t first_step, int64_t num_steps,
                int64_t num_envs, int64_t count, int64_t first_environment) {
  TORCH_CHECK(
      num_steps >= 0 && num_envs >= 0 && count >= 0 && first_step >= 0 && first_environment >= 0,
      "uniforms: sizes and indices must not be negative, got num_steps ", num_steps, ", num_envs ",
      num_envs, ", count ", count, ", first_step ", first_step, ", first_environment ",
      first_environment);
  TORCH_CHECK(
      num_steps <= Rng::kSteps - first_step && num_envs <= Rng::kEnvironments - first_environment,
      "uniforms: first_step + num_steps must be at most 2^48 and first_environment + "
      "num_envs at most 2^40, got ",
      first_step, " + ", num_steps, " and ", first_environment, " + ", num_envs);
  Tensor result = at::empty({num_steps, num_envs, count}, at::kFloat);
  float* out = result.data_ptr<float>();
  at::parallel_for(0, num_steps * num_envs, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      Rng rng(seed, stream, static_cast<uint64_t>(first_environment + row % num_envs),
              static_cast<uint64_t>(first_step + row / num_envs));
      for (int64_t i = 0; i < count; ++i) out[row * count + i] = rng.uniform();
    }
  });
  return result;
}

}  // namespace retain
