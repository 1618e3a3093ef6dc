#pragma once

#include <retain/lib/cores/core.h>

#include <functional>
#include <memory>
#include <vector>

namespace retain {

struct StackOptions {
  double norm_eps = 1e-5;  ///< Added to the mean square under each norm's root.
  bool norm_input = true;  ///< Off: the first layer reads its input as it is, scale included.
  /// Each layer's core runs again in the backward: less memory, more time.
  bool recompute = false;
};

/// n_layers × (norm → core → residual), then a final norm: the backbone of the public Mamba models,
/// whose parameter names it has: layers.<i>.norm.weight, layers.<i>.mixer.<…>, norm_f.weight. Each
/// norm adds the residual stream in the same pass (fp32 for half types). The State holds
/// "layers.<i>.<part>".
class Stack : public Core {
 public:
  /// Throws c10::Error if there is no core or their widths differ.
  explicit Stack(const std::vector<std::shared_ptr<Core>>& cores, const StackOptions& options = {});

  int64_t d_model() const override { return cores_.front()->d_model(); }
  int64_t n_layers() const { return static_cast<int64_t>(cores_.size()); }
  const std::shared_ptr<Core>& layer(int64_t index) const { return cores_.at(index); }
  State initial_state(int64_t batch) const override;
  CoreOutput forward(const Tensor& x, const State& state, const Tensor& reset = {}) override;
  Tensor step(const Tensor& x, State& state, const Tensor& reset = {}) override;

 private:
  /// Layer i on its normed input.
  using RunLayer = std::function<Tensor(int64_t i, const Tensor& normed)>;

  void check_layers(const State& state) const;
  Tensor through_layers(const Tensor& x, const RunLayer& run) const;

  StackOptions options_;
  std::vector<std::shared_ptr<Core>> cores_;
  /// One a layer (the first may be undefined), then the final one.
  std::vector<Tensor> norm_weights_;
};

}  // namespace retain
