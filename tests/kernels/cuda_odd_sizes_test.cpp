#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <gtest/gtest.h>
#include <retain/kernels/causal_conv1d/causal_conv1d_cuda.h>
#include <retain/kernels/mamba_update/mamba_update_cuda.h>
#include <retain/kernels/rms_norm/rms_norm_cuda.h>
#include <retain/kernels/scan_inputs/scan_inputs_cuda.h>
#include <retain/kernels/selective_scan/selective_scan_cuda.h>
#include <retain/kernels/state/state_cuda.h>
#include <retain/kernels/thin_linear/thin_linear_cuda.h>

#include <algorithm>
#include <cstring>
#include <random>
#include <stdexcept>
#include <utility>
#include <vector>

// Every CUDA kernel over sizes that fill no block, without LibTorch, so that compute-sanitizer
// comes to its end within minutes (tests/README.md). The claims: each byte of an output is written,
// whatever it was before, and two runs write the same.
namespace retain::kernels {
namespace {

constexpr auto fp32 = ActivationType::fp32, fp16 = ActivationType::fp16,
               bf16 = ActivationType::bf16;
constexpr ActivationType kTypes[] = {fp32, fp16, bf16};

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

/// Device memory of a run: inputs as a seed makes them, and outputs that are compared.
class Arena {
 public:
  enum class Outputs { as_they_come, full_of_ones };

  explicit Arena(Outputs outputs) : outputs_(outputs) {}
  ~Arena() {
    for (void* pointer : all_) cudaFree(pointer);
  }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  template <typename T>
  T* scratch(int64_t count) {
    void* pointer = nullptr;
    check(cudaMalloc(&pointer, std::max<size_t>(count * sizeof(T), 16)));
    all_.push_back(pointer);
    return static_cast<T*>(pointer);
  }
  template <typename T>
  T* output(int64_t count) {
    T* const pointer = scratch<T>(count);
    if (outputs_ == Outputs::full_of_ones) check(cudaMemset(pointer, 0xff, count * sizeof(T)));
    results_.push_back({reinterpret_cast<char*>(pointer), count * sizeof(T)});
    return pointer;
  }
  /// Uniform between shift - scale and shift + scale.
  float* floats(int64_t count, float scale = 1, float shift = 0) {
    return static_cast<float*>(values(fp32, count, scale, shift));
  }
  /// Read and written.
  float* state(int64_t count) {
    float* const pointer = floats(count);
    results_.push_back({reinterpret_cast<char*>(pointer), count * sizeof(float)});
    return pointer;
  }
  void* values(ActivationType type, int64_t count, float scale = 1, float shift = 0) {
    std::vector<char> host(count * element_bytes(type));
    for (int64_t i = 0; i < count; ++i) {
      const float x = std::uniform_real_distribution<float>(shift - scale, shift + scale)(random_);
      char* const to = host.data() + i * element_bytes(type);
      const auto put = [&](auto value) { std::memcpy(to, &value, sizeof(value)); };
      if (type == fp32) put(x);
      if (type == fp16) put(__float2half(x));
      if (type == bf16) put(__float2bfloat16(x));
    }
    return copied(host.data(), host.size());
  }
  Activations activations(ActivationType type, int64_t T, int64_t B, int64_t D) {
    return {values(type, T * B * D), B * D, D};
  }
  Activations outputs(ActivationType type, int64_t T, int64_t B, int64_t D) {
    return {output<char>(T * B * D * element_bytes(type)), B * D, D};
  }
  /// [T, B]: true once in ten, or absent.
  TimeMajor<const bool> resets(bool any, int64_t T, int64_t B) {
    if (!any) return {};
    std::vector<char> host(T * B);
    for (auto& x : host) x = std::bernoulli_distribution(.1)(random_);
    return {static_cast<const bool*>(copied(host.data(), host.size())), B, 1};
  }

  /// What the outputs are once all work is done.
  std::vector<std::vector<char>> results() const {
    check(cudaDeviceSynchronize());
    std::vector<std::vector<char>> all;
    for (const auto& [pointer, bytes] : results_) {
      all.emplace_back(bytes);
      check(cudaMemcpy(all.back().data(), pointer, bytes, cudaMemcpyDeviceToHost));
    }
    return all;
  }

 private:
  void* copied(const void* host, size_t bytes) {
    void* const pointer = scratch<char>(bytes);
    check(cudaMemcpy(pointer, host, bytes, cudaMemcpyHostToDevice));
    return pointer;
  }

  struct Result {
    char* pointer;
    size_t bytes;
  };
  Outputs outputs_;
  std::mt19937 random_{1};
  std::vector<void*> all_;
  std::vector<Result> results_;
};

template <typename Run>
void expect_outputs_written(const Run& run) {
  Arena first(Arena::Outputs::as_they_come), second(Arena::Outputs::full_of_ones);
  run(first);
  run(second);
  const auto expected = first.results(), got = second.results();
  ASSERT_FALSE(got.empty());
  for (size_t i = 0; i < got.size(); ++i) EXPECT_TRUE(got[i] == expected[i]) << "output " << i;
}

class CudaKernels : public ::testing::Test {
 protected:
  void SetUp() override {
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) GTEST_SKIP() << "needs a GPU";
  }

  static bool knows_hopper() {
    cudaDeviceProp device;
    check(cudaGetDeviceProperties(&device, 0));
    return device.major >= 9;
  }
};

// Selective scan

struct ScanProblem {
  int64_t B, T, D, N, G = 1;
  int64_t segments = 1;  ///< or as many as the rule on sizes wants
};

SelectiveScanCudaInputs scan_inputs(Arena& arena, ActivationType type, const ScanProblem& p,
                                    bool resets, bool all) {
  const auto [B, T, D, N, G, segments] = p;
  SelectiveScanCudaInputs in;
  in.T = T;
  in.B = B;
  in.D = D;
  in.N = N;
  in.G = G;
  in.type = type;
  in.u = arena.activations(type, T, B, D);
  in.delta = arena.activations(type, T, B, D);
  if (all) in.z = arena.activations(type, T, B, D);
  in.B_matrix = arena.activations(type, T, B, G * N);
  in.C_matrix = arena.activations(type, T, B, G * N);
  in.B_stride_g = in.C_stride_g = N;
  in.A = arena.floats(D * N, .5f, -1);
  if (all) in.D_skip = arena.floats(D);
  if (all) in.delta_bias = arena.floats(D);
  in.delta_softplus = all;
  in.reset = arena.resets(resets, T, B);
  in.checkpoint_every = scan_checkpoint_every(N, type);
  in.checkpoint_type = scan_checkpoint_type(N, type);
  return in;
}

SelectiveScanCudaInputs cut(Arena& arena, SelectiveScanCudaInputs in, int64_t segments,
                            bool backward) {
  cut_into_segments(in, backward);
  if (segments > 1) {
    const int64_t steps = (in.T + segments - 1) / segments, every = in.checkpoint_every;
    in.segment_steps = (steps + every - 1) / every * every;
    in.segments = (in.T + in.segment_steps - 1) / in.segment_steps;
  }
  in.segment_states = arena.scratch<float>(in.segments * in.B * in.D * in.N);
  in.segment_decays = arena.scratch<float>(in.segments * in.B * in.D * in.N);
  return in;
}

void scan(Arena& arena, ActivationType type, const ScanProblem& p, bool resets, bool all) {
  const auto [B, T, D, N, G, segments] = p;
  const int64_t states = B * D * N;
  const auto in = scan_inputs(arena, type, p, resets, all);
  const int64_t kept = (T + in.checkpoint_every - 1) / in.checkpoint_every;
  char* const checkpoints = arena.output<char>(kept * states * element_bytes(in.checkpoint_type));
  SelectiveScanCudaFwd fwd{.in = cut(arena, in, segments, /*backward=*/false),
                           .initial_state = all ? arena.floats(states) : nullptr,
                           .y = arena.outputs(type, T, B, D),
                           .last_state = arena.output<float>(states),
                           .checkpoints = checkpoints};
  selective_scan_cuda_fwd(fwd, nullptr);

  SelectiveScanCudaBwd bwd;
  bwd.in = cut(arena, in, segments, /*backward=*/true);
  bwd.checkpoints = checkpoints;
  if (all) bwd.y = fwd.y;
  if (all) bwd.dy = arena.activations(type, T, B, D);
  bwd.dlast_state = arena.floats(states);
  bwd.du = arena.outputs(type, T, B, D);
  bwd.ddelta = arena.outputs(type, T, B, D);
  if (all) bwd.dz = arena.outputs(type, T, B, D);
  bwd.dB = arena.output<char>(T * B * G * N * element_bytes(type));
  bwd.dC = arena.output<char>(T * B * G * N * element_bytes(type));
  bwd.pair_stride = G * N;
  bwd.dA = arena.output<float>(D * N);
  if (all) bwd.dD = arena.output<float>(D);
  if (all) bwd.ddelta_bias = arena.output<float>(D);
  bwd.dinitial_state = arena.output<float>(states);
  const int64_t sums = selective_scan_cuda_block_sums(bwd.in), parts = bwd.in.segments;
  bwd.dB_blocks = arena.scratch<float>(sums);
  bwd.dC_blocks = arena.scratch<float>(sums);
  bwd.dA_rows = arena.scratch<float>(parts * states);
  bwd.dD_rows = arena.scratch<float>(parts * B * D);
  bwd.ddelta_bias_rows = arena.scratch<float>(parts * B * D);
  selective_scan_cuda_bwd(bwd, nullptr);
}

TEST_F(CudaKernels, ScanWritesItsOutputs) {
  const ScanProblem problems[] = {
      {1, 1, 8, 32},        {2, 33, 20, 24},        {1, 65, 1024, 32},     {3, 47, 13, 17},
      {1, 129, 64, 31},     {1, 64, 40, 16},        {2, 49, 48, 12},       {3, 31, 33, 9},
      {1, 17, 520, 16},     {2, 40, 24, 4},         {1, 70, 33, 64},       {1, 33, 12, 130},
      {64, 20, 96, 16},     {40, 20, 96, 24},       {2, 35, 66, 16, 3},    {1, 50, 40, 20, 2},
      {2, 21, 12, 1},       {1, 19, 7, 256},        {1, 96, 40, 32, 1, 3}, {2, 127, 9, 20, 1, 4},
      {2, 65, 24, 8, 1, 2}, {2, 129, 72, 16, 1, 5}, {1, 300, 34, 16, 2, 7}};
  for (const auto type : kTypes) {
    for (const auto& p : problems) {
      for (const bool resets : {false, true}) {
        SCOPED_TRACE(::testing::Message()
                     << element_bytes(type) << " bytes, type " << static_cast<int>(type) << ", "
                     << p.B << " " << p.T << " " << p.D << " " << p.N << " " << p.G);
        expect_outputs_written([&](Arena& arena) { scan(arena, type, p, resets, /*all=*/true); });
      }
    }
    for (const int64_t N : {7, 16, 24, 48}) {
      expect_outputs_written([&](Arena& arena) {
        scan(arena, type, {2, 45, 40, N}, /*resets=*/false, /*all=*/false);
      });
    }
  }
}

TEST_F(CudaKernels, ScanUpdateWritesItsOutputs) {
  for (const auto type : kTypes) {
    for (const auto& p : {ScanProblem{1, 1, 8, 16},
                          {37, 1, 50, 16},
                          {5, 1, 33, 7},
                          {3, 1, 40, 70, 4},
                          {700, 1, 12, 4}}) {
      expect_outputs_written([&](Arena& arena) {
        const int64_t states = p.B * p.D * p.N;
        SelectiveScanCudaFwd update{.in = scan_inputs(arena, type, p, true, true),
                                    .initial_state = nullptr,
                                    .y = arena.outputs(type, 1, p.B, p.D),
                                    .last_state = arena.state(states)};
        update.initial_state = update.last_state;
        selective_scan_cuda_update(update, nullptr);
      });
    }
  }
}

// Causal convolution

struct ConvProblem {
  int64_t B, T, D, K;
  int64_t P = 0;  ///< of the product that adds to dy
};

CausalConv1dCudaInputs conv_inputs(Arena& arena, ActivationType type, const ConvProblem& p,
                                   bool resets) {
  CausalConv1dCudaInputs in;
  in.T = p.T;
  in.B = p.B;
  in.D = p.D;
  in.K = p.K;
  in.type = type;
  in.x = arena.activations(type, p.T, p.B, p.D);
  in.weight = arena.floats(p.D * p.K);
  in.bias = arena.floats(p.D);
  in.initial_state = arena.floats(p.B * (p.K - 1) * p.D);
  in.reset = arena.resets(resets, p.T, p.B);
  in.silu = true;
  return in;
}

void convolve(Arena& arena, ActivationType type, const ConvProblem& p, bool resets) {
  const auto [B, T, D, K, P] = p;
  const auto in = conv_inputs(arena, type, p, resets);
  CausalConv1dCudaFwd fwd{.in = in,
                          .y = arena.outputs(type, T, B, D),
                          .last_state = arena.output<float>(B * (K - 1) * D)};
  cut_into_runs(fwd);
  causal_conv1d_cuda_fwd(fwd, nullptr);

  CausalConv1dCudaBwd bwd;
  bwd.in = in;
  bwd.dy = arena.activations(type, T, B, D);
  bwd.dlast_state = arena.floats(B * (K - 1) * D);
  bwd.dx = arena.outputs(type, T, B, D);
  bwd.dweight = arena.output<float>(D * K);
  bwd.dbias = arena.output<float>(D);
  bwd.dinitial_state = arena.output<float>(B * (K - 1) * D);
  if (P > 0) {
    bwd.rows = arena.activations(type, T, B, P);
    bwd.columns = arena.values(type, P * D);
    bwd.P = P;
    ASSERT_TRUE(conv_adds_product(bwd));
  }
  cut_into_runs(bwd);
  bwd.dweight_parts = arena.scratch<float>(bwd.parts * D * K);
  bwd.dbias_parts = arena.scratch<float>(bwd.parts * D);
  if (conv_needs_dsum(bwd)) bwd.dsum = arena.scratch<float>(T * B * D);
  causal_conv1d_cuda_bwd(bwd, nullptr);
}

TEST_F(CudaKernels, ConvolutionWritesItsOutputs) {
  for (const auto type : kTypes) {
    for (const auto& p : {ConvProblem{1, 1, 8, 4},
                          {2, 0, 8, 4},
                          {3, 47, 13, 4},
                          {2, 100, 48, 3},
                          {5, 33, 40, 2},
                          {2, 19, 24, 1},
                          {1, 9, 32, 6},
                          {2, 3, 12, 4},
                          {1, 600, 520, 4}}) {
      for (const bool resets : {false, true}) {
        SCOPED_TRACE(::testing::Message() << p.B << " " << p.T << " " << p.D << " " << p.K);
        expect_outputs_written([&](Arena& arena) { convolve(arena, type, p, resets); });
      }
    }
  }
  for (const auto type : {fp16, bf16}) {
    for (const auto& p : {ConvProblem{1, 1, 128, 4, 48},
                          {3, 47, 128, 4, 40},
                          {2, 33, 256, 4, 72},
                          {1, 300, 384, 4, 8}}) {
      SCOPED_TRACE(::testing::Message() << p.B << " " << p.T << " " << p.D << " " << p.P);
      expect_outputs_written([&](Arena& arena) { convolve(arena, type, p, true); });
    }
  }
}

// Norm

TEST_F(CudaKernels, NormWritesItsOutputs) {
  struct Problem {
    int64_t T, B, D;
  };
  for (const auto type : kTypes) {
    for (const auto& p : {Problem{1, 1, 8},
                          {3, 5, 13},
                          {7, 3, 64},
                          {33, 2, 96},
                          {5, 1, 1000},
                          {2, 3, 8192},
                          {300, 3, 40}}) {
      SCOPED_TRACE(::testing::Message() << p.T << " " << p.B << " " << p.D);
      expect_outputs_written([&](Arena& arena) {
        const int64_t rows = p.T * p.B, parts = rms_norm_cuda_parts(rows, p.D);
        const float* const weight = arena.floats(p.D);
        float* const sum = arena.output<float>(rows * p.D);
        rms_norm_cuda_fwd({.T = p.T,
                           .B = p.B,
                           .D = p.D,
                           .type = type,
                           .x = arena.activations(type, p.T, p.B, p.D),
                           .residual_type = fp32,
                           .residual = arena.activations(fp32, p.T, p.B, p.D),
                           .weight = weight,
                           .eps = 1e-5f,
                           .y = arena.output<char>(rows * p.D * element_bytes(type)),
                           .residual_out = sum},
                          nullptr);
        rms_norm_cuda_bwd({.T = p.T,
                           .B = p.B,
                           .D = p.D,
                           .residual_out = sum,
                           .weight = weight,
                           .type = type,
                           .dy = arena.activations(type, p.T, p.B, p.D),
                           .dresidual_out = arena.floats(rows * p.D),
                           .eps = 1e-5f,
                           .dx = arena.output<float>(rows * p.D),
                           .dweight = arena.output<float>(p.D),
                           .parts = parts,
                           .dweight_parts = arena.scratch<float>(parts * p.D),
                           .scales = arena.scratch<float>(rows)},
                          nullptr);
      });
    }
  }
}

// The acting step of a block

struct UpdateProblem {
  int64_t B, D, N, R;
};

void update(Arena& arena, ActivationType type, ActivationType weights, const UpdateProblem& p,
            bool in_place) {
  const int64_t conv = p.B * 3 * p.D, ssm = p.B * p.D * p.N;
  const auto weight = [&](int64_t count) { return arena.values(weights, count, .3f); };
  MambaUpdateCuda update;
  update.B = p.B;
  update.D = p.D;
  update.N = p.N;
  update.K = 4;
  update.R = p.R;
  update.type = type;
  update.weight_type = weights;
  update.xz = arena.values(type, p.B * 2 * p.D);
  update.xz_stride = 2 * p.D;
  update.conv_weight = weight(p.D * 4);
  update.conv_bias = weight(p.D);
  update.x_proj_weight = weight((p.R + 2 * p.N) * p.D);
  update.dt_weight = weight(p.D * p.R);
  update.dt_bias = weight(p.D);
  update.A_log = weight(p.D * p.N);
  update.D_skip = weight(p.D);
  update.reset = arena.resets(true, 1, p.B).data;
  update.reset_stride = 1;
  update.new_conv_state = in_place ? arena.state(conv) : arena.output<float>(conv);
  update.new_ssm_state = in_place ? arena.state(ssm) : arena.output<float>(ssm);
  update.conv_state = in_place ? update.new_conv_state : arena.floats(conv);
  update.ssm_state = in_place ? update.new_ssm_state : arena.floats(ssm);
  update.y = arena.output<char>(p.B * p.D * element_bytes(type));
  ASSERT_TRUE(mamba_update_cuda_takes(update));
  mamba_update_cuda(update, nullptr);
}

TEST_F(CudaKernels, MambaUpdateWritesItsOutputs) {
  if (!knows_hopper()) GTEST_SKIP() << "needs compute capability 9.0";
  const std::pair<ActivationType, ActivationType> types[] = {
      {fp32, fp32}, {fp16, fp32}, {fp16, fp16}, {bf16, fp32}, {bf16, bf16}};
  for (const auto& [type, weights] : types) {
    for (const auto& p : {UpdateProblem{1, 32, 16, 1},
                          {7, 64, 16, 4},
                          {5, 192, 16, 7},
                          {9, 256, 32, 8},
                          {21, 512, 16, 16},
                          {6, 768, 16, 24}}) {
      for (const bool in_place : {false, true}) {
        SCOPED_TRACE(::testing::Message() << p.B << " " << p.D << " " << p.N << " " << p.R);
        expect_outputs_written([&](Arena& arena) { update(arena, type, weights, p, in_place); });
      }
    }
  }
}

// The parts of a memory

TEST_F(CudaKernels, StatePartsAreCopiedAndCleared) {
  for (const int64_t rows : {1, 7, 300}) {
    expect_outputs_written([&](Arena& arena) {
      const int64_t widths[] = {1, 3, 48, 1025};
      StatePartsCuda parts{.B = rows, .count = 4};
      for (int i = 0; i < parts.count; ++i) {
        const int64_t count = rows * widths[i];
        parts.part[i] = {arena.floats(count), arena.output<float>(count),
                         widths[i] * static_cast<int64_t>(sizeof(float))};
      }
      copy_state_cuda(parts, nullptr);
      zero_state_cuda(parts, arena.resets(true, rows, 1).data, 1, nullptr);
    });
  }
}

// The scan's inputs

TEST_F(CudaKernels, ScanInputsAreWritten) {
  if (!knows_hopper()) GTEST_SKIP() << "needs compute capability 9.0";
  struct Problem {
    int64_t B, T, D, K, R, P;
  };
  for (const auto type : {fp16, bf16}) {
    for (const auto& [B, T, D, K, R, P] : {Problem{1, 1, 128, 4, 8, 40},
                                           {3, 47, 512, 4, 16, 48},
                                           {5, 33, 256, 3, 8, 18},
                                           {300, 5, 128, 2, 16, 46},
                                           {301, 70, 128, 4, 8, 24},
                                           {300, 50, 512, 4, 16, 48}}) {
      for (const bool resets : {false, true}) {
        SCOPED_TRACE(::testing::Message() << B << " " << T << " " << D << " " << K << " " << R);
        expect_outputs_written([&](Arena& arena) {
          ScanInputsCuda p;
          p.P = P;
          p.R = R;
          p.conv.in = conv_inputs(arena, type, {B, T, D, K}, resets);
          p.conv.y = arena.outputs(type, T, B, D);
          p.conv.last_state = arena.output<float>(B * (K - 1) * D);
          p.x_proj = arena.values(type, P * D, .1f);
          p.dt_proj = arena.values(type, D * R);
          p.dt_B_C = arena.output<char>(T * B * P * element_bytes(type));
          p.delta = arena.outputs(type, T, B, D);
          ASSERT_TRUE(scan_inputs_has_kernel(p));
          cut_into_runs(p);
          scan_inputs_cuda(p, nullptr);
        });
      }
    }
  }
}

// Thin product

TEST_F(CudaKernels, ThinLinearWritesItsOutputs) {
  for (const auto type : {fp16, bf16}) {
    for (const int64_t rows : {1, 33, 300}) {
      for (const auto& [in, out] : std::vector<std::pair<int64_t, int64_t>>{{8, 64}, {16, 320}}) {
        expect_outputs_written([&](Arena& arena) {
          ThinLinearCudaBwd p{.rows = rows,
                              .in = in,
                              .out = out,
                              .type = type,
                              .dy = arena.values(type, rows * out),
                              .dy_stride = out,
                              .x = arena.values(type, rows * in),
                              .x_stride = in,
                              .weight = arena.values(type, out * in),
                              .dx = arena.output<char>(rows * in * element_bytes(type)),
                              .dx_stride = in,
                              .dcolumns = arena.output<float>(in * out)};
          ASSERT_TRUE(thin_linear_has_kernel(p));
          cut_into_parts(p);
          p.dcolumns_parts = arena.scratch<float>(p.parts * in * out);
          thin_linear_cuda_bwd(p, nullptr);
        });
      }
    }
  }
}

}  // namespace
}  // namespace retain::kernels
