#include <ATen/ATen.h>
#include <retain/lib/cores/gru.h>
#include <retain/lib/ops/gru.h>

#include <cmath>

namespace retain {

GRU::GRU(const GRUOptions& options) : options_(options) {
  const int64_t H = options.d_model;
  TORCH_CHECK(H >= 1, "GRU: d_model must be at least 1, got ", H);
  TORCH_CHECK(options.chrono_horizon == 0 || options.chrono_horizon >= 2,
              "GRU: chrono_horizon must be at least 2, or 0 for none, got ",
              options.chrono_horizon);
  const double bound = 1.0 / std::sqrt(static_cast<double>(H));
  const auto uniform = [&](at::IntArrayRef sizes) {
    return at::empty(sizes).uniform_(-bound, bound);
  };
  weight_ih_ = register_parameter("weight_ih", uniform({3 * H, H}));
  weight_hh_ = register_parameter("weight_hh", uniform({3 * H, H}));
  bias_ih_ = register_parameter("bias_ih", uniform({3 * H}));
  bias_hh_ = register_parameter("bias_hh", uniform({3 * H}));
  if (options.chrono_horizon > 0) reset_update_bias();
}

void GRU::reset_update_bias() {
  at::NoGradGuard no_grad;
  const int64_t H = options_.d_model;
  bias_ih_.narrow(0, H, H).uniform_(1.0, static_cast<double>(options_.chrono_horizon - 1)).log_();
  bias_hh_.narrow(0, H, H).zero_();
}

State GRU::expected_state(int64_t batch) const {
  return State(batch, {{"hidden", expected_part(weight_ih_, {batch, options_.d_model})}});
}

CoreOutput GRU::forward(const Tensor& x, const State& state, const Tensor& reset) {
  check_input("GRU", x, reset, d_model(), weight_ih_);
  check_state("GRU", state, expected_state(x.size(1)));
  auto [y, hidden] = gru(x, weight_ih_, weight_hh_, bias_ih_, bias_hh_, state.at("hidden"), reset);
  return {y, State(x.size(1), {{"hidden", hidden}})};
}

}  // namespace retain
