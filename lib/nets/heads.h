#pragma once

#include <retain/lib/nets/distributions.h>
#include <torch/nn/module.h>
#include <torch/nn/modules/linear.h>

#include <memory>
#include <vector>

namespace retain {

enum class ActionKind { categorical, multi_discrete, gaussian };

struct PolicyHeadOptions {
  int64_t d_model = 64;                       ///< Width of the features.
  ActionKind kind = ActionKind::categorical;  ///< What an action is.
  /// Categorical: one entry; multi-discrete: one a component.
  std::vector<int64_t> num_values = {2};
  double gain = 0.01;       ///< Of the orthogonal initialisation; small = nearly uniform at first.
  int64_t action_size = 1;  ///< Gaussian: components of an action.
};

/// Linear map (orthogonal initialisation) from features to a distribution over actions.
class PolicyHead : public torch::nn::Module {
 public:
  /// Throws c10::Error naming the option if d_model, a Gaussian's action_size or another kind's
  /// entry of num_values is below 1, or num_values is empty or, for a categorical, not one entry.
  explicit PolicyHead(const PolicyHeadOptions& options);
  /// features [T, B, d_model] (any leading shape works); legal [T, B, A] bool or undefined (all
  /// legal), for a categorical only. Throws c10::Error if the last size of features is not d_model
  /// or legal is there for another kind, and as make_categorical() does.
  std::unique_ptr<Distribution> forward(const Tensor& features, const Tensor& legal = {});

 private:
  PolicyHeadOptions options_;
  torch::nn::Linear linear_{nullptr};
  Tensor log_std_;
};

/// Linear map (orthogonal initialisation, gain 1) from features [T, B, d_model] to a value [T, B].
class ValueHead : public torch::nn::Module {
 public:
  /// Throws c10::Error if d_model is below 1.
  explicit ValueHead(int64_t d_model);
  /// Any leading shape works. Throws c10::Error if the last size is not d_model.
  Tensor forward(const Tensor& features);

 private:
  torch::nn::Linear linear_{nullptr};
};

}  // namespace retain
