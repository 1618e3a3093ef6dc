#pragma once
// Elementary functions for float and double without a branch or a call, so that a plain loop over
// them becomes vector code under any instruction set. Include it only in files that are compiled
// once an instruction set.
//
// exp and exp2 split x into a whole power of two, put into the exponent bits, and a rest in [-1/2,
// 1/2] powers of two, whose minimax polynomial is expm1's. Errors, float and double: exp, exp2
// below 1.5 ulp, sigmoid, tanh and softplus below 4 ulp. NaN stays NaN. A result below the smallest
// normal number is 0.

#include <bit>
#include <cstdint>
#include <limits>
#include <type_traits>

#ifndef RETAIN_CPU_ISA
#error "vector_math.h: define RETAIN_CPU_ISA, the namespace of the instruction set"
#endif

#define RETAIN_INLINE [[gnu::always_inline]] inline

namespace retain::kernels::RETAIN_CPU_ISA {

template <typename T>
struct FloatTraits;

template <>
struct FloatTraits<float> {
  using Bits = uint32_t;
  static constexpr int kMantissaBits = 23;
  static constexpr float kRound = 0x1.8p23f;  ///< x + kRound - kRound is the whole number next to x
  static constexpr float kLn2High = 0x1.63p-1f, kLn2Low = -2.12194440e-4f;
  static constexpr float kExpMax = 88.722839f, kExpMin = -87.336540f;
  static constexpr float kExp2Max = 127.999992f, kExp2Min = -126.0f;
};

template <>
struct FloatTraits<double> {
  using Bits = uint64_t;
  static constexpr int kMantissaBits = 52;
  static constexpr double kRound = 0x1.8p52;
  static constexpr double kLn2High = 0x1.62e42fee00000p-1, kLn2Low = 0x1.a39ef35793c76p-33;
  static constexpr double kExpMax = 709.78271289338397, kExpMin = -708.39641853226408;
  static constexpr double kExp2Max = 1023.9999999999999, kExp2Min = -1022.0;
};

template <typename T>
RETAIN_INLINE T horner(T, T c) {
  return c;
}

template <typename T, typename... Rest>
RETAIN_INLINE T horner(T x, T c, Rest... rest) {
  return c + x * horner(x, rest...);
}

/// e^r - 1 for |r| <= ln(2)/2.
RETAIN_INLINE float expm1_reduced(float r) {
  return r +
         r * r * horner(r, 0.49999993f, 0.16666521f, 0.041668388f, 0.0083687168f, 0.0013814628f);
}
RETAIN_INLINE double expm1_reduced(double r) {
  return r + r * r *
                 horner(r, 0.5000000000000010621, 0.16666666666666412591, 0.04166666666653021997,
                        0.0083333333334944488405, 0.0013888888943612336501,
                        0.00019841269506539712052, 0.00002480149311837144033,
                        2.755758646440899869e-6, 2.7630241259998390052e-7, 2.500001743608507915e-8);
}

/// 2^f - 1 for |f| <= 1/2.
RETAIN_INLINE float exp2m1_reduced(float f) {
  return f * horner(f, 0.69314720f, 0.24022648f, 0.055503324f, 0.0096184373f, 0.0013398900f,
                    0.00015353420f);
}
RETAIN_INLINE double exp2m1_reduced(double f) {
  return f * horner(f, 0.69314718055994532583, 0.24022650695910131351, 0.055504108664820081653,
                    0.009618129107594077488, 0.0013333558146774875181, 0.00015403530457172561272,
                    0.00001525273349302270392, 1.3215435249148833273e-6, 1.0178199554548313685e-7,
                    7.0737894276152240986e-9, 4.4347830394533005509e-10);
}

/// m · 2^n for a normal result; `shifted` is n + kRound.
template <typename T>
RETAIN_INLINE T scale_by_power(T m, T shifted) {
  using Bits = typename FloatTraits<T>::Bits;
  return std::bit_cast<T>(std::bit_cast<Bits>(m) +
                          (std::bit_cast<Bits>(shifted) << FloatTraits<T>::kMantissaBits));
}

/// Zero below `low`, infinity above `high`, NaN for NaN.
template <typename T>
RETAIN_INLINE T outside_range(T x, T result, T low, T high) {
  result = x <= high ? result : x + std::numeric_limits<T>::infinity();
  return x < low ? T(0) : result;
}

template <typename T>
RETAIN_INLINE T exp(T x) {
  using F = FloatTraits<T>;
  const T shifted = x * T(1.4426950408889634074) + F::kRound;
  const T n = shifted - F::kRound;
  const T r = (x - n * F::kLn2High) - n * F::kLn2Low;
  return outside_range(x, scale_by_power(T(1) + expm1_reduced(r), shifted), F::kExpMin, F::kExpMax);
}

template <typename T>
RETAIN_INLINE T exp2(T x) {
  using F = FloatTraits<T>;
  const T shifted = x + F::kRound;
  const T f = x - (shifted - F::kRound);
  return outside_range(x, scale_by_power(T(1) + exp2m1_reduced(f), shifted), F::kExp2Min,
                       F::kExp2Max);
}

/// log(1 + e) for 0 <= e <= 1, as 2 atanh(e / (2 + e)).
template <typename T>
RETAIN_INLINE T log1p_unit(T e) {
  const T s = e / (T(2) + e);
  const T w = s * s;
  T rest;
  if constexpr (std::is_same_v<T, float>) {
    rest = horner(w, 0.33333207f, 0.20010850f, 0.13999571f, 0.14012228f);
  } else {
    rest = horner(w, 0.33333333333338944708, 0.1999999999799706186, 0.1428571453173317197,
                  0.11111096321594147513, 0.090914105023201358499, 0.076820941360690346059,
                  0.067936388436869361824, 0.049490825710195057637, 0.088745593446084445213);
  }
  const T twice = s + s;
  return twice + twice * w * rest;
}

/// log(1 + e^x); x itself above 20.
template <typename T>
RETAIN_INLINE T softplus(T x) {
  const T magnitude = x < T(0) ? -x : x;
  const T positive = x < T(0) ? T(0) : x;
  const T sum = positive + log1p_unit(exp(-magnitude));
  return x > T(20) ? x : sum;
}

/// 1 / (1 + e^-x); the derivative of softplus at and below 20.
template <typename T>
RETAIN_INLINE T sigmoid(T x) {
  return T(1) / (T(1) + exp(-x));
}

template <typename T>
RETAIN_INLINE T silu(T x) {
  return x * sigmoid(x);
}

/// tanh |x| = -m / (2 + m) with m = e^(-2|x|) - 1, which keeps its digits near 0.
template <typename T>
RETAIN_INLINE T tanh(T x) {
  using F = FloatTraits<T>;
  const T magnitude = x < T(0) ? -x : x;
  const T y = magnitude > T(40) ? T(-80) : T(-2) * magnitude;
  const T shifted = y * T(1.4426950408889634074) + F::kRound;
  const T n = shifted - F::kRound;
  const T r = (y - n * F::kLn2High) - n * F::kLn2Low;
  const T power = scale_by_power(T(1), shifted);
  const T m = power * expm1_reduced(r) + (power - T(1));
  const T result = (T(0) - m) / (T(2) + m);
  return x < T(0) ? -result : result;
}

}  // namespace retain::kernels::RETAIN_CPU_ISA
