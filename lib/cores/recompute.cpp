#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <retain/lib/cores/recompute.h>
#include <retain/lib/ops/checks.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/custom_class.h>

namespace retain {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// What the backward needs beside saved tensors.
struct Call : torch::CustomClassHolder {
  std::shared_ptr<Core> core;
  std::vector<std::string> parts;  ///< names of the state's
  int64_t batch_size = 0;
  c10::DeviceType device = c10::kCPU;
  bool autocast = false;
  at::ScalarType autocast_dtype = at::kFloat;

  /// y and the new state's parts; inputs are x and the parts of the state.
  variable_list run(at::ArrayRef<Tensor> inputs, const Tensor& reset) const {
    State state(batch_size);
    for (size_t i = 0; i < parts.size(); ++i) state.insert(parts[i], inputs[1 + i]);
    const auto output = core->forward(inputs[0], state, reset);
    variable_list outputs = {output.y};
    for (const auto& name : parts) outputs.push_back(output.state.at(name));
    return outputs;
  }
};

/// The autocast of the forward pass, while it lives. It keeps no copies of weights, which nobody
/// would drop once they change.
class AutocastOf {
 public:
  explicit AutocastOf(const Call& call)
      : device_(call.device), known_(at::autocast::is_autocast_available(device_)) {
    if (!known_) return;
    enabled_ = at::autocast::is_autocast_enabled(device_);
    cached_ = at::autocast::is_autocast_cache_enabled();
    dtype_ = at::autocast::get_autocast_dtype(device_);
    at::autocast::set_autocast_enabled(device_, call.autocast);
    at::autocast::set_autocast_cache_enabled(false);
    at::autocast::set_autocast_dtype(device_, call.autocast_dtype);
  }
  ~AutocastOf() {
    if (!known_) return;
    at::autocast::set_autocast_enabled(device_, enabled_);
    at::autocast::set_autocast_cache_enabled(cached_);
    at::autocast::set_autocast_dtype(device_, dtype_);
  }
  AutocastOf(const AutocastOf&) = delete;
  AutocastOf& operator=(const AutocastOf&) = delete;

 private:
  c10::DeviceType device_;
  bool known_, enabled_ = false, cached_ = false;
  at::ScalarType dtype_ = at::kFloat;
};

/// Inputs: x, the state's parts, and the weights that want gradients.
class Recomputed : public torch::autograd::Function<Recomputed> {
 public:
  static variable_list forward(AutogradContext* context, const c10::intrusive_ptr<Call>& call,
                               const std::optional<Tensor>& resets, at::TensorList inputs) {
    const Tensor reset = value_or_undefined(resets);
    variable_list all = inputs.vec();
    all.push_back(reset);
    context->save_for_backward(all);
    context->set_materialize_grads(false);
    context->saved_data["call"] = at::IValue::make_capsule(call);
    return call->run(inputs.slice(0, 1 + call->parts.size()), reset);
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    TORCH_CHECK(!at::GradMode::is_enabled(),
                "recompute: gradients of its gradients are not implemented (create_graph)");
    const auto call =
        c10::static_intrusive_pointer_cast<Call>(context->saved_data["call"].toCapsule());
    const auto saved = context->get_saved_variables();  // refuses what has changed since
    const size_t values = 1 + call->parts.size();
    const at::AutoGradMode with_gradients(true);
    const AutocastOf autocast(*call);
    variable_list inputs;
    for (size_t i = 0; i < values; ++i) {
      const bool wanted = saved[i].requires_grad();
      inputs.push_back(saved[i].detach().requires_grad_(wanted));
    }
    const auto outputs = call->run(inputs, saved.back());
    variable_list wanted;
    for (const auto& input : inputs) {
      if (input.requires_grad()) wanted.push_back(input);
    }
    for (const auto& weight : weights_of(*call->core)) wanted.push_back(weight);
    variable_list reached, incoming;
    for (size_t i = 0; i < outputs.size(); ++i) {
      if (!gradients[i].defined() || !outputs[i].requires_grad()) continue;
      reached.push_back(outputs[i]);
      incoming.push_back(gradients[i]);
    }
    const auto found = torch::autograd::grad(reached, wanted, incoming, std::nullopt, false, true);
    variable_list result = {Tensor(), Tensor()};  // of the call itself and of the resets
    auto next = found.begin();
    for (const auto& input : inputs) result.push_back(input.requires_grad() ? *next++ : Tensor());
    result.insert(result.end(), next, found.end());
    return result;
  }

  static variable_list weights_of(const Core& core) {
    variable_list weights;
    for (const auto& weight : core.parameters()) {
      if (weight.requires_grad()) weights.push_back(weight);
    }
    return weights;
  }
};

}  // namespace

CoreOutput recomputed_forward(const std::shared_ptr<Core>& core, const Tensor& x,
                              const State& state, const Tensor& reset) {
  // One step keeps little, and without gradients it may act by a kernel of its own.
  const bool one_step = x.dim() == 3 && x.size(0) == 1;
  if (!at::GradMode::is_enabled() || one_step) return core->forward(x, state, reset);
  const auto call = c10::make_intrusive<Call>();
  call->core = core;
  call->batch_size = state.batch_size();
  call->device = x.device().type();
  if (at::autocast::is_autocast_available(call->device)) {
    call->autocast = at::autocast::is_autocast_enabled(call->device);
    call->autocast_dtype = at::autocast::get_autocast_dtype(call->device);
  }
  variable_list inputs = {x};
  for (const auto& [name, part] : state.parts()) {
    call->parts.push_back(name);
    inputs.push_back(part);
  }
  for (const auto& weight : Recomputed::weights_of(*core)) inputs.push_back(weight);
  const auto outputs = Recomputed::apply(call, if_present(reset), at::TensorList(inputs));
  State next(state.batch_size());
  for (size_t i = 0; i < call->parts.size(); ++i) next.insert(call->parts[i], outputs[1 + i]);
  return {outputs[0], next};
}

}  // namespace retain
