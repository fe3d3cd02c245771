// The forward pass of one query a head, as in decoding. Keys are lanes.

#pragma once

#include "forward.h"

constexpr int LEAST_KEYS = 256;  // of a part; shorter contexts are not worth parting
constexpr int WIDELY = 64;       // tasks that keep all threads busy

struct Part {  // a key head of one sample, and a part of its keys
  const Sample* sample;
  int64_t kv;
  int64_t number, of;
};

struct Found {  // what the queries of a group have found in a part: running maximum, sum, and weighted values
  float *top, *total, *o;  // [G], [G], [G][Dvp]
  static size_t floats(int64_t G, int Dvp) { return size_t(G) * (Dvp + 2); }
  Found(float* memory, int64_t G) : top(memory), total(memory + G), o(memory + 2 * G) {}
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
static void finish_row(const Call& call, const Sample& x, const Tile& tile, int64_t head, float* s) {
  if (tile.of_prefix) {
    const float alpha = call.alpha[x.task * call.Hq + head], tau = call.tau[x.task * call.Hq + head];
    for (int j = 0; call.gate != NONE && j < tile.m; j += W) {
      const vec score = load(s + j);
      store(s + j, score + gate_of(int(call.gate), score * tau) * alpha);
    }
    add_row_of_overlay(call.bias, x.bias, head, x.first_query, tile.first, tile.m, s);
  } else {
    const int64_t key = x.first_key + tile.first;
    add_row_of_overlay(call.padding, x.batch, 0, 0, key, tile.m, s);
    add_row_of_overlay(call.mask, x.batch, head, x.first_query, key, tile.m, s);
  }
  std::fill(s + tile.m, s + rounded_up(tile.m, W), -INF);
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

static Span seen_by(const Call& call, const Sample& x) { return seen_by(call, Chunk{&x, 0, 0, int(x.N), W}); }

// The queries of a key head's group over a part of the keys.
static void decode_part(const Call& call, const Part& part, Found found, Room& room) {
  const Sample& x = *part.sample;
  const int G = int(call.Hq / call.Hkv), Dp = rounded_up(call.D, PADDED), Dvp = rounded_up(call.Dv, PADDED);
  const int width = rounded_up(call.D, W), columns = rounded_up(call.Dv, W);
  std::fill(found.o, found.o + G * Dvp, 0.0f);
  for (int g = 0; g < G; g++) {
    const float* query = call.query.at(x.batch, part.kv * G + g, x.first_query);
    for (int d = 0; d < width; d++) room.query[g * Dp + d] = d < call.D ? query[d] * call.scale : 0.0f;
    found.top[g] = -INF, found.total[g] = 0;
  }
  auto share = [&](Span keys) {
    const int64_t m = keys.end - keys.begin;
    return Span{keys.begin + m * part.number / part.of, keys.begin + m * (part.number + 1) / part.of};
  };
  for_each_tile(call, x, part.kv, share({0, x.length}), share(seen_by(call, x)), [&](const Tile& tile) {
    int64_t key_row = tile.key_row, value_row = tile.value_row;
    const float* key = as_factor(tile.key, &key_row, tile.m, int(call.D), room.copies[0]);
    for (int g = 0; g < G; g++) {
      float* s = room.s + g * TILE;
      scores_of_row(call, tile, key, key_row, width, room.query + g * Dp, s);
      finish_row(call, x, tile, part.kv * G + g, s);
      weigh_row(tile, s, found.top + g, found.total + g, found.o + g * Dvp, Dvp);
    }
    const float* value = as_factor(tile.value, &value_row, tile.m, int(call.Dv), room.copies[0]);
    product<true>(found.o, Dvp, room.s, TILE, 1, value, value_row, G, columns, tile.m);
  });
}

// Merges what the parts of a key head have found, and the sink.
static void merge_parts(const Call& call, const Sample& x, int64_t kv, int64_t parts, float* memory, size_t each) {
  const int64_t G = call.Hq / call.Hkv;
  const int Dvp = rounded_up(call.Dv, PADDED);
  auto found = [&](int64_t part) { return Found(memory + part * each, G); };
  for (int64_t g = 0; g < G; g++) {
    const float sink = call.sink == nullptr ? -INF : call.sink[kv * G + g];
    float top = sink, total = 0;
    for (int64_t part = 0; part < parts; part++) {
      const float other = found(part).top[g];
      top = other > top || other != other ? other : top;  // a NaN stays
    }
    const float from = top == -INF ? 0.0f : top;
    auto kept = [&](float before) { return before == -INF ? 0.0f : std::exp(before - from); };
    total += kept(sink);
    float* o = found(0).o + g * Dvp;
    for (int64_t part = 0; part < parts; part++) {
      const float share = kept(found(part).top[g]);
      total += found(part).total[g] * share;
      for (int d = 0; d < Dvp; d += W) {
        const vec more = load(found(part).o + g * Dvp + d) * share;
        store(o + d, part == 0 ? more : load(o + d) + more);
      }
    }
    write_row(call, x.batch, kv * G + g, x.first_query, top, total, o);
  }
}
