#pragma once

#include <ATen/ATen.h>
#include <c10/core/Event.h>
#include <retain/experiments/commands.h>
#include <retain/experiments/evaluate.h>

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

/// What an op does at one size. Bytes count every input and output once.
struct OpCase {
  std::vector<at::Tensor> inputs;        ///< that get gradients
  std::function<at::Tensor()> fused;     ///< the op, to its first output
  std::function<at::Tensor()> composed;  ///< the same by LibTorch's own ops; none if there is none
  double fwd_bytes = 0, bwd_bytes = 0;
  double fwd_exponentials = 0, bwd_exponentials = 0;
  double fwd_multiply_adds = 0, bwd_multiply_adds = 0;
  double activation_bytes = 0;  ///< of all inputs and outputs of the ops of a block
  bool acting = false;  ///< a step of an agent: repeated in a CUDA graph, with what caches hold
};

OpCase make_case(const std::string& op, const OpShape& shape, at::Device device);

}  // namespace retain
