// The backward pass of a chunk of queries.

#pragma once

#include "forward.h"

// From the scores and dp = dO vT, in room.d, to p and ds (times the scale); adds to the gradients of alpha and tau.
static void backward_scores(const Call& call, const Chunk& chunk, const Tile& tile, Room& room, double* d_alpha,
                            double* d_tau) {
  const bool is_gated = tile.of_prefix && call.gate != NONE, is_capped = call.softcap > 0;
  const int64_t at = chunk.sample->task * call.Hq + chunk.head;
  const float alpha = is_gated ? call.alpha[at] : 0.0f, tau = is_gated ? call.tau[at] : 0.0f;
  float* g = is_gated || is_capped ? room.p : room.s;  // masks must not reach what the gate and the cap see
  if (is_gated)
    apply_gate(call, chunk, tile.m, room.s, room.y, g);
  else if (is_capped)
    std::memcpy(g, room.s, size_t(tile.m) * CHUNK * sizeof(float));
  add_masks(call, chunk, tile, g);
  vec by_alpha = {}, by_tau = {};
  for (int j = 0; j < tile.m; j++)
    for (int i = 0; i < chunk.width; i += W) {
      const int entry = j * CHUNK + i;
      const int lane = chunk.lane + i;
      const vec p = exp_of(load(g + entry) - load(room.L + lane) - load(room.rest + lane));
      const vec dg = p * (load(room.d + entry) - load(room.delta + lane));
      vec ds = dg;
      if (is_gated) {
        const vec s = load(room.s + entry), y = load(room.y + entry), slope = dg * slope_of(int(call.gate), s * tau, y);
        by_alpha += dg * y;
        by_tau += slope * s;
        ds += slope * (alpha * tau);
      }
      if (is_capped) {
        const vec share = load(room.s + entry) * (1 / call.softcap);
        ds *= splat(1.0f) - share * share;
      }
      store(room.p + entry, p);
      store(room.d + entry, ds * call.scale);
    }
  if (is_gated) *d_alpha += sum_of(by_alpha), *d_tau += double(sum_of(by_tau)) * alpha;
}

static void begin_backward(const Call& call, const Chunk& chunk, const float* query, const float* d_output,
                           Room& room) {
  const Sample& x = *chunk.sample;
  const int64_t row = x.first_query + chunk.first, at = (x.batch * call.Hq + chunk.head) * call.rows + row;
  transpose(room.query, query, call.query.row, chunk.n, chunk.width, int(call.D), call.scale);
  transpose(room.d_output, d_output, call.d_output.row, chunk.n, chunk.width, int(call.Dv), 1.0f);
  for (int i = 0; i < chunk.width; i++) {
    room.L[i] = INF, room.rest[i] = room.delta[i] = 0;  // of lanes beyond n, and of queries that see nothing
    if (i >= chunk.n || call.lse[at + i] == -INF) continue;
    room.L[i] = call.lse[at + i];
    if (call.rest != nullptr) room.rest[i] = call.rest[at + i];
    const float *o = call.output.at(x.batch, chunk.head, row + i), *d_o = d_output + i * call.d_output.row;
    room.delta[i] = inner_product(o, d_o, call.Dv);
  }
}

struct Gradients {  // of one key head, where a lane adds to them; the prefix's are those of all T
  float *prefix_key, *prefix_value;
  double *alpha, *tau;  // [T, G]
  int64_t segment;
};

static void backward_chunk(const Call& call, const Chunk& chunk, const Gradients& to, Room& room) {
  const Sample& x = *chunk.sample;
  const int64_t G = call.Hq / call.Hkv, kv = chunk.head / G, row = x.first_query + chunk.first;
  const int Dp = rounded_up(call.D, PADDED), Dvp = rounded_up(call.Dv, PADDED);
  const int columns = rounded_up(call.D, W), v_columns = rounded_up(call.Dv, W);
  const float* query = call.query.at(x.batch, chunk.head, row);
  const float* d_output = call.d_output.at(x.batch, chunk.head, row);
  begin_backward(call, chunk, query, d_output, room);
  int64_t query_row = call.query.row, d_output_row = call.d_output.row;
  query = as_factor(query, &query_row, chunk.n, int(call.D), room.copies[1]);
  d_output = as_factor(d_output, &d_output_row, chunk.n, int(call.Dv), room.copies[2]);
  const int64_t entry = x.task * G + chunk.head % G;
  bool is_first = true;
  for_each_tile(call, chunk, true, call.context_gradients, [&](const Chunk& part, const Tile& tile) {
    scores(call, part, tile, room.query + part.lane, room.s);
    product<false>(room.d, CHUNK, tile.value, tile.value_row, 1, room.d_output + part.lane, CHUNK, tile.m, part.width,
                   int(call.Dv));
    backward_scores(call, part, tile, room, to.alpha + entry, to.tau + entry);
    const float *d_o = d_output + part.lane * d_output_row, *q = query + part.lane * query_row;
    float *d_key = nullptr, *d_value = nullptr;
    int64_t key_row = Dp, value_row = Dvp;
    if (tile.of_prefix) {
      const int64_t first = x.task * call.P + tile.first;
      if (call.prefix_gradients) d_key = to.prefix_key + first * Dp, d_value = to.prefix_value + first * Dvp;
    } else {
      key_row = call.d_key.row, value_row = call.d_value.row;
      d_key = call.d_key.at(x.batch, kv, x.first_key + tile.first) + to.segment * call.d_key_segment;
      d_value = call.d_value.at(x.batch, kv, x.first_key + tile.first) + to.segment * call.d_value_segment;
    }
    if (d_key != nullptr) {
      product<true>(d_value, value_row, room.p, CHUNK, 1, d_o, d_output_row, tile.m, v_columns, part.n);
      product<true>(d_key, key_row, room.d, CHUNK, 1, q, query_row, tile.m, columns, part.n);
    }
    if (!call.context_gradients) return;
    int64_t row = tile.key_row;
    const float* key = as_factor(tile.key, &row, tile.m, int(call.D), room.copies[0]);
    if (is_first) is_first = begin_sums(part, chunk, room.o, Dp);
    product(!is_first, room.o + part.lane * Dp, Dp, room.d, 1, CHUNK, key, row, part.n, columns, tile.m);
    is_first = false;
  });
  if (!call.context_gradients) return;
  for (int i = 0; i < chunk.n; i++) {
    float* to = call.d_query.at(x.batch, chunk.head, row + i);
    for (int64_t d = 0; d < call.D; d++) to[d] = is_first ? 0.0f : room.o[i * Dp + d];
  }
}
