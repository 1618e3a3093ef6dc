#include <c10/core/impl/VirtualGuardImpl.h>
#include <retain/experiments/bench.h>
#include <retain/experiments/names.h>

#include <algorithm>
#include <chrono>
#include <iostream>

namespace retain {

Sample summarize(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const size_t half = values.size() / 2;
  const double median =
      values.size() % 2 == 1 ? values[half] : (values[half - 1] + values[half]) / 2;
  return {median, values.front(), values.back()};
}

Json to_json(const Sample& sample) {
  return {{"median", sample.median}, {"low", sample.low}, {"high", sample.high}};
}

Stopwatch::Stopwatch(at::Device device, int64_t repetitions, bool cold)
    : device_(device), repetitions_(repetitions) {
  constexpr int64_t kFlush = 256 << 20;  // bytes: several times the second-level cache of any GPU
  if (!device.is_cpu() && cold)
    flush_ = at::empty({kFlush}, at::TensorOptions(device).dtype(at::kByte));
}

double Stopwatch::time(const std::function<void()>& run) {
  if (device_.is_cpu()) {
    const auto start = std::chrono::steady_clock::now();
    run();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }
  if (flush_.defined()) flush_.fill_(1);
  const c10::impl::VirtualGuardImpl guard(device_.type());
  const auto stream = guard.getStream(device_);
  c10::Event start(device_.type(), c10::EventFlag::BACKEND_DEFAULT);
  c10::Event end(device_.type(), c10::EventFlag::BACKEND_DEFAULT);
  start.record(stream);
  run();
  end.record(stream);
  end.synchronize();
  return start.elapsedTime(end) / 1e3;
}

Sample Stopwatch::measure(const std::function<void()>& run, const std::function<void()>& prepare) {
  constexpr int64_t kWarmUp = 2;
  std::vector<double> seconds;
  for (int64_t i = 0; i < kWarmUp + repetitions_; ++i) {
    if (prepare) prepare();
    const double taken = time(run);
    if (i >= kWarmUp) seconds.push_back(taken);
  }
  return summarize(std::move(seconds));
}

int bench_command(const Arguments& arguments) {
  auto names = bench_op_names();
  names.insert(names.begin(), "train");
  if (!arguments.empty() && arguments.front().starts_with("-")) {
    if (arguments.front() != "--help" && arguments.front() != "-h")
      throw UsageError("which of " + join(names) + "?");
    std::cout
        << "Usage: retain bench WHAT [options]\n\nMeasures speed on this machine. WHAT is train, "
           "the whole training loop,\nor one op: "
        << join(bench_op_names()) << ".\nretain bench WHAT --help explains its options.\n";
    return 0;
  }
  const std::string what = arguments.empty() ? "" : arguments.front();
  check_name("benchmark", what, names);
  const Arguments rest(arguments.begin() + 1, arguments.end());
  return what == "train" ? bench_train_command(rest) : bench_op_command(what, rest);
}

}  // namespace retain
