#include <ATen/Parallel.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <retain/experiments/bench.h>
#include <retain/experiments/names.h>
#include <retain/experiments/options.h>
#include <retain/experiments/run_options.h>
#include <retain/experiments/text.h>
#include <retain/kernels/common/peak.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>
#include <iostream>

namespace retain {
namespace {

using at::Tensor;

/// What the device can do a second.
struct Limits {
  double bytes = 0, exponentials = 0, multiply_adds = 0;
  bool one_unit = false;  ///< exponentials are made of multiply-adds, as on a CPU: their times add
};

/// One pass of an op; composed is NaN where there is nothing to compare with.
struct Pass {
  Sample fused = {};
  double bytes = 0;                    ///< that it must move
  double composed = NAN, share = NAN;  ///< share of the limit that binds
  const char* limit = "-";
};

struct Measurement {
  OpShape shape;
  Pass fwd = {}, bwd = {};
  double peak_bytes = NAN;  ///< of the backward pass, what came before it included
  double kept_share = NAN;  ///< of a block's activations: what its forward keeps for the backward
};

Limits limits_of(at::Device device) {
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
  return limits;
}

/// The limit that takes longest, and what share of the measured time it takes.
void compare(const Limits& limits, double bytes, double exponentials, double multiply_adds,
             Pass& pass) {
  double longest = 0;
  pass.bytes = bytes;
  const auto consider = [&](const char* name, double work, double rate) {
    if (rate <= 0 || work / rate <= longest) return;
    longest = work / rate;
    pass.limit = name;
  };
  consider("memory", bytes, limits.bytes);
  consider("exp", exponentials, limits.exponentials);
  consider("fma", multiply_adds, limits.multiply_adds);
  if (limits.one_unit && exponentials > 0) {
    consider("exp+fma", exponentials / limits.exponentials + multiply_adds / limits.multiply_adds,
             1);
  }
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
void measure_memory(at::Device device, const OpCase& op, Measurement& result) {
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
Measurement measure_acting(const OpCase& op, const OpShape& shape, at::Device device,
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
  Measurement result{.shape = shape};
  result.fwd.fused = time(op.fused);
  result.fwd.composed = time(op.composed).median;
  compare(limits, op.fwd_bytes, op.fwd_exponentials, op.fwd_multiply_adds, result.fwd);
  return result;
}

/// A training pass in a graph: the forward, and what forward and backward take beyond it.
Measurement measure_captured(const OpCase& op, const OpShape& shape, at::Device device,
                             const Limits& limits, int64_t repetitions) {
  Stopwatch watch(device, repetitions);
  Measurement result{.shape = shape};
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
  compare(limits, op.fwd_bytes, op.fwd_exponentials, op.fwd_multiply_adds, result.fwd);
  compare(limits, op.bwd_bytes, op.bwd_exponentials, op.bwd_multiply_adds, result.bwd);
  return result;
}

Measurement measure(const std::string& name, const OpShape& shape, at::Device device,
                    const Limits& limits, int64_t repetitions, int64_t longest_composed,
                    bool graph) {
  const OpCase op = make_case(name, shape, device);
  if (op.acting) return measure_acting(op, shape, device, limits, repetitions);
  if (graph && !op.inputs.empty()) {
    return measure_captured(op, shape, device, limits, repetitions);
  }
  const bool compose = op.composed && shape.steps <= longest_composed;
  Stopwatch watch(device, repetitions);
  Measurement result{.shape = shape};
  {
    at::NoGradGuard no_grad;
    result.fwd.fused = watch.measure([&] { op.fused(); });
    if (compose) result.fwd.composed = watch.measure([&] { op.composed(); }).median;
  }
  compare(limits, op.fwd_bytes, op.fwd_exponentials, op.fwd_multiply_adds, result.fwd);
  if (op.inputs.empty()) return result;
  result.bwd.fused = measure_backward(watch, op, op.fused);
  if (compose) result.bwd.composed = measure_backward(watch, op, op.composed).median;
  compare(limits, op.bwd_bytes, op.bwd_exponentials, op.bwd_multiply_adds, result.bwd);
  measure_memory(device, op, result);
  return result;
}

std::string name_of(at::ScalarType dtype) {
  return dtype == at::kHalf ? "fp16" : dtype == at::kBFloat16 ? "bf16" : "fp32";
}

at::ScalarType dtype_of(const std::string& name) {
  check_name("dtype", name, {"fp32", "fp16", "bf16"});
  return name == "fp16" ? at::kHalf : name == "bf16" ? at::kBFloat16 : at::kFloat;
}

/// The rows of the published comparison; the CPU gets those of training on a CPU.
std::vector<OpShape> table_of(const std::string& op, bool cpu) {
  if (op == "update")
    return {{1, 1, 512, 16},
            {64, 1, 512, 16},
            {1024, 1, 512, 16},
            {8192, 1, 512, 16},
            {65536, 1, 512, 16}};
  if (op == "state") return {{64, 128, 256, 16}};
  if (op == "step")
    return {{64, 1, 256, 16}, {1024, 1, 256, 16}, {8192, 1, 256, 16}, {65536, 1, 256, 16}};
  if (cpu) return {{64, 128, 64, 16}, {256, 128, 128, 16}, {64, 128, 128, 8}};
  if (op == "block")
    return {{64, 128, 256, 16}, {256, 64, 256, 16}, {16, 8192, 256, 16}, {4, 65536, 256, 16}};
  return {{8, 2048, 1536, 16}, {16, 512, 1024, 32}, {1, 512, 1024, 32},  {64, 128, 512, 16},
          {256, 64, 512, 16},  {32, 1024, 256, 16}, {16, 8192, 512, 16}, {4, 65536, 512, 16},
          {1, 65536, 256, 16}, {1, 1048576, 64, 16}};
}

std::vector<std::string> cells(const Pass& pass) {
  if (pass.fused.median == 0) return {"-", "-", "-", "-", "-"};
  const double spread = (pass.fused.high - pass.fused.low) / pass.fused.median;
  return {fixed(1e3 * pass.fused.median, 4), percent(spread), fixed(pass.bytes / 1e6, 1),
          percent(pass.share) + " " + pass.limit,
          std::isnan(pass.composed) ? "-" : fixed(pass.composed / pass.fused.median, 1) + "x"};
}

std::vector<std::string> row(const Measurement& m) {
  std::vector<std::string> all = {name_of(m.shape.dtype), std::to_string(m.shape.batch),
                                  std::to_string(m.shape.steps), std::to_string(m.shape.channels),
                                  std::to_string(m.shape.d_state)};
  for (const Pass* pass : {&m.fwd, &m.bwd}) {
    for (auto& cell : cells(*pass)) all.push_back(std::move(cell));
  }
  const double tokens = static_cast<double>(m.shape.batch * m.shape.steps);
  all.push_back(fixed(tokens / (m.fwd.fused.median + m.bwd.fused.median) / 1e6, 2));
  all.push_back(fixed(m.peak_bytes / 1e6, 1));
  all.push_back(fixed(m.kept_share, 2));
  return all;
}

Json to_json(const Pass& pass) {
  return {{"seconds", to_json(pass.fused)},
          {"bytes", pass.bytes},
          {"composed_seconds", pass.composed},
          {"share", pass.share},
          {"limit", pass.limit}};
}

Json to_json(const Measurement& m) {
  return {{"batch", m.shape.batch},          {"steps", m.shape.steps},
          {"channels", m.shape.channels},    {"d_state", m.shape.d_state},
          {"dtype", name_of(m.shape.dtype)}, {"forward", to_json(m.fwd)},
          {"backward", to_json(m.bwd)},      {"peak_bytes", m.peak_bytes},
          {"kept_share", m.kept_share}};
}

}  // namespace

int bench_op_command(const std::string& op, const Arguments& arguments) {
  OpShape shape;
  std::string dtype = "fp32", device = "cpu", json;
  int64_t repetitions = 20, longest_composed = 512, threads = 0;
  bool table_rows = false, smoke = false, tf32 = false, graph = false;
  Options options("retain bench " + op + " [options]",
                  "Measures one op, forward and backward: milliseconds (median), their spread, the "
                  "bytes that it must move, the share of the limit that binds (memory, "
                  "exponentials or multiply-adds) and how many times longer the same takes by "
                  "LibTorch's own ops; of a step, the acting step of a block in a CUDA graph, by "
                  "its GRUCell; of state, the memory of a block taken out, put back and cleared by "
                  "mask, by the block's pass over the steps. kept: what a block's forward keeps "
                  "for its backward, as a share of all that its ops read and write.");
  options.add("batch", shape.batch, {.min = 1}, "Rows.");
  options.add("steps", shape.steps, {.min = 1}, "Time steps; an update and a step have one.");
  options.add("channels", shape.channels, {.min = 1}, "d_inner; of a block and its step d_model.");
  options.add("d_state", shape.d_state, {.min = 1}, "State size a channel.");
  options.add("dtype", dtype, "fp32, fp16 or bf16; the state stays fp32.");
  options.add("device", device, "cpu, cuda or cuda:N.");
  options.add("repetitions", repetitions, {.min = 1}, "Runs measured, after two to warm up.");
  options.add("longest_composed", longest_composed, {.min = 0},
              "Compare with LibTorch's ops up to this many steps.");
  add_threads(options, threads);
  options.add_flag("graph", graph,
                   "Forward and backward in a CUDA graph, where the host's launches cost nothing.");
  options.add_flag("recompute", shape.recompute,
                   "Of a block: keep nothing for the backward, run the forward again there.");
  options.add_flag("tf32", tf32, "Let a GPU round fp32 factors of matrix products to TF32.");
  options.add_flag("table", table_rows, "The rows of the published comparison.");
  options.add_flag("smoke", smoke, "A size that takes no time: does it run at all?");
  options.add("json", json, "Write the figures to this file, too.");
  if (!options.parse(arguments)) return 0;
  if (shape.recompute && op != "block") throw UsageError("--recompute: of a block alone");
  shape.dtype = dtype_of(dtype);
  check_device(device);
  const at::Device where(device);
  const bool trains = op == "scan" || op == "conv" || op == "norm" || op == "block";
  if (graph && (where.is_cpu() || !trains))
    throw UsageError("--graph: of a scan, conv, norm or block on a CUDA device alone");
  use_threads(threads);
  use_tf32(tf32);
  const bool one_step = op == "update" || op == "step";
  if (one_step) shape.steps = 1;
  std::vector<OpShape> shapes = {shape};
  if (table_rows) shapes = table_of(op, where.is_cpu());
  if (smoke) shapes = {{2, one_step ? 1 : 5, 8, 4}};
  for (auto& each : shapes) {
    each.dtype = shape.dtype;
    each.recompute = shape.recompute;
  }

  const Limits limits = smoke ? Limits{} : limits_of(where);
  std::cout << op << " on " << device << ": copy " << fixed(limits.bytes / 1e9, 0) << " GB/s, "
            << short_count(limits.exponentials) << " exponentials/s, "
            << short_count(limits.multiply_adds) << " multiply-adds/s\n"
            << std::flush;
  std::vector<std::vector<std::string>> rows = {{"dtype", "batch", "steps", "channels", "d_state",
                                                 "fwd ms", "spread", "MB", "of limit", "LibTorch",
                                                 "bwd ms", "spread", "MB", "of limit", "LibTorch",
                                                 "Mtokens/s", "peak MB", "kept"}};
  Json results = Json::array();
  for (const OpShape& each : shapes) {
    const auto measured = measure(op, each, where, limits, repetitions, longest_composed, graph);
    rows.push_back(row(measured));
    results.push_back(to_json(measured));
  }
  std::cout << table(rows);
  if (!json.empty()) {
    write_json(json, {{"format", 1},
                      {"benchmark", op},
                      {"device", device},
                      {"copy_bytes_per_second", limits.bytes},
                      {"exponentials_per_second", limits.exponentials},
                      {"multiply_adds_per_second", limits.multiply_adds},
                      {"repetitions", repetitions},
                      {"results", results}});
  }
  return 0;
}

}  // namespace retain
