#define RETAIN_CPU_ISA test
#include <gtest/gtest.h>
#include <retain/kernels/common/cpu_isa.h>
#include <retain/kernels/common/vector_math.h>

#include <cmath>
#include <limits>
#include <vector>

namespace retain {
namespace {

namespace math = kernels::test;

// Each function over an array, as the kernels use it, with the baseline's instructions and with
// fused multiply-adds.
#if defined(__x86_64__)
#define RETAIN_WITH_FMA [[gnu::target("avx2,fma")]]
bool has_fma() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#else
#define RETAIN_WITH_FMA
bool has_fma() { return true; }
#endif

#define RETAIN_OVER_ARRAY(name)                                                 \
  template <typename T>                                                         \
  void name##_baseline(const std::vector<T>& x, std::vector<T>& y) {            \
    for (size_t i = 0; i < x.size(); ++i) y[i] = math::name(x[i]);              \
  }                                                                             \
  template <typename T>                                                         \
  RETAIN_WITH_FMA void name##_fma(const std::vector<T>& x, std::vector<T>& y) { \
    for (size_t i = 0; i < x.size(); ++i) y[i] = math::name(x[i]);              \
  }
RETAIN_OVER_ARRAY(exp)
RETAIN_OVER_ARRAY(exp2)
RETAIN_OVER_ARRAY(softplus)
RETAIN_OVER_ARRAY(softplus_slope)
RETAIN_OVER_ARRAY(sigmoid)
RETAIN_OVER_ARRAY(silu)
RETAIN_OVER_ARRAY(tanh)

template <typename T>
using OverArray = void (*)(const std::vector<T>&, std::vector<T>&);

template <typename T>
struct Function {
  const char* name;
  OverArray<T> baseline, fma;
  long double (*exact)(long double);
  double low, high, ulps;
};

long double exact_sigmoid(long double x) { return 1 / (1 + expl(-x)); }
long double exact_softplus(long double x) { return x > 20 ? x : log1pl(expl(x)); }
long double exact_slope(long double x) { return x > 20 ? 1 : exact_sigmoid(x); }
long double exact_silu(long double x) { return x * exact_sigmoid(x); }

/// Distance in units of the last place of the exact value.
template <typename T>
double distance(T got, long double exact) {
  int exponent = 0;
  frexpl(exact, &exponent);
  const long double ulp = ldexpl(1, exponent - std::numeric_limits<T>::digits);
  return static_cast<double>(fabsl(got - exact) / ulp);
}

template <typename T>
class VectorMath : public ::testing::Test {
 protected:
  using Functions = std::vector<Function<T>>;
  static Functions functions() {
    const bool narrow = sizeof(T) == 4;
    return {
        {"exp", exp_baseline<T>, exp_fma<T>, expl, narrow ? -86.9 : -708, narrow ? 88.7 : 709.7, 2},
        {"exp2", exp2_baseline<T>, exp2_fma<T>, exp2l, narrow ? -125.5 : -1021.5,
         narrow ? 127.49 : 1023.49, 2},
        {"softplus", softplus_baseline<T>, softplus_fma<T>, exact_softplus, -40, 40, 4},
        {"softplus_slope", softplus_slope_baseline<T>, softplus_slope_fma<T>, exact_slope, -40, 40,
         4},
        {"sigmoid", sigmoid_baseline<T>, sigmoid_fma<T>, exact_sigmoid, -80, 80, 4},
        {"silu", silu_baseline<T>, silu_fma<T>, exact_silu, -80, 80, 4},
        {"tanh", tanh_baseline<T>, tanh_fma<T>, tanhl, -50, 50, 4},
        {"tanh", tanh_baseline<T>, tanh_fma<T>, tanhl, -1e-3, 1e-3, 4},
    };
  }
};

using Types = ::testing::Types<float, double>;
TYPED_TEST_SUITE(VectorMath, Types);

TYPED_TEST(VectorMath, StaysWithinItsUlps) {
  constexpr int kCount = 100003;
  for (const auto& function : TestFixture::functions()) {
    std::vector<TypeParam> x(kCount), y(kCount);
    for (int i = 0; i < kCount; ++i) {
      x[i] = static_cast<TypeParam>(function.low + (function.high - function.low) * i / kCount);
    }
    for (const auto run : {function.baseline, has_fma() ? function.fma : function.baseline}) {
      run(x, y);
      double worst = 0;
      for (int i = 0; i < kCount; ++i) {
        if (x[i] != 0) {
          const double here = distance(y[i], function.exact(x[i]));
          if (!(here <= worst)) worst = here;  // NaN, too
        }
      }
      EXPECT_LE(worst, function.ulps) << function.name;
    }
  }
}

TYPED_TEST(VectorMath, PacksGiveWhatSingleNumbersGive) {
  using Four = math::Pack<TypeParam, 4>;
  const auto expect_same = [](const char* name, auto function) {
    TypeParam x[Four::kCount], y[Four::kCount];
    for (int64_t from = -60; from < 60; ++from) {
      for (int64_t i = 0; i < Four::kCount; ++i) {
        x[i] = static_cast<TypeParam>(from) + static_cast<TypeParam>(i) / Four::kCount;
      }
      function(Four::load(x)).store(y);
      for (int64_t i = 0; i < Four::kCount; ++i) EXPECT_EQ(y[i], function(x[i])) << name << x[i];
    }
  };
  expect_same("exp ", [](const auto& x) { return math::exp(x); });
  expect_same("exp2 ", [](const auto& x) { return math::exp2(x); });
  expect_same("softplus ", [](const auto& x) { return math::softplus(x); });
  expect_same("softplus_slope ", [](const auto& x) { return math::softplus_slope(x); });
  expect_same("silu ", [](const auto& x) { return math::silu(x); });
  expect_same("tanh ", [](const auto& x) { return math::tanh(x); });
}

TYPED_TEST(VectorMath, NaNStaysNaN) {
  const std::vector<TypeParam> x = {std::numeric_limits<TypeParam>::quiet_NaN(),
                                    -std::numeric_limits<TypeParam>::quiet_NaN()};
  std::vector<TypeParam> y(2);
  for (const auto& function : TestFixture::functions()) {
    function.baseline(x, y);
    EXPECT_TRUE(std::isnan(y[0]) && std::isnan(y[1])) << function.name;
  }
}

TYPED_TEST(VectorMath, EndsAreExact) {
  constexpr TypeParam kInfinity = std::numeric_limits<TypeParam>::infinity();
  EXPECT_EQ(math::exp(-kInfinity), 0);
  EXPECT_EQ(math::exp(kInfinity), kInfinity);
  EXPECT_EQ(math::exp(TypeParam(-1e30)), 0);
  EXPECT_EQ(math::exp(TypeParam(1e30)), kInfinity);
  EXPECT_EQ(math::exp(TypeParam(0)), 1);
  EXPECT_EQ(math::exp2(-kInfinity), 0);
  EXPECT_EQ(math::exp2(TypeParam(-1e30)), 0);
  EXPECT_EQ(math::exp2(TypeParam(2000)), kInfinity);
  EXPECT_EQ(math::exp2(TypeParam(-3)), TypeParam(0.125));
  EXPECT_EQ(math::softplus(kInfinity), kInfinity);
  EXPECT_EQ(math::softplus(-kInfinity), 0);
  EXPECT_EQ(math::softplus(TypeParam(20.5)), TypeParam(20.5));
  EXPECT_EQ(math::softplus_slope(TypeParam(20.5)), 1);
  EXPECT_EQ(math::sigmoid(-kInfinity), 0);
  EXPECT_EQ(math::sigmoid(kInfinity), 1);
  EXPECT_EQ(math::tanh(-kInfinity), -1);
  EXPECT_EQ(math::tanh(kInfinity), 1);
  EXPECT_EQ(math::tanh(TypeParam(0)), 0);
}

}  // namespace
}  // namespace retain
