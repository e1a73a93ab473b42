"""Attention of the nodes of a growing draft tree: to the paged prefix, and to each node's own path in scratch.

    out[b, n] = softmax(scale * q[b, n] . K) V over request b's prefix and the slots paths[b, n] of scratch

Lengths are read on the device, so that one CUDA graph can contain the whole growth. Keys are split as in
`tree_attention` (`split_kv`); the path belongs to the first split.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._triton import Backend, cdiv, choose_backend, next_power_of_2, tl, triton
from .split_kv import LEAST_KEYS, choose_splits, merge_splits, partials, tile_of

GATHERED = 1 << 14  # cached tokens that the torch twin gathers at a time, summed over requests


# Long: a third is the signature, and the steps of one program share too many values to be functions of their own.
@triton.jit
def _path_attention_kernel(
    out_ptr,
    part_ptr, part_max_ptr, part_sum_ptr,
    q_ptr, q_stride,
    kv_ptr, kv_block_stride, kv_head_stride, kv_slot_stride,
    table_ptr, table_stride,
    lens_ptr,
    keys_ptr, values_ptr, scratch_request_stride, scratch_slot_stride,
    paths_ptr, path_request_stride, path_node_stride,
    length, nodes, heads, scale, window,
    GROUP: tl.constexpr,
    SPLITS: tl.constexpr,
    LEAST_TILES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """BLOCK_Q nodes of a request x the heads of one KV head, over one share of the prefix."""
    # The blocks of a request are neighbours in the grid, so that they share keys in the L2 cache.
    blocks = tl.cdiv(nodes, BLOCK_Q)
    request = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    prefix = tl.load(lens_ptr + request).to(tl.int32)

    m = tl.arange(0, BLOCK_M)
    node = block * BLOCK_Q + m // GROUP
    row_ok = (m // GROUP < BLOCK_Q) & (node < nodes)
    row = request * nodes + node
    head = kv_head * GROUP + m % GROUP
    d = tl.arange(0, BLOCK_D)
    d_ok = d < HEAD_DIM
    row_mask = row_ok[:, None] & d_ok[None, :]
    q = tl.load(q_ptr + (row * q_stride + head * HEAD_DIM)[:, None] + d[None, :], mask=row_mask, other=0.0)

    first = 0
    if HAS_WINDOW:  # a node is at position prefix - 1 + length
        first = tl.maximum(prefix + length - window, 0)
    share = tl.maximum(tl.cdiv(tl.cdiv(prefix - first, TILE), SPLITS), LEAST_TILES) * TILE
    low = first + split * share
    high = tl.minimum(low + share, prefix)
    part = (row * heads + head) * SPLITS + split
    if (low >= high) & (split > 0):
        tl.store(part_max_ptr + part, tl.full((BLOCK_M,), float("-inf"), tl.float32), mask=row_ok)
        return

    best = tl.full((BLOCK_M,), float("-inf"), tl.float32)  # scores are base-2 logarithms
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    factor = scale * 1.4426950408889634
    own = tl.where(split == 0, length, 0)
    for i in range(own):  # each node has its own keys here, so there is no matrix product
        slot = tl.load(
            paths_ptr + request * path_request_stride + node * path_node_stride + i, mask=row_ok, other=0
        )
        at = request * scratch_request_stride + slot * scratch_slot_stride + kv_head * HEAD_DIM
        k = tl.load(keys_ptr + at[:, None] + d[None, :], mask=row_mask, other=0.0)
        score = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1) * factor
        new_best = tl.maximum(best, score)
        weight = tl.exp2(score - new_best)
        decay = tl.exp2(best - new_best)
        v = tl.load(values_ptr + at[:, None] + d[None, :], mask=row_mask, other=0.0)
        acc = acc * decay[:, None] + weight[:, None] * v.to(tl.float32)
        total = total * decay + weight
        best = new_best

    kv_ptr += kv_head.to(tl.int64) * kv_head_stride
    table_ptr += request * table_stride
    n = tl.arange(0, TILE)
    for begin in range(low, high, TILE):
        key = begin + n
        key_ok = key < high
        physical = tl.load(table_ptr + key // BLOCK_SIZE, mask=key_ok, other=0)
        at = physical.to(tl.int64) * kv_block_stride + (key % BLOCK_SIZE) * kv_slot_stride
        kv_mask = key_ok[:, None] & d_ok[None, :]
        k = tl.load(kv_ptr + at[:, None] + d[None, :], mask=kv_mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * factor
        scores = tl.where(key_ok[None, :], scores, float("-inf"))
        new_best = tl.maximum(best, tl.max(scores, 1))
        weights = tl.exp2(scores - new_best[:, None])
        decay = tl.exp2(best - new_best)
        v = tl.load(kv_ptr + at[:, None] + HEAD_DIM + d[None, :], mask=kv_mask, other=0.0)
        acc = acc * decay[:, None] + tl.dot(weights.to(q.dtype), v, input_precision="ieee")
        total = total * decay + tl.sum(weights, 1)
        best = new_best

    if SPLITS == 1:
        out = (row * heads + head) * HEAD_DIM
        tl.store(out_ptr + out[:, None] + d[None, :], acc / total[:, None], mask=row_mask)
    else:
        tl.store(part_ptr + part[:, None] * HEAD_DIM + d[None, :], acc, mask=row_mask)
        tl.store(part_max_ptr + part, best, mask=row_ok)
        tl.store(part_sum_ptr + part, total, mask=row_ok)


def path_attention(
    query: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    prefix_lens: Tensor,
    keys: Tensor,
    values: Tensor,
    paths: Tensor,
    *,
    scale: float,
    window: int = 0,
    splits: int | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Attention output [batch, nodes, heads, head_dim] in query's dtype; softmax in fp32.

    query [batch, nodes, heads, head_dim], adjacent heads, rows evenly spaced; kv_cache [blocks, kv_heads,
    block_size, 2 * head_dim] (keys, then values; contiguous last dimension, any other strides) in query's
    dtype; block_table int [batch, blocks]; prefix_lens int [batch], cached tokens that all nodes of a
    request read; keys, values [batch or more, slots, kv_heads, head_dim], contiguous: the scratch; paths int64
    [batch, nodes, length], length >= 1: slots of each node's ancestors and, last, its own slot. window: sliding
    window in tokens, 0 for none, longer than a path; a node is at position prefix_len - 1 + length.

    Raises ValueError on shapes or dtypes that do not fit.
    """
    _check(query, kv_cache, keys, values, paths)
    if choose_backend(backend, query, kv_cache, block_table, prefix_lens, keys, paths) == "torch":
        return path_attention_torch(
            query, kv_cache, block_table, prefix_lens, keys, values, paths, scale=scale, window=window
        )
    if query.stride() != (query.shape[1] * query.stride(1), query.stride(1), query.shape[3], 1):
        raise ValueError("query must have adjacent heads and evenly spaced rows")
    if not (keys.is_contiguous() and values.is_contiguous()):
        raise ValueError("keys and values must be contiguous")
    if kv_cache.stride(3) != 1 or paths.stride(2) != 1:
        raise ValueError("kv_cache and paths must have an adjacent last dimension")
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if out.shape[0] and out.shape[1]:
        _launch(out, query, kv_cache, block_table, prefix_lens, keys, values, paths, scale, window, splits)
    return out


def _check(query: Tensor, kv_cache: Tensor, keys: Tensor, values: Tensor, paths: Tensor) -> None:
    batch, nodes, heads, head_dim = query.shape
    kv_heads = kv_cache.shape[1]
    if kv_cache.shape[3] != 2 * head_dim or heads % kv_heads:
        raise ValueError(
            f"kv_cache must be [blocks, kv_heads, block_size, {2 * head_dim}] with kv_heads dividing "
            f"{heads}, found {tuple(kv_cache.shape)}"
        )
    for name, t in (("keys", keys), ("values", values)):
        if t.shape != keys.shape or t.shape[2:] != (kv_heads, head_dim) or len(t) < batch:
            raise ValueError(
                f"{name} must be [{batch} or more, slots, {kv_heads}, {head_dim}], found {tuple(t.shape)}"
            )
    if not query.dtype == kv_cache.dtype == keys.dtype == values.dtype:
        raise ValueError(
            f"expected one dtype, found {query.dtype} (query), {kv_cache.dtype} (kv_cache), {keys.dtype} "
            f"(keys), {values.dtype} (values)"
        )
    if paths.dtype != torch.int64 or paths.shape[:2] != (batch, nodes) or paths.shape[2] < 1:
        raise ValueError(
            f"paths must be int64 [{batch}, {nodes}, 1 or more], found {paths.dtype} {tuple(paths.shape)}"
        )


def _launch(
    out: Tensor, query: Tensor, kv_cache: Tensor, block_table: Tensor, prefix_lens: Tensor, keys: Tensor,
    values: Tensor, paths: Tensor, scale: float, window: int, splits: int | None,
) -> None:  # fmt: skip
    batch, nodes, heads, head_dim = query.shape
    kv_heads = kv_cache.shape[1]
    group = heads // kv_heads
    block_m = max(16, min(64, next_power_of_2(nodes * group)), next_power_of_2(group))
    block_q = block_m // group
    blocks = cdiv(nodes, block_q)
    if splits is None:
        splits = choose_splits(query.device, batch * kv_heads * blocks, query.numel() * 4)
    parts = partials(batch * nodes, heads, head_dim, splits, query.device)
    tile = tile_of(query)
    _path_attention_kernel[(batch * blocks, kv_heads, splits)](
        out, *parts, query, query.stride(1), kv_cache, *kv_cache.stride()[:3], block_table, block_table.stride(0),
        prefix_lens, keys, values, *keys.stride()[:2], paths, *paths.stride()[:2], paths.shape[2], nodes, heads,
        scale, window, GROUP=group, SPLITS=splits, LEAST_TILES=LEAST_KEYS // tile, HEAD_DIM=head_dim,
        BLOCK_D=next_power_of_2(head_dim), BLOCK_Q=block_q, BLOCK_M=block_m, BLOCK_SIZE=kv_cache.shape[2],
        TILE=tile, HAS_WINDOW=window > 0, num_warps=4,
    )  # fmt: skip
    if splits > 1:
        merge_splits(out.view(batch * nodes, heads, head_dim), parts)


def path_attention_torch(
    query: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    prefix_lens: Tensor,
    keys: Tensor,
    values: Tensor,
    paths: Tensor,
    *,
    scale: float,
    window: int = 0,
) -> Tensor:
    """Plain-torch twin of `path_attention`. The host reads the longest prefix; memory does not grow with the prefix."""
    batch, nodes, heads, head_dim = query.shape
    kv_heads, block_size = kv_cache.shape[1:3]
    length = paths.shape[2]
    q = (query.float() * scale).view(batch, nodes, kv_heads, heads // kv_heads, head_dim)
    request = torch.arange(batch, device=query.device)[:, None, None]
    path_keys, path_values = keys[request, paths].float(), values[request, paths].float()
    # Running softmax (arXiv 1805.02867): the largest score, the sum and the output so far. It starts with the paths.
    scores = torch.einsum("bnkgd,bnlkd->bnkgl", q, path_keys)
    largest = scores.amax(dim=-1, keepdim=True)
    weights = (scores - largest).exp()
    total = weights.sum(dim=-1, keepdim=True)
    out = torch.einsum("bnkgl,bnlkd->bnkgd", weights, path_values)

    last = cdiv(int(prefix_lens.max()), block_size) if batch else 0
    step = max(GATHERED // max(batch * block_size, 1), 1)
    for first in range(0, last, step):
        blocks = block_table[:, first : min(first + step, last)].long()
        # [batch, kv_heads, tokens, 2 * head_dim]
        cached = kv_cache[blocks].transpose(1, 2).reshape(batch, kv_heads, -1, 2 * head_dim)
        k, v = cached.float().split(head_dim, dim=-1)
        column = first * block_size + torch.arange(k.shape[2], device=query.device)
        seen = column < prefix_lens[:, None]
        if window:
            seen &= column > prefix_lens[:, None] - 1 + length - window
        scores = torch.einsum("bnkgd,bkpd->bnkgp", q, k)
        scores = scores.masked_fill(~seen[:, None, None, None], float("-inf"))
        before, largest = largest, torch.maximum(largest, scores.amax(dim=-1, keepdim=True))
        weights, shrink = (scores - largest).exp(), (before - largest).exp()
        total = total * shrink + weights.sum(dim=-1, keepdim=True)
        # Cache rows after the prefix may be NaN, and weight 0 times NaN is NaN.
        v = v.masked_fill(~seen[:, None, :, None], 0.0)
        out = out * shrink + torch.einsum("bnkgp,bkpd->bnkgd", weights, v)
    return (out / total).reshape(batch, nodes, heads, head_dim).to(query.dtype)
