#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <retain/experiments/run_options.h>
#include <retain/experiments/text.h>

#include <algorithm>
#include <cmath>
#include <new>
#include <stdexcept>

namespace retain {
namespace {

constexpr Range kPositive{.min = 0, .open = true};
constexpr Range kNotNegative{.min = 0};
constexpr Range kShare{.min = 0, .max = 1};
constexpr Range kOneOrMore{.min = 1};

void add_world_options(Options& options, RunOptions& run) {
  options.group("World");
  options.add("world", run.world, "One of those that `retain worlds` lists.");
  options.add("horizon", run.horizon, kOneOrMore,
              "How far back the agent must look; default: the world's own.");
  options.add("world_option", run.world_option,
              "name=value: any other option of the world; may be repeated.");
  options.add("num_envs", run.num_envs, kOneOrMore, "Environments stepped together.");
}

void add_algorithm_options(Options& options, RunOptions& run) {
  PPOOptions& ppo = run.trainer.ppo;
  options.group("Algorithm (PPO; one epoch of one minibatch is A2C)");
  options.add("num_steps", run.trainer.num_steps, kNotNegative,
              "Rows a rollout, memory carried from one to the next; 0 = whole episodes.");
  options.add("learning_rate", ppo.learning_rate, kPositive, "Adam's.");
  options.add("anneal", ppo.anneal, "The learning rate falls linearly to 0 over the updates.");
  options.add("update_epochs", ppo.update_epochs, kOneOrMore, "Passes over each rollout.");
  options.add("num_minibatches", ppo.num_minibatches, kOneOrMore,
              "Parts of a pass; they split the environments, never time.");
  options.add("gamma", ppo.gamma, kShare, "Discount of the return.");
  options.add("gae_lambda", ppo.gae_lambda, kShare, "Decay of generalised advantage estimation.");
  options.add("clip_coef", ppo.clip_coef, kPositive, "Bound on the probability ratio.");
  options.add("ent_coef", ppo.ent_coef, kNotNegative, "Weight of the entropy.");
  options.add("vf_coef", ppo.vf_coef, kNotNegative, "Weight of the value loss.");
  options.add("value_on_decisions", ppo.value_on_decisions,
              "Value loss over decision steps only: for whole episodes with gae_lambda 1.");
  options.add("adam_eps", ppo.adam_eps, kPositive, "Added to the root of Adam's second moment.");
  options.add("max_grad_norm", ppo.max_grad_norm, kPositive, "Bound on the norm of the gradient.");
  options.add("normalize_advantage", ppo.normalize_advantage,
              "Over the decision steps of a rollout.");
  options.add("target_kl", ppo.target_kl, kNotNegative,
              "Stop the epochs beyond this approximate KL; 0 = never.");
  options.add("normalize_reward", run.trainer.normalize_reward,
              "By the running deviation of the discounted return.");
  options.add("sweep", run.trainer.sweep, "Roll passive worlds out in one pass over time.");
}

void add_budget_options(Options& options, RunOptions& run) {
  options.group("Run");
  options.add("updates", run.updates, kOneOrMore, "Rollouts and updates to do.");
  options.add("seed", run.trainer.seed, "Of weights, worlds and actions.");
  options.add("device", run.trainer.device, "cpu, cuda or cuda:N.");
  options.add("checkpoint_every", run.checkpoint_every, kOneOrMore,
              "Updates between two checkpoints.");
  add_threads(options, run.threads);
  options.add("tf32", run.tf32, "A GPU rounds fp32 factors of matrix products to TF32.");
}

/// "0.001", "horizon", "1/horizon"
double resolve(const std::string& name, const std::string& text, std::optional<int64_t> horizon) {
  const std::string suffix = "/horizon";
  const bool inverse = text.ends_with(suffix);
  if (!inverse && text != "horizon") return parse_number(name, text, kPositive);
  if (!horizon) throw UsageError("--" + name + " " + text + ": this world has no horizon");
  const auto steps = static_cast<double>(*horizon);
  return inverse
             ? parse_number(name, text.substr(0, text.size() - suffix.size()), kPositive) / steps
             : steps;
}

WorldInfo world_info(const std::string& name) {
  const auto all = worlds();
  std::vector<std::string> valid;
  for (const WorldInfo& info : all) valid.push_back(info.name);
  check_name("world", name, valid);
  return *std::find_if(all.begin(), all.end(),
                       [&](const WorldInfo& info) { return info.name == name; });
}

bool names_horizon(const WorldInfo& info) {
  return std::any_of(info.options.begin(), info.options.end(),
                     [](const auto& option) { return option.first == "horizon"; });
}

void complete_world(RunOptions& run) {
  const WorldInfo info = world_info(run.world);
  if (run.world_option.count("horizon"))
    throw UsageError("--world_option horizon: give it as --horizon");
  std::vector<std::string> valid;
  for (const auto& [name, value] : info.options) {
    if (name != "horizon") {
      run.world_option.emplace(name, value);
      valid.push_back(name);
    } else if (!run.horizon) {
      run.horizon = parse_integer("horizon", value);
    }
  }
  if (run.horizon && !names_horizon(info))
    throw UsageError("--horizon: world " + run.world + " has none");
  for (const auto& option : run.world_option)
    check_name("option of world " + run.world, option.first, valid);
}

/// What the library says about an argument, as a mistake of the user: its first line.
template <class Make>
auto checked(const Make& make) {
  try {
    return make();
  } catch (const c10::Error& error) {
    if (is_out_of_memory(error.what_without_backtrace())) throw std::bad_alloc();
    throw UsageError(error.what_without_backtrace());
  } catch (const std::invalid_argument& error) {
    throw UsageError(error.what());
  }
}

}  // namespace

void add_core_options(Options& options, RunOptions& run) {
  CoreOptions& core = run.trainer.policy.core;
  options.group("Policy");
  options.add("core", core.name, "The memory: one of those that `retain cores` lists.");
  options.add("d_model", core.d_model, kOneOrMore, "Width of the core's input and output.");
  options.add("n_layers", core.n_layers, kOneOrMore, "Layers in the stack.");
  options.add("norm_input", core.norm_input,
              "Norm before the first layer too; off keeps the scale of the observation.");
  options.add("recompute", core.recompute,
              "Run layers again in the backward pass: less memory, more time.");
  options.add("d_state", core.d_state, kOneOrMore, "mamba: state size a channel.");
  options.add("d_conv", core.d_conv, kOneOrMore, "mamba: taps of the causal convolution.");
  options.add("expand", core.expand, kOneOrMore, "mamba, mlp: inner width = expand x d_model.");
  options.add("dt_min", run.dt_min, "mamba: smallest initial step; 1/horizon follows the horizon.");
  options.add("dt_max", run.dt_max, "mamba: largest initial step; 10/horizon works too.");
  options.add("dt_init_floor", run.dt_init_floor,
              "mamba: initial steps are clamped from below here; 1/horizon works too.");
  options.add(
      "chrono_horizon", run.chrono_horizon,
      "gru_chrono: forget biases are log U(1, chrono_horizon - 1); `horizon` follows the horizon.");
  options.add("activate_encoder", run.trainer.policy.activate_encoder, "ReLU after the encoder.");
  options.add("policy_gain", run.trainer.policy.policy_gain, kPositive,
              "Of the policy head's initialisation; small = nearly uniform at first.");
  options.add("normalize_observation", run.trainer.policy.normalize_observation,
              "By running mean and deviation.");
}

void add_run_options(Options& options, RunOptions& run) {
  add_world_options(options, run);
  add_core_options(options, run);
  add_algorithm_options(options, run);
  add_budget_options(options, run);
}

bool has_horizon(const RunOptions& run) { return names_horizon(world_info(run.world)); }

void complete(RunOptions& run) {
  complete_world(run);
  CoreOptions& core = run.trainer.policy.core;
  check_name("core", core.name, core_names());
  core.dt_min = resolve("dt_min", run.dt_min, run.horizon);
  core.dt_max = resolve("dt_max", run.dt_max, run.horizon);
  core.dt_init_floor = resolve("dt_init_floor", run.dt_init_floor, run.horizon);
  core.chrono_horizon =
      run.chrono_horizon == "horizon"
          ? static_cast<int64_t>(resolve("chrono_horizon", run.chrono_horizon, run.horizon))
          : parse_integer("chrono_horizon", run.chrono_horizon, {.min = 2});
  if (run.threads == 0) run.threads = at::get_num_threads();
  PPOOptions& ppo = run.trainer.ppo;
  ppo.num_updates = run.updates;
  if (ppo.num_minibatches > run.num_envs) {
    throw UsageError("--num_minibatches must be at most --num_envs = " +
                     std::to_string(run.num_envs) + ", got " + std::to_string(ppo.num_minibatches));
  }
}

RunOptions read_run(const std::string& ini, const std::string& where) {
  RunOptions run;
  Options options("", "");
  add_run_options(options, run);
  options.parse_ini(ini, where);
  complete(run);
  return run;
}

std::string to_ini(const RunOptions& run) {
  RunOptions copy = run;
  Options options("", "");
  add_run_options(options, copy);
  return options.ini();
}

std::unique_ptr<VectorEnv> make_env(const RunOptions& run, int64_t num_envs, uint64_t seed) {
  WorldOptions world_options = run.world_option;
  if (run.horizon) world_options["horizon"] = std::to_string(*run.horizon);
  return checked([&] { return make_vector_env(run.world, world_options, num_envs, seed); });
}

std::unique_ptr<Trainer> make_trainer(const RunOptions& run) {
  check_device(run.trainer.device);
  auto env = make_env(run, run.num_envs, run.trainer.seed);
  return checked([&] { return std::make_unique<Trainer>(std::move(env), run.trainer); });
}

std::string title(const RunOptions& run) {
  return run.world + (run.horizon ? " " + std::to_string(*run.horizon) : "") + " " +
         run.trainer.policy.core.name + " seed " + std::to_string(run.trainer.seed);
}

int64_t num_parameters(const torch::nn::Module& module) {
  int64_t count = 0;
  for (const Tensor& parameter : module.parameters()) count += parameter.numel();
  return count;
}

void add_threads(Options& options, int64_t& threads) {
  options.add("threads", threads, {.min = 0, .max = 1024}, "CPU threads; 0 = one a core.");
}

void use_threads(int64_t threads) {
  if (threads > 0) at::set_num_threads(static_cast<int>(threads));
}

void use_tf32(bool tf32) {
  at::globalContext().setFloat32MatmulPrecision(tf32 ? "high" : "highest");
}

void check_device(const std::string& device) {
  at::Device wanted(at::kMeta);
  try {
    wanted = at::Device(device);
  } catch (const c10::Error&) {
    // not a device at all: reported below
  }
  if (!wanted.is_cpu() && !wanted.is_cuda()) {
    throw UsageError("--device must be cpu, cuda or cuda:N, got \"" + device + "\"");
  }
  const int64_t count = wanted.is_cuda() ? static_cast<int64_t>(at::getNumGPUs()) : 0;
  if (wanted.is_cuda() && std::max<int64_t>(0, wanted.index()) >= count) {
    throw UsageError("--device " + device + ": this machine has " + std::to_string(count) +
                     " CUDA devices");
  }
}

}  // namespace retain
