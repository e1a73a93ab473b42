"""Graft: a continuation that the look-up found becomes a branch of the grown tree.

The continuation starts at the root and follows the tree for as long as a child carries its next token; what is
left of it hangs below as one path. The new nodes come after the grown ones, so cutting the tree to its first
nodes cuts the graft first. A graft may be deeper than the draft grows.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from vllm_eagle3.kernels import ancestor_bits, tree_walk
from vllm_eagle3.tree.growth import UNUSED


class Grafted(NamedTuple):
    """Trees with their grafts, numbered as in `growth.Tree`: node 0 is the root and has no column."""

    tokens: Tensor  # [batch, nodes + length] int64, 0 for unused nodes
    parents: Tensor  # [batch, nodes + length] int64, node numbers, -1 for unused nodes
    grown: Tensor  # [batch] int64, nodes of the grown tree: nodes above this number are the graft's
    added: Tensor  # [batch] int64, nodes of the graft


def graft(tokens: Tensor, parents: Tensor, continuation: Tensor) -> Grafted:
    """Merges a continuation into each tree.

    Args:
        tokens: int64 [batch, nodes], of grown trees as in `growth.Tree`, unused nodes last.
        parents: int64 [batch, nodes], of the same trees.
        continuation: int64 [batch, length], from its first token on what may follow the root; -1 past its end.

    Raises ValueError if nodes + length is more than a tree can have (63).
    """
    length = continuation.shape[1]
    tokens, parents = pad(tokens, (0, length)), pad(parents, (0, length), value=UNUSED)
    all_tokens, all_parents = pad(tokens, (1, 0)), pad(parents, (1, 0), value=UNUSED)  # with the root
    depth, _ = ancestor_bits(all_parents)
    wanted = pad(continuation, (0, 1), value=-1).gather(1, depth.long().clamp(max=length))  # after each node
    path, followed = tree_walk(all_parents, all_tokens, wanted)
    followed = followed.long()[:, None]
    tip = path.long().gather(1, followed)  # the last node that the continuation follows

    grown = (parents >= 0).sum(1, keepdim=True)
    added = (continuation >= 0).sum(1, keepdim=True) - followed
    column = torch.arange(tokens.shape[1], device=tokens.device)
    new = column - grown  # number of each column within the graft
    fresh = (new >= 0) & (new < added)
    below = continuation.gather(1, (followed + new).clamp(0, length - 1))
    return Grafted(
        torch.where(fresh, below, tokens),
        torch.where(fresh, torch.where(new == 0, tip, column), parents),  # node `column` is the column before
        grown[:, 0],
        added[:, 0],
    )
