#pragma once
// What every CUDA kernel here uses: elements of any activation type as fp32, in fours where they
// lie so, and elementary functions on the special-function unit.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <retain/kernels/common/cuda_types.h>

#include <cfloat>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace retain::kernels {

/// Calls run(T{}) with the element type that `type` names.
template <typename Run>
void dispatch_activations(ActivationType type, const Run& run) {
  switch (type) {
    case ActivationType::fp32:
      return run(float{});
    case ActivationType::fp16:
      return run(__half{});
    case ActivationType::bf16:
      return run(__nv_bfloat16{});
  }
}

/// Throws if the launch before it was refused.
inline void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(kernel) + ": " + cudaGetErrorString(error));
}

/// Bytes of shared memory that a block of the current device may have.
inline int most_shared_memory() {
  int device = 0, bytes = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return bytes;
}

/// Whether what this build has of a kernel for the current device is for compute capability 9.0 or
/// more: knows clusters, and barriers in shared memory that can be waited for.
template <typename Kernel>
bool is_for_hopper(Kernel kernel) {
  cudaFuncAttributes attributes = {};
  return cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.ptxVersion >= 90;
}

// Elements

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

/// Four neighbouring elements, their bits as they lie in memory.
template <typename T>
using Four = std::conditional_t<sizeof(T) == 4, uint4, uint2>;

/// Elements 0 … count - 1 of four, the others 0. `whole` says that all four are there and aligned.
template <typename T>
__device__ __forceinline__ Four<T> load_four(const T* from, int count, bool whole) {
  if (whole) return *reinterpret_cast<const Four<T>*>(from);
  using Bits = std::conditional_t<sizeof(T) == 4, unsigned, unsigned short>;
  const Bits* bits = reinterpret_cast<const Bits*>(from);
  unsigned x[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) x[i] = i < count ? bits[i] : 0u;
  if constexpr (sizeof(T) == 4) {
    return {x[0], x[1], x[2], x[3]};
  } else {
    return {x[0] | x[1] << 16, x[2] | x[3] << 16};
  }
}

template <typename T>
__device__ __forceinline__ float4 widen(const Four<T>& four) {
  if constexpr (std::is_same_v<T, float>) {
    return {__uint_as_float(four.x), __uint_as_float(four.y), __uint_as_float(four.z),
            __uint_as_float(four.w)};
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return {__uint_as_float(four.x << 16), __uint_as_float(four.x & 0xffff0000u),
            __uint_as_float(four.y << 16), __uint_as_float(four.y & 0xffff0000u)};
  } else {
    const float2 low = __half22float2(*reinterpret_cast<const __half2*>(&four.x));
    const float2 high = __half22float2(*reinterpret_cast<const __half2*>(&four.y));
    return {low.x, low.y, high.x, high.y};
  }
}

/// Two neighbours of a half type.
template <typename T>
using Two = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;

/// Their bits as they lie in memory.
template <typename T>
__device__ __forceinline__ unsigned pair_of(float low, float high) {
  Two<T> pair;
  if constexpr (std::is_same_v<T, __half>) {
    pair = __floats2half2_rn(low, high);
  } else {
    pair = __floats2bfloat162_rn(low, high);
  }
  return *reinterpret_cast<const unsigned*>(&pair);
}

/// Four neighbours.
template <typename T>
__device__ __forceinline__ Four<T> narrow(float4 x) {
  if constexpr (std::is_same_v<T, float>) {
    return {__float_as_uint(x.x), __float_as_uint(x.y), __float_as_uint(x.z), __float_as_uint(x.w)};
  } else {
    return {pair_of<T>(x.x, x.y), pair_of<T>(x.z, x.w)};
  }
}

template <typename T>
__device__ __forceinline__ void store_word(T* to, float4 x) {
  __stcg(reinterpret_cast<Four<T>*>(to), narrow<T>(x));
}

template <typename T>
__device__ __forceinline__ void store_four(T* to, float4 x, int count, bool whole) {
  if (whole) return store_word(to, x);
  const float value[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (i < count) to[i] = from_float<T>(value[i]);
  }
}

// Shared memory

__device__ __forceinline__ unsigned shared_address(const void* x) {
  return static_cast<unsigned>(__cvta_generic_to_shared(x));
}

/// Starts to copy 16 bytes there, or zeros where `there` is false.
__device__ __forceinline__ void copy_word(void* to, const void* from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(there ? 16 : 0));
}

/// The same of four elements.
template <typename T>
__device__ __forceinline__ void copy_four(void* to, const void* from, bool there) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(to)), "l"(from),
               "n"(4 * sizeof(T)), "r"(there ? static_cast<int>(4 * sizeof(T)) : 0));
}

/// For this thread's copies.
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

/// Makes this thread's copies since the last call a group.
__device__ __forceinline__ void close_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

/// For this thread's groups but the newest kBut.
template <int kBut>
__device__ __forceinline__ void wait_for_copies_but() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kBut) : "memory");
}

// Barriers in shared memory

/// Each phase ends when so many have arrived. All threads of the block meet before the first use.
__device__ __forceinline__ void init_barrier(uint64_t* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(count));
}

__device__ __forceinline__ void arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

/// The end of a phase of this parity, 0 for the first.
__device__ __forceinline__ void await(uint64_t* barrier, unsigned phase) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(shared_address(barrier)),
      "r"(phase)
      : "memory");
}

// Functions

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

/// A log2(e), for exponentials of base 2. Finite where A is infinite, so that a step size of 0
/// keeps the state all the same, as beyond a sequence's end; a NaN stays.
__device__ __forceinline__ float rate_of(float A) {
  const float rate = A * kLog2e;
  return isinf(rate) ? copysignf(FLT_MAX, rate) : rate;
}

/// 2^x within 2 ulp; 0 below the normal numbers.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// 1 / x within 1 ulp.
__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float sigmoid(float x) {
  return reciprocal(1.f + exp2_fast(-kLog2e * x));
}

/// e^x for x <= 0: what rounding takes from x log2(e) comes back to first order.
__device__ __forceinline__ float exp_accurate(float x) {
  const float scaled = x * kLog2e;
  const float rest = fmaf(x, kLog2e, -scaled) + x * 1.925963e-8f;
  const float power = exp2_fast(scaled);
  return fmaf(power, rest * kLn2, power);
}

/// e^-|x|
__device__ __forceinline__ float exp_of_minus(float x) {
  return exp_accurate(fmaxf(-fabsf(x), -150.f));
}

/// max(x, 0), or NaN.
__device__ __forceinline__ float positive_part(float x) {
  float y;
  asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(y) : "f"(x));
  return y;
}

/// A polynomial, the constant first.
template <int kCount>
__device__ __forceinline__ float polynomial(const float (&c)[kCount], float x) {
  float y = c[kCount - 1];
#pragma unroll
  for (int i = kCount - 2; i >= 0; --i) y = fmaf(y, x, c[i]);
  return y;
}

/// log(1 + e^x) as max(x, 0) + log(1 + e), e = e^-|x|, which is x itself above 20. The polynomial
/// for log(1 + e) / e in [0, 1] is the best of its degree that is 1 at 0: within 3.3e-8 of it.
__device__ __forceinline__ float softplus_of(float x, float e) {
  constexpr float kLog[] = {1.f,         -.49999648f, .33321324f,   -.24857163f, .19153655f,
                            -.13753803f, .079204537f, -.030065794f, .0053648246f};
  return fmaf(polynomial(kLog, e), e, positive_part(x));
}

__device__ __forceinline__ float softplus(float x) { return softplus_of(x, exp_of_minus(x)); }

/// The same within 1e-5 of it, at half the instructions.
__device__ __forceinline__ float softplus_near(float x) {
  constexpr float kLog[] = {1.f, -.49953947f, .32622608f, -.21240419f, .10359262f, -.024734532f};
  const float e = exp2_fast(-kLog2e * fabsf(x));
  return fmaf(polynomial(kLog, e), e, positive_part(x));
}

/// As near as activations of a type ask for.
template <typename T>
__device__ __forceinline__ float softplus_for(float x) {
  return std::is_same_v<T, __nv_bfloat16> ? softplus_near(x) : softplus(x);
}

/// softplus and its derivative.
__device__ __forceinline__ float softplus(float x, float& slope) {
  const float e = exp_of_minus(x);
  slope = x > 20.f ? 1.f : (x >= 0.f ? 1.f : e) * reciprocal(1.f + e);
  return softplus_of(x, e);
}

}  // namespace retain::kernels
