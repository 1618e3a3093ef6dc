#include <ATen/ATen.h>
#include <retain/lib/nets/heads.h>
#include <torch/nn/init.h>

#include <numeric>

namespace retain {
namespace {

torch::nn::Linear orthogonal_linear(int64_t in, int64_t out, double gain) {
  torch::nn::Linear linear(in, out);
  torch::nn::init::orthogonal_(linear->weight, gain);
  torch::nn::init::zeros_(linear->bias);
  return linear;
}

int64_t num_outputs(const PolicyHeadOptions& options) {
  if (options.kind == ActionKind::gaussian) {
    TORCH_CHECK(options.action_size >= 1, "PolicyHead: action_size must be at least 1, got ",
                options.action_size);
    return options.action_size;
  }
  const auto& n = options.num_values;
  TORCH_CHECK(!n.empty() && *std::min_element(n.begin(), n.end()) >= 1,
              "PolicyHead: num_values must hold numbers of at least 1, got ", at::IntArrayRef(n));
  TORCH_CHECK(options.kind == ActionKind::multi_discrete || n.size() == 1,
              "PolicyHead: num_values of a categorical must hold one number, got ",
              at::IntArrayRef(n));
  return std::accumulate(n.begin(), n.end(), int64_t{0});
}

void check_features(const char* where, const Tensor& features, int64_t d_model) {
  TORCH_CHECK(features.dim() >= 1 && features.size(-1) == d_model, where,
              ": features must be [..., d_model] = [..., ", d_model, "], got ", features.sizes());
}

}  // namespace

PolicyHead::PolicyHead(const PolicyHeadOptions& options) : options_(options) {
  TORCH_CHECK(options.d_model >= 1, "PolicyHead: d_model must be at least 1, got ",
              options.d_model);
  const int64_t outputs = num_outputs(options);
  linear_ = register_module("linear", orthogonal_linear(options.d_model, outputs, options.gain));
  if (options.kind == ActionKind::gaussian) {
    log_std_ = register_parameter("log_std", at::zeros({outputs}));
  }
}

std::unique_ptr<Distribution> PolicyHead::forward(const Tensor& features, const Tensor& legal) {
  check_features("PolicyHead", features, options_.d_model);
  TORCH_CHECK(!legal.defined() || options_.kind == ActionKind::categorical,
              "PolicyHead: legal is for categorical actions only");
  const auto output = linear_(features);
  switch (options_.kind) {
    case ActionKind::categorical:
      return make_categorical(output, legal);
    case ActionKind::multi_discrete:
      return make_multi_discrete(output, options_.num_values);
    case ActionKind::gaussian:
      break;
  }
  return make_gaussian(output, log_std_);
}

ValueHead::ValueHead(int64_t d_model) {
  TORCH_CHECK(d_model >= 1, "ValueHead: d_model must be at least 1, got ", d_model);
  linear_ = register_module("linear", orthogonal_linear(d_model, 1, 1.0));
}

Tensor ValueHead::forward(const Tensor& features) {
  check_features("ValueHead", features, linear_->options.in_features());
  return linear_(features).squeeze(-1);
}

}  // namespace retain
