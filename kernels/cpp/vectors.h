// Vectors of floats, as wide as the CPU's, and functions of them.

#pragma once

#include <cstdint>
#include <utility>

#if defined(__AVX512F__)
constexpr int W = 16;  // floats of a vector
#elif defined(__AVX__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif
typedef float vec __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef uint8_t bytes __attribute__((vector_size(W), aligned(1), may_alias));

constexpr float INF = __builtin_inff();

static inline vec splat(float x) { return vec{} + x; }
static inline vec load(const float* p) { return *(const vec*)p; }
static inline void store(float* p, vec x) { *(vec*)p = x; }
static inline vec larger(vec a, vec b) { return a < b ? b : a; }   // a NaN in a stays
static inline vec smaller(vec a, vec b) { return b < a ? b : a; }  // likewise
static inline vec magnitude(vec x) { return (vec)((ivec)x & 0x7fffffff); }

static inline float sum_of(vec x) {
  float total = 0;
  for (int i = 0; i < W; i++) total += x[i];
  return total;
}

static float inner_product(const float* a, const float* b, int64_t n) {
  vec sums = {};
  int64_t i = 0;
  for (; i + W <= n; i += W) sums += load(a + i) * load(b + i);
  float total = sum_of(sums);
  for (; i < n; i++) total += a[i] * b[i];
  return total;
}

// Polynomials of the Cephes library (expf, tanhf). Exactly 0 below -87.
static inline vec exp_of(vec x) {
  const vec given = x;
  x = smaller(larger(x, splat(-87.0f)), splat(88.0f));
  const vec shifted = x * splat(1.44269504f) + splat(12582912.0f);  // its low bits are the rounded integer
  const vec n = shifted - splat(12582912.0f);
  const vec r = x - n * splat(0.693359375f) + n * splat(2.12194440e-4f);
  vec p = splat(1.9875691500e-4f);
  p = p * r + splat(1.3981999507e-3f);
  p = p * r + splat(8.3334519073e-3f);
  p = p * r + splat(4.1665795894e-2f);
  p = p * r + splat(1.6666665459e-1f);
  p = p * r + splat(5.0000001201e-1f);
  p = p * r * r + r + splat(1.0f);
  const vec y = (vec)((ivec)p + ((ivec)shifted << 23));
  const vec whole = given < splat(-87.0f) ? vec{} : y;
  return given == given ? whole : given;
}

static inline vec sigmoid_of(vec x) { return splat(1.0f) / (exp_of(-x) + 1.0f); }

static inline vec tanh_of(vec x) {
  const vec z = x * x;
  vec p = splat(-5.70498872745e-3f);
  p = p * z + splat(2.06390887954e-2f);
  p = p * z + splat(-5.37397155531e-2f);
  p = p * z + splat(1.33314422036e-1f);
  p = p * z + splat(-3.33332819422e-1f);
  const vec small = p * z * x + x;
  const vec far = sigmoid_of(x * 2.0f) * 2.0f - 1.0f;
  return magnitude(x) < splat(0.625f) ? small : far;
}

template <int S, int... I>
static inline void exchange(vec& a, vec& b, std::integer_sequence<int, I...>) {
#if defined(__clang__)
  const vec low = __builtin_shufflevector(a, b, ((I & S) ? W + I - S : I)...);
  const vec high = __builtin_shufflevector(a, b, ((I & S) ? W + I : I + S)...);
#else
  const vec low = __builtin_shuffle(a, b, ivec{((I & S) ? W + I - S : I)...});
  const vec high = __builtin_shuffle(a, b, ivec{((I & S) ? W + I : I + S)...});
#endif
  a = low, b = high;
}

// Transposes blocks of 2 S columns, then those twice as large.
template <int S>
static inline void transpose_square(vec (&x)[W]) {
  for (int i = 0; i < W; i++)
    if (!(i & S)) exchange<S>(x[i], x[i + S], std::make_integer_sequence<int, W>());
  if constexpr (2 * S < W) transpose_square<2 * S>(x);
}

// Adds up each of n vectors; lane i of the result is the sum of x[i].
template <int S = 1, int n = W>
static inline vec sums_of(vec (&x)[n]) {
  vec half[n / 2];
  for (int i = 0; i < n / 2; i++) {
    exchange<S>(x[2 * i], x[2 * i + 1], std::make_integer_sequence<int, W>());
    half[i] = x[2 * i] + x[2 * i + 1];
  }
  if constexpr (n == 2)
    return half[0];
  else
    return sums_of<2 * S, n / 2>(half);
}
