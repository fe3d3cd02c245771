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
// In decoding, with one query a head, a task is a key head with the queries of its whole group, so that keys and values
// are read once, or a part of its keys. Keys are lanes then.
//
// native.py compiles it at first use, without PyTorch's headers, and passes pointers in a struct. It defines
//
//     CHUNK    the most queries of a task
//     PADDED   floats that the widths of rooms are rounded up to, a multiple of every W

#include <algorithm>
#include <vector>

#include "backward.h"
#include "decode.h"
#include "reweighting.h"

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

// One query a head, without a backward pass: that forms exp(score - lse), and both must come from the same sums.
static bool is_decoding(const Call& call, const std::vector<Sample>& samples) {
  const bool is_single = std::all_of(samples.begin(), samples.end(), [](const Sample& x) { return x.N <= 1; });
  return call.forward_only && is_single && call.Hq / call.Hkv <= CHUNK;
}

static void decode(const Call& call, const std::vector<Sample>& samples) {
  const int64_t heads = call.count * call.Hkv, G = call.Hq / call.Hkv;
  int64_t most = 0;
  for (const Sample& x : samples) most = std::max(most, x.length + seen_by(call, x).end - seen_by(call, x).begin);
  const int64_t wanted = WIDELY / std::max<int64_t>(heads, 1);
  const int64_t parts = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(most / LEAST_KEYS, 1));
  const size_t each = Found::floats(G, rounded_up(call.Dv, PADDED));
  const std::unique_ptr<float[]> memory(new float[heads * parts * each]);
  auto sample_of = [&](int64_t head) -> const Sample& { return samples[head / call.Hkv]; };
#pragma omp parallel num_threads(int(call.threads))
  {
    Room room(call);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < heads * parts; task++) {
      const int64_t head = task / parts;
      if (sample_of(head).N == 0) continue;
      const Part part{&sample_of(head), head % call.Hkv, task % parts, parts};
      decode_part(call, part, Found(memory.get() + task * each, G), room);
    }
#pragma omp for
    for (int64_t head = 0; head < heads; head++)
      if (sample_of(head).N > 0)
        merge_parts(call, sample_of(head), head % call.Hkv, parts, memory.get() + head * parts * each, each);
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
  if (is_decoding(call, samples)) return decode(call, samples);
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
