"""Graft: adds a continuation that the look-up found to the grown tree, within the tree's number of places.

The graft's nodes come first, as a path from the root. The nodes of the tree follow, best first, without those whose
path the graft already has. Only as many nodes as there are places are kept. So a graft replaces the tree's least likely
nodes, verification costs the same as before, and the first n nodes of the result are the best tree of n nodes, as in a
grown tree. A graft may be deeper than the grown tree.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from vllm_eagle3.kernels import ancestor_bits, tree_walk
from vllm_eagle3.tree.growth import UNUSED


class Grafted(NamedTuple):
    """Trees with their grafts, numbered as in `growth.Tree`: the root is node 0."""

    tokens: Tensor  # int64 [batch, places]
    parents: Tensor  # int64 [batch, places]
    added: Tensor  # int64 [batch], number of the graft's nodes, which are the first
    number: Tensor  # int64 [batch, nodes + 1], the new number of each node of the grown tree, `places` + 1 if left out


def worthwhile(survival: Tensor, values: Tensor, places: int) -> Tensor:
    """How many tokens of each continuation are at least as likely as the nodes whose places they take, int64 [batch].

    The first token takes the last of the `places`, the second the place before it, and so on.

    Args:
        survival: float [batch, length], probability that a continuation is accepted up to and with each token.
        values: float [batch, nodes], by which the tree's nodes were kept, best first: log-probabilities of their paths
            or, for drawn nodes, of their places. The latter do not depend on the tokens drawn there, so that this
            choice does not change the distribution of the output.
        places: nodes of a merged tree.
    """
    taken = pad(values.exp(), (0, max(places - values.shape[1], 0)))[:, :places].flip(1)
    length = min(survival.shape[1], places)
    return (survival[:, :length] >= taken[:, :length]).sum(dim=1)


def graft(
    tokens: Tensor, parents: Tensor, continuation: Tensor, places: int, chain: Tensor | None = None
) -> Grafted:
    """Trees with their grafts.

    Args:
        tokens: int64 [batch, nodes], of grown trees as in `growth.Tree`, unused nodes last.
        parents: int64 [batch, nodes], of the same trees.
        continuation: int64 [batch, length], tokens that may follow the root; -1 after its end.
        places: nodes of a tree with its graft, without the root; at most 63.
        chain: bool [batch], requests whose tree is a chain and must stay one. Their chain is kept unless one of graft
            and chain is the beginning of the other.

    Raises ValueError if nodes is more than a tree can have (63).
    """
    length = min(continuation.shape[1], places)
    continuation = continuation[:, :length]
    all_tokens, all_parents = pad(tokens, (1, 0)), pad(parents, (1, 0), value=UNUSED)  # with the root
    depth, _ = ancestor_bits(all_parents)
    depth = depth.long()
    after = pad(continuation, (0, 1), value=-1).gather(1, depth.clamp(max=length))  # what follows each node
    path, shared = tree_walk(all_parents, all_tokens, after)
    shared, used = shared.long()[:, None], (parents >= 0).sum(1, keepdim=True)
    added = (continuation >= 0).sum(1, keepdim=True)
    if chain is not None:
        added = added.masked_fill(chain[:, None] & (shared < torch.minimum(added, used)), 0)

    # Numbers of the tree's nodes in the result. A node on the shared path has the graft's number, which is its depth.
    node = torch.arange(all_parents.shape[1], device=tokens.device)
    on_path = torch.zeros_like(all_parents, dtype=torch.bool)
    on_path.scatter_(
        1, torch.where((node <= shared) & (added > 0), path.long(), 0), True
    )  # the root among them
    others = (all_parents >= 0) & ~on_path
    number = torch.where(on_path, depth, added + others.cumsum(1))
    parent = number.gather(1, all_parents.clamp(min=0))

    # One column more than there are places, for the nodes that are left out.
    column = torch.where(others, (number - 1).clamp(max=places), places)
    grafted = torch.arange(length, device=tokens.device)
    fresh = grafted < added
    new_tokens = tokens.new_zeros(len(tokens), places + 1).scatter_(1, column, all_tokens)
    new_parents = parents.new_full((len(parents), places + 1), UNUSED).scatter_(1, column, parent)
    new_tokens[:, :length] = torch.where(fresh, continuation, new_tokens[:, :length])
    new_parents[:, :length] = torch.where(fresh, grafted, new_parents[:, :length])
    left_out = (number > places) | (all_parents < 0)
    left_out[:, 0] = False
    number = number.masked_fill(left_out, places + 1)
    return Grafted(new_tokens[:, :places], new_parents[:, :places], added[:, 0], number)
