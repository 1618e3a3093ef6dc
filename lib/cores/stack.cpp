#include <ATen/ATen.h>
#include <retain/lib/cores/recompute.h>
#include <retain/lib/cores/stack.h>
#include <retain/lib/ops/rms_norm.h>
#include <torch/nn/modules/container/modulelist.h>

namespace retain {
namespace {

// A module whose only parameter is called weight, as the public models' norms are.
class Norm : public torch::nn::Module {
 public:
  explicit Norm(int64_t d_model) : weight(register_parameter("weight", at::ones({d_model}))) {}
  const Tensor weight;
};

std::vector<std::string> names_of(const State& state) {
  std::vector<std::string> names;
  for (const auto& [name, part] : state.parts()) names.push_back(name);
  return names;
}

}  // namespace

Stack::Stack(const std::vector<std::shared_ptr<Core>>& cores, const StackOptions& options)
    : options_(options), cores_(cores) {
  TORCH_CHECK(!cores.empty(), "Stack: cores must hold at least one core");
  const auto add_norm = [&](torch::nn::Module& parent, const std::string& name) {
    norm_weights_.push_back(
        parent.register_module(name, std::make_shared<Norm>(d_model()))->weight);
  };
  torch::nn::ModuleList layers;
  for (const auto& core : cores) {
    TORCH_CHECK(core->d_model() == d_model(),
                "Stack: every core's d_model must be the first one's, ", d_model(), ", got ",
                core->d_model());
    const auto layer = std::make_shared<torch::nn::Module>("Layer");
    if (options.norm_input || layers->size() > 0) {
      add_norm(*layer, "norm");
    } else {
      norm_weights_.emplace_back();
    }
    layer->register_module("mixer", core);
    layers->push_back(layer);
  }
  register_module("layers", layers);
  add_norm(*this, "norm_f");
}

State Stack::initial_state(int64_t batch) const {
  State state(batch);
  for (int64_t i = 0; i < n_layers(); ++i) state.insert_layer(i, cores_[i]->initial_state(batch));
  return state;
}

// Each layer checks its own parts; what is left is parts of no layer.
void Stack::check_layers(const State& state) const {
  size_t parts = 0;
  for (int64_t i = 0; i < n_layers(); ++i) parts += state.layer(i).parts().size();
  TORCH_CHECK(parts == state.parts().size(), "Stack: state must hold parts of layers.0 to layers.",
              n_layers() - 1, " only, got ", c10::Join(", ", names_of(state)));
}

Tensor Stack::through_layers(const Tensor& x, const RunLayer& run) const {
  Tensor y = x, residual;
  for (int64_t i = 0; i < n_layers(); ++i) {
    const auto [normed, sum] = norm_weights_[i].defined()
                                   ? rms_norm(y, norm_weights_[i], residual, options_.norm_eps)
                                   : std::make_tuple(x, x);
    y = run(i, normed);
    residual = sum;
  }
  return std::get<0>(rms_norm(y, norm_weights_.back(), residual, options_.norm_eps));
}

CoreOutput Stack::forward(const Tensor& x, const State& state, const Tensor& reset) {
  check_input("Stack", x, reset, d_model(), norm_weights_.back());
  check_layers(state);
  State last_state(x.size(1));
  const auto y = through_layers(x, [&](int64_t i, const Tensor& normed) {
    auto output = options_.recompute ? recomputed_forward(cores_[i], normed, state.layer(i), reset)
                                     : cores_[i]->forward(normed, state.layer(i), reset);
    last_state.insert_layer(i, output.state);
    return output.y;
  });
  return {y, last_state};
}

Tensor Stack::step(const Tensor& x, State& state, const Tensor& reset) {
  const at::NoGradGuard no_grad;
  check_step_input("Stack", x, reset, d_model(), norm_weights_.back());
  check_layers(state);
  return through_layers(x, [&](int64_t i, const Tensor& normed) {
    auto layer_state = state.layer(i);  // shares the tensors
    return cores_[i]->step(normed, layer_state, reset);
  });
}

}  // namespace retain
