"""The growth of draft trees between two passes of the draft, in one C++ call per level.

`top_children` has the same results as `kernels.top_children`. `Growth` has the same results, bit for bit, as
`tree.growth.Growth`, which is its torch twin.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from ..topk import top_children as top_children_torch
from .build import native
from .call import DTYPES, Backend, choose_backend, i32, i64, pointer, struct

_Children = struct("log_probs ids logits to_target", i64("stride"), i32("rows vocab k dtype"))
_Level = struct(
    "tokens scores parents frontier frontier_scores log_probs ids chain states next_tokens next_positions "
    "next_paths next_states paths last",
    i64("state_stride state_bytes"),
    i32("batch topk width base most level max_position token_bytes"),
)
_Rerank = struct(
    "out_tokens out_parents out_scores tokens scores parents",
    i64("tokens_stride parents_stride"),
    i32("batch nodes count most"),
)


def top_children(
    logits: Tensor, k: int, to_target: Tensor | None = None, *, backend: Backend | None = None
) -> tuple[Tensor, Tensor]:
    """The k likeliest tokens of each row of draft logits [n, vocab]: log-probabilities (fp32) and ids, both [n, k].

    Logits are fp32, bf16 or fp16 with a contiguous last dimension, vocab >= k. Of equal logits the lower id is first.
    to_target: int64 [vocab], ids to return instead of the draft's own. Values that are not finite become UNLIKELY.

    Raises ValueError on shapes or dtypes that do not fit.
    """
    rows, vocab = logits.shape
    if logits.dtype not in DTYPES or logits.stride(1) != 1 or not 1 <= k <= vocab:
        raise ValueError(
            f"logits must be fp32, bf16 or fp16 [n, {k} or more] with an adjacent last dimension, found {logits.dtype} "
            f"{tuple(logits.shape)}"
        )
    if to_target is not None and (to_target.dtype != torch.int64 or len(to_target) < vocab):
        found = f"{to_target.dtype} {tuple(to_target.shape)}"
        raise ValueError(f"to_target must be int64 [{vocab}], found {found}")
    if choose_backend(backend) == "torch":
        log_probs, ids = top_children_torch(logits, k)
        return log_probs, ids if to_target is None else to_target[ids]
    log_probs, ids = torch.empty(rows, k), torch.empty(rows, k, dtype=torch.int64)
    library = native()
    assert library is not None
    arguments = _Children(
        pointer(log_probs), pointer(ids), pointer(logits), pointer(to_target), logits.stride(0), rows, vocab, k,
        DTYPES[logits.dtype],
    )  # fmt: skip
    if library.top_children(ctypes.byref(arguments)):
        raise ValueError(f"the native kernels of this machine do not take {logits.dtype}")
    return log_probs, ids


class Level(NamedTuple):
    """The draft's inputs to score the children of the frontier."""

    tokens: Tensor  # [batch * topk], ids of the target vocabulary
    positions: Tensor  # int64 [batch * topk]
    states: Tensor  # [batch * topk, hidden], of each node's parent
    paths: Tensor  # int64 [batch, topk, level]: scratch slots of each node's ancestors and its own


class Growth:
    """Trees of one batch, from the root's children to the reranked nodes. See `tree.growth.Growth`."""

    def __init__(
        self, depth: int, topk: int, chain: Tensor, last: Tensor, max_position: int, token_dtype: torch.dtype
    ) -> None:
        """Begin the trees of a batch.

        depth: the greatest number of levels. chain: bool [batch], requests that keep only the greedy path. last: int64
        [batch], position of the row that each tree grows from. token_dtype: dtype of the next level's tokens, int32 or
        int64.
        """
        batch = len(chain)
        if chain.dtype != torch.bool or last.dtype != torch.int64 or last.shape != chain.shape:
            raise ValueError(
                f"chain must be bool [batch] and last int64 [batch], found {chain.dtype} {tuple(chain.shape)} and "
                f"{last.dtype} {tuple(last.shape)}"
            )
        self.topk, self.chain, self.last = topk, chain.contiguous(), last.contiguous()
        self.max_position, self.token_dtype = max_position, token_dtype
        self.most = topk + (depth - 1) * topk * topk
        self.tokens = torch.empty(batch, self.most, dtype=torch.int64)
        self.parents = torch.empty(batch, self.most, dtype=torch.int64)
        self.scores = torch.empty(batch, self.most)
        self.frontier = torch.full((batch, topk), -1, dtype=torch.int64)
        self.frontier_scores = torch.zeros(batch, topk)
        self.paths = torch.empty(batch, 1, 0, dtype=torch.int64)
        self.count = 0

    def extend(self, log_probs: Tensor, ids: Tensor, states: Tensor) -> Level:
        """Add the children of the frontier. The draft scores the new frontier next.

        log_probs (fp32), ids (int64): [batch * width, topk] in order of falling probability; width is 1 for the roots,
        else topk. states: [batch * width, hidden], the draft's output, which the children read in place of g.
        """
        batch, width, level = self.paths.shape
        shape = (batch * width, self.topk)
        fits = log_probs.dtype == torch.float32 and ids.dtype == torch.int64 and states.stride(-1) == 1
        if not (fits and log_probs.shape == ids.shape == shape and len(states) == shape[0]):
            raise ValueError(
                f"expected log_probs (fp32) and ids (int64) {shape} and {shape[0]} states, found {log_probs.dtype} "
                f"{tuple(log_probs.shape)}, {ids.dtype} {tuple(ids.shape)} and {len(states)}"
            )
        if self.count + width * self.topk > self.most:
            raise ValueError(f"these trees have no level {level + 1}: their depth was given as smaller")
        rows = batch * self.topk
        after = Level(
            torch.empty(rows, dtype=self.token_dtype),
            torch.empty(rows, dtype=torch.int64),
            torch.empty(rows, states.shape[1], dtype=states.dtype),
            torch.empty(batch, self.topk, level + 1, dtype=torch.int64),
        )
        log_probs, ids = log_probs.contiguous(), ids.contiguous()
        size = states.element_size()
        arguments = _Level(
            pointer(self.tokens), pointer(self.scores), pointer(self.parents), pointer(self.frontier),
            pointer(self.frontier_scores), pointer(log_probs), pointer(ids), pointer(self.chain), pointer(states),
            pointer(after.tokens), pointer(after.positions), pointer(after.paths), pointer(after.states),
            pointer(self.paths), pointer(self.last), states.stride(0) * size, states.shape[1] * size, batch,
            self.topk, width, self.count, self.most, level, self.max_position, after.tokens.element_size(),
        )  # fmt: skip
        library = native()
        assert library is not None
        library.grow_level(ctypes.byref(arguments))
        self.paths, self.count = after.paths, self.count + width * self.topk
        return after

    def rerank(self, tokens: Tensor, parents: Tensor) -> Tensor:
        """Write the best nodes to tokens and parents, int64 [batch, nodes] with adjacent columns. Return the scores."""
        batch, nodes = tokens.shape
        for name, t in (("tokens", tokens), ("parents", parents)):
            if t.dtype != torch.int64 or t.shape != (len(self.chain), nodes) or t.stride(1) != 1:
                raise ValueError(
                    f"{name} must be int64 [{len(self.chain)}, nodes], found {t.dtype} {tuple(t.shape)}"
                )
        scores = torch.empty(batch, nodes)
        arguments = _Rerank(
            pointer(tokens), pointer(parents), pointer(scores), pointer(self.tokens), pointer(self.scores),
            pointer(self.parents), tokens.stride(0), parents.stride(0), batch, nodes, self.count, self.most,
        )  # fmt: skip
        library = native()
        assert library is not None
        library.rerank_trees(ctypes.byref(arguments))
        return scores
