// Backward pass of the selective scan for d_state above 16, or 32 in bf16. With g_t = dL/dh_t =
// C_t dy_t + exp(delta'_{t+1} A) g_{t+1}, q_t = exp(delta'_t A) h_{t-1} and dy the gradient before
// the gate:
//   dB_t = Σ_d g delta' u,   dC_t = Σ_d dy h_t,   dA = Σ_t g q delta',
//   du = delta' Σ_n g B + D dy,   ddelta' = u Σ_n g B + Σ_n g q A.
// The state that enters each tile is computed again from the checkpoint before it, then the tile
// runs forward with every state kept in registers and backward with its exponentials computed
// again. dB and dC are summed over the channels of a warp by exchanges, over warps in shared
// memory, over blocks by a second kernel, always in the same order. A step that no gradient reaches
// adds nothing, even if its values are NaN.

#include <retain/kernels/selective_scan/selective_scan_bwd_wide.cuh>

namespace retain::kernels {
namespace {

constexpr int kPart = 8;  ///< steps whose states a thread keeps in registers
constexpr int kParts = kTile / kPart;

template <class Layout>
struct alignas(16) BwdShared {
  static constexpr int row = Layout::channels + 8;  ///< padded against bank conflicts
  float2 step[kTile][Layout::channels];             ///< delta', delta' u
  float dy[kTile][Layout::channels];
  float B[Layout::pairs], C[Layout::pairs];
  float by_input[kTile][row], by_decay[kTile][row], y[kTile][row];  ///< sums over n
  float u[kTile][Layout::channels], slope[kTile][Layout::channels];
  float dz[kTile][Layout::channels];  ///< dL/dout · silu'(z), which lacks the factor y
  float by_warp[Layout::warps][kPart][2 * Layout::padded_n];  ///< a part's dB, then dC
  float bias[Layout::channels], D[Layout::channels];
  float4 dD[Layout::fours_a_thread][Layout::threads],
      dbias[Layout::fours_a_thread][Layout::threads];
};

/// Loads a tile into shared memory; kForward and kGradients: what the way there and the way back
/// need. Returns whether something is not finite.
template <typename T, class Layout, bool kForward, bool kGradients>
__device__ bool put_tile(const SelectiveScanCudaBwd& p, const BlockPlace& place,
                         const FourPlace<Layout>& mine, int64_t tile, int steps,
                         BwdShared<Layout>& shared) {
  const auto& in = p.in;
  MatrixWalk<Layout, T> B(in.B_matrix, in.B_stride_g, place, tile);
  MatrixWalk<Layout, T> C(in.C_matrix, in.C_stride_g, place, tile);
  if (kForward) B.fetch(in.B_matrix, in.N, steps);
  if (kGradients) C.fetch(in.C_matrix, in.N, steps);
  const float* bias = &shared.bias[mine.channel];
  float odd = 0;
#pragma unroll
  for (int k = 0; k < Layout::fours_a_thread; ++k) {
    if (!mine.inside(k, kTile)) continue;
    const bool there = mine.inside(k, steps);
    const auto at = [&](const Activations& x) {
      return mine.template at<T>(x, place, tile) + k * mine.stride * x.stride_t;
    };
    Four<T> raw_u, raw_delta, raw_dout = {}, raw_z = {};
    if (there && mine.whole) {  // with nothing between the loads that waits for one
      raw_u = load_four(at(in.u), 4, true);
      raw_delta = load_four(at(in.delta), 4, true);
      if (kGradients && p.dy.data != nullptr) raw_dout = load_four(at(p.dy), 4, true);
      if (kGradients && in.z.data != nullptr) raw_z = load_four(at(in.z), 4, true);
    } else {
      const auto load = [&](const Activations& x) {
        return load_four(at(x), there && x.data != nullptr ? mine.count : 0, false);
      };
      raw_u = load(in.u);
      raw_delta = load(in.delta);
      if (kGradients) raw_dout = load(p.dy);
      if (kGradients) raw_z = load(in.z);
    }
    const float4 u4 = widen<T>(raw_u), delta4 = widen<T>(raw_delta);
    const float4 dout4 = widen<T>(raw_dout), z4 = widen<T>(raw_z);
    const float u[4] = {u4.x, u4.y, u4.z, u4.w},
                delta[4] = {delta4.x, delta4.y, delta4.z, delta4.w};
    const float dout[4] = {dout4.x, dout4.y, dout4.z, dout4.w}, z[4] = {z4.x, z4.y, z4.z, z4.w};
    const int step = mine.step + k * mine.stride;
    float size[4];
    step_sizes(delta4, bias, in.delta_softplus, size);
    if (!there) {
#pragma unroll
      for (int i = 0; i < 4; ++i) size[i] = 0.f;
    }
    auto* to = reinterpret_cast<float4*>(&shared.step[step][mine.channel]);
    const float4 drive = times4({size[0], size[1], size[2], size[3]}, u4);
    note(odd, drive);
    to[0] = {size[0], drive.x, size[1], drive.y};
    to[1] = {size[2], drive.z, size[3], drive.w};
    if (!kGradients) continue;
    float dy[4], dz[4] = {}, slope[4] = {1.f, 1.f, 1.f, 1.f};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      dy[i] = dout[i];
      if (in.z.data != nullptr) {
        const float gate = dout[i] == 0.f ? 0.f : z[i];
        const float open = sigmoid(gate);
        dz[i] = dout[i] * open * (1.f + gate * (1.f - open));
        dy[i] = dout[i] * gate * open;
      }
      if (in.delta_softplus) softplus(delta[i] + bias[i], slope[i]);
      note(odd, dy[i]);
    }
    const auto put = [&](float(&row)[Layout::channels], const float(&x)[4]) {
      *reinterpret_cast<float4*>(&row[mine.channel]) = {x[0], x[1], x[2], x[3]};
    };
    put(shared.dy[step], dy);
    put(shared.dz[step], dz);
    put(shared.u[step], u);
    put(shared.slope[step], slope);
  }
  if (kForward) B.put(shared.B, odd);
  if (kGradients) C.put(shared.C, odd);
  return odd != 0.f;
}

/// The state after kPart steps from step `first` of the tile on.
template <class Layout>
__device__ __forceinline__ void pass_part(const BwdShared<Layout>& shared,
                                          const ThreadPlace<Layout>& me,
                                          const float (&A)[Layout::states], int first,
                                          unsigned resets, float (&h)[Layout::states]) {
#pragma unroll 4
  for (int s = first; s < first + kPart; ++s) {
    if (resets >> s & 1) {
#pragma unroll
      for (int n = 0; n < Layout::states; ++n) h[n] = 0;
    }
    const float2 step = shared.step[s][me.channel];
    float B[Layout::states];
    read_floats(shared.B + s * Layout::padded_n + me.first_n(), B);
#pragma unroll
    for (int n = 0; n < Layout::states; ++n) h[n] = advance(h[n], step.x, A[n], step.y, B[n]);
  }
}

/// Sums each of the 2 · states values over the warp's channels. Value k of thread (channel c) ends
/// in those threads where c and k agree in their low bits.
template <class Layout>
__device__ __forceinline__ void sum_over_channels(float (&value)[2 * Layout::states]) {
  const int channel = Layout::channel() % Layout::warp_channels;
#pragma unroll
  for (int bit = 1; bit < Layout::warp_channels; bit *= 2) {
    const int left = Layout::states / bit;
    if (left == 0) {
      value[0] += __shfl_xor_sync(~0u, value[0], Layout::channel_bit(bit));
      continue;
    }
#pragma unroll
    for (int j = 0; j < left; ++j) {
      const bool odd = (channel & bit) != 0;
      const float keep = odd ? value[2 * j + 1] : value[2 * j];
      const float give = odd ? value[2 * j] : value[2 * j + 1];
      value[j] = keep + __shfl_xor_sync(~0u, give, Layout::channel_bit(bit));
    }
  }
}

template <class Layout>
__device__ __forceinline__ void store_by_warp(const float (&value)[2 * Layout::states],
                                              const ThreadPlace<Layout>& me, float* by_warp) {
  constexpr int kValues = 2 * Layout::states;
  constexpr int kStride = Layout::warp_channels < kValues ? Layout::warp_channels : kValues;
  const int channel = Layout::channel() % Layout::warp_channels;
  if (channel >= kValues) return;
#pragma unroll
  for (int j = 0; j < kValues / kStride; ++j) {
    const int k = channel + j * kStride;
    by_warp[k / Layout::states * Layout::padded_n + me.first_n() + k % Layout::states] = value[j];
  }
}

/// kPart steps forward, keeping the states, and backward; g is dL/dh at their end, then at their
/// start. kCareful: something is not finite.
template <class Layout, bool kCareful>
__device__ __forceinline__ void reverse_part(
    BwdShared<Layout>& shared, const ThreadPlace<Layout>& me, const float (&A)[Layout::states],
    int offset, int steps, unsigned resets, const float (&start)[Layout::states],
    float (&g)[Layout::states], float (&dA)[Layout::states]) {
  constexpr int kStates = Layout::states;
  float h[kPart + 1][kStates], a[kPart][kStates];  // h[s]: before step s and its reset
#pragma unroll
  for (int n = 0; n < kStates; ++n) h[0][n] = start[n];
  const float2* step_at = &shared.step[offset][me.channel];
  const float* dy_at = &shared.dy[offset][me.channel];
  const float* B_at = shared.B + offset * Layout::padded_n + me.first_n();
  const float* C_at = shared.C + offset * Layout::padded_n + me.first_n();
#pragma unroll
  for (int s = 0; s < kPart; ++s) {
    const float2 step = step_at[s * Layout::channels];
    const float at_reset = exponent_offset(resets, s);
    float B[kStates];
    read_floats(B_at + s * Layout::padded_n, B);
#pragma unroll
    for (int n = 0; n < kStates; ++n) {
      const float before = kCareful && (resets >> s & 1) ? 0.f : h[s][n];
      a[s][n] = decay_of(step.x, A[n], at_reset);
      h[s + 1][n] = fmaf(a[s][n], before, __fmul_rn(step.y, B[n]));
    }
  }
  float* by_warp = &shared.by_warp[threadIdx.x / 32][0][0];
#pragma unroll
  for (int first = kPart - Layout::group; first >= 0; first -= Layout::group) {
    float by_input[Layout::group] = {}, by_decay[Layout::group] = {}, y[Layout::group] = {};
#pragma unroll
    for (int j = Layout::group - 1; j >= 0; --j) {
      const int s = first + j;
      if (kCareful && s >= steps) continue;
      const bool reset = kCareful && (resets >> s & 1);
      const float2 step = step_at[s * Layout::channels];
      const float dy = dy_at[s * Layout::channels];
      float B[kStates], C[kStates], sums[2 * kStates];
      read_floats(B_at + s * Layout::padded_n, B);
      read_floats(C_at + s * Layout::padded_n, C);
#pragma unroll
      for (int n = 0; n < kStates; ++n) {
        const float decay = a[s][n];
        const float q = reset ? 0.f : decay * h[s][n];
        const float gradient = plus_times<kCareful>(dy, C[n], g[n]);
        const float through = times<kCareful>(gradient, q);
        by_input[j] = plus_times<kCareful>(gradient, B[n], by_input[j]);
        by_decay[j] = plus_times<kCareful>(through, A[n], by_decay[j]);
        y[j] = fmaf(C[n], h[s + 1][n], y[j]);
        dA[n] = plus_times<kCareful>(through, step.x, dA[n]);
        sums[n] = times<kCareful>(gradient, step.y);
        sums[kStates + n] = times<kCareful>(dy, h[s + 1][n]);
        g[n] = reset ? 0.f : times<kCareful>(gradient, decay);
      }
      sum_over_channels<Layout>(sums);
      store_by_warp<Layout>(sums, me, by_warp + s * 2 * Layout::padded_n);
    }
    const float input = sum_over_lanes<Layout>(by_input), decay = sum_over_lanes<Layout>(by_decay);
    const float output = sum_over_lanes<Layout>(y);
    if (me.lane < Layout::group) {
      const int at = offset + first + me.lane;
      shared.by_input[at][me.channel] = input;
      shared.by_decay[at][me.channel] = decay;
      shared.y[at][me.channel] = output;
    }
  }
}

/// Gradients of a tile's activations from the sums over n.
template <typename T, class Layout>
__device__ void finish_tile(const SelectiveScanCudaBwd& p, const BlockPlace& place,
                            const FourPlace<Layout>& mine, int64_t tile, int steps,
                            BwdShared<Layout>& shared) {
  const auto& in = p.in;
  const float* D = &shared.D[mine.channel];
#pragma unroll
  for (int k = 0; k < Layout::fours_a_thread; ++k) {
    if (!mine.inside(k, steps)) continue;
    const int step = mine.step + k * mine.stride;
    const auto row = [&](const auto& rows) {
      return *reinterpret_cast<const float4*>(&rows[step][mine.channel]);
    };
    const float4 steps_low = *reinterpret_cast<const float4*>(&shared.step[step][mine.channel]);
    const float4 steps_high =
        *reinterpret_cast<const float4*>(&shared.step[step][mine.channel + 2]);
    const float4 u = row(shared.u), dy = row(shared.dy), slope = row(shared.slope);
    const float4 by_input = row(shared.by_input), by_decay = row(shared.by_decay);
    const float4 y = row(shared.y), dz_y = row(shared.dz);
    float4 du, ddelta, dz;
    float4& dD = shared.dD[k][threadIdx.x];
    float4& dbias = shared.dbias[k][threadIdx.x];
    const auto finish = [&](auto member, float D, float size) {
      du.*member = fmaf(D, dy.*member, times<true>(by_input.*member, size));
      const float dsize = fmaf(by_decay.*member, kLn2, times<true>(by_input.*member, u.*member));
      ddelta.*member = times<true>(dsize, slope.*member);
      dz.*member = times<true>(dz_y.*member, fmaf(D, u.*member, y.*member));
      dD.*member += times<true>(dy.*member, u.*member);
      dbias.*member += ddelta.*member;
    };
    finish(&float4::x, D[0], steps_low.x);
    finish(&float4::y, D[1], steps_low.z);
    finish(&float4::z, D[2], steps_high.x);
    finish(&float4::w, D[3], steps_high.z);
    const auto store = [&](const Activations& x, float4 value) {
      store_four(mine.template at<T>(x, place, tile) + k * mine.stride * x.stride_t, value,
                 mine.count, mine.whole);
    };
    store(p.du, du);
    store(p.ddelta, ddelta);
    if (in.z.data != nullptr) store(p.dz, dz);
  }
}

/// dB and dC of a part's `steps`, the first of them `at_step`, summed over the warps.
template <class Layout>
__device__ void store_pairs(const SelectiveScanCudaBwd& p, const BlockPlace& place, int64_t at_step,
                            int steps, const BwdShared<Layout>& shared) {
  constexpr int kWidth = 2 * Layout::padded_n;
  const auto& in = p.in;
  const int64_t stride_t = in.B * in.G * in.N;
  const int64_t at =
      (place.channel_block * in.T + at_step) * stride_t + (place.b * in.G + place.group) * in.N;
#pragma unroll
  for (int first = 0; first < kPart * kWidth; first += Layout::threads) {
    const int i = first + threadIdx.x;
    const int step = i / kWidth, n = i % Layout::padded_n;
    if (n >= in.N || step >= steps) continue;
    float sum = 0;
#pragma unroll
    for (int warp = 0; warp < Layout::warps; ++warp) sum += shared.by_warp[warp][step][i % kWidth];
    float* blocks = i % kWidth < Layout::padded_n ? p.dB_blocks : p.dC_blocks;
    blocks[at + step * stride_t + n] = sum;
  }
}

/// dD and ddelta_bias of the block's steps: what the threads that share a channel found.
template <class Layout>
__device__ void store_channel_sums(const SelectiveScanCudaBwd& p, const BlockPlace& place,
                                   const BwdShared<Layout>& shared) {
  constexpr int kAcross = FourPlace<Layout>::across;
  const int64_t row = (place.segment * p.in.B + place.b) * p.in.D + place.first_channel;
  for (int channel = threadIdx.x; channel < place.channels; channel += Layout::threads) {
    double dD = 0, dbias = 0;
    for (int k = 0; k < Layout::fours_a_thread; ++k) {
      for (int thread = channel / 4; thread < Layout::threads; thread += kAcross) {
        dD += reinterpret_cast<const float*>(&shared.dD[k][thread])[channel % 4];
        dbias += reinterpret_cast<const float*>(&shared.dbias[k][thread])[channel % 4];
      }
    }
    p.dD_rows[row + channel] = static_cast<float>(dD);
    p.ddelta_bias_rows[row + channel] = static_cast<float>(dbias);
  }
}

/// The states that enter every kPart-th step of a chunk, each thread its own.
template <class Layout>
struct Starts {
  float* memory;

  __device__ __forceinline__ void put(int part, const float (&h)[Layout::states]) const {
#pragma unroll
    for (int n = 0; n < Layout::states; ++n) at(part, n) = h[n];
  }
  __device__ __forceinline__ void get(int part, float (&h)[Layout::states]) const {
#pragma unroll
    for (int n = 0; n < Layout::states; ++n) h[n] = at(part, n);
  }
  __device__ __forceinline__ float& at(int part, int n) const {
    return memory[(part * Layout::states + n) * Layout::threads + threadIdx.x];
  }
};

template <typename T, class Layout>
__global__ __launch_bounds__(Layout::threads, Layout::blocks_an_sm) void scan_bwd(
    const __grid_constant__ SelectiveScanCudaBwd p, bool aligned) {
  extern __shared__ char memory[];
  auto& shared = *reinterpret_cast<BwdShared<Layout>*>(memory);
  const Starts<Layout> starts{reinterpret_cast<float*>(memory + sizeof(BwdShared<Layout>))};
  constexpr int kStates = Layout::states;
  const auto& in = p.in;
  const BlockPlace place = block_place<Layout>(in);
  const ThreadPlace<Layout> me(in, place);
  const FourPlace<Layout> mine(place, aligned);
  const int64_t all_states = in.B * in.D * in.N;
  float A[kStates], g[kStates], h[kStates], dA[kStates] = {};
  load_states<Layout>(in.A + (place.first_channel + me.channel) * in.N + me.first_n(), in.N, me, A);
#pragma unroll
  for (int n = 0; n < kStates; ++n) A[n] = rate_of(A[n]);
  const float* entering =
      in.segments > 1 ? in.segment_states + place.segment * all_states : p.dlast_state;
  load_states<Layout>(entering != nullptr ? entering + me.state : nullptr, in.N, me, g);
#pragma unroll
  for (int k = 0; k < Layout::fours_a_thread; ++k) {
    shared.dD[k][threadIdx.x] = shared.dbias[k][threadIdx.x] = {};
  }

  for (int channel = threadIdx.x; channel < Layout::channels; channel += Layout::threads) {
    shared.bias[channel] = place.weight(in.delta_bias, channel);
    shared.D[channel] = place.weight(in.D_skip, channel);
  }
  __syncthreads();

  const int64_t chunks = (place.end - place.begin + in.checkpoint_every - 1) / in.checkpoint_every;
  bool ends_odd = false;  // something in the state that leaves the chunk is not finite
  for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
    const int64_t first = place.begin + chunk * in.checkpoint_every;
    const int64_t end = min(place.end, first + in.checkpoint_every);
    const int last = static_cast<int>((end - first - 1) / kTile);
    load_states<Layout>(static_cast<const float*>(p.checkpoints) +
                            first / in.checkpoint_every * all_states + me.state,
                        in.N, me, h);
    starts.put(0, h);
    unsigned resets = 0;
    const bool begins_odd = any_odd(odd_of(h));
    bool careful = begins_odd || ends_odd || any_odd(odd_of(g));
    ends_odd = begins_odd;
    float odd = 0;
    for (int k = 0; k <= last; ++k) {
      const int64_t tile = first + k * kTile;
      const int steps = static_cast<int>(min(end - tile, int64_t{kTile}));
      const bool reset = load_reset(in, place, tile);
      const bool tile_odd =
          k < last ? put_tile<T, Layout, true, false>(p, place, mine, tile, steps, shared)
                   : put_tile<T, Layout, true, true>(p, place, mine, tile, steps, shared);
      resets = reset_bits(reset);
      careful = __syncthreads_or(tile_odd || careful);
      const int parts = k < last ? kParts : (steps - 1) / kPart;
#pragma unroll 1
      for (int part = 0; part < parts; ++part) {
        pass_part<Layout>(shared, me, A, part * kPart, resets, h);
        starts.put(kParts * k + part + 1, h);
        note(odd, h);
      }
      if (k < last) __syncthreads();
    }
    careful = any_odd(odd) || careful;
    for (int k = last; k >= 0; --k) {
      const int64_t tile = first + k * kTile;
      const int steps = static_cast<int>(min(end - tile, int64_t{kTile}));
      if (k < last) {
        const bool reset = load_reset(in, place, tile);
        const bool tile_odd = put_tile<T, Layout, true, true>(p, place, mine, tile, steps, shared);
        resets = reset_bits(reset);
        careful = __syncthreads_or(tile_odd || careful);
      }
      float tile_dA[kStates] = {};
#pragma unroll 1
      for (int part = kParts - 1; part >= 0; --part) {
        const int offset = part * kPart;
        if (offset >= steps) continue;
        starts.get(kParts * k + part, h);
        const unsigned here = resets >> offset & ((1u << kPart) - 1);
        if (careful || overflowed(here, h, g)) {
          reverse_part<Layout, true>(shared, me, A, offset, steps - offset, here, h, g, tile_dA);
        } else {
          reverse_part<Layout, false>(shared, me, A, offset, steps - offset, here, h, g, tile_dA);
        }
        __syncthreads();
        store_pairs<Layout>(p, place, tile + offset, steps - offset, shared);
        __syncthreads();
      }
#pragma unroll
      for (int n = 0; n < kStates; ++n) dA[n] += tile_dA[n];
      finish_tile<T, Layout>(p, place, mine, tile, steps, shared);
      __syncthreads();
    }
  }

  if (place.segment == 0) store_states<Layout>(p.dinitial_state + me.state, in.N, me, g);
  store_states<Layout>(p.dA_rows + place.segment * all_states + me.state, in.N, me, dA);
  __syncthreads();
  store_channel_sums<Layout>(p, place, shared);
}

}  // namespace

int64_t wide_channel_blocks(const SelectiveScanCudaInputs& in) {
  int64_t blocks = 0;
  dispatch_wide_layout(in.N, [&](auto layout) { blocks = channel_blocks<decltype(layout)>(in); });
  return blocks;
}

void launch_wide_bwd(const SelectiveScanCudaBwd& p, CudaStream stream) {
  const auto& in = p.in;
  dispatch_activations(in.type, [&](auto element) {
    using T = decltype(element);
    dispatch_wide_layout(in.N, [&](auto layout) {
      using Layout = decltype(layout);
      const Alignment aligned(in, {in.u, in.delta, in.z, p.dy, p.du, p.ddelta, p.dz});
      const size_t bytes = sizeof(BwdShared<Layout>);
      const size_t starts =
          in.checkpoint_every / kPart * Layout::states * Layout::threads * sizeof(float);
      if constexpr (std::is_same_v<T, __nv_bfloat16> && Layout::padded_n <= 32) {
        throw std::logic_error("selective_scan: bf16 states go by lanes");
      } else {
        allow_shared(scan_bwd<T, Layout>, static_cast<int>(bytes + starts));
        scan_bwd<T, Layout><<<scan_grid<Layout>(in), Layout::threads, bytes + starts, stream>>>(
            p, aligned.channels);
        check_launch("selective_scan: backward");
      }
    });
  });
}

}  // namespace retain::kernels
