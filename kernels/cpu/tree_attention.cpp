// Attention of mixed batches in which requests may verify a tree; see tree_attention.py for the rule.
#include <algorithm>

#include "attention.h"
#include "threads.h"

namespace {

struct Arguments {
  void* out;
  const void *query, *cache;
  const int32_t *table, *starts, *lens;
  const int64_t *root, *bits, *position;
  const float* sinks;
  const int32_t *key_offsets, *value_offsets;
  int64_t out_stride, query_stride, table_stride, block_stride, head_stride;
  int32_t requests, heads, kv_heads, dim, block_size, layout, window, dtype;
  float scale, softcap;
};

struct Item {  // rows [first, last) of a request, one KV head
  int request, kv_head, first, last;
};

constexpr int NODES = 63;  // bits of a row's word that represent nodes

uint64_t shifted(uint64_t bits, int64_t by) {  // left by `by` places, or right if it is negative
  if (by <= -64 || by >= 64) return 0;
  return by >= 0 ? bits << by : bits >> -by;
}

uint64_t between(int64_t low, int64_t high) {  // bits [low, high) of a word
  low = std::clamp<int64_t>(low, 0, 64), high = std::clamp<int64_t>(high, 0, 64);
  if (low >= high) return 0;
  return (high == 64 ? ~0ull : (1ull << high) - 1) & ~((1ull << low) - 1);
}

// Rows of an item: many, so that keys are read rarely, but not so many that threads have no work.
int rows_per_item(const Arguments& a, int group, int threads) {
  for (int rows = std::max(1, 64 / group);; rows = (rows + 1) / 2) {
    int64_t items = 0;
    for (int r = 0; r < a.requests; ++r) items += (a.starts[r + 1] - a.starts[r] + rows - 1) / rows;
    if (rows * group <= 24 || rows == 1 || items * a.kv_heads >= 3 * threads) return rows;
  }
}

template <class T>
void run_item(const Arguments& a, const Item& item, State<T>& state) {
  const int group = a.heads / a.kv_heads, rows = item.last - item.first;
  const int length = a.lens[item.request];
  state.start(rows * group, a.dim);
  int64_t first = length, last = 0;
  for (int i = 0; i < rows; ++i) {
    const int64_t token = item.first + i;
    const T* query = (const T*)a.query + token * a.query_stride + (int64_t)item.kv_head * group * a.dim;
    for (int g = 0; g < group; ++g) {
      const int row = i * group + g;
      state.set_query(row, query + g * a.dim);
      if (a.sinks) state.best[row] = a.sinks[item.kv_head * group + g], state.total[row] = 1.0f;
    }
    const uint64_t bits = (uint64_t)a.bits[token] << 1 >> 1;
    last = std::max(last, a.root[token] + (bits ? 64 - __builtin_clzll(bits) : 0));
    first = std::min(first, a.window ? std::max<int64_t>(a.position[token] - a.window + 1, 0) : 0);
  }
  last = std::min<int64_t>(last, length);
  const Cache<T> cache{(const T*)a.cache + item.kv_head * a.head_stride, a.table + item.request * a.table_stride,
                       a.block_stride, a.block_size, a.dim, (Layout)a.layout, a.key_offsets, a.value_offsets};
  auto visible = [&](int row, int64_t key) {
    const int64_t token = item.first + row / group, root = a.root[token];
    const int64_t low = a.window ? a.position[token] - a.window + 1 : 0;
    const uint64_t bits = (uint64_t)a.bits[token] << 1 >> 1;
    return between(low - key, root - key) | shifted(bits, root - key);
  };
  attend(state, cache, (int)first, (int)last, group, a.scale, a.softcap, visible);
  for (int i = 0; i < rows; ++i)
    for (int g = 0; g < group; ++g)
      finish(state, i * group + g,
             (T*)a.out + (item.first + i) * a.out_stride + ((int64_t)item.kv_head * group + g) * a.dim);
}

template <class T>
void run(const Arguments& a) {
  const int threads = max_threads(), rows = rows_per_item(a, a.heads / a.kv_heads, threads);
  std::vector<Item> items;
  for (int r = 0; r < a.requests; ++r)
    for (int first = a.starts[r]; first < a.starts[r + 1]; first += rows)
      for (int h = 0; h < a.kv_heads; ++h) items.push_back({r, h, first, std::min(first + rows, a.starts[r + 1])});
#pragma omp parallel num_threads(team(items.size()))
  {
    static thread_local State<T> state;
#pragma omp for schedule(dynamic)
    for (size_t i = 0; i < items.size(); ++i) run_item(a, items[i], state);
  }
}

}  // namespace

extern "C" int tree_attention(const Arguments* a) {
  switch (a->dtype) {
    case 0: run<float>(*a); return 0;
    case 1: run<bf16>(*a); return 0;
#if HAS_FP16
    case 2: run<fp16>(*a); return 0;
#endif
  }
  return 1;
}
