#pragma once
// Elementary functions of float and double, and of packs of them, without a branch or a call, so
// that a plain loop over them becomes vector code under any instruction set; over packs it is
// several times faster. Include it only in files that are compiled once an instruction set.
//
// exp and exp2 split x into a whole power of two, put into the exponent bits, and a rest in [-1/2,
// 1/2] powers of two, whose minimax polynomial is expm1's. Errors, float and double: exp, exp2
// below 1.6 ulp, sigmoid, tanh and softplus below 4 ulp. NaN stays NaN. A result below the smallest
// normal number, or within a factor 1.42 above it, is 0.

#include <retain/kernels/common/wide.h>

#include <cstdint>
#include <type_traits>

#ifndef RETAIN_CPU_ISA
#error "vector_math.h: define RETAIN_CPU_ISA, the namespace of the instruction set"
#endif

namespace retain::kernels::RETAIN_CPU_ISA {

template <typename T>
struct FloatTraits;

/// x + kRound - kRound is the whole number n next to x; the low bits of x + kRound are n - 1 in the
/// exponent's own count, so that shifted up they are 2^(n - 1), and 0 where that is below the
/// normal numbers.
template <>
struct FloatTraits<float> {
  using Bits = uint32_t;
  static constexpr int kMantissaBits = 23;
  static constexpr float kRound = 0x1.8p23f + 126;
  static constexpr float kLn2High = 0x1.63p-1f, kLn2Low = -2.12194440e-4f;
  static constexpr float kExpMin = -87.3f, kExpMax = 89.0f;  ///< exp is 0 below and infinite above
  static constexpr float kExp2Min = -126, kExp2Max = 128;
};

template <>
struct FloatTraits<double> {
  using Bits = uint64_t;
  static constexpr int kMantissaBits = 52;
  static constexpr double kRound = 0x1.8p52 + 1022;
  static constexpr double kLn2High = 0x1.62e42fee00000p-1, kLn2Low = 0x1.a39ef35793c76p-33;
  static constexpr double kExpMin = -708.3, kExpMax = 710;
  static constexpr double kExp2Min = -1022, kExp2Max = 1024;
};

/// The type of the numbers in V, which is float, double or a Pack of them.
template <typename V>
struct ElementOf {
  using Type = V;
};
template <typename T, int n>
struct ElementOf<Pack<T, n>> {
  using Type = T;
};
template <typename V>
using Element = typename ElementOf<V>::Type;

// What works on the bits of a number.

/// 2^(n - 1), where shifted is n + kRound.
template <typename T>
RETAIN_INLINE T half_power(T shifted) {
  using Bits = typename FloatTraits<T>::Bits;
  return __builtin_bit_cast(T, __builtin_bit_cast(Bits, shifted) << FloatTraits<T>::kMantissaBits);
}
template <typename T, int n>
RETAIN_INLINE Pack<T, n> half_power(Pack<T, n> x) {
  for (auto& part : x.part) {
    const auto bits = __builtin_bit_cast(WideBits<T>, part) << FloatTraits<T>::kMantissaBits;
    part = __builtin_bit_cast(Wide<T>, bits);
  }
  return x;
}

RETAIN_INLINE float abs(float x) { return __builtin_fabsf(x); }
RETAIN_INLINE double abs(double x) { return __builtin_fabs(x); }
template <typename T, int n>
RETAIN_INLINE Pack<T, n> abs(Pack<T, n> x) {
  using Bits = typename FloatTraits<T>::Bits;
  const auto without_sign = static_cast<std::make_signed_t<Bits>>(~Bits{} >> 1) - WideBits<T>{};
  for (auto& part : x.part) {
    part = __builtin_bit_cast(Wide<T>, __builtin_bit_cast(WideBits<T>, part) & without_sign);
  }
  return x;
}

// Polynomials, the lowest coefficient first.

template <typename V>
RETAIN_INLINE Element<V> horner(const V&, Element<V> c) {
  return c;
}
template <typename V, typename... Rest>
RETAIN_INLINE V horner(const V& x, Element<V> c, Rest... rest) {
  return c + x * horner(x, rest...);
}

/// e^r - 1 for |r| <= ln(2)/2.
template <typename V>
RETAIN_INLINE V expm1_reduced(const V& r) {
  if constexpr (std::is_same_v<Element<V>, float>) {
    return r +
           r * r * horner(r, 0.49999993f, 0.16666521f, 0.041668388f, 0.0083687168f, 0.0013814628f);
  } else {
    return r + r * r *
                   horner(r, 0.5000000000000010621, 0.16666666666666412591, 0.04166666666653021997,
                          0.0083333333334944488405, 0.0013888888943612336501,
                          0.00019841269506539712052, 0.00002480149311837144033,
                          2.755758646440899869e-6, 2.7630241259998390052e-7,
                          2.500001743608507915e-8);
  }
}

/// 2^f for |f| <= 1/2.
template <typename V>
RETAIN_INLINE V exp2_reduced(const V& f) {
  if constexpr (std::is_same_v<Element<V>, float>) {
    return horner(f, 1.0f, 0.69314720f, 0.24022648f, 0.055503324f, 0.0096184373f, 0.0013398900f,
                  0.00015353420f);
  } else {
    return horner(f, 1.0, 0.69314718055994532583, 0.24022650695910131351, 0.055504108664820081653,
                  0.009618129107594077488, 0.0013333558146774875181, 0.00015403530457172561272,
                  0.00001525273349302270392, 1.3215435249148833273e-6, 1.0178199554548313685e-7,
                  7.0737894276152240986e-9, 4.4347830394533005509e-10);
  }
}

/// log(1 + e) for 0 <= e <= 1, as 2 atanh(e / (2 + e)).
template <typename V>
RETAIN_INLINE V log1p_unit(const V& e) {
  using T = Element<V>;
  const V s = e / (T(2) + e);
  const V w = s * s, twice = s + s;
  if constexpr (std::is_same_v<T, float>) {
    return twice + twice * w * horner(w, 0.33333207f, 0.20010850f, 0.13999571f, 0.14012228f);
  } else {
    return twice +
           twice * w *
               horner(w, 0.33333333333338944708, 0.1999999999799706186, 0.1428571453173317197,
                      0.11111096321594147513, 0.090914105023201358499, 0.076820941360690346059,
                      0.067936388436369861824, 0.049490825710195057637, 0.088745593446084445213);
  }
}

// The functions.

/// x between the bounds; NaN stays NaN.
template <typename V>
RETAIN_INLINE V clamp(const V& x, Element<V> low, Element<V> high) {
  const V raised = where(x < low, low, x);
  return where(raised > high, high, raised);
}

template <typename V>
RETAIN_INLINE V exp(const V& argument) {
  using T = Element<V>;
  using F = FloatTraits<T>;
  const V x = clamp(argument, F::kExpMin, F::kExpMax);
  const V shifted = x * T(1.4426950408889634074) + F::kRound;
  const V n = shifted - F::kRound;
  const V r = (x - n * F::kLn2High) - n * F::kLn2Low;
  const V half = half_power(shifted);
  return (half + half * expm1_reduced(r)) * T(2);
}

/// 2^x in fewer operations: 0 below -126.5, infinite from 127.5 on (1023.5 in fp64).
template <typename V>
RETAIN_INLINE V exp2(const V& argument) {
  using F = FloatTraits<Element<V>>;
  constexpr auto kRound = F::kRound + 1;
  const V x = where(argument < F::kExp2Min - 1, F::kExp2Min - 1, argument);
  constexpr auto kMost = kRound + F::kExp2Max;
  const V nearest = x + kRound, shifted = where(nearest > kMost, kMost, nearest);
  const V rest = x - (shifted - kRound);
  return half_power(shifted) * exp2_reduced(rest);
}

/// log(1 + e^x); x itself above 20.
template <typename V>
RETAIN_INLINE V softplus(const V& x) {
  using T = Element<V>;
  const V positive = where(x < T(0), T(0), x);
  const V exponent = where(x > T(20), FloatTraits<T>::kExpMin, -abs(x));
  return positive + log1p_unit(exp(exponent));
}

/// 1 / (1 + e^-x).
template <typename V>
RETAIN_INLINE V sigmoid(const V& x) {
  using T = Element<V>;
  return T(1) / (T(1) + exp(-x));
}

/// The derivative of softplus: 1 above 20.
template <typename V>
RETAIN_INLINE V softplus_slope(const V& x) {
  using T = Element<V>;
  return sigmoid(where(x > T(20), T(80), x));
}

template <typename V>
RETAIN_INLINE V silu(const V& x) {
  return x * sigmoid(x);
}

/// tanh |x| = -m / (2 + m) with m = e^(-2|x|) - 1, which keeps its digits near 0.
template <typename V>
RETAIN_INLINE V tanh(const V& x) {
  using T = Element<V>;
  using F = FloatTraits<T>;
  const V size = abs(x);
  const V y = T(-2) * where(size > T(40), T(40), size);
  const V shifted = y * T(1.4426950408889634074) + F::kRound;
  const V n = shifted - F::kRound;
  const V r = (y - n * F::kLn2High) - n * F::kLn2Low;
  const V power = half_power(shifted) * T(2);
  const V m = power * expm1_reduced(r) + (power - T(1));
  const V magnitude = (T(0) - m) / (T(2) + m);
  return where(x < T(0), -magnitude, magnitude);
}

}  // namespace retain::kernels::RETAIN_CPU_ISA
