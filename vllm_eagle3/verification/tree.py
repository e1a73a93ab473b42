"""Verification of draft trees: what each node sees, which path the target accepts, where its KV goes.

Nodes are numbered as in `drafting.tree.Tree`: 0 is the root, columns of parents and tokens are nodes 1 to N.
"""

import torch


def ancestor_bits(parents: torch.Tensor, max_depth: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Depth and ancestors of each node.

    parents: int64 `[batch, N]`, N <= 62, -1 for unused nodes, which count as children of the root; no path is
    longer than max_depth. Returns two int64 tensors `[batch, N + 1]`: depth (0 for the root), and a word whose
    bit j says that node j is the node itself or one of its ancestors.
    """
    parent = torch.nn.functional.pad(parents.clamp(min=0), (1, 0))  # the root is its own parent
    node = torch.arange(parent.shape[1], device=parent.device).expand_as(parent)
    depth, bits = torch.zeros_like(parent), torch.ones_like(parent) << node
    for _ in range(max_depth):
        depth = depth + (node > 0)
        node = parent.gather(1, node)
        bits = bits | (torch.ones_like(node) << node)
    return depth, bits


def walk(
    parents: torch.Tensor, tokens: torch.Tensor, drawn: torch.Tensor, max_depth: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The path that the target accepts.

    The rule, at every temperature: at a node, x is the target's own draw given the path to that node (its argmax
    at temperature 0). If a child carries x, go there; else emit x and stop. Every emitted token is thus a draw of
    the target's, so the output is distributed as without speculation.

    parents, tokens: int64 `[batch, N]`; parent -1 or token -1 never matches. drawn: int64 `[batch, N + 1]`, the
    target's draw at each node. Returns path int64 `[batch, N + 1]` (node at each depth; identity beyond the
    accepted ones), emitted int64 `[batch, N + 1]` (valid up to the count) and the count int32 `[batch]`.
    """
    batch, nodes = parents.shape
    numbers = torch.arange(1, nodes + 1, device=parents.device)
    path = torch.arange(nodes + 1, device=parents.device).repeat(batch, 1)
    emitted = torch.zeros_like(path)
    emitted[:, 0] = drawn[:, 0]
    current = torch.zeros_like(path[:, :1])
    count = torch.ones_like(path[:, :1])
    for depth in range(1, min(max_depth, nodes) + 1):
        child = (parents == current) & (tokens == drawn.gather(1, current)) & (count == depth)
        found = torch.where(child, numbers, nodes + 1).amin(1, keepdim=True)
        hit = found <= nodes
        current = torch.where(hit, found, current)
        path[:, depth : depth + 1] = torch.where(hit, found, path[:, depth : depth + 1])
        emitted[:, depth : depth + 1] = torch.where(hit, drawn.gather(1, current), 0)
        count = count + hit
    return path, emitted, count[:, 0].int()


def commit_kv(kv_cache: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> None:
    """Move the KV of accepted nodes into the sequence: slot `source[i]` to slot `target[i]`, int64 `[moves]`.

    kv_cache: `[blocks, kv_heads, block_size, 2 * head_dim]`. All sources are read before a target is written, so
    a path may be moved over its own nodes.
    """
    block_size = kv_cache.shape[2]
    rows = kv_cache[source // block_size, :, source % block_size]
    kv_cache[target // block_size, :, target % block_size] = rows
