#pragma once
// Wide<T>: as many numbers as one register holds, with the operators of the language. Pack<T, n>: n
// of them that go through every operation together, because one alone waits for each operation to
// end before the next begins. Include it only in files that are compiled once an instruction set.

#include <cstdint>

#ifndef RETAIN_CPU_ISA
#error "wide.h: define RETAIN_CPU_ISA, the namespace of the instruction set"
#endif

#define RETAIN_INLINE [[gnu::always_inline]] inline

namespace retain::kernels::RETAIN_CPU_ISA {

#if defined(__AVX512F__)
inline constexpr int kWideBytes = 64;
#elif defined(__AVX__)
inline constexpr int kWideBytes = 32;
#else
inline constexpr int kWideBytes = 16;
#endif

template <typename T>
struct WideTypes;
template <>
struct WideTypes<float> {
  typedef float Value __attribute__((vector_size(kWideBytes)));
  typedef int32_t Bits __attribute__((vector_size(kWideBytes)));
};
template <>
struct WideTypes<double> {
  typedef double Value __attribute__((vector_size(kWideBytes)));
  typedef int64_t Bits __attribute__((vector_size(kWideBytes)));
};

template <typename T>
using Wide = typename WideTypes<T>::Value;
template <typename T>
using WideBits = typename WideTypes<T>::Bits;
template <typename T>
inline constexpr int64_t kWide = kWideBytes / sizeof(T);

template <typename T>
RETAIN_INLINE Wide<T> load_wide(const T* from) {
  Wide<T> value;
  __builtin_memcpy(&value, from, sizeof(value));
  return value;
}
template <typename T>
RETAIN_INLINE void store_wide(T* to, const Wide<T>& value) {
  __builtin_memcpy(to, &value, sizeof(value));
}

template <typename T, int n>
struct Pack {
  static constexpr int64_t kCount = n * kWide<T>;
  Wide<T> part[n];

  RETAIN_INLINE static Pack load(const T* from) {
    Pack pack;
    for (int i = 0; i < n; ++i) pack.part[i] = load_wide(from + i * kWide<T>);
    return pack;
  }
  RETAIN_INLINE void store(T* to) const {
    for (int i = 0; i < n; ++i) store_wide(to + i * kWide<T>, part[i]);
  }
};

/// The truth of a comparison, for where().
template <typename T, int n>
struct PackMask {
  WideBits<T> part[n];
};

/// The same number in all places.
template <typename P, typename T>
RETAIN_INLINE P filled(T value) {
  P pack;
  for (auto& part : pack.part) part = value - Wide<T>{};
  return pack;
}

#define RETAIN_PACK_OPERATOR(Result, op)                                             \
  template <typename T, int n>                                                       \
  RETAIN_INLINE Result<T, n> operator op(const Pack<T, n>& a, const Pack<T, n>& b) { \
    Result<T, n> result;                                                             \
    for (int i = 0; i < n; ++i) result.part[i] = a.part[i] op b.part[i];             \
    return result;                                                                   \
  }                                                                                  \
  template <typename T, int n>                                                       \
  RETAIN_INLINE Result<T, n> operator op(const Pack<T, n>& a, T b) {                 \
    return a op filled<Pack<T, n>>(b);                                               \
  }                                                                                  \
  template <typename T, int n>                                                       \
  RETAIN_INLINE Result<T, n> operator op(T a, const Pack<T, n>& b) {                 \
    return filled<Pack<T, n>>(a) op b;                                               \
  }
RETAIN_PACK_OPERATOR(Pack, +)
RETAIN_PACK_OPERATOR(Pack, -)
RETAIN_PACK_OPERATOR(Pack, *)
RETAIN_PACK_OPERATOR(Pack, /)
RETAIN_PACK_OPERATOR(PackMask, <)
RETAIN_PACK_OPERATOR(PackMask, >)
RETAIN_PACK_OPERATOR(PackMask, ==)
#undef RETAIN_PACK_OPERATOR

template <typename T, int n>
RETAIN_INLINE Pack<T, n> operator-(const Pack<T, n>& x) {
  Pack<T, n> result;
  for (int i = 0; i < n; ++i) result.part[i] = -x.part[i];
  return result;
}

/// mask ? yes : no.
template <typename T, int n>
RETAIN_INLINE Pack<T, n> where(const PackMask<T, n>& mask, const Pack<T, n>& yes,
                               const Pack<T, n>& no) {
  Pack<T, n> result;
  for (int i = 0; i < n; ++i) result.part[i] = mask.part[i] ? yes.part[i] : no.part[i];
  return result;
}
template <typename T, int n>
RETAIN_INLINE Pack<T, n> where(const PackMask<T, n>& mask, T yes, const Pack<T, n>& no) {
  return where(mask, filled<Pack<T, n>>(yes), no);
}
template <typename T>
RETAIN_INLINE T where(bool mask, T yes, T no) {
  return mask ? yes : no;
}

/// Calls run(j, Pack()) for j = 0, … in steps of the pack's size over `count`, a multiple of kWide.
template <typename T, typename Run>
RETAIN_INLINE void for_each_pack(int64_t count, const Run& run) {
  using Four = Pack<T, 4>;
  using One = Pack<T, 1>;
  int64_t j = 0;
  for (; j + Four::kCount <= count; j += Four::kCount) run(j, Four());
  for (; j < count; j += One::kCount) run(j, One());
}

}  // namespace retain::kernels::RETAIN_CPU_ISA
