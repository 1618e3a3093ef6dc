// The acting step of a Mamba-1 block between in_proj and out_proj (Gu & Dao 2023,
// arXiv:2312.00752, section 3.4):
//   x' = silu(conv1d(x));  (dt, B, C) = x_proj x';  delta' = softplus(dt_proj dt + bias)
//   h ← exp(delta' A) h + delta' x' B;  y = (Σ_n C h + D x') silu(z)
// A cluster of blocks owns all channels of a few rows at a time, a block a part of the channels, a
// thread four states of a channel. Every block sums x_proj over its own channels and sends the sums
// to all blocks of the cluster, which add them up in one order; a barrier in shared memory counts
// what has come, so that no block waits for the others' writes to memory. While the states of one
// group of rows advance, the next group's sums travel between the blocks, and its states, most of
// all bytes, from memory to each thread's own place in shared memory.

#include <cooperative_groups.h>
#include <retain/kernels/mamba_update/mamba_update.cuh>
#include <retain/kernels/selective_scan/selective_scan.cuh>

namespace retain::kernels {
namespace {

namespace cg = cooperative_groups;

/// Sums each of 16 values over a warp; lane l gets the total of value l % 16.
[[maybe_unused]] __device__ __forceinline__ float sum_over_warp(float (&value)[16]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int bit = 1; bit < 16; bit *= 2) {
    const bool odd = (lane & bit) != 0;
#pragma unroll
    for (int j = 0; j < 8 / bit; ++j) {
      const float keep = odd ? value[2 * j + 1] : value[2 * j];
      const float give = odd ? value[2 * j] : value[2 * j + 1];
      value[j] = keep + __shfl_xor_sync(~0u, give, bit);
    }
  }
  return value[0] + __shfl_xor_sync(~0u, value[0], 16);
}

/// Sums x_proj over the block's channels and sends the sums to every block, four outputs a warp at
/// a time. `sums` is the block's own place in an array that each block has; `arrived` its barrier.
template <class Layout>
__device__ __forceinline__ void project(const float* weights, int outputs,
                                        const float (&x)[kRows][Layout::channels], float* sums,
                                        const uint64_t* arrived) {
  static_assert(kRows == 4 && (Layout::blocks == 1 || Layout::blocks % 2 == 0));
  constexpr int kBlocks = Layout::blocks;
  const int lane = threadIdx.x % 32, own_row = lane % kRows, own_output = lane / kRows % 4;
  for (int o = threadIdx.x / 32 * 4; o < outputs; o += 4 * Layout::warps) {
    float sum[16] = {};
#pragma unroll
    for (int i = 0; i < Layout::parts; ++i) {
      float input[kRows];
#pragma unroll
      for (int row = 0; row < kRows; ++row) input[row] = x[row][lane + 32 * i];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float w = weights[min(o + k, outputs - 1) * Layout::channels + lane + 32 * i];
#pragma unroll
        for (int row = 0; row < kRows; ++row) {
          sum[4 * k + row] = fmaf(w, input[row], sum[4 * k + row]);
        }
      }
    }
    const float total = sum_over_warp(sum);
    if (o + own_output >= outputs) continue;
    float* to = sums + (own_row * outputs + o + own_output) * kBlocks;
    if constexpr (kBlocks == 1) {
      *to = total;
    } else {
#pragma unroll
      for (int first = 0; first < kBlocks; first += 2) {  // half of the lanes each
        const int block = first + lane / 16;
        send(address_in(to, block), total, address_in(arrived, block));
      }
    }
  }
}

/// Adds the blocks' sums up, in their order: totals[row] = dt padded, B, C.
template <class Layout>
__device__ __forceinline__ void add_up(const UpdateArrays<Layout>& arrays, int R, const float* sums,
                                       float* totals) {
  constexpr int kThreadsARow = Layout::threads / kRows;
  const int row = threadIdx.x / kThreadsARow;
  for (int o = threadIdx.x % kThreadsARow; o < arrays.outputs; o += kThreadsARow) {
    const float* from = sums + (row * arrays.outputs + o) * Layout::blocks;
    float part[Layout::blocks], total = 0;
#pragma unroll
    for (int block = 0; block < Layout::blocks; ++block) part[block] = from[block];
#pragma unroll
    for (int block = 0; block < Layout::blocks; ++block) total += part[block];
    totals[row * arrays.width + o + (o < R ? 0 : arrays.rank - R)] = total;
  }
}

/// Sums each row's value over the lanes of a channel; lane l gets the total of row l % kRows.
template <class Layout>
__device__ __forceinline__ float sum_over_lanes(const float (&value)[kRows]) {
  const bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
  const float low_pair =
      (odd ? value[1] : value[0]) + __shfl_xor_sync(~0u, odd ? value[0] : value[1], 1);
  const float high_pair =
      (odd ? value[3] : value[2]) + __shfl_xor_sync(~0u, odd ? value[2] : value[3], 1);
  float total =
      (high ? high_pair : low_pair) + __shfl_xor_sync(~0u, high ? low_pair : high_pair, 2);
#pragma unroll
  for (int bit = 4; bit < Layout::lanes; bit *= 2) total += __shfl_xor_sync(~0u, total, bit);
  return total;
}

/// delta' of the group's rows, all of them to every lane of the channel.
template <typename W, class Layout>
__device__ __forceinline__ void step_sizes(const MambaUpdateCuda& p, float4 dt_weight, float bias,
                                           int channel, int lane, const float* totals, int width,
                                           float (&size)[kRows]) {
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    float dt[4];
    read_floats(totals + row * width + 4 * lane, dt);
    size[row] =
        fmaf(dt_weight.w, dt[3],
             fmaf(dt_weight.z, dt[2], fmaf(dt_weight.y, dt[1], __fmul_rn(dt_weight.x, dt[0]))));
  }
  const int R = static_cast<int>(p.R);
  for (int r = 4 * (Layout::lanes + lane); r < R; r += 4 * Layout::lanes) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float weight = r + i < R ? weight_at<W>(p.dt_weight, channel * R + r + i) : 0.f;
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        size[row] = fmaf(weight, totals[row * width + r + i], size[row]);
      }
    }
  }
  // A lane makes the softplus of one row and hands it to the others.
  const float own = softplus(sum_over_lanes<Layout>(size) + bias);
#pragma unroll
  for (int row = 0; row < kRows; ++row) size[row] = __shfl_sync(~0u, own, row, Layout::lanes);
}

/// Advances the thread's states of the group's rows, `live` of which exist; returns y before the
/// gate of row lane % kRows.
template <typename W, class Layout>
__device__ __forceinline__ float advance_rows(const MambaUpdateCuda& p, const ChannelWeights& w,
                                              const UpdateShared<Layout>& shared,
                                              const UpdateArrays<Layout>& arrays, int stage,
                                              int place, const float* totals, int channel, int live,
                                              float* to) {
  const int channel_in_block = threadIdx.x / Layout::lanes, lane = threadIdx.x % Layout::lanes;
  const auto& x = shared.x[place];
  float size[kRows], sum[kRows];
  step_sizes<W, Layout>(p, shared.dt_weight[threadIdx.x], w.bias, channel, lane, totals,
                        arrays.width, size);
  const float* B_at = totals + arrays.rank + 4 * lane;
#pragma unroll
  for (int row = 0; row < kRows; ++row, B_at += arrays.width) {
    const float4 from = shared.h[stage][row][threadIdx.x];
    float h[4] = {from.x, from.y, from.z, from.w}, B[4], C[4];
    read_floats(B_at, B);
    read_floats(B_at + Layout::N, C);
    const float drive = __fmul_rn(size[row], x[row][channel_in_block]);
    const bool reset = shared.reset[place][row] != 0;
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      h[n] = advance(reset ? 0.f : h[n], size[row], w.A[n], drive, B[n]);
    }
    sum[row] = own_sum(C, h);
    if (row < live) {
      *reinterpret_cast<float4*>(to + row * Layout::D * Layout::N) = {h[0], h[1], h[2], h[3]};
    }
  }
  const float total = sum_over_lanes<Layout>(sum);
  return total + __fmul_rn(w.D, x[lane % kRows][channel_in_block]);
}

/// Each cluster takes groups of kRows rows, every (gridDim / blocks)-th. Empty where there are no
/// clusters: below compute capability 9.0. Activations are T, weights W.
template <typename T, typename W, class Layout>
__global__ __launch_bounds__(Layout::threads, Layout::blocks_an_sm) void mamba_update(
    const __grid_constant__ MambaUpdateCuda p) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ char memory[];
  constexpr int kD = Layout::D, kRowStates = kD * Layout::N;
  auto& shared = *reinterpret_cast<UpdateShared<Layout>*>(memory);
  const UpdateArrays<Layout> arrays(p.R);
  const auto cluster = cg::this_cluster();
  const int me = cluster.block_rank(), first = me * Layout::channels;
  const int batch = static_cast<int>(p.B), R = static_cast<int>(p.R);
  const int rows = gridDim.x / Layout::blocks * kRows;  // from one group to the next
  const int lane = threadIdx.x % Layout::lanes, channel = first + threadIdx.x / Layout::lanes;
  const int state = channel * Layout::N + 4 * lane;  // offset of the thread's first in a row
  int b = blockIdx.x / Layout::blocks * kRows;

  const auto fetch_states = [&](int b, int stage) {
    const float* from = p.ssm_state + b * kRowStates + state;
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      if (b + row < batch) {
        copy_ahead(&shared.h[stage][row][threadIdx.x], from + row * kRowStates);
      }
    }
    close_copies();
  };
  ConvInputs<T, Layout> inputs;
  const int conv_row = threadIdx.x / Layout::channels, conv_at = threadIdx.x % Layout::channels;
  const auto convolve = [&](int place, int b) {
    if (conv_row >= kRows) return;
    const float y = inputs.convolve(p, shared.taps[conv_at], shared.conv_bias[conv_at],
                                    b + conv_row, first + conv_at);
    shared.x[place][conv_row][conv_at] = y;
    if (conv_at == 0) shared.reset[place][conv_row] = inputs.reset;
    inputs.fetch(p, b + rows + conv_row, first + conv_at);
  };

  // A block alone has nobody to wait for but its own threads.
  const auto expect_sums = [&](int stage) {
    if constexpr (Layout::blocks == 1) return;
    if (threadIdx.x != 0) return;
    expect(&shared.arrived[stage], arrays.sums_size() * sizeof(float));
  };
  const auto await_sums = [&](int stage, int phase) {
    if constexpr (Layout::blocks == 1) {
      __syncthreads();
    } else {
      await(&shared.arrived[stage], phase);
    }
  };

  load_shared<W>(p, first, shared, arrays.x_proj(memory), arrays.outputs);
  fetch_states(b, 0);
  if (conv_row < kRows) inputs.fetch(p, b + conv_row, first + conv_at);
  const ChannelWeights weights = load_channel<W>(p, channel, state);
  for (int i = threadIdx.x; i < 2 * kRows * arrays.width; i += Layout::threads) {
    arrays.totals(memory)[i] = 0;  // dt's padding stays so
  }
  if (threadIdx.x == 0) {
    init_barrier(&shared.arrived[0], 1);
    init_barrier(&shared.arrived[1], 1);
  }
  float* const my_sums = arrays.sums(memory) + me;
  wait_for_copies_but<1>();
  cluster.sync();
  expect_sums(0);
  convolve(0, b);
  __syncthreads();
  project<Layout>(arrays.x_proj(memory), arrays.outputs, shared.x[0], my_sums, &shared.arrived[0]);

  for (int turn = 0, place = 0; b < batch; b += rows, ++turn) {
    const int now = turn % 2, later = 1 - now, next_place = place == 2 ? 0 : place + 1;
    const int live = min(batch - b, kRows);
    const bool more = b + rows < batch;
    fetch_states(b + rows, later);
    T z = from_float<T>(0.f);
    if (lane % kRows < live) {
      const int at = (b + lane % kRows) * static_cast<int>(p.xz_stride) + kD + channel;
      z = static_cast<const T*>(p.xz)[at];
    }
    float* const totals = arrays.totals(memory) + now * kRows * arrays.width;
    await_sums(now, turn / 2 % 2);
    add_up(arrays, R, arrays.sums(memory) + now * arrays.sums_size(), totals);
    if (more) {
      expect_sums(later);
      convolve(next_place, b + rows);
    }
    __syncthreads();
    if (more) {
      project<Layout>(arrays.x_proj(memory), arrays.outputs, shared.x[next_place],
                      my_sums + later * arrays.sums_size(), &shared.arrived[later]);
    }
    wait_for_copies_but<1>();
    const float y = advance_rows<W>(p, weights, shared, arrays, now, place, totals, channel, live,
                                    p.new_ssm_state + b * kRowStates + state);
    if (lane < live) {
      const float gate = to_float(z);
      static_cast<T*>(p.y)[(b + lane) * kD + channel] =
          from_float<T>(__fmul_rn(y, __fmul_rn(gate, sigmoid(gate))));
    }
    place = next_place;
  }
  cluster.sync();  // none leaves while another may send to it
#endif
}

/// Calls run(UpdateLayout{}) with the layout of these sizes, if there is one.
template <typename Run>
bool dispatch_update_layout(const MambaUpdateCuda& p, const Run& run) {
  bool found = false;
  const auto consider = [&](auto layout) {
    if (p.N != layout.N || p.D != layout.D) return;
    found = true;
    run(layout);
  };
  consider(UpdateLayout<4, 128, 1>{});
  consider(UpdateLayout<4, 128, 2>{});
  consider(UpdateLayout<4, 512, 1>{});
  consider(UpdateLayout<4, 128, 6>{});
  consider(UpdateLayout<4, 512, 2>{});
  consider(UpdateLayout<4, 256, 6>{});
  consider(UpdateLayout<4, 512, 4>{});
  consider(UpdateLayout<4, 512, 6>{});
  consider(UpdateLayout<4, 512, 8>{});
  consider(UpdateLayout<8, 256, 1>{});
  consider(UpdateLayout<8, 256, 2>{});
  consider(UpdateLayout<8, 512, 2>{});
  consider(UpdateLayout<8, 256, 6>{});
  consider(UpdateLayout<8, 512, 4>{});
  consider(UpdateLayout<8, 512, 6>{});
  consider(UpdateLayout<8, 512, 8>{});
  return found;
}

template <typename T, typename W, class Layout>
void launch(const MambaUpdateCuda& p, CudaStream stream) {
  const auto kernel = mamba_update<T, W, Layout>;
  const size_t bytes = UpdateArrays<Layout>(p.R).bytes();
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                       static_cast<int>(bytes));
  cudaLaunchAttribute cluster[2] = {};
  cluster[0].id = cudaLaunchAttributeClusterDimension;
  cluster[0].val.clusterDim = {Layout::blocks, 1, 1};
  // Blocks of a cluster may share a multiprocessor: more clusters find room.
  cluster[1].id = cudaLaunchAttributeClusterSchedulingPolicyPreference;
  cluster[1].val.clusterSchedulingPolicyPreference = cudaClusterSchedulingPolicyLoadBalancing;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(Layout::blocks);
  config.blockDim = dim3(Layout::threads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = cluster;
  config.numAttrs = 2;
  int resident = 1;  // clusters that run at once
  cudaOccupancyMaxActiveClusters(&resident, kernel, &config);
  const int64_t groups = (p.B + kRows - 1) / kRows;
  const int64_t turns = (groups + resident - 1) / std::max(resident, 1);
  const int64_t clusters = (groups + turns - 1) / turns;
  config.gridDim = dim3(static_cast<unsigned>(clusters * Layout::blocks));
  cudaLaunchKernelEx(&config, kernel, p);
}

}  // namespace

bool mamba_update_cuda_takes(const MambaUpdateCuda& p) {
  const auto any = mamba_update<float, float, UpdateLayout<4, 128, 1>>;
  bool fits = false;
  dispatch_update_layout(p, [&](auto layout) {
    const auto bytes = static_cast<int64_t>(UpdateArrays<decltype(layout)>(p.R).bytes());
    fits = is_for_hopper(any) && bytes <= most_shared_memory();
  });
  const int64_t largest = p.B * std::max({p.D * p.N, p.xz_stride, p.reset_stride, 4 * p.D});
  return fits && p.K == kTaps && largest < INT32_MAX && lies_on(p.ssm_state, 16) &&
         lies_on(p.new_ssm_state, 16) && lies_on(p.A_log, 16) && lies_on(p.conv_weight, 16) &&
         lies_on(p.x_proj_weight, 16);
}

void mamba_update_cuda(const MambaUpdateCuda& p, CudaStream stream) {
  if (p.B * p.D == 0) return;
  dispatch_activations(p.type, [&](auto element) {
    using T = decltype(element);
    dispatch_update_layout(p, [&](auto layout) {
      using Layout = decltype(layout);
      const bool wide = p.weight_type == ActivationType::fp32;
      wide ? launch<T, float, Layout>(p, stream) : launch<T, T, Layout>(p, stream);
    });
  });
  check_launch("mamba_update");
}

}  // namespace retain::kernels
