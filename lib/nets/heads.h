#pragma once

#include <retain/lib/nets/distributions.h>
#include <torch/nn/module.h>
#include <torch/nn/modules/linear.h>

#include <memory>
#include <vector>

namespace retain {

enum class ActionKind { categorical, multi_discrete, gaussian };

struct PolicyHeadOptions {
  int64_t d_model = 64;
  ActionKind kind = ActionKind::categorical;
  std::vector<int64_t> num_values = {
      2};                   ///< Categorical: one entry; multi-discrete: one a component.
  double gain = 0.01;       ///< Of the orthogonal initialisation; small = nearly uniform at first.
  int64_t action_size = 1;  ///< Gaussian: components of an action.
};

/// Linear map (orthogonal initialisation) from features to a distribution over actions.
class PolicyHead : public torch::nn::Module {
 public:
  explicit PolicyHead(const PolicyHeadOptions& options);
  std::unique_ptr<Distribution> forward(const Tensor& features, const Tensor& legal = {});

 private:
  PolicyHeadOptions options_;
  torch::nn::Linear linear_{nullptr};
  Tensor log_std_;
};

/// Linear map (orthogonal initialisation, gain 1) from features [T, B, d_model] to a value [T, B].
class ValueHead : public torch::nn::Module {
 public:
  explicit ValueHead(int64_t d_model);
  Tensor forward(const Tensor& features);

 private:
  torch::nn::Linear linear_{nullptr};
};

}  // namespace retain
