#include <ATen/ATen.h>
#include <retain/lib/dtype_name.h>
#include <retain/lib/memory.h>

namespace retain {
Memory::Memory(std::shared_ptr<Core> core, int64_t batch_size) : core_(std::move(core)) {
  TORCH_CHECK(core_, "Memory: core must not be null");
  TORCH_CHECK(batch_size >= 0, "Memory: batch_size must be 0 or more, got ", batch_size);
  at::NoGradGuard no_grad;
  state_ = core_->initial_state(batch_size).detach().clone();
}

Memory::Memory(const Memory& other) : core_(other.core_), state_(other.get()) {}

Memory& Memory::operator=(Memory other) {
  core_ = std::move(other.core_);
  state_ = std::move(other.state_);
  return *this;
}

State Memory::get() const {
  at::NoGradGuard no_grad;
  State copy(batch_size());
  for (const auto& [name, part] : state_.parts()) {
    copy.insert(name, at::empty(part.sizes(), part.options()));
  }
  copy_state(state_, copy);
  return copy;
}

void Memory::set(const State& state) {
  check_state("Memory::set", state, state_);
  at::NoGradGuard no_grad;
  copy_state(state, state_);
}

void Memory::zero(const Tensor& mask) {
  at::NoGradGuard no_grad;
  state_.zero(mask);
}

void Memory::to(at::Device device) { state_ = state_.to(device); }

Tensor Memory::step(const Tensor& x, const Tensor& reset) {
  TORCH_CHECK(
      x.defined() && x.dim() == 2 && x.size(0) == batch_size() && x.size(1) == core_->d_model(),
      "Memory::step: x must be [B, d_model] = [", batch_size(), ", ", core_->d_model(), "], got ",
      x.defined() ? x.sizes() : at::IntArrayRef());
  TORCH_CHECK(!reset.defined() || (reset.dim() == 1 && reset.size(0) == batch_size() &&
                                   reset.scalar_type() == at::kBool),
              "Memory::step: reset must be [B] = [", batch_size(), "] bool, got ", reset.sizes(),
              " ", dtype_name(reset.scalar_type()));
  for (const auto& part : state_.parts()) {
    TORCH_CHECK(part.second.device() == x.device(), "Memory::step: x is on ", x.device(),
                " and the memory on ", part.second.device(),
                "; to() moves the memory, and the core's own to() its weights");
  }
  return core_->step(x, state_, reset);
}

}  // namespace retain
