// What native.py passes: the tensors of a call as pointers and strides.

#pragma once

#include <cstdint>

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
  double* alpha_parts;            // [Hkv, lanes, T, Hq / Hkv], of the gradients of alpha
  double* tau_parts;              // likewise, of tau
  float *d_alpha, *d_tau;         // [T, Hq]
  int64_t count, rows;            // samples, or packed sequences; rows of query, N of lse
  int64_t Hq, Hkv, D, Dv, T, P, n_shared;
  int64_t before, after;  // keys that a query sees around its position; -1: all
  int64_t gate, threads, chunk;
  int64_t lanes, segments;  // backward: tasks of a key head, and parts that a sample's queries are cut into
  int64_t forward_only;     // no backward pass follows
  int64_t context_gradients, prefix_gradients;
  int64_t d_key_segment, d_value_segment;  // strides from part to part
  float scale, softcap;                    // softcap 0: none
};
