#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>
#include <retain/envs/vectorize.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

namespace retain {
namespace {

using Kind = ActionSpec::Kind;

constexpr uint8_t kLast = static_cast<uint8_t>(StepType::last);

TimeSteps empty_steps(const EnvironmentSpec& spec, at::IntArrayRef rows) {
  const auto with = [&](int64_t size) {
    std::vector<int64_t> shape(rows.begin(), rows.end());
    shape.push_back(size);
    return shape;
  };
  TimeSteps steps;
  steps.observation = at::empty(with(spec.observation_size), at::kFloat);
  steps.reward = at::empty(rows, at::kFloat);
  steps.discount = at::empty(rows, at::kFloat);
  steps.step_type = at::empty(rows, at::kByte);
  if (spec.action.masked)
    steps.legal_actions = at::empty(with(spec.action.num_values[0]), at::kBool);
  return steps;
}

void check_spec(const EnvironmentSpec& spec) {
  TORCH_CHECK_VALUE(spec.observation_size >= 0, spec.name,
                    ": observation_size must not be negative, got ", spec.observation_size);
  const ActionSpec& action = spec.action;
  if (action.kind == Kind::continuous) {
    TORCH_CHECK_VALUE(action.size >= 1, spec.name, ": action.size must be at least 1, got ",
                      action.size);
  } else {
    TORCH_CHECK_VALUE(!action.num_values.empty(), spec.name, ": action.num_values is empty");
    TORCH_CHECK_VALUE(action.kind == Kind::multi_discrete || action.num_values.size() == 1,
                      spec.name, ": a categorical action has one num_values entry, got ",
                      action.num_values.size());
    for (int64_t n : action.num_values) {
      TORCH_CHECK_VALUE(n >= 1, spec.name, ": action.num_values must be at least 1, got ", n);
    }
  }
  TORCH_CHECK_VALUE(!action.masked || action.kind == Kind::categorical, spec.name,
                    ": only categorical actions can be masked");
}

int64_t action_size(const ActionSpec& action) {
  if (action.kind == Kind::categorical) return 1;
  return action.kind == Kind::continuous ? action.size
                                         : static_cast<int64_t>(action.num_values.size());
}

void check_values(const char* function, const EnvironmentSpec& spec, const Tensor& action) {
  const int64_t size = action_size(spec.action);
  if (spec.action.kind == Kind::continuous) {
    const float* values = action.data_ptr<float>();
    for (int64_t i = 0; i < action.numel(); ++i) {
      TORCH_CHECK(std::isfinite(values[i]), spec.name, ".", function,
                  ": actions must be finite, got ", values[i]);
    }
    return;
  }
  const int64_t* values = action.data_ptr<int64_t>();
  for (int64_t i = 0; i < action.numel(); ++i) {
    const int64_t n = spec.action.num_values[i % size];
    TORCH_CHECK(values[i] >= 0 && values[i] < n, spec.name, ".", function,
                ": actions must be in [0, ", n, "), got ", values[i]);
  }
}

}  // namespace

void check_num_envs(int64_t num_envs) {
  if (num_envs >= 1) return;
  throw std::invalid_argument("num_envs must be at least 1, got " + std::to_string(num_envs));
}

BatchDriver::BatchDriver(EnvironmentSpec spec, int64_t num_envs, uint64_t seed,
                         int64_t first_environment, int64_t tile, int64_t grain)
    : spec_(std::move(spec)),
      num_envs_(num_envs),
      first_environment_(first_environment),
      tile_(tile),
      grain_(grain),
      seed_(seed) {
  check_num_envs(num_envs);
  if (first_environment < 0) {
    throw std::invalid_argument("first_environment must not be negative, got " +
                                std::to_string(first_environment));
  }
  if (num_envs > Rng::kEnvironments - first_environment) {
    throw std::invalid_argument("first_environment + num_envs must be at most 2^40, got " +
                                std::to_string(first_environment) + " + " +
                                std::to_string(num_envs));
  }
  check_spec(spec_);
  current_ = empty_steps(spec_, {num_envs});
  current_.observation.zero_();
  current_.reward.zero_();
  current_.discount.fill_(1);
  current_.step_type.fill_(kLast);  // so that whatever comes first gives FIRST
  if (spec_.action.masked) current_.legal_actions.fill_(true);
}

bool BatchDriver::at_last(int64_t environment) const {
  return current_.step_type.const_data_ptr<uint8_t>()[environment] == kLast;
}

Tensor BatchDriver::no_actions() const { return at::zeros({num_envs_}, at::kLong); }

TimeSteps BatchDriver::current() const {
  TORCH_CHECK(step_ > 0, spec_.name, ".current: call reset() first");
  TimeSteps steps = current_;
  for (Tensor* part : {&steps.observation, &steps.reward, &steps.discount, &steps.step_type}) {
    *part = part->clone();
  }
  if (steps.legal_actions.defined()) steps.legal_actions = steps.legal_actions.clone();
  return steps;
}

TimeSteps BatchDriver::reset() {
  TimeSteps steps = empty_steps(spec_, {num_envs_});
  run(steps, {}, 1, true);
  return steps;
}

TimeSteps BatchDriver::step(const Tensor& action) {
  const Tensor given = checked("step", action, {num_envs_});
  TimeSteps steps = empty_steps(spec_, {num_envs_});
  run(steps, given, 1, false);
  return steps;
}

TimeSteps BatchDriver::sweep(const Tensor& action) {
  const int64_t num_steps = action.defined() && action.dim() > 0 ? action.size(0) : 0;
  const Tensor given = checked("sweep", action, {num_steps, num_envs_});
  TimeSteps steps = empty_steps(spec_, {num_steps, num_envs_});
  if (num_steps > 0) run(steps, given, num_steps, false);
  return steps;
}

Tensor BatchDriver::checked(const char* function, const Tensor& action,
                            std::vector<int64_t> shape) const {
  const ActionSpec& wanted = spec_.action;
  if (wanted.kind != Kind::categorical) shape.push_back(action_size(wanted));
  const at::ScalarType dtype = wanted.kind == Kind::continuous ? at::kFloat : at::kLong;
  TORCH_CHECK(action.defined(), spec_.name, ".", function, ": action is undefined");
  TORCH_CHECK(action.device().is_cpu(), spec_.name, ".", function,
              ": action must be on the CPU, got ", action.device());
  TORCH_CHECK(action.scalar_type() == dtype, spec_.name, ".", function, ": action must be ",
              dtype == at::kFloat ? "float32" : "int64", ", got ", action.dtype().name());
  TORCH_CHECK(action.sizes() == at::IntArrayRef(shape), spec_.name, ".", function,
              ": action must be ", at::IntArrayRef(shape), ", got ", action.sizes());
  const Tensor given = action.contiguous();
  check_values(function, spec_, given);
  if (wanted.masked && given.numel() > 0) check_first_row(function, given);
  return given;
}

void BatchDriver::check_first_row(const char* function, const Tensor& action) const {
  const int64_t* values = action.const_data_ptr<int64_t>();
  const bool* legal = current_.legal_actions.const_data_ptr<bool>();
  for (int64_t e = 0; e < num_envs_; ++e) {
    TORCH_CHECK(at_last(e) || legal[e * spec_.action.num_values[0] + values[e]], spec_.name, ".",
                function, ": action ", values[e], " of environment ", e, " is not legal now");
  }
}

void BatchDriver::check_legal(const Pass& pass, int64_t t, int64_t environment) const {
  const int64_t row = t * num_envs_ + environment, action = pass.discrete[row];
  TORCH_CHECK(pass.legal[(row - num_envs_) * pass.num_values + action], spec_.name,
              ".sweep: action ", action, " of environment ", environment, " is not legal at row ",
              t);
}

void BatchDriver::run(TimeSteps& steps, const Tensor& action, int64_t num_steps, bool begin) {
  Pass pass;
  pass.begin = begin;
  pass.num_steps = num_steps;
  pass.num_envs = num_envs_;
  pass.observation_size = spec_.observation_size;
  pass.action_size = action_size(spec_.action);
  pass.seed = seed_;
  pass.first_environment = first_environment_;
  pass.first_step = step_;
  pass.previous_type = current_.step_type.const_data_ptr<uint8_t>();
  pass.observation = steps.observation.data_ptr<float>();
  pass.reward = steps.reward.data_ptr<float>();
  pass.discount = steps.discount.data_ptr<float>();
  pass.step_type = steps.step_type.data_ptr<uint8_t>();
  if (spec_.action.masked) {
    pass.num_values = spec_.action.num_values[0];
    pass.legal = steps.legal_actions.data_ptr<bool>();
  }
  if (!begin && spec_.action.kind == Kind::continuous) {
    pass.continuous = action.const_data_ptr<float>();
  } else if (!begin) {
    pass.discrete = action.const_data_ptr<int64_t>();
  }
  const int64_t tiles = (num_envs_ + tile_ - 1) / tile_;
  const int64_t grain = std::max<int64_t>(1, grain_ / (tile_ * num_steps));
  at::parallel_for(0, tiles, grain, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      advance(pass, i * tile_, std::min(num_envs_, (i + 1) * tile_));
    }
  });
  step_ += num_steps;
  keep_last(steps);
}

void BatchDriver::keep_last(const TimeSteps& steps) {
  const auto copy = [&](Tensor& to, const Tensor& from) {
    const size_t size = to.nbytes();
    if (size == 0) return;
    std::memcpy(to.data_ptr(),
                static_cast<const uint8_t*>(from.const_data_ptr()) + from.nbytes() - size, size);
  };
  copy(current_.observation, steps.observation);
  copy(current_.reward, steps.reward);
  copy(current_.discount, steps.discount);
  copy(current_.step_type, steps.step_type);
  if (spec_.action.masked) copy(current_.legal_actions, steps.legal_actions);
}

}  // namespace retain
