#include <ATen/ATen.h>
#include <retain/lib/cores/mlp.h>

namespace retain {

MLP::MLP(const MLPOptions& options) : options_(options) {
  TORCH_CHECK(options.d_model >= 1, "MLP: d_model must be at least 1, got ", options.d_model);
  TORCH_CHECK(options.expand >= 1, "MLP: expand must be at least 1, got ", options.expand);
  const int64_t d_hidden = options.expand * options.d_model;
  fc1_ = register_module("fc1", torch::nn::Linear(options.d_model, d_hidden));
  fc2_ = register_module("fc2", torch::nn::Linear(d_hidden, options.d_model));
}

CoreOutput MLP::forward(const Tensor& x, const State& state, const Tensor& reset) {
  check_input("MLP", x, reset, d_model(), fc1_->weight);
  check_state("MLP", state, State(x.size(1)));
  return {fc2_(fc1_(x).relu()), State(x.size(1))};
}

}  // namespace retain
