#pragma once

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <retain/lib/ops/selective_scan.h>

#include <limits>
#include <vector>

#include "support/errors.h"
#include "support/op_checks.h"

namespace retain::testing {

inline constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
inline constexpr double kInfinity = std::numeric_limits<double>::infinity();

/// Which optional arguments are there.
struct ScanOptions {
  bool D = true, z = true, delta_bias = true, delta_softplus = true, initial_state = true,
       reset = true;
};

inline constexpr ScanOptions kBare{false, false, false, false, false, false};

struct ScanProblem {
  int64_t T, B, D, N, G = 1;
  ScanOptions options = {};
};

/// Where each argument lies among the inputs, z with all optional ones before it; only
/// `initial_state` and those before it get gradients.
enum ScanInput : size_t { kU, kDelta, kA, kB, kC, kFirstOptional, kZ = kFirstOptional + 1 };

/// u, delta, A, B, C, then the optional arguments that are there, in the order of the signature.
inline Tensors inputs_of(const ScanProblem& p, uint64_t seed = 1) {
  const auto wide = at::kDouble;
  auto delta = 0.7 * randn({p.T, p.B, p.D}, seed + 1, wide) - 1;
  if (!p.options.delta_softplus) delta = delta.exp();
  Tensors inputs = {
      randn({p.T, p.B, p.D}, seed, wide), delta, -randn({p.D, p.N}, seed + 2, wide).exp(),
      randn({p.T, p.B, p.G, p.N}, seed + 3, wide), randn({p.T, p.B, p.G, p.N}, seed + 4, wide)};
  if (p.options.D) inputs.push_back(randn({p.D}, seed + 5, wide));
  if (p.options.z) inputs.push_back(randn({p.T, p.B, p.D}, seed + 6, wide));
  if (p.options.delta_bias) inputs.push_back(0.1 * randn({p.D}, seed + 7, wide).abs());
  if (p.options.initial_state) inputs.push_back(randn({p.B, p.D, p.N}, seed + 8, wide));
  return inputs;
}

inline at::Tensor reset_of(const ScanProblem& p) {
  return p.options.reset ? random_mask({p.T, p.B}, 0.15, 77) : at::Tensor();
}

/// The inputs as selective_scan takes them.
struct ScanArguments {
  at::Tensor u, delta, A, B, C, D, z, delta_bias, initial_state, reset;
  bool delta_softplus, exact = false;

  ScanArguments(const ScanOptions& options, const Tensors& inputs, const at::Tensor& reset_)
      : u(inputs[kU]),
        delta(inputs[kDelta]),
        A(inputs[kA]),
        B(inputs[kB]),
        C(inputs[kC]),
        reset(reset_),
        delta_softplus(options.delta_softplus) {
    size_t next = kFirstOptional;
    if (options.D) D = inputs[next++];
    if (options.z) z = inputs[next++];
    if (options.delta_bias) delta_bias = inputs[next++];
    if (options.initial_state) initial_state = inputs[next++];
  }

  Tensors run() const {
    const auto [y, last] = selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus,
                                          initial_state, reset, exact);
    return {y, last};
  }

  Tensors run_reference() const {
    const auto [y, last] = selective_scan_reference(u, delta, A, B, C, D, z, delta_bias,
                                                    delta_softplus, initial_state, reset);
    return {y, last};
  }

  ScanArguments to(at::Device device) const {
    auto moved = *this;
    for (auto* tensor : {&moved.u, &moved.delta, &moved.A, &moved.B, &moved.C, &moved.D, &moved.z,
                         &moved.delta_bias, &moved.initial_state, &moved.reset}) {
      if (tensor->defined()) *tensor = tensor->to(device);
    }
    return moved;
  }

  /// Steps [begin, end) from `state`.
  ScanArguments steps(int64_t begin, int64_t end, const at::Tensor& state) const {
    auto part = *this;
    for (auto* tensor : {&part.u, &part.delta, &part.B, &part.C, &part.z, &part.reset}) {
      if (tensor->defined()) *tensor = tensor->slice(0, begin, end);
    }
    part.initial_state = state;
    return part;
  }

  /// Rows [begin, begin + count).
  ScanArguments rows(int64_t begin, int64_t count) const {
    auto part = *this;
    for (auto* tensor : {&part.u, &part.delta, &part.B, &part.C, &part.z, &part.reset}) {
      if (tensor->defined()) *tensor = tensor->narrow(1, begin, count);
    }
    if (initial_state.defined()) part.initial_state = initial_state.narrow(0, begin, count);
    return part;
  }
};

/// One step, odd lengths, chunks cut short, channels and states that fill no tile, groups.
inline std::vector<ScanProblem> odd_shapes() {
  return {{1, 1, 16, 1},    {1, 5, 3, 16, 3},    {3, 2, 20, 8},   {15, 1, 16, 17},
          {16, 2, 17, 16},  {17, 9, 15, 4},      {33, 2, 70, 16}, {40, 3, 132, 8, 2},
          {127, 2, 16, 16}, {129, 1, 24, 17, 2}, {2, 1, 5, 64},   {19, 2, 33, 256},
          {19, 2, 33, 32},  {21, 2, 40, 128}};
}

inline ScanArguments arguments_of(const ScanProblem& p, at::ScalarType dtype = at::kFloat) {
  return {p.options, to(inputs_of(p), dtype), reset_of(p)};
}

inline Op kernel(const ScanProblem& p) {
  return [=](const Tensors& in) { return ScanArguments(p.options, in, reset_of(p)).run(); };
}

inline Op reference(const ScanProblem& p) {
  return
      [=](const Tensors& in) { return ScanArguments(p.options, in, reset_of(p)).run_reference(); };
}

/// Every combination of the optional arguments.
inline std::vector<ScanOptions> all_options() {
  std::vector<ScanOptions> all;
  for (int bits = 0; bits < 64; ++bits) {
    const auto bit = [&](int i) { return (bits >> i & 1) != 0; };
    all.push_back({bit(0), bit(1), bit(2), bit(3), bit(4), bit(5)});
  }
  return all;
}

/// Wrong shapes, dtypes and devices are named.
inline void expect_bad_input_is_named(at::Device device) {
  using ::testing::HasSubstr;
  const ScanProblem p{3, 2, 6, 4, 2};
  const auto fails = [&](at::Tensor ScanArguments::*argument, const at::Tensor& value) {
    auto in = arguments_of(p).to(device);
    in.*argument = value.defined() && !value.is_meta() ? value.to(device) : value;
    return error_of([&] { in.run(); });
  };
  const auto named = at::empty({0}, device).device().str();
  using S = ScanArguments;
  EXPECT_THAT(fails(&S::u, at::Tensor()), HasSubstr("selective_scan: u must be a tensor"));
  EXPECT_THAT(fails(&S::u, at::zeros({3, 2})),
              HasSubstr("selective_scan: u must be [T, B, d_inner], got [3, 2]"));
  EXPECT_THAT(
      fails(&S::u, at::zeros({3, 2, 6}, at::kLong)),
      HasSubstr("selective_scan: u must be float64, float32, float16 or bfloat16, got int64"));
  EXPECT_THAT(
      fails(&S::delta, at::zeros({3, 2, 5})),
      HasSubstr("selective_scan: delta must be [T, B, d_inner] = [3, 2, 6], got [3, 2, 5]"));
  EXPECT_THAT(fails(&S::delta, at::Tensor()), HasSubstr("selective_scan: delta must be a tensor"));
  EXPECT_THAT(fails(&S::A, at::zeros({5, 4})),
              HasSubstr("selective_scan: A must be [d_inner, d_state] = [6, 4], got [5, 4]"));
  EXPECT_THAT(fails(&S::A, at::zeros({6, 4}, at::kDouble)),
              HasSubstr("selective_scan: A must have the dtype of u, float32, got float64"));
  EXPECT_THAT(fails(&S::A, at::zeros({6, 0})), HasSubstr("d_state must be at least 1"));
  EXPECT_THAT(fails(&S::B, at::zeros({3, 2, 4})),
              HasSubstr("selective_scan: B must be [T, B, groups, d_state], got [3, 2, 4]"));
  EXPECT_THAT(fails(&S::B, at::zeros({3, 2, 4, 4})),
              HasSubstr("selective_scan: groups of B must divide d_inner = 6, got 4"));
  EXPECT_THAT(fails(&S::C, at::zeros({3, 2, 1, 4})),
              HasSubstr("C must be [T, B, groups, d_state] = [3, 2, 2, 4], got [3, 2, 1, 4]"));
  EXPECT_THAT(fails(&S::D, at::zeros({5})), HasSubstr("D must be [d_inner] = [6], got [5]"));
  EXPECT_THAT(fails(&S::z, at::zeros({3, 2})), HasSubstr("z must be [T, B, d_inner] = [3, 2, 6]"));
  EXPECT_THAT(fails(&S::delta_bias, at::zeros({7})), HasSubstr("delta_bias must be [d_inner]"));
  EXPECT_THAT(fails(&S::initial_state, at::zeros({3, 6, 4})),
              HasSubstr("initial_state must be [B, d_inner, d_state] = [2, 6, 4], got [3, 6, 4]"));
  EXPECT_THAT(fails(&S::initial_state, at::zeros({2, 6, 4}, at::kMeta)),
              HasSubstr("initial_state must be on the device of u, " + named + ", got meta"));
  EXPECT_THAT(fails(&S::initial_state, at::zeros({2, 6, 4}, at::kDouble)),
              HasSubstr("initial_state must have the dtype of u"));
  EXPECT_THAT(fails(&S::reset, at::zeros({2, 3}, at::kBool)),
              HasSubstr("reset must be [T, B] = [3, 2], got [2, 3]"));
  EXPECT_THAT(fails(&S::reset, at::zeros({3, 2})), HasSubstr("reset must be bool, got float32"));
  const auto in = arguments_of(p).to(device);
  EXPECT_THAT(error_of([&] {
                selective_scan_update(in.u[0], in.delta[0], in.A, in.B[0], in.C, in.initial_state);
              }),
              HasSubstr("selective_scan_update: C must be [B, groups, d_state], got [3, 2, 2, 4]"));
}

/// Steps that make the last delta' the last state of each of N indices.
inline at::Tensor last_size(const at::Tensor& delta, int64_t N) {
  const auto T = delta.size(0), D = delta.size(2);
  const auto options = delta.options().requires_grad(false);
  const auto u = at::zeros({T, 1, D}, options), matrix = at::ones({T, 1, 1, N}, options);
  u[T - 1] = 1;
  const auto A = at::zeros({D, N}, options);
  return std::get<1>(selective_scan(u, delta, A, matrix, matrix, {}, {}, {}, true))[0];
}

/// Decays of exactly 1 and 0, beyond them, and A that is not finite, on a device.
inline void expect_extreme_decays_are_exact(at::Device device) {
  const auto one = at::ones({1, 1, 1}, device);
  const auto step = [&](double A, double delta) {
    return std::get<1>(selective_scan(one, one * delta, at::full({1, 1}, A, one.options()),
                                      one.unsqueeze(-1), one.unsqueeze(-1), {}, {}, {}, false,
                                      3 * one))
        .item<float>();
  };
  EXPECT_EQ(step(0, 1), 4);
  EXPECT_EQ(step(-200, 1), 1);
  EXPECT_EQ(step(-1e38, 1e3), 1e3f);
  EXPECT_EQ(step(-kInfinity, 1), 1);
  EXPECT_EQ(step(-1, 0), 3);
  EXPECT_EQ(step(-kInfinity, 0), 3);
  EXPECT_EQ(step(kInfinity, 0), 3);
  EXPECT_EQ(step(200, 1), kInfinity);
  EXPECT_TRUE(std::isnan(step(std::nan(""), 1)));
}

}  // namespace retain::testing
