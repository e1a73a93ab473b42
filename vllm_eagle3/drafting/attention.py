"""Attention of a draft layer's tree nodes: the cached prefix plus each node's own path in scratch."""

import torch

GATHERED = 1 << 14  # cached tokens, of all requests together, that are gathered at a time


def path_attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    prefix_lens: torch.Tensor,
    max_prefix_len: int,
    path_keys: torch.Tensor,
    path_values: torch.Tensor,
    scale: float,
    window: int = 0,
) -> torch.Tensor:
    """Each node attends the whole prefix of its request, and its ancestors and itself; nothing else.

    query: `[batch, nodes, heads, head_dim]`; kv_cache: `[blocks, kv_heads, block_size, 2 * head_dim]` (keys,
    then values); block_table: int `[batch, max_blocks]`; prefix_lens: int `[batch]`, at most max_prefix_len
    (a bound that the host knows); path_keys, path_values: `[batch, nodes, length, kv_heads, head_dim]`,
    ancestors in order of depth with the node itself last; window: sliding window in tokens, 0 for none.
    Returns `[batch, nodes, heads, head_dim]` in query's dtype; softmax in float32. Temporary memory does not grow
    with the prefix.
    """
    batch, nodes, heads, head_dim = query.shape
    kv_heads, block_size = kv_cache.shape[1:3]
    length = path_keys.shape[2]
    q = (query.float() * scale).view(batch, nodes, kv_heads, heads // kv_heads, head_dim)
    # Running softmax (arXiv 1805.02867): its largest score, its sum and the output so far, of the paths first.
    scores = torch.einsum("bnkgd,bnlkd->bnkgl", q, path_keys.float())
    largest = scores.amax(dim=-1, keepdim=True)
    weights = (scores - largest).exp()
    total = weights.sum(dim=-1, keepdim=True)
    out = torch.einsum("bnkgl,bnlkd->bnkgd", weights, path_values.float())

    last = -(-max_prefix_len // block_size)
    step = max(GATHERED // (batch * block_size), 1)
    for first in range(0, last, step):
        blocks = block_table[:, first : min(first + step, last)].long()
        # [batch, kv_heads, tokens, 2 * head_dim]
        cached = kv_cache[blocks].transpose(1, 2).reshape(batch, kv_heads, -1, 2 * head_dim)
        keys, values = cached.float().split(head_dim, dim=-1)
        column = first * block_size + torch.arange(keys.shape[2], device=query.device)
        seen = column < prefix_lens[:, None]
        if window:  # the node stands at position prefix_len - 1 + length
            seen &= column > prefix_lens[:, None] - 1 + length - window
        scores = torch.einsum("bnkgd,bkpd->bnkgp", q, keys)
        scores = scores.masked_fill(~seen[:, None, None, None], float("-inf"))
        before, largest = largest, torch.maximum(largest, scores.amax(dim=-1, keepdim=True))
        weights, shrink = (scores - largest).exp(), (before - largest).exp()
        total = total * shrink + weights.sum(dim=-1, keepdim=True)
        # Cache rows past the prefix may hold anything, NaN included: weight 0 does not cancel that.
        values = values.masked_fill(~seen[:, None, :, None], 0.0)
        out = out * shrink + torch.einsum("bnkgp,bkpd->bnkgd", weights, values)
    return (out / total).reshape(batch, nodes, heads, head_dim).to(query.dtype)
