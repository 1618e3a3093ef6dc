// Backward pass of the selective scan for bf16 and d_state up to 16, whose forward pass left bf16
// states every 16 steps; the equations are in selective_scan_bwd.cu.
//
// A warp owns 32 channels, a lane one of them with all its states, so that a step's recurrences need
// no exchange. Time runs in tiles of 16 steps between kept states, from the last: elementwise work
// by pairs of channels; forward, with the state after each step left in shared memory as bf16; back,
// with its gradient in the state's place. Sums over channels (dB, dC) and over indices (y, du) are
// matrix products of these with bf16 factors, on the tensor cores, added up in fp32.
#include <retain/kernels/common/sum_parts.cuh>
#include <retain/kernels/selective_scan/selective_scan_rows.cuh>

#ifndef US
#define US 4
#endif
#ifndef UR
#define UR 2
#endif
#ifndef UE
#define UE 2
#endif
#ifndef MINB
#define MINB 8
#endif

namespace retain::kernels {
namespace {
constexpr int kUS = US, kUR = UR, kUE = UE;

using Layout = WarpLayout<1, 16, 1>;
using bf16 = __nv_bfloat16;
constexpr int kSteps = 16, kN = 16, kChannels = 32, kGroup = 8;  // a product's columns are 8 steps
using States = float[kN];
using Slot = uint4[kChannels * 2];        ///< a step's states as bf16
using Channels = bf16[kSteps][kChannels];
using GroupRows = float[kGroup][kChannels];

/// A tile as it lies in memory.
struct alignas(16) Raw {
  Channels u, delta, z, dout;
  bf16 pair[2][kSteps][kN];  ///< B, C
};

struct alignas(16) Shared {
  Slot entering;      ///< first B as floats, then sums of a group, then the tile's first states
  Slot slot[kSteps];  ///< states after each step, then gradients
  float size[kSteps][kChannels], dy[kSteps][kChannels];  ///< delta', dL/dy
  float C[kSteps][kN];
  Channels u;                ///< then du
  Channels delta;            ///< delta' u
  Channels z;                ///< dL/dout silu'(z), then dz
  Channels dout;             ///< dL/dy, then ddelta
  bf16 pair[2][kSteps][kN];  ///< B, C
  Rows rows[kArrays];
};

/// Where a lane's eight states of one half lie in a slot: no bank conflicts by lanes or by rows.
__device__ __forceinline__ int half_at(int channel, int half) {
  return channel * 2 + (half ^ (channel >> 2 & 1));
}

/// Where a channel's value lies in a row of a group.
__device__ __forceinline__ int in_group(int step, int channel) { return channel ^ step / 2 * 8; }

__device__ __forceinline__ unsigned pack(float low, float high) {
  unsigned x;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
  return x;
}
__device__ __forceinline__ float2 unpack(unsigned x) {
  return {__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u)};
}

/// A lane's states as they lie in a slot.
struct Packed {
  uint4 half[2];

  __device__ __forceinline__ void set(const States& h) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float* x = &h[i * 8];
      half[i] = {pack(x[0], x[1]), pack(x[2], x[3]), pack(x[4], x[5]), pack(x[6], x[7])};
    }
  }
  __device__ __forceinline__ void get(States& h) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const unsigned word[4] = {half[i].x, half[i].y, half[i].z, half[i].w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 x = unpack(word[j]);
        h[i * 8 + 2 * j] = x.x;
        h[i * 8 + 2 * j + 1] = x.y;
      }
    }
  }
  __device__ __forceinline__ void put(Slot& slot) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) slot[half_at(threadIdx.x, i)] = half[i];
  }
  __device__ __forceinline__ void take(const Slot& slot) {
#pragma unroll
    for (int i = 0; i < 2; ++i) half[i] = slot[half_at(threadIdx.x, i)];
  }
};

__device__ __forceinline__ void multiply(const unsigned (&a)[4], unsigned b0, unsigned b1,
                                         float (&sum)[4]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/// Sums over a group of steps: of channels by index, and of indices by channel.
struct GroupSums {
  float over_channels[4] = {}, over_indices[2][4] = {};

  /// One product after the other. kGradients: the slots hold gradients, and one of zero
  /// wins over whatever it meets; else the factors do.
  template <bool kGradients>
  static __device__ __noinline__ GroupSums carefully(const Slot (&slots)[kGroup],
                                             const bf16 (*factor)[kChannels],
                                             const bf16 (*weights)[kN]) {
    GroupSums sums;
    const int lane = threadIdx.x, r = lane / 4, q = lane % 4;
    const auto at = [&](int s, int c, int n) {
      return to_float(reinterpret_cast<const bf16*>(&slots[s][half_at(c, n / 8)])[n % 8]);
    };
    const auto plus = [](float gradient, float x, float sum) {
      return plus_times<true>(gradient, x, sum);
    };
    for (int i = 0; i < 4; ++i) {
      const int n = r + i / 2 * 8, s = q * 2 + i % 2;
      for (int c = 0; c < kChannels; ++c) {
        const float x = at(s, c, n), f = to_float(factor[s][c]);
        float& sum = sums.over_channels[i];
        sum = kGradients ? plus(x, f, sum) : plus(f, x, sum);
      }
    }
    for (int i = 0; i < 8; ++i) {
      const int c = r + i / 2 * 8, s = q * 2 + i % 2;
      float sum = 0;
      for (int n = 0; n < kN; ++n) {
        const float x = at(s, c, n), f = to_float(weights[s][n]);
        sum = kGradients ? plus(x, f, sum) : fmaf(x, f, sum);
      }
      sums.over_indices[i / 4][i % 4] = sum;
    }
    return sums;
  }

  __device__ __forceinline__ void store_over_channels(float* to, int64_t stride_t, int N,
                                                      int steps) const {
    const int n = threadIdx.x / 4, t = threadIdx.x % 4 * 2;
    float* at = to + t * stride_t + n;
    const bool low = n < N, high = n + 8 < N;
    if (t < steps) {
      if (low) at[0] = over_channels[0];
      if (high) at[8] = over_channels[2];
    }
    at += stride_t;
    if (t + 1 < steps) {
      if (low) at[0] = over_channels[1];
      if (high) at[8] = over_channels[3];
    }
  }

  __device__ __forceinline__ void put_over_indices(GroupRows& to) const {
    const int c = threadIdx.x / 4, t = threadIdx.x % 4 * 2;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        to[t + i % 2][in_group(t, c + k * 16 + i / 2 * 8)] = over_indices[k][i];
      }
    }
  }
};

/// The same on the tensor cores, a step after the other. Rows `factor` [step, channel] and `weights`
/// [step, index] begin at the group's first step.
struct GroupProducts {
  GroupSums sums;
  unsigned f[4], w[2], by_index, by_channel;

  __device__ __forceinline__ GroupProducts(const Slot* slots, const bf16 (*factor)[kChannels],
                                           const bf16 (*weights)[kN]) {
    const int lane = threadIdx.x, r = lane / 4, q = lane % 4, row = lane % 8, m = lane / 8;
#pragma unroll
    for (int i = 0; i < 4; ++i) f[i] = *reinterpret_cast<const unsigned*>(&factor[r][2 * q + 8 * i]);
#pragma unroll
    for (int i = 0; i < 2; ++i) w[i] = *reinterpret_cast<const unsigned*>(&weights[r][2 * q + 8 * i]);
    const auto base = static_cast<unsigned>(__cvta_generic_to_shared(slots));
    by_index = base + half_at(row + m / 2 * 8, m % 2) * 16;
    by_channel = base + half_at(row + m % 2 * 8, m / 2) * 16;
  }

  /// Step `s` of the group.
  __device__ __forceinline__ void add(int s) {
    const bool mine = threadIdx.x / 4 == s;
    const unsigned w0 = mine ? w[0] : 0, w1 = mine ? w[1] : 0;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const unsigned offset = s * sizeof(Slot) + k * 512;
      unsigned a[4], b[4];
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                   : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
                   : "r"(by_index + offset)
                   : "memory");
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                   : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
                   : "r"(by_channel + offset)
                   : "memory");
      multiply(a, mine ? f[2 * k] : 0, mine ? f[2 * k + 1] : 0, sums.over_channels);
      multiply(b, w0, w1, sums.over_indices[k]);
    }
  }
};

__device__ __forceinline__ void copy_16(void* to, const char* from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                   static_cast<unsigned>(__cvta_generic_to_shared(to))),
               "l"(from), "r"(there ? 16 : 0));
}

/// Starts to bring an array's channels, or its indices, of a tile: whole and on their boundaries.
__device__ __forceinline__ void copy_channels(Channels& to, const Rows& rows, int first, int steps) {
  const int row = threadIdx.x / 4, col = threadIdx.x % 4 * 16;
#pragma unroll
  for (int half = 0; half < kSteps; half += 8) {
    copy_16(reinterpret_cast<char*>(to[half + row]) + col, rows.near(first + half + row, col),
            half + row < steps && rows.data != nullptr);
  }
}
__device__ __forceinline__ void copy_indices(bf16 (&to)[kSteps][kN], const Rows& rows, int first,
                                             int steps) {
  const int row = threadIdx.x / 2, col = threadIdx.x % 2 * 16;
  copy_16(reinterpret_cast<char*>(to[row]) + col, rows.near(first + row, col), row < steps);
}

/// The same for any array, here and now.
template <int kWide>
__device__ __noinline__ void load_rows(bf16 (&to)[kSteps][kWide], const Rows& rows, int count,
                                       int first, int steps) {
  for (int i = threadIdx.x; i < kSteps * kWide; i += 32) {
    const int step = i / kWide, at = i % kWide;
    const bool there = step < steps && at < count && rows.data != nullptr;
    to[step][at] = there ? reinterpret_cast<const bf16*>(rows.at(first + step, 0))[at]
                         : from_float<bf16>(0.f);
  }
}

__device__ __forceinline__ void prefetch_channels(const Rows& rows, int first) {
  if (rows.data == nullptr) return;
  const char* at = rows.near(first + threadIdx.x / 2, threadIdx.x % 2 * 32);
  asm volatile("prefetch.global.L2 [%0];" ::"l"(at));
}

__device__ __forceinline__ void store_rows(const Channels& from, const Rows& rows, int first,
                                           int steps, int channels, bool words) {
  if (words) {
    const int row = threadIdx.x / 4, col = threadIdx.x % 4 * 16;
#pragma unroll
    for (int half = 0; half < kSteps; half += 8) {
      if (half + row < steps) {
        __stcg(reinterpret_cast<uint4*>(rows.near(first + half + row, col)),
               *reinterpret_cast<const uint4*>(reinterpret_cast<const char*>(from[half + row]) + col));
      }
    }
  } else if (threadIdx.x < channels) {
    for (int s = 0; s < steps; ++s) {
      reinterpret_cast<bf16*>(rows.at(first + s, 0))[threadIdx.x] = from[s][threadIdx.x];
    }
  }
}

/// A pair of channels' weights, and what they gather over time.
struct PairWeights {
  float2 bias, D, dD = {}, dbias = {};
  bool softplus, gated;

  __device__ __forceinline__ PairWeights(const SelectiveScanCudaInputs& in,
                                         const WarpPlace<Layout>& me)
      : bias(load(in.delta_bias, me)),
        D(load(in.D_skip, me)),
        softplus(in.delta_softplus),
        gated(in.z.data != nullptr) {}

  static __device__ __forceinline__ float2 load(const float* from, const WarpPlace<Layout>& me) {
    const int c = threadIdx.x % 16 * 2;
    const auto at = [&](int c) {
      return from != nullptr && c < me.channels ? from[me.first_channel + c] : 0.f;
    };
    return {at(c), at(c + 1)};
  }
};

/// The two steps of `i` that a warp works on by pairs of channels: a lane's pair there.
__device__ __forceinline__ int pair_step(int i) { return i + threadIdx.x / 16; }
__device__ __forceinline__ int pair_channel() { return threadIdx.x % 16 * 2; }
__device__ __forceinline__ unsigned& pair_at(bf16 (&row)[kChannels]) {
  return *reinterpret_cast<unsigned*>(&row[pair_channel()]);
}
__device__ __forceinline__ float2& pair_at(float (&row)[kChannels]) {
  return *reinterpret_cast<float2*>(&row[pair_channel()]);
}

/// log(1 + e^x), to about 1e-6 of it.
__device__ __forceinline__ float softplus_near(float x) {
  const float e = exp2_fast(-kLog2e * fabsf(x));
  float log2;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(log2) : "f"(1.f + e));
  const float few = e * fmaf(e, fmaf(e, .33333333f, -.5f), 1.f);
  return fmaxf(x, 0.f) + (e < .015625f ? few : log2 * kLn2);
}

/// 1 - e^-x for x >= 0: the derivative of softplus where it is x.
__device__ __forceinline__ float slope_of(float x) {
  const float near = x * fmaf(x, fmaf(x, .16666667f, -.5f), 1.f);
  return x < .03125f ? near : 1.f - exp2_fast(-kLog2e * x);
}

/// delta' of a pair.
__device__ __forceinline__ float2 sizes(float2 delta, const PairWeights& w, bool there) {
  float2 size{delta.x + w.bias.x, delta.y + w.bias.y};
  if (w.softplus) size = {softplus_near(size.x), softplus_near(size.y)};
  return there ? size : float2{};
}

/// dL/dout becomes dL/dy; `slope` is dL/dout silu'(z).
__device__ __forceinline__ void open_gate(float z, float& dy, float& slope) {
  z = dy == 0.f ? 0.f : z;
  const float open = sigmoid(z), part = dy * open;
  slope = fmaf(part * z, 1.f - open, part);
  dy = part * z;
}

/// A tile's indices as floats. Stays 0 if all are finite.
__device__ __forceinline__ void widen_indices(uint4 x, float* to, float& odd) {
  const float4 low = widen<bf16>(uint2{x.x, x.y}), high = widen<bf16>(uint2{x.z, x.w});
  const float all[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
  for (int i = 0; i < 8; ++i) odd = fmaf(all[i], 0.f, odd);
  reinterpret_cast<float4*>(to)[threadIdx.x * 2] = low;
  reinterpret_cast<float4*>(to)[threadIdx.x * 2 + 1] = high;
}

/// Elementwise work before the recurrences.
__device__ __forceinline__ void prepare(Raw& raw, Shared& shared, const PairWeights& w, int steps,
                                        float& odd) {
  float even = 0;
  const uint4 B = reinterpret_cast<const uint4*>(raw.pair[0])[threadIdx.x];
  const uint4 C = reinterpret_cast<const uint4*>(raw.pair[1])[threadIdx.x];
  widen_indices(B, reinterpret_cast<float*>(shared.entering), even);
  widen_indices(C, &shared.C[0][0], odd);
  reinterpret_cast<uint4*>(shared.pair[0])[threadIdx.x] = B;
  reinterpret_cast<uint4*>(shared.pair[1])[threadIdx.x] = C;
#pragma unroll(kUE)
  for (int i = 0; i < kSteps; i += 2) {
    const int s = pair_step(i);
    const unsigned u_pair = pair_at(raw.u[s]);
    const float2 u = unpack(u_pair);
    const float2 size = sizes(unpack(pair_at(raw.delta[s])), w, s < steps);
    float2 dy = unpack(pair_at(raw.dout[s]));
    if (w.gated) {
      const float2 z = unpack(pair_at(raw.z[s]));
      float2 slope;
      open_gate(z.x, dy.x, slope.x);
      open_gate(z.y, dy.y, slope.y);
      pair_at(shared.z[s]) = pack(slope.x, slope.y);
    }
    odd = fmaf(dy.x, 0.f, fmaf(dy.y, 0.f, odd));
    pair_at(shared.u[s]) = u_pair;
    pair_at(shared.size[s]) = size;
    pair_at(shared.dy[s]) = dy;
    pair_at(shared.delta[s]) = pack(size.x * u.x, size.y * u.y);
    pair_at(shared.dout[s]) = pack(dy.x, dy.y);
  }
}

__device__ __forceinline__ void clear(States& h) {
#pragma unroll
  for (int n = 0; n < kN; ++n) h[n] = 0;
}

/// A decay of 0 at a reset: what exp2 gives of minus infinity.
__device__ __forceinline__ float decay_of(float delta, float A, bool reset) {
  return exp2_fast(fmaf(delta, A, reset ? -INFINITY : 1e-8f));
}

/// What the way there needs of a step.
struct ScanInputs {
  float size, drive, offset;
  States B;
  __device__ __forceinline__ ScanInputs(const Shared& shared, int s, unsigned resets) {
    size = shared.size[s][threadIdx.x];
    drive = __fmul_rn(size, to_float(shared.u[s][threadIdx.x]));
    offset = resets >> s & 1 ? -INFINITY : 1e-8f;
    read_floats<kN>(reinterpret_cast<const float(&)[kSteps][kN]>(shared.entering)[s], B);
  }
};

__device__ __forceinline__ void scan_step(Shared& shared, const States& A, int s,
                                          const ScanInputs& x, States& h) {
#pragma unroll
  for (int n = 0; n < kN; ++n) {
    const float decay = exp2_fast(fmaf(x.size, A[n], x.offset));
    h[n] = fmaf(decay, h[n], __fmul_rn(x.drive, x.B[n]));
  }
  Packed packed;
  packed.set(h);
  packed.put(shared.slot[s]);
}

/// The way there over a group: states into the slots; beside it, the products of the steps before.
__device__ __forceinline__ void scan(Shared& shared, const States& A, int first, unsigned resets,
                                     States& h, GroupProducts& products) {
  {
    const ScanInputs x(shared, first, resets), y(shared, first + 1, resets);
    scan_step(shared, A, first, x, h);
    scan_step(shared, A, first + 1, y, h);
  }
#pragma unroll 1
  for (int i = 2; i < kGroup; i += 2) {
    const int s = first + i;
    const ScanInputs x(shared, s, resets), y(shared, s + 1, resets);
    __syncwarp();
    products.add(i - 2);
    products.add(i - 1);
    scan_step(shared, A, s, x, h);
    scan_step(shared, A, s + 1, y, h);
  }
  __syncwarp();
  products.add(kGroup - 2);
  products.add(kGroup - 1);
}

/// The same without products, where a reset clears even what is not finite.
__device__ __forceinline__ void scan_carefully(Shared& shared, const States& A, int first,
                                               unsigned resets, const Packed& entering) {
  States h;
  entering.get(h);
#pragma unroll 1
  for (int s = first; s < first + kGroup; ++s) {
    const ScanInputs x(shared, s, 0);
    if (resets >> s & 1) clear(h);
    scan_step(shared, A, s, x, h);
  }
}

/// What the way back needs of a step.
struct ReverseInputs {
  float size, dy, offset;
  States C;
  Packed before;
  __device__ __forceinline__ ReverseInputs(const Shared& shared, int s, unsigned resets)
      : size(shared.size[s][threadIdx.x]),
        dy(shared.dy[s][threadIdx.x]),
        offset(resets >> s & 1 ? -INFINITY : 1e-8f) {
    read_floats<kN>(shared.C[s], C);
    before.take((&shared.entering)[s]);
  }
};

/// A gradient into its slot; returns Σ_n e h A.
template <bool kCareful>
__device__ __forceinline__ float reverse_step(Shared& shared, const States& A, int s,
                                              const ReverseInputs& x, States& g, States& dA) {
  States h, gradient;
  x.before.get(h);
#pragma unroll
  for (int n = 0; n < kN; ++n) {
    gradient[n] = plus_times<kCareful>(x.dy, x.C[n], g[n]);
    g[n] = times<kCareful>(gradient[n], exp2_fast(fmaf(x.size, A[n], x.offset)));
  }
  Packed packed;
  packed.set(gradient);
  packed.put(shared.slot[s]);
  if (kCareful && x.offset < 0) clear(g);
  float sum[2] = {};
#pragma unroll
  for (int n = 0; n < kN; ++n) {
    const float through = times<kCareful>(g[n], h[n]);
    sum[n % 2] = plus_times<kCareful>(through, A[n], sum[n % 2]);
    dA[n] = plus_times<kCareful>(through, x.size, dA[n]);
  }
  return sum[0] + sum[1];
}

/// The way back over a group: gradients into the slots, Σ_n e h A into `by_decay`; beside it, the
/// products of the steps after.
__device__ __forceinline__ void reverse(Shared& shared, const States& A, int first, unsigned resets,
                                        States& g, States& dA, GroupRows& by_decay,
                                        GroupProducts& products) {
  const auto put = [&](int i, float sum) { by_decay[i][in_group(i, threadIdx.x)] = sum; };
  {
    const int i = kGroup - 1, s = first + i;
    const ReverseInputs x(shared, s, resets), y(shared, s - 1, resets);
    put(i, reverse_step<false>(shared, A, s, x, g, dA));
    put(i - 1, reverse_step<false>(shared, A, s - 1, y, g, dA));
  }
#pragma unroll 1
  for (int i = kGroup - 3; i > 0; i -= 2) {
    const int s = first + i;
    const ReverseInputs x(shared, s, resets), y(shared, s - 1, resets);
    __syncwarp();
    products.add(i + 2);
    products.add(i + 1);
    const float at_s = reverse_step<false>(shared, A, s, x, g, dA);
    const float below = reverse_step<false>(shared, A, s - 1, y, g, dA);
    put(i, at_s);
    put(i - 1, below);
  }
  __syncwarp();
  products.add(1);
  products.add(0);
}

__device__ __forceinline__ void reverse_carefully(Shared& shared, const States& A, int first,
                                                  unsigned resets, States& g, States& dA,
                                                  GroupRows& by_decay) {
#pragma unroll 1
  for (int i = kGroup - 1; i >= 0; --i) {
    const ReverseInputs x(shared, first + i, resets);
    by_decay[i][in_group(i, threadIdx.x)] =
        reverse_step<true>(shared, A, first + i, x, g, dA);
  }
}

/// dz of a group.
template <bool kCareful>
__device__ __forceinline__ void finish_gate(Shared& shared, const PairWeights& w, int first,
                                            const GroupRows& y) {
#pragma unroll(kUE)
  for (int i = 0; i < kGroup; i += 2) {
    const int k = pair_step(i), s = first + k;
    const float2 u = unpack(pair_at(shared.u[s])), slope = unpack(pair_at(shared.z[s]));
    const float2 sum = *reinterpret_cast<const float2*>(&y[k][in_group(k, pair_channel())]);
    pair_at(shared.z[s]) = pack(times<kCareful>(slope.x, fmaf(w.D.x, u.x, sum.x)),
                                times<kCareful>(slope.y, fmaf(w.D.y, u.y, sum.y)));
  }
}

/// du and ddelta of a group.
template <bool kCareful>
__device__ __forceinline__ void finish(Shared& shared, PairWeights& w, int first, int steps,
                                       const GroupRows& by_input, const GroupRows& by_decay) {
#pragma unroll(kUE)
  for (int i = 0; i < kGroup; i += 2) {
    const int k = pair_step(i), s = first + k, at = in_group(k, pair_channel());
    const float2 u2 = unpack(pair_at(shared.u[s])), size2 = pair_at(shared.size[s]);
    const float2 dy2 = pair_at(shared.dy[s]);
    const float2 input2 = *reinterpret_cast<const float2*>(&by_input[k][at]);
    const float2 decay2 = *reinterpret_cast<const float2*>(&by_decay[k][at]);
    float2 du, ddelta;
    const auto each = [&](auto m) {
      const float u = u2.*m, size = size2.*m, dy = dy2.*m, input = input2.*m;
      float dsize = fmaf(decay2.*m, kLn2, times<kCareful>(input, u));
      if (w.softplus) dsize = times<kCareful>(dsize, slope_of(size));
      if (s >= steps) dsize = 0;
      du.*m = plus_times<kCareful>(input, size, w.D.*m * dy);
      ddelta.*m = dsize;
      w.dD.*m = plus_times<kCareful>(dy, u, w.dD.*m);
      w.dbias.*m += dsize;
    };
    each(&float2::x);
    each(&float2::y);
    pair_at(shared.u[s]) = pack(du.x, du.y);
    pair_at(shared.dout[s]) = pack(ddelta.x, ddelta.y);
  }
}

__device__ __forceinline__ void load_packed(const bf16* from, int64_t N, bool exists, Packed& h) {
  if (N == kN && exists) {
#pragma unroll
    for (int i = 0; i < 2; ++i) h.half[i] = reinterpret_cast<const uint4*>(from)[i];
  } else {
    States x;
#pragma unroll
    for (int n = 0; n < kN; ++n) x[n] = exists && n < N ? to_float(from[n]) : 0.f;
    h.set(x);
  }
}

/// Brings a tile; the bits say which of its steps have a reset.
struct TileSource {
  bool words;  ///< all rows whole, on their boundaries
  int channels, N;

  __device__ __forceinline__ void channel_rows(Channels& to, const Rows& rows, int first,
                                               int steps) const {
    if (words) {
      copy_channels(to, rows, first, steps);
    } else {
      load_rows(to, rows, channels, first, steps);
    }
  }
  __device__ __forceinline__ void index_rows(bf16 (&to)[kSteps][kN], const Rows& rows, int first,
                                             int steps) const {
    if (words) {
      copy_indices(to, rows, first, steps);
    } else {
      load_rows(to, rows, N, first, steps);
    }
  }
};

__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

/// Rows of all arrays from the segment's first step on.
__device__ __forceinline__ void put_all_rows(const SelectiveScanCudaBwd& p,
                                             const WarpPlace<Layout>& me, Rows* rows) {
  put_rows<bf16>(p.in, me, me.begin, rows);
  if (threadIdx.x == 0) {
    rows[kDy] = rows_of<bf16>(p.dy, me.begin, me.b, me.first_channel);
    rows[kDu] = rows_of<bf16>(p.du, me.begin, me.b, me.first_channel);
    rows[kDdelta] = rows_of<bf16>(p.ddelta, me.begin, me.b, me.first_channel);
    rows[kDz] = rows_of<bf16>(p.dz, me.begin, me.b, me.first_channel);
  }
  __syncwarp();
}

__device__ __forceinline__ bool any_odd(float odd) { return __any_sync(~0u, odd != 0.f); }

__global__ __launch_bounds__(32, MINB) void scan_bwd_bf16(const __grid_constant__ SelectiveScanCudaBwd p,
                                                       Alignment aligned, bool eights) {
  extern __shared__ char memory[];
  auto& shared = *reinterpret_cast<Shared*>(memory);
  const auto& in = p.in;
  const WarpPlace<Layout> me(in, aligned.channels);
  const int N = static_cast<int>(in.N);
  const TileSource source{eights && me.channels == kChannels, me.channels, N};
  const int64_t all_states = in.B * in.D * in.N;
  const int64_t stride_t = in.B * in.G * in.N;
  const int64_t pairs_at = me.channel_block * in.T * stride_t + (me.b * in.G + me.group) * in.N;
  const bool exists = me.channel < me.channels;
  PairWeights w(in, me);
  OwnStates<Layout> A_, g_, dA_ = {};
  States &A = A_[0], &g = g_[0], &dA = dA_[0];
  load_rates(in, me, A_);
  const float* entering =
      in.segments > 1 ? in.segment_states + me.segment * all_states : p.dlast_state;
  load_states<Layout>(entering != nullptr ? entering + me.state : nullptr, N, me, g_);
  put_all_rows(p, me, shared.rows);

  const int length = static_cast<int>(me.end - me.begin);
  const int tiles = (length + kSteps - 1) / kSteps;
  const auto* checkpoint = static_cast<const bf16*>(p.checkpoints) + me.state +
                           (me.begin / kSteps + tiles - 1) * all_states;
  // What the next tile needs comes while the last slots are free.
  auto& raw = reinterpret_cast<Raw&>(shared.slot[kGroup + 1]);
  int reset = 0;
  Packed before;
  const auto fetch = [&](int first) {
    const int steps = min(length - first, kSteps);
    reset = load_reset(shared.rows, first, steps);
    source.channel_rows(raw.u, shared.rows[kU], first, steps);
    source.channel_rows(raw.delta, shared.rows[kDelta], first, steps);
    source.channel_rows(raw.z, shared.rows[kZ], first, steps);
    source.channel_rows(raw.dout, shared.rows[kDy], first, steps);
    source.index_rows(raw.pair[0], shared.rows[kB], first, steps);
    source.index_rows(raw.pair[1], shared.rows[kC], first, steps);
    load_packed(checkpoint, N, exists, before);
    checkpoint -= all_states;
  };
  if (tiles > 0) fetch((tiles - 1) * kSteps);
#pragma unroll 1
  for (int first = (tiles - 1) * kSteps; first >= 0; first -= kSteps) {
    const int steps = min(length - first, kSteps);
    wait_for_copies();
    const unsigned resets = reset_bits(reset != 0);
    __syncwarp();
    float odd = 0;
    prepare(raw, shared, w, steps, odd);
    States h;
    before.get(h);
    __syncwarp();
#pragma unroll
    for (int n = 0; n < kN; ++n) odd = fmaf(g[n], 0.f, odd);
    const int64_t pair = pairs_at + (me.begin + first) * stride_t;
    bool careful = false;
#pragma unroll 1
    for (int k = 0; k < kSteps; k += kGroup) {
      GroupProducts products(&shared.slot[k], &shared.dout[k], &shared.pair[1][k]);
      scan(shared, A, k, resets, h, products);
#pragma unroll
      for (int n = 0; n < kN; ++n) odd = fmaf(h[n], 0.f, odd);
      careful = any_odd(odd);
      if (careful) {
        Packed from = before;
        if (k > 0) from.take(shared.slot[k - 1]);
        scan_carefully(shared, A, k, resets, from);
        __syncwarp();
        products.sums = GroupSums::carefully<false>(
            *reinterpret_cast<Slot(*)[kGroup]>(&shared.slot[k]), &shared.dout[k], &shared.pair[1][k]);
        Packed last;
        last.take(shared.slot[k + kGroup - 1]);
        last.get(h);
      }
      products.sums.store_over_channels(p.dC_blocks + pair + k * stride_t, stride_t, N, steps - k);
      if (w.gated) {
        auto& y = reinterpret_cast<GroupRows&>(k == 0 ? shared.slot[kGroup] : shared.entering);
        products.sums.put_over_indices(y);
        __syncwarp();
        if (careful) {
          finish_gate<true>(shared, w, k, y);
        } else {
          finish_gate<false>(shared, w, k, y);
        }
        __syncwarp();
      }
    }
#pragma unroll 1
    for (int k = kSteps - kGroup; k >= 0; k -= kGroup) {
      auto& by_decay =
          reinterpret_cast<GroupRows&>(k == 0 ? shared.slot[kGroup] : shared.entering);
      if (k == 0) {
        before.put(shared.entering);
        if (first > 0) fetch(first - kSteps);
      }
      __syncwarp();
      GroupProducts products(&shared.slot[k], &shared.delta[k], &shared.pair[0][k]);
      if (careful) {
        reverse_carefully(shared, A, k, resets, g, dA, by_decay);
        __syncwarp();
        products.sums = GroupSums::carefully<true>(
            *reinterpret_cast<Slot(*)[kGroup]>(&shared.slot[k]), &shared.delta[k], &shared.pair[0][k]);
      } else {
        reverse(shared, A, k, resets, g, dA, by_decay, products);
      }
      products.sums.store_over_channels(p.dB_blocks + pair + k * stride_t, stride_t, N, steps - k);
      __syncwarp();
      auto& by_input = reinterpret_cast<GroupRows&>(shared.slot[k]);
      products.sums.put_over_indices(by_input);
      __syncwarp();
      if (careful) {
        finish<true>(shared, w, k, steps, by_input, by_decay);
      } else {
        finish<false>(shared, w, k, steps, by_input, by_decay);
      }
      __syncwarp();
    }
    store_rows(shared.u, shared.rows[kDu], first, steps, me.channels, source.words);
    store_rows(shared.dout, shared.rows[kDdelta], first, steps, me.channels, source.words);
    if (w.gated) store_rows(shared.z, shared.rows[kDz], first, steps, me.channels, source.words);
    __syncwarp();
  }
  store_states<Layout>(p.dA_rows + me.segment * all_states + me.state, N, me, dA_);
  if (me.segment == 0) store_states<Layout>(p.dinitial_state + me.state, N, me, g_);
  const int64_t row = (me.segment * in.B + me.b) * in.D + me.first_channel;
  const auto store = [&](float* to, float2 sum) {
    sum.x += __shfl_xor_sync(~0u, sum.x, 16);
    sum.y += __shfl_xor_sync(~0u, sum.y, 16);
    const int c = pair_step(pair_channel());
    if (c < me.channels) to[row + c] = threadIdx.x < 16 ? sum.x : sum.y;
  };
  store(p.dD_rows, w.dD);
  store(p.ddelta_bias_rows, w.dbias);
}

struct alignas(16) ChangeShared {
  float size[kSteps][kChannels], dy[kSteps][kChannels], C[kSteps][kN];
  Channels delta, z, dout;
  bf16 indices[kSteps][kN];
  Rows rows[kArrays];
};

/// Adds what the outputs of steps 0 … until - 1 give the gradient at the segment's start; `total` is
/// Σ delta' of the steps before.
template <bool kCareful>
__device__ __forceinline__ void add_changes(const ChangeShared& shared, const States& A, int until,
                                            float& total, States& g) {
#pragma unroll(kCareful ? 1 : 4)
  for (int s = 0; s < until; ++s) {
    const float dy = shared.dy[s][threadIdx.x];
    States C;
    read_floats<kN>(shared.C[s], C);
    total += shared.size[s][threadIdx.x];
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      const float own = times<kCareful>(dy, C[n]);
      g[n] = plus_times<kCareful>(own, exp2_fast(total * A[n]), g[n]);
    }
  }
}

/// As change_of_gradients in selective_scan_segments.cu.
__global__ __launch_bounds__(32, 16) void change_of_gradients_bf16(
    const __grid_constant__ SelectiveScanCudaBwd p, Alignment aligned, bool eights) {
  extern __shared__ char memory[];
  auto& shared = *reinterpret_cast<ChangeShared*>(memory);
  const auto& in = p.in;
  const WarpPlace<Layout> me(in, aligned.channels);
  const int N = static_cast<int>(in.N);
  const TileSource source{eights && me.channels == kChannels, me.channels, N};
  const PairWeights w(in, me);
  OwnStates<Layout> A, g = {};
  load_rates(in, me, A);
  bool growing = false;
#pragma unroll
  for (int n = 0; n < kN; ++n) growing = growing || !(A[0][n] <= 0.f);
  put_all_rows(p, me, shared.rows);
  const int length = static_cast<int>(me.end - me.begin);
  int steps, reset;
  const auto fetch = [&](int first) {
    steps = min(length - first, kSteps);
    reset = load_reset(shared.rows, first, steps);
    source.channel_rows(shared.delta, shared.rows[kDelta], first, steps);
    source.channel_rows(shared.z, shared.rows[kZ], first, steps);
    source.channel_rows(shared.dout, shared.rows[kDy], first, steps);
    source.index_rows(shared.indices, shared.rows[kC], first, steps);
  };
  float total[1] = {};
  unsigned resets = 0;
  fetch(0);
#pragma unroll 1
  for (int first = 0; first < length && resets == 0; first += kSteps) {
    wait_for_copies();
    resets = reset_bits(reset != 0);
    __syncwarp();
    float odd = growing ? 1.f : 0.f;
    widen_indices(reinterpret_cast<const uint4*>(shared.indices)[threadIdx.x], &shared.C[0][0], odd);
#pragma unroll(kUE)
    for (int i = 0; i < kSteps; i += 2) {
      const int s = pair_step(i);
      const float2 size = sizes(unpack(pair_at(shared.delta[s])), w, s < steps);
      float2 dy = unpack(pair_at(shared.dout[s])), slope;
      if (w.gated) {
        const float2 z = unpack(pair_at(shared.z[s]));
        open_gate(z.x, dy.x, slope.x);
        open_gate(z.y, dy.y, slope.y);
      }
      odd = fmaf(dy.x, 0.f, fmaf(dy.y, 0.f, odd));
      odd = fmaf(size.x, 0.f, fmaf(size.y, 0.f, odd));
      pair_at(shared.size[s]) = size;
      pair_at(shared.dy[s]) = dy;
    }
    __syncwarp();
    const int until = resets != 0 ? __ffs(resets) - 1 : kSteps;
    if (first + kSteps < length) fetch(first + kSteps);
    if (any_odd(odd)) {
      add_changes<true>(shared, A[0], until, total[0], g[0]);
    } else {
      add_changes<false>(shared, A[0], until, total[0], g[0]);
    }
    __syncwarp();
  }
  wait_for_copies();
  store_changes(in, me, resets != 0, total, A, g);
}

/// Whether rows lie in aligned sixteens of bytes.
bool in_eights(const SelectiveScanCudaBwd& p, const Alignment& aligned) {
  const auto& in = p.in;
  bool all = aligned.near && in.D / in.G % 8 == 0 && in.N == kN && in.B_stride_g % 8 == 0 &&
             in.C_stride_g % 8 == 0;
  for (const auto& x :
       {in.u, in.delta, in.z, p.dy, p.du, p.ddelta, p.dz, in.B_matrix, in.C_matrix}) {
    all = all && reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.stride_t % 8 == 0 &&
          x.stride_b % 8 == 0;
  }
  return all;
}

}  // namespace

void launch_bf16_changes(const SelectiveScanCudaBwd& p, CudaStream stream) {
  const Alignment aligned(p.in, {p.in.delta, p.in.z, p.dy});
  change_of_gradients_bf16<<<scan_grid<Layout>(p.in), 32, sizeof(ChangeShared), stream>>>(
      p, aligned, in_eights(p, aligned));
  check_launch("selective_scan: change of gradients");
}

void launch_bf16_bwd(const SelectiveScanCudaBwd& p, CudaStream stream) {
  const auto& in = p.in;
  const Alignment aligned(in, {in.u, in.delta, in.z, p.dy, p.du, p.ddelta, p.dz});
  if (in.B * in.D > 0) {
    const auto grid = scan_grid<Layout>(in);
    allow_shared(scan_bwd_bf16, sizeof(Shared));
    scan_bwd_bf16<<<grid, 32, sizeof(Shared), stream>>>(p, aligned, in_eights(p, aligned));
    check_launch("selective_scan: backward");
  }
  const int64_t size = in.T * in.B * in.G * in.N;
  const int64_t blocks = channel_blocks<Layout>(in);
  launch_sum_blocks(p.dB_blocks, blocks, size, static_cast<bf16*>(p.dB), stream);
  launch_sum_blocks(p.dC_blocks, blocks, size, static_cast<bf16*>(p.dC), stream);
}

}  // namespace retain::kernels
