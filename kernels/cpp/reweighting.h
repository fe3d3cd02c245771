// Reweighted rows k' = W o k with W = U V, and from their gradients to those of k, U, V and of the gate.

#pragma once

#include "tiles.h"

// A row of W = U V, [D], of one head.
static void weights_of(const Side& side, const Call& call, int64_t place, int64_t kv, int64_t p, float* W_row) {
  std::fill(W_row, W_row + side.D, 0.0f);
  for (int64_t r = 0; r < side.R; r++) {
    const float u = side.U[(place * call.P + p) * side.R + r];
    const float* v = side.V + ((place * side.R + r) * call.Hkv + kv) * side.D;
    for (int64_t d = 0; d < side.D; d++) W_row[d] += u * v[d];
  }
}

// k' = W o k for one prefix in use and one head; shared rows are as they are.
static void fold(const Call& call, const Side& side, int64_t t, int64_t kv, float* W_row) {
  const int64_t place = place_of(call, side, t);
  const float* from = side.rows + (place * call.Hkv + kv) * call.P * side.D;
  float* to = side.folded + (t * call.Hkv + kv) * call.P * side.D;
  for (int64_t p = 0; p < call.lengths[t]; p++, from += side.D, to += side.D) {
    if (p < call.n_shared) {
      std::copy(from, from + side.D, to);
      continue;
    }
    weights_of(side, call, place, kv, p, W_row);
    for (int64_t d = 0; d < side.D; d++) to[d] = from[d] * W_row[d];
  }
}

// From dk', in parts, to dk, dU and dV of one prefix in use.
static void unfold(const Call& call, const Side& side, int64_t t, float* W_row) {
  const int64_t place = place_of(call, side, t), Dp = rounded_up(side.D, PADDED);
  for (int64_t kv = 0; kv < call.Hkv; kv++)
    for (int64_t p = 0; p < call.lengths[t]; p++) {
      float* d_row = side.d_rows + ((t * call.Hkv + kv) * call.P + p) * side.D;
      const float* row = side.rows + ((place * call.Hkv + kv) * call.P + p) * side.D;
      for (int64_t lane = 0; lane < call.lanes; lane++) {
        const float* part = side.parts + (((kv * call.lanes + lane) * call.T + t) * call.P + p) * Dp;
        for (int64_t d = 0; d < side.D; d++) d_row[d] += part[d];
      }
      if (side.R == 0 || p < call.n_shared) continue;
      weights_of(side, call, place, kv, p, W_row);
      for (int64_t d = 0; d < side.D; d++) {
        const float by_weight = d_row[d] * row[d];
        d_row[d] *= W_row[d];
        W_row[d] = by_weight;
      }
      for (int64_t r = 0; r < side.R; r++) {
        auto u = [&](int64_t prefix) { return (prefix * call.P + p) * side.R + r; };
        auto v = [&](int64_t prefix) { return ((prefix * side.R + r) * call.Hkv + kv) * side.D; };
        float* d_v = side.d_V + v(t);
        for (int64_t d = 0; d < side.D; d++) d_v[d] += side.U[u(place)] * W_row[d];
        side.d_U[u(t)] += inner_product(side.V + v(place), W_row, side.D);
      }
    }
}

// The sum of the parts of d_alpha or d_tau, for one prefix in use and one head.
static float sum_of_parts(const Call& call, const double* parts, int64_t t, int64_t head) {
  const int64_t G = call.Hq / call.Hkv;
  double total = 0;
  for (int64_t lane = 0; lane < call.lanes; lane++)
    total += parts[((head / G * call.lanes + lane) * call.T + t) * G + head % G];
  return float(total);
}
