#include <retain/experiments/bench.h>
#include <retain/experiments/names.h>
#include <retain/experiments/options.h>
#include <retain/experiments/run_options.h>
#include <retain/experiments/text.h>

#include <cmath>
#include <iostream>

namespace retain {
namespace {

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
  std::vector<OpShape> rows = {{8, 2048, 1536, 16}, {16, 512, 1024, 32}, {1, 512, 1024, 32},
                               {64, 128, 512, 16},  {256, 64, 512, 16},  {32, 1024, 256, 16},
                               {16, 8192, 512, 16}, {4, 65536, 512, 16}, {1, 65536, 256, 16},
                               {1, 1048576, 64, 16}};
  for (const int64_t batch : {1, 64, 1024, 8192}) {
    if (op == "conv") rows.push_back({batch, 1, 512, 16});
  }
  return rows;
}

std::vector<std::string> cells(const Pass& pass) {
  if (pass.fused.median == 0) return {"-", "-", "-", "-", "-"};
  const double spread = (pass.fused.high - pass.fused.low) / pass.fused.median;
  return {fixed(1e3 * pass.fused.median, 4), percent(spread), fixed(pass.bytes / 1e6, 1),
          percent(pass.share) + " " + pass.limit,
          std::isnan(pass.composed) ? "-" : fixed(pass.composed / pass.fused.median, 1) + "x"};
}

std::vector<std::string> row(const OpMeasurement& m) {
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

Json to_json(const OpMeasurement& m) {
  return {{"batch", m.shape.batch},          {"steps", m.shape.steps},
          {"channels", m.shape.channels},    {"d_state", m.shape.d_state},
          {"dtype", name_of(m.shape.dtype)}, {"forward", to_json(m.fwd)},
          {"backward", to_json(m.bwd)},      {"peak_bytes", m.peak_bytes},
          {"kept_share", m.kept_share}};
}

/// What is to be measured.
struct OpBench {
  OpShape shape;
  Measuring how;
  std::string dtype = "fp32", device = "cpu", json;
  int64_t threads = 0;
  bool table = false, smoke = false, tf32 = false;
};

Options options_of(const std::string& op, OpBench& bench) {
  Options options("retain bench " + op + " [options]",
                  "Measures one op, forward and backward: milliseconds (median), their spread, the "
                  "bytes that it must move, the share of the limit that binds (memory, "
                  "exponentials, multiply-adds or tensor cores) and how many times longer the same "
                  "takes by LibTorch's own ops; of a step, the acting step of a block in a CUDA "
                  "graph, by its GRUCell; of state, the memory of a block taken out, put back and "
                  "cleared by mask, by the block's pass over the steps. kept: what a block's "
                  "forward keeps for its backward, as a share of all that its ops read and write.");
  options.add("batch", bench.shape.batch, {.min = 1}, "Rows.");
  options.add("steps", bench.shape.steps, {.min = 1}, "Time steps; an update and a step have one.");
  options.add("channels", bench.shape.channels, {.min = 1},
              "d_inner; of a block and its step d_model.");
  options.add("d_state", bench.shape.d_state, {.min = 1}, "State size a channel.");
  options.add("dtype", bench.dtype, "fp32, fp16 or bf16; the state stays fp32.");
  options.add("device", bench.device, "cpu, cuda or cuda:N.");
  options.add("repetitions", bench.how.repetitions, {.min = 1},
              "Runs measured, after two to warm up.");
  options.add("longest_composed", bench.how.longest_composed, {.min = 0},
              "Compare with LibTorch's ops up to this many steps.");
  add_threads(options, bench.threads);
  options.add_flag("graph", bench.how.graph,
                   "Forward and backward in a CUDA graph, where the host's launches cost nothing.");
  options.add_flag("recompute", bench.shape.recompute,
                   "Of a block: keep nothing for the backward, run the forward again there.");
  options.add_flag("tf32", bench.tf32, "Let a GPU round fp32 factors of matrix products to TF32.");
  options.add_flag("table", bench.table, "The rows of the published comparison.");
  options.add_flag("smoke", bench.smoke, "A size that takes no time: does it run at all?");
  options.add("json", bench.json, "Write the figures to this file, too.");
  return options;
}

bool has_one_step(const std::string& op) { return op == "update" || op == "step"; }

/// Throws UsageError where an option would change nothing.
void check_options(const std::string& op, const Options& options, const OpBench& bench) {
  const auto refuse = [&](std::initializer_list<const char*> names, const std::string& reason) {
    for (const char* name : names) {
      if (options.given(name)) throw UsageError("--" + std::string(name) + ": " + reason);
    }
  };
  if (op != "block") refuse({"recompute"}, "of a block alone");
  if (has_one_step(op)) refuse({"steps"}, "an " + op + " has one");
  if (op == "conv" || op == "norm") refuse({"d_state"}, "a " + op + " has none");
  if (bench.table || bench.smoke) {
    const std::string given = bench.table ? "--table" : "--smoke";
    if (bench.table) refuse({"smoke"}, given + " has sizes of its own");
    refuse({"batch", "steps", "channels", "d_state"}, given + " has sizes of its own");
  }
  const bool cpu = at::Device(bench.device).is_cpu(), trains = !has_one_step(op) && op != "state";
  if (cpu || !trains) refuse({"graph"}, "of a scan, conv, norm or block on a CUDA device alone");
  if (cpu) refuse({"tf32"}, "on a CUDA device alone");
}

std::vector<OpShape> shapes_of(const std::string& op, const OpBench& bench) {
  std::vector<OpShape> shapes = {bench.shape};
  if (bench.table) shapes = table_of(op, at::Device(bench.device).is_cpu());
  if (bench.smoke) shapes = {{2, 5, 8, 4}};
  for (auto& shape : shapes) {
    if (has_one_step(op)) shape.steps = 1;
    shape.dtype = dtype_of(bench.dtype);
    shape.recompute = bench.shape.recompute;
  }
  return shapes;
}

Json to_json(const Limits& limits) {
  return {{"copy_bytes_per_second", limits.bytes},
          {"exponentials_per_second", limits.exponentials},
          {"multiply_adds_per_second", limits.multiply_adds},
          {"products_per_second", limits.products}};
}

}  // namespace

int bench_op_command(const std::string& op, const Arguments& arguments) {
  OpBench bench;
  auto options = options_of(op, bench);
  if (!options.parse(arguments)) return 0;
  check_device(bench.device);
  check_options(op, options, bench);
  const auto shapes = shapes_of(op, bench);
  const at::Device device(bench.device);
  use_threads(bench.threads);
  use_tf32(bench.tf32);

  const Limits limits = bench.smoke ? Limits{} : limits_of(op, device, shapes.front().dtype);
  std::cout << op << " on " << bench.device << ": copy " << fixed(limits.bytes / 1e9, 0)
            << " GB/s, " << short_count(limits.exponentials) << " exponentials/s, "
            << short_count(limits.multiply_adds) << " multiply-adds/s"
            << (limits.products > 0 ? ", " + short_count(limits.products) + " of products" : "")
            << "\n"
            << std::flush;
  std::vector<std::vector<std::string>> rows = {{"dtype", "batch", "steps", "channels", "d_state",
                                                 "fwd ms", "spread", "MB", "of limit", "LibTorch",
                                                 "bwd ms", "spread", "MB", "of limit", "LibTorch",
                                                 "Mtokens/s", "peak MB", "kept"}};
  Json results = Json::array();
  for (const OpShape& shape : shapes) {
    const auto measured = measure_op(op, shape, device, limits, bench.how);
    rows.push_back(row(measured));
    results.push_back(to_json(measured));
  }
  std::cout << table(rows);
  if (!bench.json.empty()) {
    Json report = {{"format", 1},
                   {"benchmark", op},
                   {"device", bench.device},
                   {"repetitions", bench.how.repetitions},
                   {"results", results}};
    report.update(to_json(limits));
    write_json(bench.json, report);
  }
  return 0;
}

}  // namespace retain
