#include <ATen/ATen.h>
#include <retain/lib/cores/gru.h>
#include <retain/lib/cores/mamba1.h>
#include <retain/lib/cores/mlp.h>
#include <retain/lib/cores/registry.h>
#include <retain/lib/cores/stack.h>

#include <algorithm>
#include <cmath>

namespace retain {
namespace {

std::shared_ptr<Core> make_mamba(const CoreOptions& o) {
  const auto core = std::make_shared<Mamba1>(Mamba1Options{.d_model = o.d_model,
                                                           .d_state = o.d_state,
                                                           .d_conv = o.d_conv,
                                                           .expand = o.expand,
                                                           .dt_min = o.dt_min,
                                                           .dt_max = o.dt_max,
                                                           .dt_init_floor = o.dt_init_floor});
  // The published backbone divides what each layer adds to the residual stream, as GPT-2 does.
  at::NoGradGuard no_grad;
  core->named_parameters()["out_proj.weight"].div_(std::sqrt(static_cast<double>(o.n_layers)));
  return core;
}

std::shared_ptr<Core> make_gru(const CoreOptions& o) {
  return std::make_shared<GRU>(GRUOptions{.d_model = o.d_model});
}

std::shared_ptr<Core> make_gru_chrono(const CoreOptions& o) {
  TORCH_CHECK(o.chrono_horizon >= 2, "make_core: chrono_horizon must be at least 2, got ",
              o.chrono_horizon);
  return std::make_shared<GRU>(
      GRUOptions{.d_model = o.d_model, .chrono_horizon = o.chrono_horizon});
}

std::shared_ptr<Core> make_mlp(const CoreOptions& o) {
  return std::make_shared<MLP>(MLPOptions{.d_model = o.d_model, .expand = o.expand});
}

struct Entry {
  const char* name;
  std::shared_ptr<Core> (*make)(const CoreOptions&);
};

constexpr Entry kCores[] = {
    {"mamba", make_mamba}, {"gru", make_gru}, {"gru_chrono", make_gru_chrono}, {"mlp", make_mlp}};

}  // namespace

std::vector<std::string> core_names() {
  std::vector<std::string> names;
  for (const auto& entry : kCores) names.emplace_back(entry.name);
  return names;
}

std::shared_ptr<Core> make_core(const CoreOptions& options) {
  const auto entry = std::find_if(std::begin(kCores), std::end(kCores),
                                  [&](const Entry& e) { return e.name == options.name; });
  TORCH_CHECK(entry != std::end(kCores), "make_core: unknown core \"", options.name,
              "\"; valid: ", c10::Join(", ", core_names()));
  TORCH_CHECK(options.n_layers >= 1, "make_core: n_layers must be at least 1, got ",
              options.n_layers);
  std::vector<std::shared_ptr<Core>> layers;
  for (int64_t i = 0; i < options.n_layers; ++i) layers.push_back(entry->make(options));
  return std::make_shared<Stack>(
      layers, StackOptions{.norm_input = options.norm_input, .recompute = options.recompute});
}

}  // namespace retain
