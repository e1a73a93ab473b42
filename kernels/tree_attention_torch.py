"""Plain-torch twins of `tree_attention` and `node_attention`, request by request. They read lengths on the host."""

from __future__ import annotations

import torch
from torch import Tensor

from ._triton import cdiv

NODES = 63  # usable node bits of an int64, whose bit 63 is the sign


def visible_keys(root: Tensor, bits: Tensor, positions: Tensor, length: int, window: int = 0) -> Tensor:
    """The mask [rows, length] (bool) that root, bits and positions [rows] describe."""
    key = torch.arange(length, device=root.device)
    node = key - root[:, None]
    in_prefix = node < 0
    if window:
        in_prefix &= key > positions[:, None] - window
    in_tree = (bits[:, None] >> node.clamp(0, NODES - 1)) & 1
    return in_prefix | ((node >= 0) & (node < NODES) & (in_tree == 1))


def tree_attention_torch(
    query: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    root: Tensor,
    bits: Tensor,
    positions: Tensor,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    nodes_only: bool = False,
) -> tuple[Tensor, Tensor]:
    """Output [tokens, heads, head_dim] and log-sum-exp of the scores, fp32 [heads, tokens].

    nodes_only: leave out the keys before the root, as `node_attention` does. Rows of no request are 0.
    """
    heads, head_dim = query.shape[1:]
    kv_heads, block_size = kv_cache.shape[1:3]
    out, lse = torch.zeros_like(query), torch.zeros(heads, len(query), device=query.device)
    starts, lens = query_start_loc.tolist(), seq_lens.tolist()
    for request, (start, stop) in enumerate(zip(starts[:-1], starts[1:], strict=True)):
        length = lens[request]
        if stop <= start or length == 0:
            continue
        blocks = block_table[request, : cdiv(length, block_size)].long()
        kv = kv_cache[blocks].transpose(0, 1).reshape(kv_heads, -1, 2 * head_dim)[:, :length].float()
        keys, values = kv.split(head_dim, dim=-1)
        rows = slice(start, stop)
        q = (query[rows].float() * scale).view(-1, kv_heads, heads // kv_heads, head_dim)
        scores = torch.einsum("tkgd,kld->tkgl", q, keys)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        visible = visible_keys(root[rows], bits[rows], positions[rows], length, window)
        if nodes_only:
            visible &= torch.arange(length, device=query.device) >= root[rows, None]
        scores = scores.masked_fill(~visible[:, None, None], float("-inf"))
        if sinks is not None:
            sink = sinks.float().view(1, kv_heads, -1, 1).expand(len(q), -1, -1, 1)
            scores = torch.cat([scores, sink], dim=-1)
        weights = scores.softmax(dim=-1)[..., :length]
        context = torch.einsum("tkgl,kld->tkgd", weights, values)
        out[rows] = context.reshape(-1, heads, head_dim).to(out.dtype)
        lse[:, rows] = scores.logsumexp(dim=-1).flatten(1).T
    return out, lse
