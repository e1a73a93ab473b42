"""Tree attention in plain torch: the prefix, the node's ancestors and itself, from a paged KV cache."""

from typing import NamedTuple

import torch


class TreeMask(NamedTuple):
    """What each row of a mixed batch may see: key k of its request iff k < root, or bit (k - root) is set.

    A row outside any tree is the root of a tree of its own: root is its position, bits is 1.
    """

    root: torch.Tensor  # [tokens] int64, position of the tree's root in the sequence
    bits: torch.Tensor  # [tokens] int64, bit j: node j of the tree
    positions: torch.Tensor  # [tokens] int64, root + depth


def tree_attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    mask: TreeMask,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Plain-torch twin of the tree attention kernel, and what serves on CPU.

    query: `[tokens, heads, head_dim]`; kv_cache: `[blocks, kv_heads, block_size, 2 * head_dim]` (keys, then
    values), holding the rows of this step too; block_table: int `[requests, max_blocks]`; query_start_loc: int
    `[requests + 1]`; seq_lens: int `[requests]`, this step's rows included; window: sliding window in tokens, 0 for
    none (it must be longer than the tree is deep); softcap: 0 for none; sinks: `[heads]` extra logits or None.
    Returns `[tokens, heads, head_dim]` in query's dtype; softmax in float32. Reads lengths on the host.
    """
    heads, head_dim = query.shape[1:]
    kv_heads, block_size = kv_cache.shape[1:3]
    out = torch.zeros_like(query)
    starts, lens = query_start_loc.tolist(), seq_lens.tolist()
    for request, (start, stop) in enumerate(zip(starts[:-1], starts[1:], strict=True)):
        length = lens[request]
        if stop <= start or length == 0:
            continue
        blocks = block_table[request, : -(-length // block_size)].long()
        kv = kv_cache[blocks].transpose(0, 1).reshape(kv_heads, -1, 2 * head_dim)[:, :length].float()
        keys, values = kv.split(head_dim, dim=-1)
        rows = slice(start, stop)
        q = (query[rows].float() * scale).view(-1, kv_heads, heads // kv_heads, head_dim)
        scores = torch.einsum("tkgd,kld->tkgl", q, keys)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        visible = visible_keys(mask.root[rows], mask.bits[rows], mask.positions[rows], length, window)
        scores = scores.masked_fill(~visible[:, None, None], float("-inf"))
        if sinks is not None:
            sink = sinks.float().view(1, kv_heads, -1, 1).expand(len(q), -1, -1, 1)
            scores = torch.cat([scores, sink], dim=-1)
        weights = scores.softmax(dim=-1)[..., :length]
        out[rows] = torch.einsum("tkgl,kld->tkgd", weights, values).reshape(-1, heads, head_dim).to(out.dtype)
    return out


def visible_keys(
    root: torch.Tensor, bits: torch.Tensor, positions: torch.Tensor, length: int, window: int = 0
) -> torch.Tensor:
    """The mask `[rows, length]` (bool) that root, bits and positions `[rows]` stand for."""
    key = torch.arange(length, device=root.device)
    node = key - root[:, None]
    in_prefix = node < 0
    if window:
        in_prefix &= key > positions[:, None] - window
    in_tree = (bits[:, None] >> node.clamp(0, 63)) & 1
    return in_prefix | ((node >= 0) & (node < 63) & (in_tree == 1))
