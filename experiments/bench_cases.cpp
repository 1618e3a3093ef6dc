#include <retain/experiments/bench.h>
#include <retain/lib/cores/mamba1.h>
#include <retain/lib/cores/recompute.h>
#include <retain/lib/memory.h>
#include <retain/lib/ops/causal_conv1d.h>
#include <retain/lib/ops/rms_norm.h>
#include <retain/lib/ops/selective_scan.h>

#include <algorithm>

namespace retain {
namespace {

using at::Tensor;

struct Maker {
  OpShape shape;
  at::Device device;
  int64_t T = shape.steps, B = shape.batch, D = shape.channels, N = shape.d_state;
  double rows = static_cast<double>(T) * static_cast<double>(B);
  double elements = rows * static_cast<double>(D), states = elements * static_cast<double>(N);
  double size = static_cast<double>(c10::elementSize(shape.dtype));

  Tensor activations(at::IntArrayRef sizes) const {
    return at::randn(sizes, at::TensorOptions(device).dtype(at::kFloat)).to(shape.dtype);
  }
  Tensor weights(at::IntArrayRef sizes) const {
    return at::randn(sizes, at::TensorOptions(device).dtype(at::kFloat));
  }
  /// An episode begins about every 128 steps.
  Tensor resets() const {
    return at::rand({T, B}, at::TensorOptions(device).dtype(at::kFloat)) < 1.0 / 128;
  }
};

/// With every optional argument.
OpCase scan_case(const Maker& m) {
  const auto u = m.activations({m.T, m.B, m.D}), z = m.activations({m.T, m.B, m.D});
  const auto delta = m.activations({m.T, m.B, m.D}) * 0.7 - 1;
  const auto B = m.activations({m.T, m.B, 1, m.N}), C = m.activations({m.T, m.B, 1, m.N});
  const auto A = -m.weights({m.D, m.N}).exp(), D = m.weights({m.D});
  const auto bias = 0.1 * m.weights({m.D}), state = m.weights({m.B, m.D, m.N}), reset = m.resets();
  OpCase made;
  made.inputs = {u, delta, A, B, C, D, z, bias, state};
  made.fused = [=] {
    return std::get<0>(selective_scan(u, delta, A, B, C, D, z, bias, true, state, reset));
  };
  made.composed = [=] {
    return std::get<0>(selective_scan_reference(u, delta, A, B, C, D, z, bias, true, state, reset));
  };
  const double matrices = 2 * m.rows * static_cast<double>(m.N);
  const double state_bytes = 4 * static_cast<double>(m.B * m.D * m.N);
  made.fwd = {.bytes = m.size * (4 * m.elements + matrices) + 2 * state_bytes,
              .exponentials = m.states,
              .multiply_adds = 4 * m.states};
  made.bwd = {.bytes = m.size * (7 * m.elements + 2 * matrices) + 2 * state_bytes,
              .exponentials = m.states,
              .multiply_adds = 13 * m.states};
  return made;
}

OpCase update_case(const Maker& m) {
  const auto u = m.activations({m.B, m.D}), z = m.activations({m.B, m.D});
  const auto delta = m.activations({m.B, m.D});
  const auto B = m.activations({m.B, 1, m.N}), C = m.activations({m.B, 1, m.N});
  const auto A = -m.weights({m.D, m.N}).exp(), D = m.weights({m.D}), bias = m.weights({m.D});
  const auto state = m.weights({m.B, m.D, m.N}), reset = m.resets()[0];
  OpCase made;
  made.fused = [=] {
    return std::get<0>(selective_scan_update(u, delta, A, B, C, state, D, z, bias, true, reset));
  };
  made.composed = [=] {
    const auto step = [](const Tensor& x) { return x.unsqueeze(0); };
    return std::get<0>(selective_scan_reference(step(u), step(delta), A, step(B), step(C), D,
                                                step(z), bias, true, state, step(reset)));
  };
  const double matrices = 2 * m.rows * static_cast<double>(m.N);
  made.fwd = {.bytes = m.size * (4 * m.elements + matrices) + 8 * m.states,
              .exponentials = m.states,
              .multiply_adds = 4 * m.states};
  return made;
}

constexpr int64_t kTaps = 4;

OpCase conv_case(const Maker& m) {
  const auto x = m.activations({m.T, m.B, m.D}), weight = m.weights({m.D, kTaps}).to(m.shape.dtype);
  const auto bias = m.weights({m.D}).to(m.shape.dtype), reset = m.resets();
  const auto state = m.weights({m.B, kTaps - 1, m.D});
  OpCase made;
  made.inputs = {x, weight, bias, state};
  made.fused = [=] { return std::get<0>(causal_conv1d(x, weight, bias, true, state, reset)); };
  made.composed = [=] {
    return std::get<0>(causal_conv1d_reference(x, weight, bias, true, state, reset));
  };
  made.fwd = {.bytes = 2 * m.size * m.elements,
              .exponentials = m.elements,
              .multiply_adds = kTaps * m.elements};
  made.bwd = {.bytes = 3 * m.size * m.elements,
              .exponentials = m.elements,
              .multiply_adds = 3 * kTaps * m.elements};
  return made;
}

OpCase norm_case(const Maker& m) {
  const auto x = m.activations({m.T, m.B, m.D}), weight = m.weights({m.D});
  const auto residual = m.weights({m.T, m.B, m.D});
  OpCase made;
  made.inputs = {x, weight, residual};
  made.fused = [=] { return std::get<0>(rms_norm(x, weight, residual, 1e-5)); };
  made.composed = [=] { return std::get<0>(rms_norm_reference(x, weight, residual, 1e-5)); };
  made.fwd = {.bytes = (2 * m.size + 8) * m.elements, .multiply_adds = 3 * m.elements};
  made.bwd = {.bytes = (2 * m.size + 4) * m.elements, .multiply_adds = 6 * m.elements};
  return made;
}

int64_t dt_rank(const Maker& m) { return (m.D + 15) / 16; }

/// Multiply-adds of a block's four projections in one step of one row.
int64_t core_products(const Maker& m) {
  const int64_t d_inner = 2 * m.D, rank = dt_rank(m);
  return m.D * 2 * d_inner + d_inner * (rank + 2 * m.N) + rank * d_inner + d_inner * m.D;
}

/// A block by LibTorch's own ops.
Tensor composed_block(const Mamba1& core, const Tensor& x, const State& state,
                      const Tensor& reset) {
  const auto all = core.named_parameters();
  return std::get<0>(mamba_block_reference(x, all["in_proj.weight"], all["out_proj.weight"],
                                           state.at("conv"), state.at("ssm"), core.weights(),
                                           reset));
}

/// One Mamba-1 block of d_model = channels.
OpCase block_case(const Maker& m) {
  const auto core = std::make_shared<Mamba1>(Mamba1Options{.d_model = m.D, .d_state = m.N});
  core->to(m.device, m.shape.dtype);
  const auto x = m.activations({m.T, m.B, m.D}), reset = m.resets();
  const auto state = core->initial_state(m.B);
  OpCase made;
  made.inputs = core->parameters();
  made.inputs.push_back(x);
  made.fused = [=, again = m.shape.recompute] {
    return (again ? recomputed_forward(core, x, state, reset) : core->forward(x, state, reset)).y;
  };
  made.composed = [=] { return composed_block(*core, x, state, reset); };
  const double states = 2 * m.states;  // d_inner is 2 d_model
  made.fwd = {.bytes = m.size * 14 * m.elements,
              .exponentials = states,
              .multiply_adds = 4 * states,
              .products = m.rows * static_cast<double>(core_products(m))};
  made.bwd = {.bytes = 2 * made.fwd.bytes,
              .exponentials = states,
              .multiply_adds = 2 * made.fwd.multiply_adds,
              .products = 2 * made.fwd.products};
  // x, xz, the convolution's y, (dt, B, C), delta, the scan's y, y
  made.activation_bytes = m.size * m.rows * static_cast<double>(12 * m.D + dt_rank(m) + 2 * m.N);
  return made;
}

/// The acting step of such a block, memory in place, against the GRUCell of its width.
OpCase step_case(const Maker& m) {
  const auto core = std::make_shared<Mamba1>(Mamba1Options{.d_model = m.D, .d_state = m.N});
  core->to(m.device, m.shape.dtype);
  const auto memory = std::make_shared<Memory>(core, m.B);
  const auto x = m.activations({m.B, m.D}), reset = m.resets()[0];
  const auto w_ih = m.weights({3 * m.D, m.D}).to(m.shape.dtype), w_hh = at::randn_like(w_ih);
  const auto hidden = m.activations({m.B, m.D});
  OpCase made;
  made.acting = true;
  made.fused = [=] { return memory->step(x, reset); };
  made.composed = [=] { return Tensor(hidden).copy_(at::gru_cell(x, hidden, w_ih, w_hh)); };
  const double d_inner = 2 * m.elements;
  made.fwd = {
      .bytes = 8 * d_inner * (static_cast<double>(m.N) + kTaps - 1) + 2 * m.size * m.elements,
      .exponentials = d_inner * static_cast<double>(m.N),
      .products = m.rows * static_cast<double>(core_products(m))};
  return made;
}

/// What it costs to take the memory of such a block out, to put it back and to clear some of its
/// rows, against a pass over a sequence.
OpCase state_case(const Maker& m) {
  const auto core = std::make_shared<Mamba1>(Mamba1Options{.d_model = m.D, .d_state = m.N});
  core->to(m.device, m.shape.dtype);
  const auto memory = std::make_shared<Memory>(core, m.B);
  const auto x = m.activations({m.T, m.B, m.D}), reset = m.resets(), mask = reset[0];
  const auto state = core->initial_state(m.B);
  OpCase made;
  made.fused = [=] {
    const State taken = memory->get();
    memory->set(taken);
    memory->zero(mask);
    return taken.at("ssm");
  };
  made.composed = [=] { return core->forward(x, state, reset).y; };
  made.fwd.bytes = 4 * 4 * 2 * static_cast<double>(m.B * m.D * (m.N + kTaps - 1));
  made.acting = true;
  return made;
}

struct Case {
  const char* op;
  OpCase (*make)(const Maker&);
};

constexpr Case kCases[] = {{"scan", scan_case},     {"conv", conv_case}, {"norm", norm_case},
                           {"update", update_case}, {"step", step_case}, {"state", state_case},
                           {"block", block_case}};

}  // namespace

std::vector<std::string> bench_op_names() {
  std::vector<std::string> names;
  for (const Case& each : kCases) names.emplace_back(each.op);
  return names;
}

OpCase make_case(const std::string& op, const OpShape& shape, at::Device device) {
  const auto found = std::find_if(std::begin(kCases), std::end(kCases),
                                  [&](const Case& each) { return each.op == op; });
  TORCH_CHECK(found != std::end(kCases), "make_case: unknown op \"", op, "\"");
  OpCase made = found->make({.shape = shape, .device = device});
  for (auto& input : made.inputs) input.requires_grad_();
  return made;
}

}  // namespace retain
