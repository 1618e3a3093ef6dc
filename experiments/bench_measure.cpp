#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <retain/experiments/bench.h>
#include <retain/kernels/common/peak.h>
#include <torch/csrc/autograd/autograd.h>

namespace retain {
namespace {

using at::Tensor;

/// The limit that takes longest, and what share of the measured time it takes.
void compare(const Limits& limits, const Work& work, Pass& pass) {
  double longest = 0;
  pass.bytes = work.bytes;
  const auto consider = [&](const char* name, double seconds) {
    if (!(seconds > longest)) return;
    longest = seconds;
    pass.limit = name;
  };
  const auto seconds = [](double amount, double rate) { return rate > 0 ? amount / rate : 0; };
  const double exponentials = seconds(work.exponentials, limits.exponentials),
               multiply_adds =
                   seconds(work.multiply_adds + (limits.products > 0 ? 0 : work.products),
                           limits.multiply_adds);
  consider("memory", seconds(work.bytes, limits.bytes));
  consider("exp", exponentials);
  consider("fma", multiply_adds);
  consider("tensor cores", seconds(work.products, limits.products));
  if (limits.one_unit && exponentials > 0) consider("exp+fma", exponentials + multiply_adds);
  if (longest > 0) pass.share = longest / pass.fused.median;
}

/// Seconds of the backward pass of `run`.
Sample measure_backward(Stopwatch& watch, const OpCase& op, const std::function<Tensor()>& run) {
  Tensor y, dy;
  return watch.measure([&] { torch::autograd::grad({y}, op.inputs, {dy}, false, false, true); },
                       [&] {
                         y = run();
                         if (!dy.defined()) dy = at::randn_like(y);
                       });
}

/// Memory of one pass forward and backward.
void measure_memory(at::Device device, const OpCase& op, OpMeasurement& result) {
  if (device.is_cpu()) return;
  auto* allocator = at::getDeviceAllocator(device.type());
  const auto index = device.index() < 0 ? at::DeviceIndex{0} : device.index();
  const auto allocated = [&] { return allocator->getDeviceStats(index).allocated_bytes[0]; };
  allocator->resetPeakStats(index);
  const auto before = static_cast<double>(allocated().current);
  const auto y = op.fused();
  const double input = static_cast<double>(op.inputs.back().nbytes());
  const double kept = static_cast<double>(allocated().current) - before + input;
  torch::autograd::grad({y}, op.inputs, {at::ones_like(y)}, false, false, true);
  result.peak_bytes = static_cast<double>(allocated().peak);
  if (op.activation_bytes > 0) result.kept_share = kept / op.activation_bytes;
}

/// An agent's step, again and again in a graph, as is what it is compared with.
OpMeasurement measure_acting(const OpCase& op, const OpShape& shape, at::Device device,
                             const Limits& limits, int64_t repetitions) {
  constexpr int64_t kSteps = 20;
  Stopwatch watch(device, repetitions, /*cold=*/false);
  const at::NoGradGuard no_grad;
  const auto time = [&](const std::function<Tensor()>& step) {
    const auto run = captured(device, [&] { step(); });
    auto sample = watch.measure([&] {
      for (int64_t i = 0; i < kSteps; ++i) run();
    });
    for (double* seconds : {&sample.median, &sample.low, &sample.high}) *seconds /= kSteps;
    return sample;
  };
  OpMeasurement result{.shape = shape};
  result.fwd.fused = time(op.fused);
  result.fwd.composed = time(op.composed).median;
  compare(limits, op.fwd, result.fwd);
  return result;
}

/// A training pass in a graph: the forward, and what forward and backward take beyond it.
OpMeasurement measure_captured(const OpCase& op, const OpShape& shape, at::Device device,
                               const Limits& limits, int64_t repetitions) {
  Stopwatch watch(device, repetitions);
  OpMeasurement result{.shape = shape};
  const auto forward = captured(device, [&] {
    const at::NoGradGuard no_grad;
    op.fused();
  });
  const auto dy = at::randn_like(op.fused().detach());
  const auto train = captured(
      device, [&] { torch::autograd::grad({op.fused()}, op.inputs, {dy}, false, false, true); });
  result.fwd.fused = watch.measure(forward);
  const Sample total = watch.measure(train);
  const double passed = result.fwd.fused.median;
  result.bwd.fused = {total.median - passed, total.low - passed, total.high - passed};
  compare(limits, op.fwd, result.fwd);
  compare(limits, op.bwd, result.bwd);
  return result;
}

/// Forward and, where there are inputs that get gradients, backward.
OpMeasurement measure_passes(const OpCase& op, const OpShape& shape, at::Device device,
                             const Limits& limits, const Measuring& how) {
  const bool compose = op.composed && shape.steps <= how.longest_composed;
  Stopwatch watch(device, how.repetitions);
  OpMeasurement result{.shape = shape};
  {
    const at::NoGradGuard no_grad;
    result.fwd.fused = watch.measure([&] { op.fused(); });
    if (compose) result.fwd.composed = watch.measure([&] { op.composed(); }).median;
  }
  compare(limits, op.fwd, result.fwd);
  if (op.inputs.empty()) return result;
  result.bwd.fused = measure_backward(watch, op, op.fused);
  if (compose) result.bwd.composed = measure_backward(watch, op, op.composed).median;
  compare(limits, op.bwd, result.bwd);
  return result;
}

}  // namespace

Limits limits_of(const std::string& op, at::Device device, at::ScalarType dtype) {
  constexpr int64_t kElements = 128 << 20;
  const auto from = at::zeros({kElements}, at::TensorOptions(device).dtype(at::kFloat));
  const auto to = at::empty_like(from);
  Stopwatch watch(device, 7);
  Limits limits;
  limits.bytes = 8.0 * kElements / watch.measure([&] { Tensor(to).copy_(from); }).low;
  const auto peak = device.is_cpu() ? kernels::peak_cpu() : kernels::peak_cuda();
  const int units = device.is_cpu() ? at::get_num_threads() : 1;
  limits.exponentials = units * peak.exponentials;
  limits.multiply_adds = units * peak.multiply_adds;
  limits.one_unit = device.is_cpu();
  const bool products = op == "block" || op == "step";
  const bool narrow = dtype != at::kFloat || at::globalContext().allowTF32CuBLAS();
  if (!products || device.is_cpu() || !narrow) return limits;
  constexpr int64_t kSide = 8192;
  const auto factor = at::randn({kSide, kSide}, from.options()).to(dtype);
  const double multiply_adds = double{kSide} * kSide * kSide;
  limits.products = multiply_adds / watch.measure([&] { at::mm(factor, factor); }).low;
  return limits;
}

OpMeasurement measure_op(const std::string& op_name, const OpShape& shape, at::Device device,
                         const Limits& limits, const Measuring& how) {
  const OpCase op = make_case(op_name, shape, device);
  if (op.acting) return measure_acting(op, shape, device, limits, how.repetitions);
  auto result = how.graph ? measure_captured(op, shape, device, limits, how.repetitions)
                          : measure_passes(op, shape, device, limits, how);
  if (!op.inputs.empty()) measure_memory(device, op, result);
  return result;
}

}  // namespace retain
