// Moves tokens of a paged cache to other slots, in all layers; see commit_kv.py for the rule.
#include <cstdint>
#include <cstring>
#include <vector>

#include "threads.h"

namespace {

struct Arguments {
  const int64_t *caches, *src, *dst;  // addresses of the layers; slots [batch, moves]
  const int32_t *key_offsets, *value_offsets;
  int64_t num_blocks, block_stride, head_stride;
  int32_t layers, batch, moves, kv_heads, dim, block_size, item_size;
};

struct Move {
  int64_t src, dst;
};

template <class Word>
void move_request(const Arguments& a, Word* head, const std::vector<Move>& moves, std::vector<Word>& held) {
  const int width = 2 * a.dim;
  held.resize(moves.size() * width);
  auto row = [&](int64_t slot, const int32_t* offsets) { return offsets + slot % a.block_size * a.dim; };
  for (size_t i = 0; i < moves.size(); ++i) {
    const Word* block = head + moves[i].src / a.block_size * a.block_stride;
    const int32_t *keys = row(moves[i].src, a.key_offsets), *values = row(moves[i].src, a.value_offsets);
    Word* to = held.data() + i * width;
    for (int d = 0; d < a.dim; ++d) to[d] = block[keys[d]], to[a.dim + d] = block[values[d]];
  }
  for (size_t i = 0; i < moves.size(); ++i) {
    Word* block = head + moves[i].dst / a.block_size * a.block_stride;
    const int32_t *keys = row(moves[i].dst, a.key_offsets), *values = row(moves[i].dst, a.value_offsets);
    const Word* from = held.data() + i * width;
    for (int d = 0; d < a.dim; ++d) block[keys[d]] = from[d], block[values[d]] = from[a.dim + d];
  }
}

template <class Word>
void run(const Arguments& a) {
  const int64_t slots = a.num_blocks * a.block_size;
  std::vector<std::vector<Move>> requests;  // requests with moves
  for (int b = 0; b < a.batch; ++b) {
    std::vector<Move> moves;
    for (int i = b * a.moves; i < (b + 1) * a.moves; ++i) {
      const int64_t src = a.src[i], dst = a.dst[i];
      if (src != dst && src >= 0 && dst >= 0 && src < slots && dst < slots) moves.push_back({src, dst});
    }
    if (!moves.empty()) requests.push_back(std::move(moves));
  }
  if (requests.empty()) return;
#pragma omp parallel num_threads(team((size_t)a.layers))
  {
    std::vector<Word> held;
#pragma omp for
    for (int layer = 0; layer < a.layers; ++layer)
      for (const auto& moves : requests)
        for (int h = 0; h < a.kv_heads; ++h) move_request(a, (Word*)a.caches[layer] + h * a.head_stride, moves, held);
  }
}

}  // namespace

extern "C" int commit_kv(const Arguments* a) {
  switch (a->item_size) {
    case 1: run<uint8_t>(*a); return 0;
    case 2: run<uint16_t>(*a); return 0;
    case 4: run<uint32_t>(*a); return 0;
  }
  return 1;
}
