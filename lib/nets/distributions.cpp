#include <ATen/ATen.h>
#include <retain/lib/dtype_name.h>
#include <retain/lib/nets/distributions.h>
#include <retain/lib/ops/casts.h>

#include <cmath>
#include <limits>
#include <numbers>
#include <numeric>

namespace retain {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

std::vector<int64_t> with_last(at::IntArrayRef leading, int64_t last) {
  auto sizes = leading.vec();
  sizes.push_back(last);
  return sizes;
}

void check_sizes(const char* name, const Tensor& t, at::IntArrayRef sizes) {
  TORCH_CHECK(t.sizes() == sizes, "Distribution: ", name, " must be ", sizes, ", got ", t.sizes());
}

void check_discrete(const Tensor& action, at::IntArrayRef sizes) {
  check_sizes("action", action, sizes);
  TORCH_CHECK(action.scalar_type() == at::kLong, "Distribution: action must be int64, got ",
              dtype_name(action.scalar_type()));
}

class Categorical : public Distribution {
 public:
  Categorical(const Tensor& logits, const Tensor& legal) : legal_(legal) {
    TORCH_CHECK(logits.dim() >= 1 && logits.size(-1) >= 1,
                "make_categorical: logits must be [..., A] with A at least 1, got ",
                logits.sizes());
    if (legal.defined()) check_legal(logits);
    const auto wide = at_least_fp32(logits);
    log_probs_ = (legal.defined() ? wide.masked_fill(legal.logical_not(), -kInfinity) : wide)
                     .log_softmax(-1);
  }

  Tensor log_prob(const Tensor& action) const override {
    check_discrete(action, leading());
    return log_probs_.gather(-1, action.unsqueeze(-1)).squeeze(-1);
  }

  Tensor entropy() const override {
    // 0 · (−inf) is NaN, forward and backward: illegal actions get a finite logarithm first.
    const auto finite =
        legal_.defined() ? log_probs_.masked_fill(legal_.logical_not(), 0) : log_probs_;
    return -(log_probs_.exp() * finite).sum(-1);
  }

  Tensor mode() const override { return log_probs_.argmax(-1); }
  int64_t uniforms() const override { return 1; }

  Tensor sample(const Tensor& uniform) const override {
    at::NoGradGuard no_grad;
    check_sizes("uniform", uniform, with_last(leading(), 1));
    const auto cdf = log_probs_.to(at::kDouble).exp().cumsum(-1);
    const auto total = cdf.slice(-1, -1);
    // Counts the actions below: an action of probability 0 never is the first above, not even at
    // the far end.
    return (cdf <= uniform * total).logical_and_(cdf < total).sum(-1);
  }

 private:
  at::IntArrayRef leading() const { return log_probs_.sizes().slice(0, log_probs_.dim() - 1); }

  void check_legal(const Tensor& logits) const {
    TORCH_CHECK(legal_.sizes() == logits.sizes(), "make_categorical: legal must be ",
                logits.sizes(), " as logits are, got ", legal_.sizes());
    TORCH_CHECK(legal_.scalar_type() == at::kBool, "make_categorical: legal must be bool, got ",
                dtype_name(legal_.scalar_type()));
    // On other devices the answer would stall the stream.
    TORCH_CHECK(!legal_.is_cpu() || legal_.any(-1).all().item<bool>(),
                "make_categorical: legal must allow at least one action everywhere");
  }

  Tensor legal_, log_probs_;
};

class MultiDiscrete : public Distribution {
 public:
  MultiDiscrete(const Tensor& logits, const std::vector<int64_t>& num_values) {
    const int64_t total = std::accumulate(num_values.begin(), num_values.end(), int64_t{0});
    TORCH_CHECK(!num_values.empty(), "make_multi_discrete: num_values is empty");
    for (int64_t n : num_values)
      TORCH_CHECK(n >= 1, "make_multi_discrete: num_values must be at least 1, got ", n);
    TORCH_CHECK(logits.dim() >= 1 && logits.size(-1) == total,
                "make_multi_discrete: logits must be [..., sum(num_values)] = [..., ", total,
                "], got ", logits.sizes());
    leading_ = logits.sizes().slice(0, logits.dim() - 1).vec();
    for (const auto& part : logits.split_with_sizes(num_values, -1))
      components_.emplace_back(part, Tensor());
  }

  Tensor log_prob(const Tensor& action) const override {
    check_discrete(action, with_last(leading_, uniforms()));
    const auto parts =
        each([&](const Categorical& c, int64_t i) { return c.log_prob(action.select(-1, i)); });
    return parts.sum(-1);
  }

  Tensor entropy() const override {
    return each([](const Categorical& c, int64_t) { return c.entropy(); }).sum(-1);
  }

  Tensor mode() const override {
    return each([](const Categorical& c, int64_t) { return c.mode(); });
  }

  int64_t uniforms() const override { return static_cast<int64_t>(components_.size()); }

  Tensor sample(const Tensor& uniform) const override {
    check_sizes("uniform", uniform, with_last(leading_, uniforms()));
    return each(
        [&](const Categorical& c, int64_t i) { return c.sample(uniform.slice(-1, i, i + 1)); });
  }

 private:
  template <typename Function>
  Tensor each(Function function) const {
    std::vector<Tensor> results;
    for (int64_t i = 0; i < uniforms(); ++i) results.push_back(function(components_[i], i));
    return at::stack(results, -1);
  }

  std::vector<int64_t> leading_;
  std::vector<Categorical> components_;
};

class Gaussian : public Distribution {
 public:
  Gaussian(const Tensor& mean, const Tensor& log_std)
      : mean_(mean), wide_mean_(at_least_fp32(mean)), log_std_(at_least_fp32(log_std)) {
    TORCH_CHECK(mean.dim() >= 1, "make_gaussian: mean must be [..., A], got ", mean.sizes());
    TORCH_CHECK(log_std.sizes() == mean.sizes().slice(mean.dim() - 1),
                "make_gaussian: log_std must be [A] = ", mean.sizes().slice(mean.dim() - 1),
                ", got ", log_std.sizes());
  }

  Tensor log_prob(const Tensor& action) const override {
    check_sizes("action", action, mean_.sizes());
    const auto standard = (action - wide_mean_) * (-log_std_).exp();
    return (-0.5 * standard.square() - log_std_ - 0.5 * std::log(2 * std::numbers::pi)).sum(-1);
  }

  Tensor entropy() const override {
    const double unit = 0.5 * (1 + std::log(2 * std::numbers::pi));
    return (log_std_ + unit).sum().expand(leading());
  }

  Tensor mode() const override { return mean_; }
  int64_t uniforms() const override { return 2 * mean_.size(-1); }

  Tensor sample(const Tensor& uniform) const override {
    at::NoGradGuard no_grad;
    check_sizes("uniform", uniform, with_last(leading(), uniforms()));
    const auto pairs = uniform.to(at::kDouble).unflatten(-1, {mean_.size(-1), 2});
    const auto radius = (-2 * pairs.select(-1, 0).log()).sqrt();
    const auto normal = radius * (2 * std::numbers::pi * pairs.select(-1, 1)).cos();
    return (wide_mean_ + log_std_.to(at::kDouble).exp() * normal).to(mean_.scalar_type());
  }

 private:
  at::IntArrayRef leading() const { return mean_.sizes().slice(0, mean_.dim() - 1); }

  Tensor mean_, wide_mean_, log_std_;
};

}  // namespace

std::unique_ptr<Distribution> make_categorical(const Tensor& logits, const Tensor& legal) {
  return std::make_unique<Categorical>(logits, legal);
}

std::unique_ptr<Distribution> make_multi_discrete(const Tensor& logits,
                                                  const std::vector<int64_t>& num_values) {
  return std::make_unique<MultiDiscrete>(logits, num_values);
}

std::unique_ptr<Distribution> make_gaussian(const Tensor& mean, const Tensor& log_std) {
  return std::make_unique<Gaussian>(mean, log_std);
}

}  // namespace retain
