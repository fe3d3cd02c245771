// The gate s + a f(t s): f by name, and its derivative.

#pragma once

#include "vectors.h"

// The normal distribution function, to 1e-7 (Abramowitz and Stegun, 7.1.26).
static inline vec normal_of(vec x) {
  const vec z = magnitude(x) * 0.70710678f, t = splat(1.0f) / (z * 0.3275911f + 1.0f);
  vec p = splat(1.061405429f);
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const vec beyond = p * t * exp_of(-z * z) * 0.5f;
  return x < vec{} ? beyond : splat(1.0f) - beyond;
}

// log(1 + exp(x)) = max(x, 0) + log(1 + u) with u = exp(-|x|), and log(1 + u) = 2 artanh(u / (2 + u)).
static inline vec softplus_of(vec x) {
  const vec u = exp_of(-magnitude(x)), z = u / (u + 2.0f), square = z * z;
  vec p = splat(1.0f / 13);
  for (int n = 11; n > 0; n -= 2) p = p * square + 1.0f / float(n);
  return larger(x, vec{}) + p * z * 2.0f;
}

enum Gate { NONE, TANH, SIGMOID, GELU, RELU, SOFTPLUS, ELU, IDENTITY };

// e^x - 1 for x <= 0, by its series near 0.
static inline vec expm1_of(vec x) {
  vec p = splat(1.0f / 5040);
  for (float factorial : {720.0f, 120.0f, 24.0f, 6.0f, 2.0f}) p = p * x + 1.0f / factorial;
  return x > splat(-0.4f) ? (p * x + 1.0f) * x : exp_of(x) - 1.0f;
}

// f(x) of the gate s + a f(t s), and below its derivative. f is exact to 1e-7, not to digits of small values: it is added
// to a score, which is as inexact unless a is large.
static inline vec gate_of(int gate, vec x) {
  switch (gate) {
    case TANH: return sigmoid_of(x * 2.0f) * 2.0f - 1.0f;
    case SIGMOID: return sigmoid_of(x);
    case GELU: return x * normal_of(x);
    case RELU: return larger(x, vec{});
    case SOFTPLUS: return softplus_of(x);
    case ELU: return x > vec{} ? x : expm1_of(smaller(x, vec{}));
    default: return x;
  }
}

static inline vec slope_of(int gate, vec x, vec y) {
  switch (gate) {
    case TANH: return splat(1.0f) - y * y;
    case SIGMOID: return y * (splat(1.0f) - y);
    case GELU: return normal_of(x) + x * exp_of(x * x * -0.5f) * 0.39894228f;
    case RELU: return x > vec{} ? splat(1.0f) : vec{};
    case SOFTPLUS: return sigmoid_of(x);
    case ELU: return x > vec{} ? splat(1.0f) : y + 1.0f;
    default: return splat(1.0f);
  }
}
