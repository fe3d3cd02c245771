// The forward pass of few queries, as in decoding. Keys are lanes.

#pragma once

#include "forward.h"

constexpr int FEW = 8;           // queries of a head; with more, its queries fill the lanes of a chunk
constexpr int LEAST_KEYS = 256;  // of a part; shorter contexts are not worth parting
constexpr int WIDELY = 64;       // tasks that keep all threads busy

struct Few {  // the queries of a key head of one sample, and a part of the keys
  const Sample* sample;
  int64_t kv;
  int64_t part, parts;
};

struct Found {  // what those queries have found in their part: running maximum, sum, and weighted values
  float *top, *total, *o;  // [rows], [rows], [rows][Dvp]
  static size_t floats(int rows, int Dvp) { return size_t(rows) * (Dvp + 2); }
  Found(float* memory, int rows) : top(memory), total(memory + rows), o(memory + 2 * rows) {}
};

// Scores of one query [m], a multiple of W of which are written: those beyond m are of the last key.
static void scores_of_row(const Call& call, const Tile& tile, const float* key, int64_t row, int width,
                          const float* query, float* s) {
  for (int j = 0; j < tile.m; j += W) {
    const float* keys[W];
    for (int i = 0; i < W; i++) keys[i] = key + std::min(j + i, tile.m - 1) * row;
    vec sums[W] = {};
    for (int d = 0; d < width; d += W) {
      const vec q = load(query + d);
      for (int i = 0; i < W; i++) sums[i] += load(keys[i] + d) * q;
    }
    vec x = sums_of(sums);
    if (call.softcap > 0) x = tanh_of(x * (1 / call.softcap)) * call.softcap;
    store(s + j, x);
  }
}

static void add_row_of_overlay(const Overlay& x, int64_t batch, int64_t head, int64_t query, int64_t key, int m,
                               float* s) {
  if (x.data == nullptr) return;
  const int64_t base = batch * x.batch + head * x.head + query * x.row + key * x.column;
  int j = 0;
  if (x.column == 1)
    for (; j + W <= m; j += W) store(s + j, plus_overlay(load(s + j), overlays_at(x, base + j)));
  for (; j < m; j++) {
    const float value = overlay_at(x, base + j * x.column);
    s[j] = value == -INF ? value : s[j] + value;
  }
}

// Gate, bias and masks for the scores of one query, and -inf beyond m.
static void finish_row(const Call& call, const Sample& x, const Tile& tile, int64_t head, int64_t n, float* s) {
  const int64_t query = x.first_query + n;
  int begin = 0, end = tile.m;
  if (tile.of_prefix) {
    const float alpha = call.alpha[x.task * call.Hq + head], tau = call.tau[x.task * call.Hq + head];
    if (call.gate != NONE)
      for (int j = 0; j < tile.m; j += W) store(s + j, load(s + j) + gate_of(int(call.gate), load(s + j) * tau) * alpha);
    add_row_of_overlay(call.bias, x.bias, head, query, tile.first, tile.m, s);
  } else {
    const int64_t key = x.first_key + tile.first;
    add_row_of_overlay(call.padding, x.batch, 0, 0, key, tile.m, s);
    add_row_of_overlay(call.mask, x.batch, head, query, key, tile.m, s);
    const Span seen = seen_by(call, Chunk{&x, head, n, 1, W});
    begin = int(std::clamp<int64_t>(seen.begin - tile.first, 0, tile.m));
    end = int(std::clamp<int64_t>(seen.end - tile.first, 0, tile.m));
  }
  std::fill(s, s + begin, -INF);
  std::fill(s + std::max(begin, end), s + rounded_up(tile.m, W), -INF);
}

// From scores to weights exp(s - top), with what was found so far brought to the new maximum.
static void weigh_row(const Tile& tile, float* s, float* top, float* total, float* o, int width) {
  vec highest = splat(*top);
  for (int j = 0; j < tile.m; j += W) highest = larger(load(s + j), highest);
  float next = *top;
  for (int i = 0; i < W; i++) next = highest[i] > next || highest[i] != highest[i] ? highest[i] : next;
  const float from = next == -INF ? 0.0f : next;  // a query that sees nothing
  vec sums = {};
  for (int j = 0; j < tile.m; j += W) {
    const vec p = exp_of(load(s + j) - from);
    store(s + j, p);
    sums += p;
  }
  const float kept = exp_of(splat(*top - from))[0];
  *total = *total * kept + sum_of(sums);
  *top = next;
  if (kept != 1)
    for (int d = 0; d < width; d += W) store(o + d, load(o + d) * kept);
}

// Of all heads of a group; at most CHUNK, as rooms have it.
static int queries_of(const Call& call, const Sample& x) { return int(call.Hq / call.Hkv * x.N); }

static void forward_few(const Call& call, const Few& few, Found found, Room& room) {
  const Sample& x = *few.sample;
  const int64_t G = call.Hq / call.Hkv;
  const int rows = queries_of(call, x), Dp = rounded_up(call.D, PADDED), Dvp = rounded_up(call.Dv, PADDED);
  const int width = rounded_up(call.D, W), columns = rounded_up(call.Dv, W);
  std::fill(found.o, found.o + rows * Dvp, 0.0f);
  for (int r = 0; r < rows; r++) {
    const float* query = call.query.at(x.batch, few.kv * G + r / x.N, x.first_query + r % x.N);
    for (int d = 0; d < width; d++) room.query[r * Dp + d] = d < call.D ? query[d] * call.scale : 0.0f;
    found.top[r] = -INF, found.total[r] = 0;
  }
  auto mine = [&](Span keys) {
    const int64_t m = keys.end - keys.begin;
    return Span{keys.begin + m * few.part / few.parts, keys.begin + m * (few.part + 1) / few.parts};
  };
  for_each_tile(call, x, few.kv, mine({0, x.length}), mine(seen_by(call, Chunk{&x, 0, 0, int(x.N), W})),
                [&](const Tile& tile) {
    int64_t key_row = tile.key_row, value_row = tile.value_row;
    const float* key = as_factor(tile.key, &key_row, tile.m, int(call.D), room.copies[0]);
    for (int r = 0; r < rows; r++) {
      float* s = room.s + r * TILE;
      scores_of_row(call, tile, key, key_row, width, room.query + r * Dp, s);
      finish_row(call, x, tile, few.kv * G + r / x.N, r % x.N, s);
      weigh_row(tile, s, found.top + r, found.total + r, found.o + r * Dvp, Dvp);
    }
    const float* value = as_factor(tile.value, &value_row, tile.m, int(call.Dv), room.copies[0]);
    product<true>(found.o, Dvp, room.s, TILE, 1, value, value_row, rows, columns, tile.m);
  });
}

// Merges what the parts of a key head have found, and the sink.
static void merge_parts(const Call& call, const Sample& x, int64_t kv, int64_t parts, float* memory, size_t each) {
  const int64_t G = call.Hq / call.Hkv;
  const int rows = queries_of(call, x), Dvp = rounded_up(call.Dv, PADDED);
  auto found = [&](int64_t part) { return Found(memory + part * each, rows); };
  for (int r = 0; r < rows; r++) {
    const int64_t head = kv * G + r / x.N;
    float top = call.sink == nullptr ? -INF : call.sink[head];
    float total = top == -INF ? 0.0f : 1.0f, *o = found(0).o + r * Dvp;
    const float sink = top;
    for (int64_t part = 0; part < parts; part++) {
      const float other = found(part).top[r];
      top = other > top || other != other ? other : top;  // a NaN stays
    }
    const float from = top == -INF ? 0.0f : top;
    auto kept = [&](float before) { return before == -INF ? 0.0f : std::exp(before - from); };
    total *= kept(sink);
    for (int64_t part = 0; part < parts; part++) {
      const float share = kept(found(part).top[r]);
      total += found(part).total[r] * share;
      for (int d = 0; d < Dvp; d += W) {
        const vec more = load(found(part).o + r * Dvp + d) * share;
        store(o + d, part == 0 ? more : load(o + d) + more);
      }
    }
    write_row(call, x.batch, head, x.first_query + r % x.N, top, total, o);
  }
}
