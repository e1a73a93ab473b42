// Attention of the nodes of a draft tree while it grows; see path_attention.py for the rule.
#include "attention.h"
#include "threads.h"

namespace {

struct Arguments {
  void* out;
  const void *query, *cache;
  const int32_t *table, *prefix;
  void *keys, *values;  // scratch [batch, slots, kv_heads, dim]
  const int64_t* paths;
  const void *new_keys, *new_values;  // rows of this level, written to their slots first; or null
  const int32_t *key_offsets, *value_offsets;
  int64_t query_stride, new_key_stride, new_value_stride, table_stride, block_stride, head_stride, path_request,
      path_node;
  int32_t batch, nodes, length, slots, heads, kv_heads, dim, block_size, layout, window, dtype;
  float scale;
};

template <class T>
T* scratch(const Arguments& a, void* base, int request, int64_t slot) {
  return (T*)base + ((int64_t)request * a.slots + slot) * a.kv_heads * a.dim;
}

template <class T>
void store_level(const Arguments& a) {
  const size_t bytes = sizeof(T) * a.kv_heads * a.dim;
  for (int b = 0; b < a.batch; ++b)
    for (int n = 0; n < a.nodes; ++n) {
      const int64_t row = (int64_t)b * a.nodes + n, slot = a.paths[b * a.path_request + n * a.path_node + a.length - 1];
      std::memcpy(scratch<T>(a, a.keys, b, slot), (const T*)a.new_keys + row * a.new_key_stride, bytes);
      std::memcpy(scratch<T>(a, a.values, b, slot), (const T*)a.new_values + row * a.new_value_stride, bytes);
    }
}

// A node's own path has few keys, and no other node shares them, so there is no matrix product.
template <class T>
void attend_path(const Arguments& a, State<T>& state, int request, int kv_head, int node, int group) {
  const int64_t* path = a.paths + request * a.path_request + node * a.path_node;
  for (int row = node * group; row < (node + 1) * group; ++row) {
    const auto* query = state.query.data() + (size_t)row * a.dim;
    for (int i = 0; i < a.length; ++i) {
      const T* key = scratch<T>(a, a.keys, request, path[i]) + kv_head * a.dim;
      vfloat sum{};
      for (int d = 0; d < a.dim; d += WIDTH) sum += load(query + d) * load(key + d);
      state.scores[(size_t)row * CHUNK + i] = reduce_sum(sum);
    }
    take_scores(state, row, (1ull << a.length) - 1, (a.length + WIDTH - 1) / WIDTH, a.scale, 0.0f);
    float* out = state.out.data() + (size_t)row * a.dim;
    for (int i = 0; i < a.length; ++i) {
      const T* value = scratch<T>(a, a.values, request, path[i]) + kv_head * a.dim;
      const float weight = to_float(state.weights[(size_t)row * CHUNK + i]);
      for (int d = 0; d < a.dim; d += WIDTH) store(out + d, load(out + d) + weight * load(value + d));
    }
  }
}

template <class T>
void run_item(const Arguments& a, int request, int kv_head, State<T>& state) {
  const int group = a.heads / a.kv_heads;
  state.start(a.nodes * group, a.dim);
  for (int n = 0; n < a.nodes; ++n) {
    const T* query = (const T*)a.query + ((int64_t)request * a.nodes + n) * a.query_stride;
    for (int g = 0; g < group; ++g) state.set_query(n * group + g, query + ((int64_t)kv_head * group + g) * a.dim);
  }
  for (int n = 0; n < a.nodes; ++n) attend_path(a, state, request, kv_head, n, group);
  const int prefix = a.prefix[request];
  const int first = a.window ? std::max(prefix + a.length - a.window, 0) : 0;  // its position: prefix - 1 + length
  const Cache<T> cache{(const T*)a.cache + kv_head * a.head_stride, a.table + request * a.table_stride, a.block_stride,
                       a.block_size, a.dim, (Layout)a.layout, a.key_offsets, a.value_offsets};
  attend(state, cache, first, prefix, group, a.scale, 0.0f,
         [&](int, int64_t key) { return key >= first ? ~0ull : ~0ull << (first - key); });
  for (int n = 0; n < a.nodes; ++n)
    for (int g = 0; g < group; ++g)
      finish(state, n * group + g,
             (T*)a.out + (((int64_t)request * a.nodes + n) * a.heads + (int64_t)kv_head * group + g) * a.dim);
}

template <class T>
void run(const Arguments& a) {
  if (a.new_keys) store_level<T>(a);
#pragma omp parallel num_threads(team((size_t)a.batch * a.kv_heads))
  {
    static thread_local State<T> state;
#pragma omp for collapse(2) schedule(dynamic)
    for (int r = 0; r < a.batch; ++r)
      for (int h = 0; h < a.kv_heads; ++h) run_item(a, r, h, state);
  }
}

}  // namespace

extern "C" int path_attention(const Arguments* a) {
  switch (a->dtype) {
    case 0: run<float>(*a); return 0;
    case 1: run<bf16>(*a); return 0;
#if HAS_FP16
    case 2: run<fp16>(*a); return 0;
#endif
  }
  return 1;
}
