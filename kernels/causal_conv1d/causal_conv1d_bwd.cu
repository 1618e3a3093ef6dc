// Backward pass of the depthwise causal convolution. With s_t the sum under the activation and
// g_t = dL/ds_t = dy_t act'(s_t):
//   dx_s = Σ_k weight[k] g_{s + K - 1 - k},   dweight[k] = Σ_t g_t x_{t - (K - 1) + k},
//   dbias = Σ_t g_t,
// where no term crosses a reset. s_t is computed again. A thread walks over the runs of time of its
// four channels with the windows of x and of the unfinished dx, the weights and their gradients in
// registers, while the next steps' inputs come to shared memory; behind a run it goes a few steps
// on, which finish the last dx. A block adds up its threads' dweight in shared memory, a second
// kernel the blocks', always in the same order. A step that no gradient reaches adds nothing, even
// if its inputs are NaN. To dy may add a product.

#include <retain/kernels/causal_conv1d/causal_conv1d_walk.cuh>
#include <retain/kernels/common/sum_parts.cuh>

namespace retain::kernels {
namespace {

constexpr int kThreads = 128;

/// How the threads of a block are laid over channels: `across` fours side by side, a power of two
/// at most 32, `kThreads / across` times.
int fours_across(int64_t D) {
  const int64_t fours = (D + 3) / 4;
  int across = 1;
  while (across < fours && across < 32) across *= 2;
  const auto idle = [&] { return (across - fours % across) % across; };
  while (across > 8 && 8 * idle() > fours) across /= 2;
  return across;
}

int64_t tiles_of(const CausalConv1dCudaInputs& in, int across) {
  return ((in.D + 3) / 4 + across - 1) / across;
}

/// Adds up dweight and dbias over the threads that share channels, and stores the block's part.
template <int K>
__device__ __forceinline__ void store_parts(const CausalConv1dCudaBwd& p, int across, int64_t tile,
                                            int64_t part, const float (&dtap)[K][4],
                                            const float (&dbias)[4]) {
  extern __shared__ char memory[];
  float* shared = reinterpret_cast<float*>(memory);  // [down][across][4 K + 4]
  constexpr int kEach = 4 * K + 4;
  float* mine = shared + threadIdx.x * kEach;
#pragma unroll
  for (int i = 0; i < 4 * K; ++i) mine[i] = dtap[i % K][i / K];
#pragma unroll
  for (int c = 0; c < 4; ++c) mine[4 * K + c] = dbias[c];
  __syncthreads();
  for (int i = threadIdx.x; i < across * kEach; i += kThreads) {
    const int64_t four = tile * across + i / kEach;
    if (4 * four >= p.in.D) continue;
    double sum = 0;
    for (int at = i; at < kThreads * kEach; at += across * kEach) sum += shared[at];
    const int value = i % kEach;
    float* to = value < 4 * K ? p.dweight_parts + (part * p.in.D + 4 * four) * K + value
                              : p.dbias_parts + part * p.in.D + 4 * four + value - 4 * K;
    *to = static_cast<float>(sum);
  }
}

template <typename T, int K, bool kSilu, class Addend>
__global__ __launch_bounds__(kThreads,
                             3) void conv_bwd(const __grid_constant__ CausalConv1dCudaBwd p,
                                              int across, unsigned tiles) {
  extern __shared__ char memory[];
  const auto& in = p.in;
  const unsigned tile = blockIdx.x % tiles, part = blockIdx.x / tiles;
  ConvPlace place(int64_t{tile} * across + threadIdx.x % across);
  Channels<K> channels;
  constexpr int kInputs = Inputs<T, Addend::kFours>::bytes(kThreads);
  Addend addend(p, int64_t{tile} * kProductChannels, memory + kInputs);
  if (place.channel < in.D) {
    load_taps(in.weight, place, channels.tap);
    load_floats(in.bias, place.channel, place, channels.bias);
    const int64_t down = kThreads / across, items = conv_runs(in) * in.B;
    for (int64_t i = part * down + threadIdx.x / across; i < items; i += p.parts * down) {
      place.go_to(in, i / in.B, i % in.B);
      walk_run<T, K, kSilu>(p, place, memory, channels, addend);
    }
  }
  __syncthreads();  // the memory serves once more
  store_parts(p, across, tile, part, channels.dtap, channels.dbias);
}

template <typename T, int K, bool kSilu, class Addend>
void launch(const CausalConv1dCudaBwd& p, CudaStream stream) {
  const int across = fours_across(p.in.D);
  const auto tiles = static_cast<unsigned>(tiles_of(p.in, across));
  const auto parts_bytes = static_cast<int>(kThreads * (4 * K + 4) * sizeof(float));
  const int bytes = std::max(
      parts_bytes, Inputs<T, Addend::kFours>::bytes(kThreads) + Addend::bytes(p.P, kThreads / 32));
  const auto kernel = conv_bwd<T, K, kSilu, Addend>;
  if (Addend::kThere) {
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  }
  kernel<<<static_cast<unsigned>(tiles * p.parts), kThreads, bytes, stream>>>(p, across, tiles);
}

void launch_windows(const CausalConv1dCudaBwd& p, CudaStream stream) {
  dispatch_conv(p.in, [&](auto element, auto taps, auto silu) {
    using T = decltype(element);
    if constexpr (sizeof(T) == 2 && silu()) {
      if (p.P > 0) return launch<T, taps(), silu(), Product<T>>(p, stream);
    }
    launch<T, taps(), silu(), NoProduct>(p, stream);
  });
  check_launch("causal_conv1d: backward");
}

bool lies_in_fours(const CausalConv1dCudaBwd& p) {
  return in_fours(p.in, {p.in.x, p.dy, p.dx},
                  {p.in.bias, p.in.initial_state, p.dlast_state, p.dinitial_state, p.dsum});
}

}  // namespace

bool conv_adds_product(const CausalConv1dCudaBwd& p) {
  constexpr int64_t kWord = 8;  // elements of half types
  return p.in.type != ActivationType::fp32 && p.in.silu && !conv_needs_dsum(p) &&
         p.in.D % kProductChannels == 0 && p.P <= kProductMost && p.P % kWord == 0 &&
         lies_in_words(p.rows, p.in.type, kWord) && lies_in_words(p.in.x, p.in.type, kWord) &&
         lies_in_words(p.dy, p.in.type, kWord) && lies_on(p.columns, 16) &&
         Inputs<__half, 2>::bytes(kThreads) + Product<__half>::bytes(p.P, kThreads / 32) <=
             most_shared_memory();
}

bool conv_needs_dsum(const CausalConv1dCudaBwd& p) {
  return !conv_window_in_registers(p.in.K) || p.in.T == 0 || p.dy.data == nullptr ||
         !lies_in_fours(p);
}

void cut_into_runs(CausalConv1dCudaBwd& p) {
  constexpr int64_t kBlocks = 396;    // that fill the device at once
  constexpr int64_t kLongest = 512;   // steps of a run
  constexpr int64_t kBeside = 8;      // steps that a run costs besides
  constexpr int64_t kMostSum = 4096;  // steps that one thread adds up
  auto& in = p.in;
  const int across = fours_across(in.D);
  const int64_t down = kThreads / across, steps = in.T * in.B;
  const int64_t most = ((in.T + 7) / 8 * in.B + down - 1) / down;  // parts that have work
  const int64_t wanted =
      std::max(kBlocks / std::max<int64_t>(tiles_of(in, across), 1), steps / (down * kMostSum));
  p.parts = std::max<int64_t>(std::min(wanted, most), 1);
  const int64_t slots = p.parts * down;
  const int64_t least_rounds = std::max<int64_t>(steps / (slots * kLongest), 1);
  // The number of runs with which the busiest thread has least to do.
  int64_t least_cost = std::numeric_limits<int64_t>::max();
  for (int64_t rounds = least_rounds; rounds < least_rounds + 4; ++rounds) {
    const int64_t runs = std::max<int64_t>(slots * rounds / std::max<int64_t>(in.B, 1), 1);
    const int64_t run_steps = std::max<int64_t>(((in.T + runs - 1) / runs + 7) / 8 * 8, 8);
    const int64_t items = (in.T + run_steps - 1) / run_steps * in.B;
    const int64_t cost = (items + slots - 1) / slots * (run_steps + kBeside);
    if (cost >= least_cost) continue;
    least_cost = cost;
    in.run_steps = run_steps;
  }
}

void causal_conv1d_cuda_bwd(const CausalConv1dCudaBwd& p, CudaStream stream) {
  const auto& in = p.in;
  if (in.D == 0) return;
  if (conv_needs_dsum(p)) {
    causal_conv1d_cuda_bwd_any(p, lies_in_fours(p), stream);
  } else {
    launch_windows(p, stream);
  }
  launch_sum_rows(p.parts,
                  {{{p.dweight_parts, in.D * in.K, p.dweight}, {p.dbias_parts, in.D, p.dbias}}},
                  stream);
}

}  // namespace retain::kernels
