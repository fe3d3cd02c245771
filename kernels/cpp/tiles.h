// A task's queries and the tiles of keys that they see; scores and masks of a tile.

#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>

#include "arguments.h"
#include "products.h"

constexpr int TILE = 192;  // the most keys at a time
constexpr int GROUP = 16;  // queries of a chunk that see keys of their own under causality or a window

static int rounded_up(int64_t x, int to) { return int((x + to - 1) / to * to); }

// Where rows, U and V have the prefix that is the t-th in use.
static int64_t place_of(const Call& call, const Side& side, int64_t t) { return side.is_bank ? call.used[t] : t; }

// The rows of a prefix that queries of one head see.
static const float* rows_of(const Call& call, const Side& side, int64_t t, int64_t kv) {
  const float* from = side.R > 0 ? side.folded : side.rows;
  const int64_t place = side.R > 0 ? t : place_of(call, side, t);
  return from + (place * call.Hkv + kv) * call.P * side.D;
}

struct Chunk {  // queries of one head of one sample
  const Sample* sample;
  int64_t head, first;  // first query, counted within the sample
  int n, width;         // queries; rounded up to W
  int lane = 0;         // of a room, where the first query is
};

// Queries `from` to `to` of a chunk, multiples of W.
static Chunk part_of(const Chunk& chunk, int from, int to) {
  return {chunk.sample, chunk.head, chunk.first + from, std::min(to, chunk.n) - from, to - from, chunk.lane + from};
}

struct Tile {  // keys of the prefix, or of the context
  bool of_prefix;
  int64_t first;
  int m;
  const float *key, *value;
  int64_t key_row, value_row;
};

// Memory that a thread keeps from call to call: fresh pages cost more than a small call computes.
static float* kept_memory(size_t floats) {
  struct Free {
    void operator()(float* memory) const { std::free(memory); }
  };
  static thread_local std::unique_ptr<float, Free> memory;
  static thread_local size_t size = 0;
  if (floats > size) {
    memory.reset((float*)std::aligned_alloc(64, floats * sizeof(float)));
    if (memory == nullptr) std::abort();
    size = floats;
  }
  return memory.get();
}

struct Room {  // scratch memory of a thread
  float *query, *d_output;  // [D][CHUNK], transposed
  float *s, *y, *p, *d;     // [TILE][CHUNK]: scores, f(t s), weights and ds of a tile, from lane 0 on
  float *o;                 // [CHUNK][Dp]
  float *copies[3];         // of rows whose width is no multiple of W: [TILE][Dp] of keys, [CHUNK][Dp] of queries
  float *top, *total, *L, *rest, *delta;

  explicit Room(const Call& call) {
    const int Dp = rounded_up(std::max(call.D, call.Dv), PADDED);
    const size_t floats = size_t(CHUNK) * (5 * Dp + 4 * TILE + 5) + size_t(TILE) * Dp;
    float* next = kept_memory(floats);
    auto take = [&](size_t n) { float* mine = next; next += n; return mine; };
    query = take(CHUNK * Dp), d_output = take(CHUNK * Dp);
    s = take(TILE * CHUNK), y = take(TILE * CHUNK), p = take(TILE * CHUNK), d = take(TILE * CHUNK);
    o = take(CHUNK * Dp);
    copies[0] = take(TILE * Dp), copies[1] = take(CHUNK * Dp), copies[2] = take(CHUNK * Dp);
    top = take(CHUNK), total = take(CHUNK), L = take(CHUNK), rest = take(CHUNK), delta = take(CHUNK);
  }
};

// Rows as [D][CHUNK], times a factor; 0 in the lanes beyond n.
static void transpose(float* to, const float* from, int64_t row, int n, int width, int D, float factor) {
  for (int i = 0; i < width; i += W) {
    int d = 0;
    if (i + W <= n)
      for (; d + W <= D; d += W) {
        vec x[W];
        for (int lane = 0; lane < W; lane++) x[lane] = load(from + (i + lane) * row + d);
        transpose_square<1>(x);
        for (int k = 0; k < W; k++) store(to + (d + k) * CHUNK + i, x[k] * factor);
      }
    for (; d < D; d++)
      for (int lane = 0; lane < W; lane++)
        to[d * CHUNK + i + lane] = i + lane < n ? from[(i + lane) * row + d] * factor : 0.0f;
  }
}

// The rows as a right factor: their width must be a multiple of W, or they are copied.
static const float* as_factor(const float* rows, int64_t* row, int m, int D, float* copy) {
  if (D % W == 0) return rows;
  const int Dp = rounded_up(D, PADDED);
  for (int j = 0; j < m; j++) {
    std::memcpy(copy + j * Dp, rows + j * *row, D * sizeof(float));
    std::memset(copy + j * Dp + D, 0, (Dp - D) * sizeof(float));
  }
  *row = Dp;
  return copy;
}

static float overlay_at(const Overlay& x, int64_t offset) {
  if (x.is_bool) return ((const uint8_t*)x.data)[offset] ? 0.0f : -INF;
  const float value = ((const float*)x.data)[offset];
  return value <= std::numeric_limits<float>::lowest() ? -INF : value;
}

// W neighbouring entries.
static inline vec overlays_at(const Overlay& x, int64_t offset) {
  if (x.is_bool) {
    const ivec attends = __builtin_convertvector(*(const bytes*)((const uint8_t*)x.data + offset), ivec);
    return attends != 0 ? vec{} : splat(-INF);
  }
  const vec value = load((const float*)x.data + offset);
  return value <= splat(std::numeric_limits<float>::lowest()) ? splat(-INF) : value;
}

static inline vec plus_overlay(vec s, vec value) { return value == splat(-INF) ? value : s + value; }

// Adds a mask that differs by query to scores [m][CHUNK].
static void add_by_query(const Overlay& x, int64_t base, int n, int m, float* s) {
  int whole_queries = 0, whole_keys = 0;  // in squares of W
  if (x.column == 1) {
    whole_queries = n / W * W, whole_keys = m / W * W;
    for (int i = 0; i < whole_queries; i += W)
      for (int j = 0; j < whole_keys; j += W) {
        vec values[W];
        for (int lane = 0; lane < W; lane++) values[lane] = overlays_at(x, base + (i + lane) * x.row + j);
        transpose_square<1>(values);
        for (int k = 0; k < W; k++) {
          float* at = s + (j + k) * CHUNK + i;
          store(at, plus_overlay(load(at), values[k]));
        }
      }
  }
  for (int j = 0; j < m; j++)
    for (int i = j < whole_keys ? whole_queries : 0; i < n; i++) {
      const float value = overlay_at(x, base + i * x.row + j * x.column);
      s[j * CHUNK + i] = value == -INF ? value : s[j * CHUNK + i] + value;
    }
}

static void add_overlay(const Overlay& x, int64_t batch, int64_t head, int64_t query, int64_t key, int n, int width,
                        int m, float* s) {
  if (x.data == nullptr) return;
  const int64_t base = batch * x.batch + head * x.head + query * x.row + key * x.column;
  if (x.row != 0) return add_by_query(x, base, n, m, s);
  for (int j = 0; j < m; j++) {
    const float value = overlay_at(x, base + j * x.column);
    if (value == 0) continue;
    for (int i = j * CHUNK; i < j * CHUNK + width; i += W) store(s + i, plus_overlay(load(s + i), splat(value)));
  }
}

static inline void hide_lanes(float* s, int64_t from, int64_t to) {
  for (; from < to && from % W != 0; from++) s[from] = -INF;
  for (; from + W <= to; from += W) store(s + from, splat(-INF));
  for (; from < to; from++) s[from] = -INF;
}

// -inf where causality or a window hides a context key.
static void hide(const Call& call, const Chunk& chunk, const Tile& tile, float* s) {
  const int64_t first = tile.first - (chunk.sample->M - chunk.sample->N + chunk.first);  // from the first query's place
  const int64_t m = tile.m, width = chunk.width;  // lane i sees the keys i - before .. i + after
  if (call.after >= 0)
    for (int64_t j = std::clamp<int64_t>(call.after + 1 - first, 0, m); j < m; j++)
      hide_lanes(s + j * CHUNK, 0, std::min(first + j - call.after, width));
  if (call.before >= 0)
    for (int64_t j = 0; j < std::clamp<int64_t>(width - 1 - call.before - first, 0, m); j++)
      hide_lanes(s + j * CHUNK, std::max<int64_t>(first + j + call.before + 1, 0), width);
}

// The scores of a tile [m][CHUNK]: of the prefix without gate and bias, of the context with masks.
static void scores(const Call& call, const Chunk& chunk, const Tile& tile, const float* query, float* s) {
  product<false>(s, CHUNK, tile.key, tile.key_row, 1, query, CHUNK, tile.m, chunk.width, int(call.D));
  if (call.softcap > 0)
    for (int j = 0; j < tile.m; j++)
      for (int i = 0; i < chunk.width; i += W) {
        float* at = s + j * CHUNK + i;
        store(at, tanh_of(load(at) * (1 / call.softcap)) * call.softcap);
      }
}

static void add_masks(const Call& call, const Chunk& chunk, const Tile& tile, float* s) {
  const Sample& x = *chunk.sample;
  const int64_t query = x.first_query + chunk.first;
  if (tile.of_prefix) {
    add_overlay(call.bias, x.bias, chunk.head, query, tile.first, chunk.n, chunk.width, tile.m, s);
    return;
  }
  const int64_t key = x.first_key + tile.first;
  add_overlay(call.padding, x.batch, 0, 0, key, chunk.n, chunk.width, tile.m, s);
  add_overlay(call.mask, x.batch, chunk.head, query, key, chunk.n, chunk.width, tile.m, s);
  const int64_t first = x.M - x.N + chunk.first, last = first + chunk.n - 1, end = tile.first + tile.m;
  const bool all_seen = (call.before < 0 || last - call.before <= tile.first) &&
                        (call.after < 0 || end - 1 <= first + call.after);
  if (!all_seen) hide(call, chunk, tile, s);
}

struct Span {  // of keys
  int64_t begin, end;
};

// The context's keys that some query of a chunk sees.
static Span seen_by(const Call& call, const Chunk& chunk) {
  const Sample& x = *chunk.sample;
  const int64_t position = x.M - x.N + chunk.first;
  const int64_t begin = call.before < 0 ? x.seen_from : std::max(x.seen_from, position - call.before);
  const int64_t end = call.after < 0 ? x.seen_to : std::min(x.seen_to, position + chunk.n + call.after);
  return {begin, std::max(begin, end)};
}

// Calls f for each tile of some rows of the prefix and of some keys of the context.
template <typename F>
static void for_each_tile(const Call& call, const Sample& x, int64_t kv, Span prefix, Span context, F f) {
  auto walk = [&](bool of_prefix, Span keys, const float* key, const float* value, int64_t key_row, int64_t value_row) {
    const int64_t m = keys.end - keys.begin, tiles = (m + TILE - 1) / TILE;
    for (int64_t t = 0; t < tiles; t++) {  // of about equal size
      const int64_t from = keys.begin + m * t / tiles, to = keys.begin + m * (t + 1) / tiles;
      f(Tile{of_prefix, from, int(to - from), key + from * key_row, value + from * value_row, key_row, value_row});
    }
  };
  if (prefix.begin < prefix.end)
    walk(true, prefix, rows_of(call, call.prefix_key, x.task, kv), rows_of(call, call.prefix_value, x.task, kv), call.D,
         call.Dv);
  if (context.begin < context.end)
    walk(false, context, call.key.at(x.batch, kv, x.first_key), call.value.at(x.batch, kv, x.first_key), call.key.row,
         call.value.row);
}

// Calls f for each tile that a chunk sees, the prefix's first, with the part of the chunk that sees it. Where causality
// or a window hides keys, each GROUP of queries begins and ends at other keys: the context is cut there.
template <typename F>
static void for_each_tile(const Call& call, const Chunk& chunk, bool prefix, bool context, F f) {
  const Sample& x = *chunk.sample;
  const int64_t kv = chunk.head / (call.Hq / call.Hkv);
  auto with = [&](const Chunk& part) { return [&](const Tile& tile) { f(part, tile); }; };
  if (prefix) for_each_tile(call, x, kv, {0, x.length}, {}, with(chunk));
  if (!context) return;
  Span seen[CHUNK / GROUP];
  int64_t cuts[2 * CHUNK / GROUP];
  int groups = 0, count = 0;
  auto lane_of = [&](int group) { return std::min(group * GROUP, chunk.width); };
  for (; lane_of(groups) < chunk.width; groups++) {
    seen[groups] = seen_by(call, part_of(chunk, lane_of(groups), lane_of(groups + 1)));
    cuts[count++] = seen[groups].begin, cuts[count++] = seen[groups].end;
  }
  std::sort(cuts, cuts + count);
  for (int cut = 0; cut + 1 < count; cut++) {
    const Span keys{cuts[cut], cuts[cut + 1]};
    auto sees = [&](int group) { return seen[group].begin <= keys.begin && keys.end <= seen[group].end; };
    int from = 0, to = groups;
    while (from < to && !sees(from)) from++;
    while (from < to && !sees(to - 1)) to--;
    if (from < to) for_each_tile(call, x, kv, {}, keys, with(part_of(chunk, lane_of(from), lane_of(to))));
  }
}
