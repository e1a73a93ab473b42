"""Steps of tree drafting without waiting for the device: depths and ancestor masks, and the walk of verification.

A tree is given by the parent's index of each node, and parents come before children. Node 0 is the root, the last
sampled token. The value at index 0 of `parents` is ignored. An unused node has parent -1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._triton import Backend, choose_backend, next_power_of_2, tl, triton

MAX_NODES = 64  # with the root, since a mask is an int64 with one bit per node


@triton.jit
def _ancestor_bits_kernel(parents_ptr, depth_ptr, bits_ptr, nodes, ROUNDS: tl.constexpr,
                          BLOCK: tl.constexpr):  # fmt: skip
    """One tree, by pointer doubling: after r rounds each node knows its 2^r nearest ancestors."""
    row = tl.program_id(0).to(tl.int64)
    ids = tl.arange(0, BLOCK)
    parent = tl.load(parents_ptr + row * nodes + ids, mask=ids < nodes, other=-1).to(tl.int32)
    linked = (ids > 0) & (parent >= 0) & (parent < nodes)
    up = tl.where(linked, parent, 0)
    depth = linked.to(tl.int32)
    one = tl.full((BLOCK,), 1, tl.int64)
    bits = tl.where(linked | (ids == 0), one << ids.to(tl.int64), one)
    for _ in tl.static_range(ROUNDS):
        bits = bits | tl.gather(bits, up, 0)
        depth += tl.gather(depth, up, 0)
        up = tl.gather(up, up, 0)
    tl.store(depth_ptr + row * nodes + ids, depth, mask=ids < nodes)
    tl.store(bits_ptr + row * nodes + ids, bits, mask=ids < nodes)


@triton.jit
def _tree_walk_kernel(parents_ptr, tokens_ptr, sampled_ptr, path_ptr, accepted_ptr, nodes,
                      BLOCK: tl.constexpr):  # fmt: skip
    """One tree: go from the root to the first child that holds the token sampled at its parent, until there is none."""
    row = tl.program_id(0).to(tl.int64)
    ids = tl.arange(0, BLOCK)
    inside = ids < nodes
    parent = tl.load(parents_ptr + row * nodes + ids, mask=inside, other=-1).to(tl.int32)
    token = tl.load(tokens_ptr + row * nodes + ids, mask=inside, other=-1).to(tl.int64)
    sampled = tl.load(sampled_ptr + row * nodes + ids, mask=inside, other=-1).to(tl.int64)
    path = ids
    node = tl.full((), 0, tl.int32)
    accepted = tl.full((), 0, tl.int32)
    while node < BLOCK:
        drawn = tl.sum(tl.where(ids == node, sampled, 0), 0)
        match = (parent == node) & (token == drawn) & (ids > node)
        node = tl.min(tl.where(match, ids, BLOCK), 0)
        accepted += (node < BLOCK).to(tl.int32)
        path = tl.where((ids == accepted) & (node < BLOCK), node, path)
    tl.store(path_ptr + row * nodes + ids, path, mask=inside)
    tl.store(accepted_ptr + row, accepted)


def ancestor_bits(parents: Tensor, *, backend: Backend | None = None) -> tuple[Tensor, Tensor]:
    """Depth int32 [b, nodes] and ancestor mask int64 [b, nodes] of every node of b trees.

    parents [b, nodes] int32 or int64, nodes <= 64 with the root. Bit j of a node's mask is set if node j is the node
    itself or one of its ancestors, which include the root. Unused nodes have depth 0 and only the root's bit. A parent
    must come before its child; on CUDA this is not checked, but a wrong order does not read out of bounds.

    Raises ValueError on shapes or dtypes that do not fit.
    """
    _check(parents=parents)
    if choose_backend(backend, parents) == "torch":
        return ancestor_bits_torch(parents)
    b, nodes = parents.shape
    depth = torch.empty(b, nodes, dtype=torch.int32, device=parents.device)
    bits = torch.empty(b, nodes, dtype=torch.int64, device=parents.device)
    if b > 0:
        block = max(next_power_of_2(nodes), 2)
        _ancestor_bits_kernel[(b,)](
            parents.contiguous(), depth, bits, nodes, ROUNDS=(block - 1).bit_length(), BLOCK=block,
            num_warps=1,
        )  # fmt: skip
    return depth, bits


def ancestor_bits_torch(parents: Tensor) -> tuple[Tensor, Tensor]:
    """Plain-torch twin of `ancestor_bits`, and its CPU path: the same pointer doubling."""
    nodes = parents.shape[1]
    ids = torch.arange(nodes, device=parents.device)
    linked = (parents >= 0) & (parents < nodes) & (ids > 0)
    up = torch.where(linked, parents, 0).long()
    depth = linked.int()
    bits = torch.where(linked, torch.ones_like(ids) << ids, 1)
    for _ in range((nodes - 1).bit_length()):
        bits = bits | bits.gather(1, up)
        depth = depth + depth.gather(1, up)
        up = up.gather(1, up)
    return depth, bits


def tree_walk(
    parents: Tensor, tokens: Tensor, sampled: Tensor, *, backend: Backend | None = None
) -> tuple[Tensor, Tensor]:
    """Accepted path of b verified trees: (path int32 [b, nodes], num_accepted int32 [b]).

    parents, tokens, sampled [b, nodes] int32 or int64, contiguous rows: tokens[:, i] is the draft token of
    node i (ignored for the root), sampled[:, i] the target's draw at node i. The walk starts at the root and
    goes to the child that holds the token drawn at its parent (the first such child), until there is none.
    path[:, 0] = 0, path[:, 1..num_accepted] are the accepted nodes, and path[:, j] = j after them, so that
    `commit_kv` does not move those. The new tokens are sampled[path[:, 0..num_accepted]]: the accepted drafts and one
    more.

    Raises ValueError on shapes or dtypes that do not fit.
    """
    _check(parents=parents, tokens=tokens, sampled=sampled)
    if choose_backend(backend, parents, tokens, sampled) == "torch":
        return tree_walk_torch(parents, tokens, sampled)
    b, nodes = parents.shape
    path = torch.empty(b, nodes, dtype=torch.int32, device=parents.device)
    accepted = torch.empty(b, dtype=torch.int32, device=parents.device)
    if b > 0:
        _tree_walk_kernel[(b,)](
            parents.contiguous(), tokens.contiguous(), sampled.contiguous(), path, accepted, nodes,
            BLOCK=max(next_power_of_2(nodes), 2), num_warps=1,
        )  # fmt: skip
    return path, accepted


def tree_walk_torch(parents: Tensor, tokens: Tensor, sampled: Tensor) -> tuple[Tensor, Tensor]:
    """Plain-torch twin of `tree_walk`, and its CPU path. Takes one level of all trees at a time."""
    b, nodes = parents.shape
    ids = torch.arange(nodes, device=parents.device)
    path = ids.int().repeat(b, 1)
    accepted = torch.zeros(b, dtype=torch.int32, device=parents.device)
    node = torch.zeros(b, 1, dtype=torch.int64, device=parents.device)
    for level in range(1, nodes):
        match = (parents == node) & (tokens == sampled.gather(1, node)) & (ids > node)
        hit = match.any(dim=1, keepdim=True)
        if not hit.any():
            break
        node = torch.where(
            hit, match.int().argmax(dim=1, keepdim=True), nodes - 1
        )  # a tree whose walk has ended stays ended
        path[:, level : level + 1] = torch.where(hit, node.int(), path[:, level : level + 1])
        accepted += hit[:, 0]
    return path, accepted


def _check(**tensors: Tensor) -> None:
    shape = tensors["parents"].shape
    if len(shape) != 2 or not 1 <= shape[1] <= MAX_NODES:
        raise ValueError(f"parents must be [b, nodes] with 1 to {MAX_NODES} nodes, found {tuple(shape)}")
    for name, t in tensors.items():
        if t.shape != shape:
            raise ValueError(f"{name} must have the shape of parents {tuple(shape)}, found {tuple(t.shape)}")
        if t.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{name} must be int32 or int64, found {t.dtype}")
