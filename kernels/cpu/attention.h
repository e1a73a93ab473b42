// Attention of some rows of one request to paged keys and values, by running softmax over chunks of keys.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "gemm.h"

constexpr int CHUNK = 64;  // keys processed at a time, with one bit each in a word
constexpr float NONE = -INFINITY;

enum Layout { COLUMNS = 0, PAIRS = 1, TABLE = 2 };  // see layout.py

template <class T>
struct Cache {  // keys and values of one head of one request
  const T* data;
  const int32_t* blocks;  // of this request
  int64_t block_stride;
  int block_size, dim;
  Layout layout;
  const int32_t *key_offsets, *value_offsets;  // [block_size, dim], only for TABLE and odd ends of PAIRS
};

// The operands of products: pairs of bf16 if the CPU can multiply them, else float.
template <class T>
using Operand = std::conditional_t<HAS_BF16_DOT && std::is_same_v<T, bf16>, bf16, float>;

// A thread's working memory for `rows` rows (query rows times the heads that share a KV head).
template <class T>
struct State {
  int rows, dim;
  std::vector<Operand<T>> query, weights, keys, values;
  std::vector<float> scores, out, best, total;

  void start(int rows_, int dim_) {
    rows = rows_, dim = dim_;
    query.resize((size_t)rows * dim);
    weights.resize((size_t)rows * CHUNK);
    keys.resize((size_t)CHUNK * dim);
    values.resize((size_t)CHUNK * dim);
    scores.resize((size_t)rows * CHUNK);
    out.assign((size_t)rows * dim, 0.0f);
    best.assign(rows, NONE);
    total.assign(rows, 0.0f);
  }

  void set_query(int row, const T* from) {
    for (int d = 0; d < dim; d += WIDTH) store(query.data() + (size_t)row * dim + d, load(from + d));
  }
};

template <class T>
static Packed<Operand<T>> chunk_keys(const Cache<T>& cache, const T* block, int first, int groups, Operand<T>* to) {
  if (cache.layout == COLUMNS) return pack(block + first, cache.block_size, cache.dim, groups, to);
  if constexpr (std::is_same_v<Operand<T>, bf16>)
    if (cache.layout == PAIRS) return {block + (int64_t)first * cache.dim, (int64_t)GROUP * cache.dim, 2 * GROUP};
  return pack_table(block, cache.key_offsets + (int64_t)first * cache.dim, 1, cache.dim, cache.dim, groups, to);
}

template <class T>
static Packed<Operand<T>> chunk_values(const Cache<T>& cache, const T* block, int first, int count, Operand<T>* to) {
  const T* values = block + (int64_t)cache.block_size * cache.dim;
  if (cache.layout == COLUMNS)
    return pack(values + (int64_t)first * cache.dim, cache.dim, count, cache.dim / GROUP, to);
  if constexpr (std::is_same_v<Operand<T>, bf16>)
    if (cache.layout == PAIRS && count % 2 == 0)  // an odd end would be multiplied by the value after it
      return {values + (int64_t)first * GROUP, (int64_t)GROUP * cache.block_size, 2 * GROUP};
  return pack_table(block, cache.value_offsets + (int64_t)first * cache.dim, cache.dim, 1, count, cache.dim / GROUP,
                    to);
}

static inline vfloat capped(vfloat x, float softcap) {  // softcap * tanh(x / softcap), without overflow
  vfloat size = x < 0.0f ? -x : x;
  vfloat ratio = vexp(size * (-2.0f / softcap));
  vfloat value = softcap * (1.0f - ratio) / (1.0f + ratio);
  return x < 0.0f ? -value : value;
}

// Softmax of one row's scores over the keys in `visible`, relative to the running maximum. Fills the row's weights.
template <class T>
static void take_scores(State<T>& state, int row, uint64_t visible, int vectors, float scale, float softcap) {
  float* scores = state.scores.data() + (size_t)row * CHUNK;
  Operand<T>* weights = state.weights.data() + (size_t)row * CHUNK;
  const bool all = vectors * WIDTH == CHUNK && visible == ~0ull;
  vint lane;
  for (int i = 0; i < WIDTH; ++i) lane[i] = i;
  vfloat most = splat(NONE);
  for (int v = 0; v < vectors; ++v) {
    vfloat s = load(scores + v * WIDTH) * scale;
    if (softcap > 0.0f) s = capped(s, softcap);
    if (!all) {
      vint seen = ((vint{} + (int32_t)((visible >> (v * WIDTH)) & ((1u << WIDTH) - 1))) >> lane) & 1;
      s = seen != 0 ? s : splat(NONE);
    }
    store(scores + v * WIDTH, s);
    most = vmax(most, s);
  }
  const float best = std::max(state.best[row], reduce_max(most));
  const float safe = best == NONE ? 0.0f : best;
  vfloat sum{};
  for (int v = 0; v < vectors; ++v) {
    vfloat w = vexp(load(scores + v * WIDTH) - safe);
    store(weights + v * WIDTH, w);
    sum += w;
  }
  if (best != state.best[row]) {
    const float decay = std::exp(state.best[row] - safe);
    float* out = state.out.data() + (size_t)row * state.dim;
    for (int d = 0; d < state.dim; d += WIDTH) store(out + d, load(out + d) * decay);
    state.total[row] *= decay;
    state.best[row] = best;
  }
  state.total[row] += reduce_sum(sum);
}

// All rows over the keys [first, last) of the cache. visible(row, key) returns a word whose bit j is for key + j. It is
// called once for `group` rows, the heads of one token.
template <class T, class Visible>
static void attend(State<T>& state, const Cache<T>& cache, int first, int last, int group, float scale, float softcap,
                   Visible visible) {
  for (int key = first / GROUP * GROUP; key < last;) {
    const int in_block = key % cache.block_size;
    const int room = cache.block_size - in_block < CHUNK ? cache.block_size - in_block : CHUNK;
    const int count = last - key < room ? last - key : room;
    const int groups = (count + GROUP - 1) / GROUP;
    const T* block = cache.data + cache.blocks[key / cache.block_size] * cache.block_stride;
    const uint64_t exist = count == 64 ? ~0ull : (1ull << count) - 1;
    auto keys = chunk_keys(cache, block, in_block, groups, state.keys.data());
    gemm(state.query.data(), state.dim, keys, state.rows, groups, state.dim, state.scores.data(), CHUNK, false);
    for (int row = 0; row < state.rows; row += group) {
      const uint64_t word = visible(row, key) & exist;
      for (int g = 0; g < group; ++g) take_scores(state, row + g, word, groups * VECTORS, scale, softcap);
    }
    auto values = chunk_values(cache, block, in_block, count, state.values.data());
    constexpr bool pairs = std::is_same_v<Operand<T>, bf16>;
    gemm(state.weights.data(), CHUNK, values, state.rows, state.dim / GROUP, pairs ? (count + 1) / 2 * 2 : count,
         state.out.data(), state.dim, true);
    key += count;
  }
}

// Divide by the softmax's denominator. A row that saw no key gets zeros.
template <class T>
static void finish(const State<T>& state, int row, T* to) {
  const float* out = state.out.data() + (size_t)row * state.dim;
  const float inverse = state.total[row] > 0.0f ? 1.0f / state.total[row] : 0.0f;
  for (int d = 0; d < state.dim; d += WIDTH) store(to + d, load(out + d) * inverse);
}
