"""The growth of draft trees on a GPU: one program per request for a level, and one for the choice of nodes.

The rules are those of `tree.growth.Growth`, in which a level takes 34 kernels. The results are the same, bit for
bit. As in `head_topk`, a score and its index are packed into one int64 key, so that of equal scores the lower index is
first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._triton import next_power_of_2, tl, triton
from .cpu import Level
from .head_topk import _pack_keys

UNUSED = -1  # parent of a column that holds no node


# Long: a third is the signature, and a level is to be one launch.
@triton.jit(do_not_specialize=["level", "base"])
def _extend_kernel(
    log_probs_ptr, ids_ptr,
    chain_ptr, last_ptr,
    tokens_ptr, scores_ptr, parents_ptr, most, base,
    frontier_ptr, frontier_scores_ptr, next_frontier_ptr, next_scores_ptr,
    next_tokens_ptr, next_positions_ptr, next_rows_ptr,
    paths_ptr, next_paths_ptr,
    level, max_position,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    ROOT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_L: tl.constexpr,
):  # fmt: skip
    """One request: score the WIDTH * K children, keep them as candidates, and expand the K best of them next."""
    request = tl.program_id(0).to(tl.int64)
    child = tl.arange(0, BLOCK)
    real = child < WIDTH * K
    children = request * WIDTH * K
    log_probs = tl.load(log_probs_ptr + children + child, mask=real, other=0.0)
    parent = tl.full((BLOCK,), -1, tl.int32)
    scores = log_probs
    if not ROOT:
        frontier = request * K + child // K
        scores = tl.load(frontier_scores_ptr + frontier, mask=real, other=0.0) + log_probs
        parent = tl.load(frontier_ptr + frontier, mask=real, other=-1)
    greedy = tl.load(chain_ptr + request) != 0
    scores = tl.where(greedy & (child > 0), float("-inf"), scores)
    candidate = request * most + base + child
    tl.store(tokens_ptr + candidate, tl.load(ids_ptr + children + child, mask=real, other=0), mask=real)
    tl.store(scores_ptr + candidate, scores, mask=real)
    tl.store(parents_ptr + candidate, parent, mask=real)

    lowest = tl.full((BLOCK,), -0x8000000000000000, tl.int64)
    keys = tl.where(real, _pack_keys(scores, child), lowest)
    k = tl.arange(0, BLOCK_K)
    chosen = tl.zeros((BLOCK_K,), tl.int32)
    chosen_scores = tl.zeros((BLOCK_K,), tl.float32)
    for j in range(K):
        best = tl.max(keys, 0)
        chosen = tl.where(k == j, 0x7FFFFFFF - (best & 0x7FFFFFFF).to(tl.int32), chosen)
        chosen_scores = tl.where(
            k == j, tl.max(tl.where(keys == best, scores, float("-inf")), 0), chosen_scores
        )
        keys = tl.where(keys == best, lowest, keys)

    out = request * K + k
    kept = k < K
    row = chosen // K
    token = tl.load(ids_ptr + children + chosen, mask=kept, other=0)
    position = tl.minimum(tl.load(last_ptr + request) + level + 1, max_position)
    tl.store(next_frontier_ptr + out, base + chosen, mask=kept)
    tl.store(next_scores_ptr + out, chosen_scores, mask=kept)
    tl.store(next_tokens_ptr + out, token.to(next_tokens_ptr.dtype.element_ty), mask=kept)
    tl.store(next_positions_ptr + out, tl.zeros((BLOCK_K,), tl.int64) + position, mask=kept)
    tl.store(next_rows_ptr + out, request * WIDTH + row, mask=kept)
    depth = tl.arange(0, BLOCK_L)
    before = kept[:, None] & (depth < level)[None, :]
    path = tl.load(
        paths_ptr + (request * WIDTH + row)[:, None] * level + depth[None, :], mask=before, other=0
    )
    path = tl.where((depth == level)[None, :], (level * K + k)[:, None].to(tl.int64), path)
    tl.store(
        next_paths_ptr + out[:, None] * (level + 1) + depth[None, :], path,
        mask=kept[:, None] & (depth <= level)[None, :],
    )  # fmt: skip


@triton.jit
def _rerank_kernel(
    tokens_ptr, scores_ptr, parents_ptr, most, count,
    out_tokens_ptr, out_tokens_stride,
    out_parents_ptr, out_parents_stride,
    out_scores_ptr, nodes,
    KEPT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One request: its KEPT best candidates in order of rank, with the numbers of their parents."""
    request = tl.program_id(0).to(tl.int64)
    candidate = tl.arange(0, BLOCK)
    scores = tl.load(scores_ptr + request * most + candidate, mask=candidate < count, other=float("-inf"))
    lowest = tl.full((BLOCK,), -0x8000000000000000, tl.int64)
    keys = tl.where(candidate < count, _pack_keys(scores, candidate), lowest)
    n = tl.arange(0, BLOCK_N)
    chosen = tl.full((BLOCK_N,), -2, tl.int32)  # no candidate, and nobody's parent
    for j in range(KEPT):
        best = tl.max(keys, 0)
        chosen = tl.where(n == j, 0x7FFFFFFF - (best & 0x7FFFFFFF).to(tl.int32), chosen)
        keys = tl.where(keys == best, lowest, keys)

    at = request * most + chosen
    score = tl.load(scores_ptr + at, mask=chosen >= 0, other=float("-inf"))
    used = score > float("-inf")
    token = tl.load(tokens_ptr + at, mask=used, other=0)
    parent = tl.load(parents_ptr + at, mask=used, other=-1)
    is_parent = parent[:, None] == chosen[None, :]
    number = tl.max(tl.where(is_parent, (n + 1)[None, :], 0), 1)
    tl.store(out_tokens_ptr + request * out_tokens_stride + n, token, mask=n < nodes)
    tl.store(
        out_parents_ptr + request * out_parents_stride + n,
        tl.where(used, number, -1).to(tl.int64),
        mask=n < nodes,
    )
    tl.store(out_scores_ptr + request * nodes + n, score, mask=n < nodes)


class TreeGrowth:
    """`tree.growth.Growth` for trees whose children are the draft's likeliest, in Triton."""

    def __init__(
        self,
        depth: int,
        topk: int,
        chain: Tensor,
        last: Tensor,
        max_position: int,
        token_dtype: torch.dtype,
    ) -> None:
        """Begin the trees of a batch; arguments as of `tree.growth.Growth`."""
        assert chain.dtype == torch.bool and last.dtype == torch.int64, "chain: bool, last: int64"
        self.topk, self.max_position, self.token_dtype = topk, max_position, token_dtype
        self.chain, self.last = chain.contiguous().view(torch.int8), last.contiguous()
        batch, self.most = len(chain), topk + (depth - 1) * topk * topk

        def empty(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.empty(batch, *shape, dtype=dtype, device=chain.device)

        self._empty = empty
        self.tokens, self.scores = empty(torch.int64, self.most), empty(torch.float32, self.most)
        self.parents = empty(torch.int32, self.most)
        self.frontier, self.frontier_scores = empty(torch.int32, topk), empty(torch.float32, topk)
        self.paths = empty(torch.int64, 1, 0)
        self.candidates = 0

    def extend(self, log_probs: Tensor, ids: Tensor, states: Tensor) -> Level:
        """Add the children of the frontier; arguments and result as of `tree.growth.Growth.extend`."""
        batch, width, level = self.paths.shape
        topk, empty = self.topk, self._empty
        assert log_probs.shape == ids.shape == (batch * width, topk) and ids.dtype == torch.int64
        assert log_probs.dtype == torch.float32 and self.candidates + width * topk <= self.most
        frontier, scores = empty(torch.int32, topk), empty(torch.float32, topk)
        tokens, positions = empty(self.token_dtype, topk), empty(torch.int64, topk)
        rows, paths = empty(torch.int64, topk), empty(torch.int64, topk, level + 1)
        if batch:
            _extend_kernel[(batch,)](
                log_probs.contiguous(), ids.contiguous(), self.chain, self.last, self.tokens, self.scores,
                self.parents, self.most, self.candidates, self.frontier, self.frontier_scores, frontier, scores,
                tokens, positions, rows, self.paths, paths, level, self.max_position, K=topk, WIDTH=width,
                ROOT=level == 0, BLOCK=max(next_power_of_2(width * topk), 2), BLOCK_K=max(next_power_of_2(topk), 2),
                BLOCK_L=max(next_power_of_2(level + 1), 2), num_warps=4,
            )  # fmt: skip
        self.frontier, self.frontier_scores, self.paths = frontier, scores, paths
        self.candidates += width * topk
        return Level(tokens.flatten(), positions.flatten(), states[rows.flatten()], paths)

    def rerank(self, tokens: Tensor, parents: Tensor) -> Tensor:
        """Write the best nodes to tokens and parents, int64 [batch, nodes]; returns their scores."""
        batch, nodes = tokens.shape
        assert tokens.dtype == parents.dtype == torch.int64 and tokens.stride(1) == parents.stride(1) == 1
        scores = self._empty(torch.float32, nodes)
        if batch:
            block = max(next_power_of_2(self.candidates), 2)
            _rerank_kernel[(batch,)](
                self.tokens, self.scores, self.parents, self.most, self.candidates, tokens, tokens.stride(0),
                parents, parents.stride(0), scores, nodes, KEPT=min(nodes, self.candidates), BLOCK=block,
                BLOCK_N=max(next_power_of_2(nodes), 2), num_warps=4 if block <= 2048 else 8,
            )  # fmt: skip
        return scores
