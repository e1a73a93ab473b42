"""Attention of a draft layer's tree nodes: the cached prefix plus each node's own path in scratch."""

import torch


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
    Returns `[batch, nodes, heads, head_dim]` in query's dtype; softmax in float32.
    """
    batch, nodes, heads, head_dim = query.shape
    kv_heads, block_size = kv_cache.shape[1:3]
    length = path_keys.shape[2]
    blocks = block_table[:, : -(-max_prefix_len // block_size)].long()
    # [batch, kv_heads, prefix, 2 * head_dim]
    prefix = kv_cache[blocks].transpose(1, 2).reshape(batch, kv_heads, -1, 2 * head_dim)
    keys, values = prefix.float().split(head_dim, dim=-1)
    q = (query.float() * scale).view(batch, nodes, kv_heads, heads // kv_heads, head_dim)

    scores = torch.einsum("bnkgd,bkpd->bnkgp", q, keys)
    column = torch.arange(keys.shape[2], device=query.device)
    seen = column < prefix_lens[:, None]
    if window:  # the node stands at position prefix_len - 1 + length
        seen &= column > prefix_lens[:, None] - 1 + length - window
    scores = scores.masked_fill(~seen[:, None, None, None], float("-inf"))
    path_scores = torch.einsum("bnkgd,bnlkd->bnkgl", q, path_keys.float())

    weights = torch.cat([scores, path_scores], dim=-1).softmax(dim=-1)
    prefix_weights, path_weights = weights.split([scores.shape[-1], length], dim=-1)
    # Cache rows past the prefix may hold anything, NaN included: weight 0 does not cancel that.
    values = values.masked_fill(~seen[:, None, :, None], 0.0)
    out = torch.einsum("bnkgp,bkpd->bnkgd", prefix_weights, values)
    out += torch.einsum("bnkgl,bnlkd->bnkgd", path_weights, path_values.float())
    return out.reshape(batch, nodes, heads, head_dim).to(query.dtype)
