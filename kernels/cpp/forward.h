// The forward pass of a chunk of queries.

#pragma once

#include <cmath>

#include "gate.h"
#include "tiles.h"

// Writes g = s + a f(t s) to `to`, and f(t s) to y unless it is null.
static void apply_gate(const Call& call, const Chunk& chunk, int m, const float* s, float* y, float* to) {
  const int64_t at = chunk.sample->task * call.Hq + chunk.head;
  const float alpha = call.alpha[at], tau = call.tau[at];
  for (int j = 0; j < m; j++)
    for (int i = 0; i < chunk.width; i += W) {
      const vec x = load(s + j * CHUNK + i), f = gate_of(int(call.gate), x * tau);
      if (y != nullptr) store(y + j * CHUNK + i, f);
      store(to + j * CHUNK + i, x + f * alpha);
    }
}

// Writes a query's output and log-sum-exp from its running maximum, sum and weighted values; null if it saw no key.
static void write_row(const Call& call, int64_t batch, int64_t head, int64_t query, float top, float total,
                      const float* o) {
  float* to = call.output.at(batch, head, query);
  const float share = o == nullptr || total == 0 ? 0.0f : 1 / total, above = std::log(total);
  for (int64_t d = 0; d < call.Dv; d++) to[d] = o == nullptr ? 0.0f : o[d] * share;
  const int64_t at = (batch * call.Hq + head) * call.rows + query;
  call.lse[at] = top == -INF ? -INF : top + above;
  if (call.rest != nullptr) call.rest[at] = top == -INF ? 0.0f : top - call.lse[at] + above;
}

// Makes a chunk's sums [n][width] ready for its first tile: if that does not write them all, they become 0. Returns
// whether it does.
static bool begin_sums(const Chunk& part, const Chunk& chunk, float* sums, int width) {
  if (part.n == chunk.n) return true;
  std::fill(sums, sums + chunk.n * width, 0.0f);
  return false;
}

static void forward_chunk(const Call& call, const Chunk& chunk, Room& room) {
  const Sample& x = *chunk.sample;
  const int Dvp = rounded_up(call.Dv, PADDED);
  transpose(room.query, call.query.at(x.batch, chunk.head, x.first_query + chunk.first), call.query.row, chunk.n,
            chunk.width, int(call.D), call.scale);
  const float sink = call.sink == nullptr ? -INF : call.sink[chunk.head];
  for (int i = 0; i < chunk.width; i++) room.top[i] = sink, room.total[i] = sink == -INF ? 0.0f : 1.0f;
  bool is_first = true;
  for_each_tile(call, chunk, true, true, [&](const Chunk& part, const Tile& tile) {
    float *s = room.s, *o = room.o + part.lane * Dvp, *tops = room.top + part.lane, *totals = room.total + part.lane;
    scores(call, part, tile, room.query + part.lane, s);
    if (tile.of_prefix && call.gate != NONE) apply_gate(call, part, tile.m, s, nullptr, s);
    add_masks(call, part, tile, s);
    if (is_first) is_first = begin_sums(part, chunk, room.o, Dvp);
    for (int i = 0; i < part.width; i += W) {
      const vec before = load(tops + i);
      vec top = before;
      for (int j = 0; j < tile.m; j++) top = larger(load(s + j * CHUNK + i), top);
      const vec from = top == splat(-INF) ? vec{} : top;  // a query that sees nothing
      vec sum = {};
      for (int j = 0; j < tile.m; j++) {
        const vec p = exp_of(load(s + j * CHUNK + i) - from);
        store(s + j * CHUNK + i, p);
        sum += p;
      }
      const vec kept = exp_of(before - from);
      store(totals + i, load(totals + i) * kept + sum);
      store(tops + i, top);
      if (!is_first)
        for (int lane = 0; lane < W && i + lane < part.n; lane++)
          if (kept[lane] != 1)
            for (int d = 0; d < Dvp; d += W) {
              float* at = o + (i + lane) * Dvp + d;
              store(at, load(at) * kept[lane]);
            }
    }
    int64_t row = tile.value_row;
    const float* value = as_factor(tile.value, &row, tile.m, int(call.Dv), room.copies[0]);
    const int columns = rounded_up(call.Dv, W);
    product(!is_first, o, Dvp, s, 1, CHUNK, value, row, part.n, columns, tile.m);
    is_first = false;
  });
  const int64_t query = x.first_query + chunk.first;
  for (int i = 0; i < chunk.n; i++)
    write_row(call, x.batch, chunk.head, query + i, room.top[i], room.total[i], is_first ? nullptr : room.o + i * Dvp);
}
