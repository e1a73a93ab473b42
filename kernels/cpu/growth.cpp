// The growth of draft trees between two passes of the draft; growth.py describes what is computed.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <vector>

#include "simd.h"
#include "threads.h"

namespace {

constexpr int BLOCK = 128;  // logits whose maximum is kept
constexpr float UNLIKELY = -1e4f;

struct Children {
  float* log_probs;
  int64_t* ids;
  const void* logits;
  const int64_t* to_target;  // or null
  int64_t stride;
  int32_t rows, vocab, k, dtype;
};

struct Ranked {
  float score;
  int32_t index;
};

bool before(const Ranked& a, const Ranked& b) { return a.score > b.score || (a.score == b.score && a.index < b.index); }

// The k best of a sequence whose items arrive in ascending order of index.
struct Best {
  std::vector<Ranked> kept;
  int k;

  void start(int k_) { k = k_, kept.clear(); }
  bool wants(float score) const { return (int)kept.size() < k || score > kept.back().score; }
  void offer(float score, int index) {
    if (score != score) score = -INFINITY;
    if (!wants(score)) return;
    if ((int)kept.size() == k) kept.pop_back();
    auto place = std::upper_bound(kept.begin(), kept.end(), Ranked{score, index}, before);
    kept.insert(place, {score, index});
  }
};

// The order of values: NaN and +infinity come last, -infinity just before them.
float rankable(float x) { return x < INFINITY ? std::max(x, -FLT_MAX) : -INFINITY; }

vfloat rankable(vfloat x) { return x < INFINITY ? vmax(x, splat(-FLT_MAX)) : splat(-INFINITY); }

float finite(float log_prob) {
  if (!(std::fabs(log_prob) < INFINITY)) return UNLIKELY;
  return std::clamp(log_prob, UNLIKELY, 0.0f);
}

// log(sum(exp(x))) of a row, with the results of torch.logsumexp for NaN and infinities.
template <class T>
float log_sum_exp(const T* row, int vocab, float largest) {
  if (largest <= -FLT_MAX) {  // no finite value: use the definition
    float sum = 0.0f;
    for (int i = 0; i < vocab; ++i) sum += std::exp(to_float(row[i]));
    return std::log(sum);
  }
  vfloat sums{}, odd{};
  int i = 0;
  for (; i + WIDTH <= vocab; i += WIDTH) {
    vfloat x = load(row + i) - largest;
    sums += vexp(x);
    odd += x < INFINITY ? vfloat{} : x;  // infinity and NaN
  }
  float sum = reduce_sum(sums) + reduce_sum(odd);
  for (; i < vocab; ++i) sum += std::exp(to_float(row[i]) - largest);
  return std::log(sum) + largest;
}

template <class T>
void row_children(const Children& a, int r, std::vector<float>& maxima, Best& best) {
  const T* row = (const T*)a.logits + r * a.stride;
  const int blocks = (a.vocab + BLOCK - 1) / BLOCK;
  maxima.resize(blocks);
  float largest = -INFINITY;
  for (int b = 0; b < blocks; ++b) {
    const int end = std::min((b + 1) * BLOCK, a.vocab);
    vfloat most = splat(-INFINITY);
    int i = b * BLOCK;
    for (; i + WIDTH <= end; i += WIDTH) most = vmax(most, rankable(load(row + i)));
    float m = reduce_max(most);
    for (; i < end; ++i) m = std::max(m, rankable(to_float(row[i])));
    maxima[b] = m;
    largest = std::max(largest, m);
  }
  // The k best values are at least the k-th largest maximum of a block, so other blocks are skipped.
  best.start(std::min(a.k, blocks));
  for (int b = 0; b < blocks; ++b) best.offer(maxima[b], b);
  const float bound = (int)best.kept.size() == a.k ? best.kept.back().score : -INFINITY;
  best.start(a.k);
  for (int b = 0; b < blocks; ++b)
    if (maxima[b] >= bound)
      for (int i = b * BLOCK; i < std::min((b + 1) * BLOCK, a.vocab); ++i) best.offer(rankable(to_float(row[i])), i);
  const float log_z = log_sum_exp(row, a.vocab, largest);
  for (int j = 0; j < a.k; ++j) {
    const Ranked& child = best.kept[j];
    a.log_probs[(int64_t)r * a.k + j] = finite(child.score - log_z);
    a.ids[(int64_t)r * a.k + j] = a.to_target ? a.to_target[child.index] : child.index;
  }
}

template <class T>
void run(const Children& a) {
#pragma omp parallel num_threads(team((size_t)a.rows))
  {
    std::vector<float> maxima;
    Best best;
#pragma omp for
    for (int r = 0; r < a.rows; ++r) row_children<T>(a, r, maxima, best);
  }
}

struct Level {
  // All candidates so far, [batch, most] each. The first `base` of them are from earlier levels.
  int64_t* tokens;
  float* scores;
  int64_t* parents;  // index among all candidates, -1 for the root
  int64_t* frontier;  // [batch, topk], candidates whose children are added; on return, the next frontier
  float* frontier_scores;
  // This level's children [batch, width, topk], and the states [batch * width] that they were made from.
  const float* log_probs;
  const int64_t* ids;
  const bool* chain;
  const char* states;
  // The draft's next inputs, [batch, topk] rows.
  void* next_tokens;
  int64_t *next_positions, *next_paths;
  char* next_states;
  const int64_t *paths, *last;  // [batch, width, level], [batch]
  int64_t state_stride, state_bytes;
  int32_t batch, topk, width, base, most, level, max_position, token_bytes;
};

void grow_request(const Level& a, int b, Best& best) {
  const int n = a.width * a.topk;
  int64_t *tokens = a.tokens + (int64_t)b * a.most + a.base, *parents = a.parents + (int64_t)b * a.most + a.base;
  float* scores = a.scores + (int64_t)b * a.most + a.base;
  int64_t* frontier = a.frontier + b * a.topk;
  float* frontier_scores = a.frontier_scores + b * a.topk;
  best.start(a.topk);
  for (int i = 0; i < n; ++i) {
    const int from = i / a.topk;
    const float score = frontier_scores[from] + a.log_probs[(int64_t)b * n + i];
    tokens[i] = a.ids[(int64_t)b * n + i];
    parents[i] = frontier[from];
    scores[i] = a.chain[b] && i > 0 ? -INFINITY : score;
    best.offer(scores[i], i);
  }
  for (int j = 0; j < a.topk; ++j) {
    const int index = best.kept[j].index, from = index / a.topk;
    const int64_t row = (int64_t)b * a.topk + j;
    frontier[j] = a.base + index, frontier_scores[j] = scores[index];
    if (a.token_bytes == 4)
      ((int32_t*)a.next_tokens)[row] = (int32_t)tokens[index];
    else
      ((int64_t*)a.next_tokens)[row] = tokens[index];
    a.next_positions[row] = std::min<int64_t>(a.last[b] + a.level + 1, a.max_position);
    std::memcpy(a.next_states + row * a.state_bytes, a.states + ((int64_t)b * a.width + from) * a.state_stride,
                a.state_bytes);
    int64_t* path = a.next_paths + row * (a.level + 1);
    std::memcpy(path, a.paths + ((int64_t)b * a.width + from) * a.level, a.level * sizeof(int64_t));
    path[a.level] = (int64_t)a.level * a.topk + j;
  }
}

struct Rerank {
  int64_t *out_tokens, *out_parents;  // [batch, nodes], with a row stride of out_stride
  float* out_scores;  // [batch, nodes]
  const int64_t* tokens;
  const float* scores;
  const int64_t* parents;
  int64_t tokens_stride, parents_stride;
  int32_t batch, nodes, count, most;
};

void rerank_request(const Rerank& a, int b, std::vector<Ranked>& order, std::vector<int64_t>& node) {
  const int64_t at = (int64_t)b * a.most;
  const int kept = std::min(a.nodes, a.count);
  order.resize(a.count);
  for (int i = 0; i < a.count; ++i) order[i] = {a.scores[at + i], i};
  std::partial_sort(order.begin(), order.begin() + kept, order.end(), before);
  node.assign(a.count, 0);
  for (int i = 0; i < kept; ++i) node[order[i].index] = i + 1;
  for (int i = 0; i < a.nodes; ++i) {
    const bool dead = i >= kept || order[i].score == -INFINITY;
    const int64_t parent = dead ? -1 : a.parents[at + order[i].index];
    a.out_tokens[b * a.tokens_stride + i] = dead ? 0 : a.tokens[at + order[i].index];
    a.out_parents[b * a.parents_stride + i] = dead ? -1 : parent < 0 ? 0 : node[parent];
    a.out_scores[(int64_t)b * a.nodes + i] = dead ? -INFINITY : order[i].score;
  }
}

}  // namespace

extern "C" int top_children(const Children* a) {
  switch (a->dtype) {
    case 0: run<float>(*a); return 0;
    case 1: run<bf16>(*a); return 0;
#if HAS_FP16
    case 2: run<fp16>(*a); return 0;
#endif
  }
  return 1;
}

extern "C" void grow_level(const Level* a) {
  Best best;
  for (int b = 0; b < a->batch; ++b) grow_request(*a, b, best);
}

extern "C" void rerank_trees(const Rerank* a) {
  std::vector<Ranked> order;
  std::vector<int64_t> node;
  for (int b = 0; b < a->batch; ++b) rerank_request(*a, b, order, node);
}
