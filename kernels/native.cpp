// Prefix attention on a CPU: forward and backward pass over prefix and context, in float32.
//
// A task is a chunk of one head's queries. It walks over tiles of keys, first the prefix's rows, then the context's:
//
//     forward   s = cap(c q kT)   g = s + a f(t s) + bias | s + mask   running softmax   o += p v
//     backward  p = exp(g - L)    dg = p (dO vT - delta)    dv += pT dO    dq += ds k    dk += dsT q
//
// Scores of a tile are transposed, [keys][queries], so that sums over keys run along vectors and a query's numbers are
// lanes. All products are one kernel: C[r, :] += sum over k of A[r, k] B[k, :], with B's rows contiguous. It reads each
// scalar of A for a block of vectors that stays in registers.
//
// Where a key head has few queries and no backward pass follows, as in decoding, a task is that head with the queries of
// its whole group, so that keys and values are read once, or a part of its keys. Keys are lanes then.
//
// native.py compiles it at first use, without PyTorch's headers, and passes pointers in a struct. It defines
//
//     CHUNK    the most queries of a task
//     PADDED   floats that the widths of rooms are rounded up to, a multiple of every W

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

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

constexpr int TILE = 192;  // the most keys at a time
constexpr float INF = __builtin_inff();

static int rounded_up(int64_t x, int to) { return int((x + to - 1) / to * to); }

// ---------------------------------------------------------------------------------------------------------- vectors

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

// f(x) of the gate s + a f(t s), and its derivative. f is exact to 1e-7, not to digits of small values: it is added to a
// score, which is as inexact unless a is large.
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

// --------------------------------------------------------------------------------------------------------- products

template <int ROWS, int VECTORS, bool ADD>
static inline void block(float* C, int64_t c, const float* A, int64_t row, int64_t step, const float* B, int64_t b,
                         int K) {
  vec sums[ROWS][VECTORS];
  for (int r = 0; r < ROWS; r++)
    for (int j = 0; j < VECTORS; j++) sums[r][j] = ADD ? load(C + r * c + j * W) : vec{};
  for (int k = 0; k < K; k++) {
    vec x[VECTORS];
    for (int j = 0; j < VECTORS; j++) x[j] = load(B + k * b + j * W);
    for (int r = 0; r < ROWS; r++) {
      const vec a = splat(A[r * row + k * step]);
      for (int j = 0; j < VECTORS; j++) sums[r][j] += a * x[j];
    }
  }
  for (int r = 0; r < ROWS; r++)
    for (int j = 0; j < VECTORS; j++) store(C + r * c + j * W, sums[r][j]);
}

template <int VECTORS, bool ADD>
static void columns_of(float* C, int64_t c, const float* A, int64_t row, int64_t step, const float* B, int64_t b,
                       int rows, int K) {
  constexpr int ROWS = W == 16 ? 24 / VECTORS : 12 / VECTORS;  // sums in registers: 24 of 32, or 12 of 16
  int r = 0;
  for (; r + ROWS <= rows; r += ROWS) block<ROWS, VECTORS, ADD>(C + r * c, c, A + r * row, row, step, B, b, K);
  if (VECTORS == 1)
    for (; r + 8 <= rows; r += 8) block<8, 1, ADD>(C + r * c, c, A + r * row, row, step, B, b, K);
  for (; r + 4 <= rows; r += 4) block<4, VECTORS, ADD>(C + r * c, c, A + r * row, row, step, B, b, K);
  for (; r + 2 <= rows; r += 2) block<2, VECTORS, ADD>(C + r * c, c, A + r * row, row, step, B, b, K);
  for (; r < rows; r++) block<1, VECTORS, ADD>(C + r * c, c, A + r * row, row, step, B, b, K);
}

// C[rows, columns] (+)= A B; columns is a multiple of W. Entry (r, k) of A lies at r * row + k * step.
template <bool ADD>
static void product(float* C, int64_t c, const float* A, int64_t row, int64_t step, const float* B, int64_t b, int rows,
                    int columns, int K) {
  int j = 0;
  if (W == 16)
    for (; j + 4 * W <= columns; j += 4 * W) columns_of<4, ADD>(C + j, c, A, row, step, B + j, b, rows, K);
  for (; j + 2 * W <= columns; j += 2 * W) columns_of<2, ADD>(C + j, c, A, row, step, B + j, b, rows, K);
  for (; j < columns; j += W) columns_of<1, ADD>(C + j, c, A, row, step, B + j, b, rows, K);
}

static void product(bool add, float* C, int64_t c, const float* A, int64_t row, int64_t step, const float* B, int64_t b,
                    int rows, int columns, int K) {
  if (add)
    product<true>(C, c, A, row, step, B, b, rows, columns, K);
  else
    product<false>(C, c, A, row, step, B, b, rows, columns, K);
}

// ------------------------------------------------------------------------------------------------------ the arguments

struct Rows {  // [B, H, N, D] with contiguous columns; strides in floats
  float* data;
  int64_t batch, head, row;
  float* at(int64_t b, int64_t h, int64_t n) const { return data + b * batch + h * head + n * row; }
};

struct Overlay {  // a mask [B, H, N, M], or null; a stride of 0 repeats it
  const void* data;
  int64_t batch, head, row, column;
  int64_t is_bool;  // true: attend; else it is float32 and added, and the lowest finite number hides, too
};

struct Sample {  // a sample, or a packed sequence
  int64_t batch, first_query, N, first_key, M;
  int64_t task, length, bias;  // its prefix among those in use, that prefix's rows, and its place in a bias
  int64_t seen_from, seen_to;  // context keys outside are padding; `samples_of` fills them in
};

struct Side {  // the prefix's keys, or its values; R is 0 without reweighting
  const float *rows, *U, *V;  // [., Hkv, P, D], [., P, R], [., R, Hkv, D]: of a whole bank, or of the prefixes in use
  float* folded;              // W o rows of the prefixes in use, [T, Hkv, P, D]; null without reweighting
  float* parts;               // gradients of what queries see, [Hkv, lanes, T, P, D rounded up to PADDED]
  float *d_rows, *d_U, *d_V;  // like rows, U and V, of the prefixes in use
  int64_t D, R, is_bank;
};

struct Call {
  Rows query, key, value, output, d_output, d_query, d_key, d_value;
  Overlay padding, mask, bias;
  const Sample* samples;
  Side prefix_key, prefix_value;
  const int64_t *used, *lengths;  // [T] of the prefixes in use: their places in the bank, and their rows
  const float *alpha, *tau;       // [T, Hq]
  const float* sink;              // [Hq] or null
  float *lse, *rest;              // [B, Hq, N]; rest may be null
  double *alpha_parts, *tau_parts;  // [Hkv, lanes, T, Hq / Hkv], of the gradients of alpha and tau
  float *d_alpha, *d_tau;         // [T, Hq]
  int64_t count, rows;            // samples, or packed sequences; rows of query, N of lse
  int64_t Hq, Hkv, D, Dv, T, P, n_shared;
  int64_t before, after;  // keys that a query sees around its position; -1: all
  int64_t gate, threads, chunk;
  int64_t lanes, segments;  // backward: tasks of a key head, and parts that a sample's queries are cut into
  int64_t forward_only;  // no backward pass follows
  int64_t context_gradients, prefix_gradients;
  int64_t d_key_segment, d_value_segment;  // strides from part to part
  float scale, softcap;                    // softcap 0: none
};

// ------------------------------------------------------------------------------------------------------------- a tile

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

// -inf where causality or a window hides a context key.
static void hide(const Call& call, const Chunk& chunk, const Tile& tile, float* s) {
  const int64_t shift = chunk.sample->M - chunk.sample->N + chunk.first;  // position of the chunk's first query
  for (int j = 0; j < tile.m; j++, s += CHUNK) {
    const int64_t key = tile.first + j - shift;  // lane i sees keys i - before .. i + after
    const int64_t low = call.after < 0 ? 0 : std::clamp<int64_t>(key - call.after, 0, chunk.width);
    const int64_t high = call.before < 0 ? chunk.width : std::clamp<int64_t>(key + call.before + 1, 0, chunk.width);
    for (int64_t i = 0; i < low; i++) s[i] = -INF;
    for (int64_t i = high; i < chunk.width; i++) s[i] = -INF;
  }
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
// or a window hides keys, neighbouring W queries begin and end at other keys: the context is cut there.
template <typename F>
static void for_each_tile(const Call& call, const Chunk& chunk, bool prefix, bool context, F f) {
  const Sample& x = *chunk.sample;
  const int64_t kv = chunk.head / (call.Hq / call.Hkv);
  auto with = [&](const Chunk& part) { return [&](const Tile& tile) { f(part, tile); }; };
  if (prefix) for_each_tile(call, x, kv, {0, x.length}, {}, with(chunk));
  if (!context) return;
  Span seen[CHUNK / W];
  int64_t cuts[2 * CHUNK / W];
  int groups = 0, count = 0;
  for (; groups * W < chunk.width; groups++) {
    seen[groups] = seen_by(call, part_of(chunk, groups * W, (groups + 1) * W));
    cuts[count++] = seen[groups].begin, cuts[count++] = seen[groups].end;
  }
  std::sort(cuts, cuts + count);
  for (int cut = 0; cut + 1 < count; cut++) {
    const Span keys{cuts[cut], cuts[cut + 1]};
    auto sees = [&](int group) { return seen[group].begin <= keys.begin && keys.end <= seen[group].end; };
    int from = 0, to = groups;
    while (from < to && !sees(from)) from++;
    while (from < to && !sees(to - 1)) to--;
    if (from < to) for_each_tile(call, x, kv, {}, keys, with(part_of(chunk, from * W, to * W)));
  }
}

// ------------------------------------------------------------------------------------------------------------ forward

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

// Whether the first tile writes all of a chunk's sums [n][width]; if not, they are set to 0.
static bool is_whole(const Chunk& part, const Chunk& chunk, float* sums, int width) {
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
    if (is_first) is_first = is_whole(part, chunk, room.o, Dvp);
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

// -------------------------------------------------------------------------------------------------------- few queries

constexpr int FEW = 16;         // rows: the queries of all heads of a group
constexpr int LEAST_KEYS = 256;  // of a part; shorter contexts are not worth parting
constexpr int WIDELY = 64;       // tasks that keep all threads busy

struct Few {  // the queries of a key head of one sample, and a part of the keys
  const Sample* sample;
  int64_t kv;
  int64_t part, parts;
};

struct Found {  // what those queries have found in their part
  float *top, *total, *o;  // [FEW], [FEW], [FEW][Dvp]
  static size_t floats(int Dvp) { return size_t(FEW) * (Dvp + 2); }
  Found(float* memory) : top(memory), total(memory + FEW), o(memory + 2 * FEW) {}
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

static void forward_few(const Call& call, const Few& few, Found found, Room& room) {
  const Sample& x = *few.sample;
  const int64_t G = call.Hq / call.Hkv;
  const int rows = int(G * x.N), Dp = rounded_up(call.D, PADDED), Dvp = rounded_up(call.Dv, PADDED);
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
static void merge_parts(const Call& call, const Sample& x, int64_t kv, int64_t parts, float* memory) {
  const int64_t G = call.Hq / call.Hkv;
  const int Dvp = rounded_up(call.Dv, PADDED);
  auto found = [&](int64_t part) { return Found(memory + part * Found::floats(Dvp)); };
  for (int r = 0; r < G * x.N; r++) {
    const int64_t head = kv * G + r / x.N;
    float top = call.sink == nullptr ? -INF : call.sink[head];
    float total = top == -INF ? 0.0f : 1.0f, *o = found(0).o + r * Dvp;
    const float sink = top;
    for (int64_t part = 0; part < parts; part++) top = found(part).top[r] > top ? found(part).top[r] : top;
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

// ----------------------------------------------------------------------------------------------------------- backward

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
    if (is_first) is_first = is_whole(part, chunk, room.o, Dp);
    product(!is_first, room.o + part.lane * Dp, Dp, room.d, 1, CHUNK, key, row, part.n, columns, tile.m);
    is_first = false;
  });
  if (!call.context_gradients) return;
  for (int i = 0; i < chunk.n; i++) {
    float* to = call.d_query.at(x.batch, chunk.head, row + i);
    for (int64_t d = 0; d < call.D; d++) to[d] = is_first ? 0.0f : room.o[i * Dp + d];
  }
}

// ------------------------------------------------------------------------------------------------------ reweighting

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

// ------------------------------------------------------------------------------------------------------ entry points

static int64_t chunks_of(const Call& call, const Sample& x) { return (x.N + call.chunk - 1) / call.chunk; }

// The samples without the padding at both ends of their contexts.
static std::vector<Sample> samples_of(const Call& call) {
  std::vector<Sample> samples(call.samples, call.samples + call.count);
  for (Sample& x : samples) {
    auto is_padding = [&](int64_t j) {
      if (call.padding.data == nullptr) return false;
      return overlay_at(call.padding, x.batch * call.padding.batch + (x.first_key + j) * call.padding.column) == -INF;
    };
    x.seen_from = 0, x.seen_to = x.M;
    while (x.seen_to > 0 && is_padding(x.seen_to - 1)) x.seen_to--;
    while (x.seen_from < x.seen_to && is_padding(x.seen_from)) x.seen_from++;
  }
  return samples;
}

static Chunk chunk_of(const Call& call, const Sample& x, int64_t head, int64_t c) {
  const int n = int(std::min(call.chunk, x.N - c * call.chunk));
  return Chunk{&x, head, c * call.chunk, n, rounded_up(n, W)};
}

// Scores of few queries are summed in another order than in the backward pass, which makes weights of their difference.
static bool are_few(const Call& call, const std::vector<Sample>& samples) {
  return call.forward_only && std::all_of(samples.begin(), samples.end(),
                                          [&](const Sample& x) { return x.N * (call.Hq / call.Hkv) <= FEW; });
}

static void forward_of_few(const Call& call, const std::vector<Sample>& samples) {
  const int64_t heads = call.count * call.Hkv;
  int64_t most = 0;
  for (const Sample& x : samples) most = std::max(most, x.length + x.seen_to - x.seen_from);
  const int64_t wanted = WIDELY / std::max<int64_t>(heads, 1);
  const int64_t parts = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(most / LEAST_KEYS, 1));
  const size_t each = Found::floats(rounded_up(call.Dv, PADDED));
  std::vector<float> found(heads * parts * each);
#pragma omp parallel num_threads(int(call.threads))
  {
    Room room(call);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < heads * parts; task++) {
      const int64_t head = task / parts;
      const Few few{&samples[head / call.Hkv], head % call.Hkv, task % parts, parts};
      forward_few(call, few, found.data() + task * each, room);
    }
#pragma omp for
    for (int64_t head = 0; head < heads; head++)
      merge_parts(call, samples[head / call.Hkv], head % call.Hkv, parts, found.data() + head * parts * each);
  }
}

extern "C" {

int64_t native_size() { return sizeof(Call); }

// Computes `folded` of both sides, where there is a reweighting.
void native_fold(const Call* given) {
  const Call& call = *given;
  const int64_t tasks = call.T * call.Hkv;
#pragma omp parallel num_threads(int(std::min(call.threads, call.T)))
  {
    std::vector<float> W_row(std::max(call.D, call.Dv));
#pragma omp for
    for (int64_t task = 0; task < tasks; task++)
      for (const Side* side : {&call.prefix_key, &call.prefix_value})
        if (side->R > 0) fold(call, *side, task / call.Hkv, task % call.Hkv, W_row.data());
  }
}

// Adds to `d_rows`, `d_U` and `d_V` of both sides; writes d_alpha and d_tau.
void native_unfold(const Call* given) {
  const Call& call = *given;
#pragma omp parallel num_threads(int(std::min(call.threads, call.T)))
  {
    std::vector<float> W_row(std::max(call.D, call.Dv));
#pragma omp for
    for (int64_t t = 0; t < call.T; t++) {
      for (const Side* side : {&call.prefix_key, &call.prefix_value}) unfold(call, *side, t, W_row.data());
      for (int64_t head = 0; head < call.Hq; head++) {
        call.d_alpha[t * call.Hq + head] = sum_of_parts(call, call.alpha_parts, t, head);
        call.d_tau[t * call.Hq + head] = sum_of_parts(call, call.tau_parts, t, head);
      }
    }
  }
}

void native_forward(const Call* given) {
  const Call& call = *given;
  const std::vector<Sample> samples = samples_of(call);
  if (are_few(call, samples)) return forward_of_few(call, samples);
  std::vector<int64_t> ends;  // of each sample's tasks: sample by sample, head by head, so that neighbours share keys
  int64_t tasks = 0;
  for (const Sample& x : samples) ends.push_back(tasks += chunks_of(call, x) * call.Hq);
#pragma omp parallel num_threads(int(call.threads))
  {
    Room room(call);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks; task++) {
      const int64_t s = std::upper_bound(ends.begin(), ends.end(), task) - ends.begin();
      const int64_t each = chunks_of(call, samples[s]), c = task - (ends[s] - each * call.Hq);
      forward_chunk(call, chunk_of(call, samples[s], c / each, c % each), room);
    }
  }
}

void native_backward(const Call* given) {
  const Call& call = *given;
  const std::vector<Sample> samples = samples_of(call);
  const int64_t G = call.Hq / call.Hkv, units = call.count * call.segments;
  const int64_t Dp = rounded_up(call.D, PADDED), Dvp = rounded_up(call.Dv, PADDED);
#pragma omp parallel num_threads(int(call.threads))
  {
    Room room(call);
#pragma omp for schedule(dynamic)
    for (int64_t lane = 0; lane < call.Hkv * call.lanes; lane++) {
      const int64_t kv = lane / call.lanes, part = lane % call.lanes;
      Gradients to{call.prefix_key.parts + lane * call.T * call.P * Dp,
                   call.prefix_value.parts + lane * call.T * call.P * Dvp, call.alpha_parts + lane * call.T * G,
                   call.tau_parts + lane * call.T * G, 0};
      for (int64_t unit = units * part / call.lanes; unit < units * (part + 1) / call.lanes; unit++) {
        const Sample& x = samples[unit / call.segments];
        const int64_t each = chunks_of(call, x);
        to.segment = unit % call.segments;
        for (int64_t g = 0; g < G; g++)
          for (int64_t c = each * to.segment / call.segments; c < each * (to.segment + 1) / call.segments; c++)
            backward_chunk(call, chunk_of(call, x, kv * G + g, c), to, room);
      }
    }
  }
}
}
