#include <retain/experiments/bench.h>

#ifdef RETAIN_HAS_CUDA
#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDAGuard.h>
#endif

namespace retain {

#ifdef RETAIN_HAS_CUDA

std::function<void()> captured(at::Device device, const std::function<void()>& run) {
  if (!device.is_cuda()) return run;
  const c10::cuda::CUDAGuard guard(device);
  const auto graph = std::make_shared<at::cuda::CUDAGraph>();
  const auto stream = c10::cuda::getStreamFromPool();
  {
    const c10::cuda::CUDAStreamGuard aside(stream);
    run();  // what is made once must not be made in the graph
    graph->capture_begin();
    run();
    graph->capture_end();
  }
  stream.synchronize();
  return [graph] { graph->replay(); };
}

#else

std::function<void()> captured(at::Device, const std::function<void()>& run) { return run; }

#endif

}  // namespace retain
