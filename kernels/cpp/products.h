// The one kernel of all products: C[r, :] (+)= sum over k of A[r, k] B[k, :].

#pragma once

#include "vectors.h"

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
