#include <ATen/ATen.h>
#include <retain/lib/cores/mamba1.h>

#include <cmath>
#include <tuple>

namespace retain {
namespace {

Mamba1Options checked(Mamba1Options options) {
  const auto at_least_one = [](const char* name, int64_t value) {
    TORCH_CHECK(value >= 1, "Mamba1: ", name, " must be at least 1, got ", value);
  };
  at_least_one("d_model", options.d_model);
  at_least_one("d_state", options.d_state);
  at_least_one("d_conv", options.d_conv);
  at_least_one("expand", options.expand);
  TORCH_CHECK(options.dt_rank >= 0,
              "Mamba1: dt_rank must be at least 1, or 0 for ceil(d_model / 16), got ",
              options.dt_rank);
  TORCH_CHECK(options.dt_min > 0 && std::isfinite(options.dt_min),
              "Mamba1: dt_min must be positive, got ", options.dt_min);
  TORCH_CHECK(options.dt_max >= options.dt_min && std::isfinite(options.dt_max),
              "Mamba1: dt_max must be at least dt_min = ", options.dt_min, ", got ",
              options.dt_max);
  TORCH_CHECK(options.dt_init_floor >= 0 && std::isfinite(options.dt_init_floor),
              "Mamba1: dt_init_floor must be at least 0, got ", options.dt_init_floor);
  if (options.dt_rank == 0) options.dt_rank = (options.d_model + 15) / 16;
  return options;
}

Tensor first_step(const Tensor& reset) { return reset.defined() ? reset[0] : reset; }

}  // namespace

Mamba1::Mamba1(const Mamba1Options& options) : options_(checked(options)) {
  using torch::nn::LinearOptions;
  const auto& o = options_;
  in_proj_ = register_module(
      "in_proj", torch::nn::Linear(LinearOptions(o.d_model, 2 * d_inner()).bias(false)));
  conv1d_ = register_module(
      "conv1d", torch::nn::Conv1d(
                    torch::nn::Conv1dOptions(d_inner(), d_inner(), o.d_conv).groups(d_inner())));
  x_proj_ = register_module(
      "x_proj", torch::nn::Linear(LinearOptions(d_inner(), o.dt_rank + 2 * o.d_state).bias(false)));
  dt_proj_ = register_module("dt_proj", torch::nn::Linear(o.dt_rank, d_inner()));
  reset_dt_proj();
  const auto A = at::arange(1, o.d_state + 1, at::kFloat).expand({d_inner(), o.d_state});
  A_log_ = register_parameter("A_log", A.log());
  D_ = register_parameter("D", at::ones({d_inner()}));
  out_proj_ = register_module("out_proj",
                              torch::nn::Linear(LinearOptions(d_inner(), o.d_model).bias(false)));
}

void Mamba1::reset_dt_proj() {
  at::NoGradGuard no_grad;
  const double bound = 1.0 / std::sqrt(static_cast<double>(options_.dt_rank));
  dt_proj_->weight.uniform_(-bound, bound);
  const double low = std::log(options_.dt_min), high = std::log(options_.dt_max);
  const auto dt = (at::rand({d_inner()}, at::kDouble) * (high - low) + low)
                      .exp()
                      .clamp_min(options_.dt_init_floor);
  dt_proj_->bias.copy_(dt + (-(-dt).expm1()).log());  // the inverse of softplus
}

State Mamba1::expected_state(int64_t batch) const {
  const auto& weight = in_proj_->weight;
  return State(batch, {{"conv", expected_part(weight, {batch, options_.d_conv - 1, d_inner()})},
                       {"ssm", expected_part(weight, {batch, d_inner(), options_.d_state})}});
}

MambaWeights Mamba1::weights() const {
  return {.conv_weight = conv1d_->weight.squeeze(1),
          .conv_bias = conv1d_->bias,
          .x_proj_weight = x_proj_->weight,
          .dt_proj_weight = dt_proj_->weight,
          .dt_proj_bias = dt_proj_->bias,
          .A_log = A_log_,
          .D = D_};
}

CoreOutput Mamba1::forward(const Tensor& input, const State& state, const Tensor& reset) {
  check_input("Mamba1", input, reset, d_model(), in_proj_->weight);
  check_state("Mamba1", state, expected_state(input.size(1)));
  const auto& conv = state.at("conv");
  const auto& ssm = state.at("ssm");
  Tensor y, new_conv, new_ssm;
  if (input.size(0) == 1 && !at::GradMode::is_enabled()) {
    const auto xz = at::linear(input[0], in_proj_->weight);
    std::tie(y, new_conv, new_ssm) = mamba_update(xz, conv, ssm, weights(), first_step(reset));
    y = at::linear(y, out_proj_->weight).unsqueeze(0);
  } else {
    std::tie(y, new_conv, new_ssm) =
        mamba_block(input, in_proj_->weight, out_proj_->weight, conv, ssm, weights(), reset);
  }
  return {y, State(input.size(1), {{"conv", new_conv}, {"ssm", new_ssm}})};
}

Tensor Mamba1::step(const Tensor& input, State& state, const Tensor& reset) {
  const at::NoGradGuard no_grad;
  check_step_input("Mamba1", input, reset, d_model(), in_proj_->weight);
  check_state("Mamba1", state, expected_state(input.size(0)));
  const auto xz = at::linear(input, in_proj_->weight);
  const auto y = mamba_update_(xz, state.at("conv"), state.at("ssm"), weights(), reset);
  return at::linear(y, out_proj_->weight);
}

}  // namespace retain
