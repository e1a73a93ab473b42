"""Attention of mixed batches in which requests may verify a tree: to the paged prefix, then to ancestors by a mask.

    out[t] = softmax(scale * q[t] . K) V over the keys k with k < root[t] or bit (k - root[t]) of bits[t]

The keys of this step's rows are in the cache too: node j of a tree is at position root + j. A row that belongs to no
tree is the root of its own tree (root = its position, bits = 1). All rows of a block see the keys before the block's
first root, so the loop over these keys needs no mask. Only the few tiles after them use one. The Triton kernel is in
`tree_attention_triton`, its plain-torch twin in `tree_attention_torch`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._triton import Backend, choose_backend, next_power_of_2
from .split_kv import LEAST_KEYS, choose_splits, merge_splits, partials, tile_of
from .tree_attention_torch import tree_attention_torch
from .tree_attention_triton import tree_attention_kernel


def tree_attention(
    query: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    root: Tensor,
    bits: Tensor,
    positions: Tensor,
    *,
    max_query_len: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    splits: int | None = None,
    out: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Attention output [tokens, heads, head_dim] in query's dtype; softmax in fp32.

    query [tokens, heads, head_dim], adjacent heads; kv_cache [blocks, kv_heads, block_size, 2 * head_dim]
    (keys, then values; contiguous last dimension, any other strides) in query's dtype, this step's rows included;
    block_table int [requests, blocks]; query_start_loc int [requests + 1]; seq_lens int [requests], this step's
    rows included; root, bits, positions int64 [tokens]: position of the tree's root, ancestors, root + depth.
    max_query_len: the most rows of any request, known on the host. window: sliding window in tokens, 0 for none,
    longer than a tree is deep; softcap: 0 for none; sinks [heads]; out: where to write, adjacent heads.

    Raises ValueError on shapes or dtypes that do not fit.
    """
    check(query, kv_cache, root, bits, positions)
    if choose_backend(backend, query, kv_cache, block_table, query_start_loc, seq_lens, root) == "torch":
        result, _ = tree_attention_torch(
            query, kv_cache, block_table, query_start_loc, seq_lens, root, bits, positions, scale=scale,
            window=window, softcap=softcap, sinks=sinks,
        )  # fmt: skip
        return result if out is None else out.copy_(result)
    out = torch.empty_like(query, memory_format=torch.contiguous_format) if out is None else out
    _launch(
        out, None, query, kv_cache, block_table, query_start_loc, seq_lens, root, bits, positions,
        max_query_len, scale, window, softcap, sinks, splits,
    )  # fmt: skip
    return out


def node_attention(
    query: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    root: Tensor,
    bits: Tensor,
    positions: Tensor,
    *,
    max_query_len: int,
    scale: float,
    softcap: float = 0.0,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """As `tree_attention`, without the prefix: each node sees only the root, its ancestors and itself.

    Another kernel computes the attention to the prefix. To merge both, this returns the output [tokens, heads,
    head_dim] and the log-sum-exp of the scores, fp32 [heads, tokens].
    """
    check(query, kv_cache, root, bits, positions)
    tokens, heads, _ = query.shape
    if choose_backend(backend, query, kv_cache, block_table, query_start_loc, seq_lens, root) == "torch":
        return tree_attention_torch(
            query, kv_cache, block_table, query_start_loc, seq_lens, root, bits, positions, scale=scale,
            softcap=softcap, nodes_only=True,
        )  # fmt: skip
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = torch.empty(heads, tokens, device=query.device)
    _launch(
        out, lse, query, kv_cache, block_table, query_start_loc, seq_lens, root, bits, positions,
        max_query_len, scale, 0, softcap, None, 1,
    )  # fmt: skip
    return out, lse


def check(query: Tensor, kv_cache: Tensor, root: Tensor, bits: Tensor, positions: Tensor) -> None:
    """Raise ValueError on shapes or dtypes that do not fit, see `tree_attention`."""
    tokens, heads, head_dim = query.shape
    kv_heads, _, width = kv_cache.shape[1:]
    if width != 2 * head_dim or heads % kv_heads:
        raise ValueError(
            f"kv_cache must be [blocks, kv_heads, block_size, {2 * head_dim}] with kv_heads dividing "
            f"{heads}, found {tuple(kv_cache.shape)}"
        )
    for name, t in (("root", root), ("bits", bits), ("positions", positions)):
        if t.dtype != torch.int64 or t.shape[0] < tokens:
            raise ValueError(f"{name} must be int64 [{tokens}], found {t.dtype} {tuple(t.shape)}")
    if kv_cache.dtype != query.dtype:
        raise ValueError(f"kv_cache is {kv_cache.dtype}, query {query.dtype}: expected one dtype")
    if query.stride(2) != 1 or query.stride(1) != head_dim or kv_cache.stride(3) != 1:
        raise ValueError("query must have adjacent heads, kv_cache an adjacent last dimension")


def _launch(
    out: Tensor, lse: Tensor | None, query: Tensor, kv_cache: Tensor, block_table: Tensor,
    query_start_loc: Tensor, seq_lens: Tensor, root: Tensor, bits: Tensor, positions: Tensor,
    max_query_len: int, scale: float, window: int, softcap: float, sinks: Tensor | None, splits: int | None,
) -> None:  # fmt: skip
    tokens, heads, head_dim = query.shape
    kv_heads, requests = kv_cache.shape[1], len(seq_lens)
    if requests == 0 or tokens == 0:
        return
    group = heads // kv_heads
    block_m = max(16, min(64, next_power_of_2(max_query_len * group)), next_power_of_2(group))
    block_q = block_m // group
    blocks = tokens // block_q + requests  # at most; see _find_block
    if splits is None:
        splits = choose_splits(query.device, kv_heads * blocks, tokens * heads * head_dim * 4)
    parts = partials(tokens, heads, head_dim, splits, query.device)
    tile = tile_of(query)
    tree_attention_kernel[(blocks, kv_heads, splits)](
        out, out.stride(0), lse, 0 if lse is None else lse.stride(0), *parts, query, query.stride(0), kv_cache,
        *kv_cache.stride()[:3], block_table, block_table.stride(0), query_start_loc, seq_lens, root, bits,
        positions, sinks, requests, heads, scale, softcap, window, GROUP=group, SPLITS=splits,
        LEAST_TILES=LEAST_KEYS // tile, HEAD_DIM=head_dim, BLOCK_D=next_power_of_2(head_dim), BLOCK_Q=block_q,
        BLOCK_M=block_m, BLOCK_SIZE=kv_cache.shape[2], TILE=tile, NODES_ONLY=lse is not None,
        HAS_WINDOW=window > 0, HAS_SOFTCAP=softcap > 0, HAS_SINKS=sinks is not None, num_warps=4,
    )  # fmt: skip
    if splits > 1:
        merge_splits(out, parts, query_start_loc)
