#pragma once

#include <ATen/ATen.h>
#include <c10/core/Event.h>
#include <retain/experiments/commands.h>
#include <retain/experiments/evaluate.h>

#include <cmath>
#include <functional>
#include <string>
#include <vector>

namespace retain {

int bench_train_command(const Arguments& arguments);
/// `op` is one of bench_op_names().
int bench_op_command(const std::string& op, const Arguments& arguments);
std::vector<std::string> bench_op_names();

/// Of the repetitions of one measurement.
struct Sample {
  double median = 0, low = 0, high = 0;
};
Sample summarize(std::vector<double> values);
Json to_json(const Sample& sample);

/// Times work on a device, warmed up; `cold`: with caches that hold nothing of it, on a GPU.
class Stopwatch {
 public:
  Stopwatch(at::Device device, int64_t repetitions, bool cold = true);
  /// Seconds of `run`; `prepare` comes before each and is not counted.
  Sample measure(const std::function<void()>& run, const std::function<void()>& prepare = {});

 private:
  double time(const std::function<void()>& run);

  at::Device device_;
  int64_t repetitions_;
  at::Tensor flush_;
};

/// `run` as one launch: in a CUDA graph on a GPU if this build has CUDA; else `run` itself.
std::function<void()> captured(at::Device device, const std::function<void()>& run);

/// One size of one op, in the terms of the kernels; steps is 1 for an update.
struct OpShape {
  int64_t batch = 64, steps = 128, channels = 512, d_state = 16;
  at::ScalarType dtype = at::kFloat;
  bool recompute = false;  ///< of a block: its forward runs again in its backward
};

/// What a pass must do at least. Bytes count every input and output once.
struct Work {
  double bytes = 0, exponentials = 0, multiply_adds = 0;
  double products = 0;  ///< multiply-adds of LibTorch's matrix products
};

/// What an op does at one size.
struct OpCase {
  std::vector<at::Tensor> inputs;        ///< that get gradients
  std::function<at::Tensor()> fused;     ///< the op, to its first output
  std::function<at::Tensor()> composed;  ///< the same by LibTorch's own ops; none if there is none
  Work fwd, bwd;
  double activation_bytes = 0;  ///< of all inputs and outputs of the ops of a block
  bool acting = false;  ///< a step of an agent: repeated in a CUDA graph, with what caches hold
};

OpCase make_case(const std::string& op, const OpShape& shape, at::Device device);

/// What the device can do a second.
struct Limits {
  double bytes = 0, exponentials = 0, multiply_adds = 0;
  double products = 0;    ///< of multiply-adds on tensor cores; 0 where there are no such products
  bool one_unit = false;  ///< exponentials are made of multiply-adds, as on a CPU: their times add
};
/// Measured, those of products in `dtype`.
Limits limits_of(const std::string& op, at::Device device, at::ScalarType dtype);

/// One pass of an op; composed is NaN where there is nothing to compare with.
struct Pass {
  Sample fused = {};
  double bytes = 0;                    ///< that it must move
  double composed = NAN, share = NAN;  ///< share of the limit that binds
  const char* limit = "-";
};

struct OpMeasurement {
  OpShape shape;
  Pass fwd = {}, bwd = {};
  double peak_bytes = NAN;  ///< of the backward pass, what came before it included
  double kept_share = NAN;  ///< of a block's activations: what its forward keeps for the backward
};

/// How an op is measured.
struct Measuring {
  int64_t repetitions = 20;        ///< after two to warm up
  int64_t longest_composed = 512;  ///< steps up to which LibTorch's own ops are measured, too
  bool graph = false;              ///< forward and backward in a CUDA graph
};
OpMeasurement measure_op(const std::string& op, const OpShape& shape, at::Device device,
                         const Limits& limits, const Measuring& how);

}  // namespace retain
