"""Attention of mixed batches in which requests may verify a tree: paged prefix, then a mask of ancestors.

    out[t] = softmax(scale * q[t] . K) V over the keys k with k < root[t] or bit (k - root[t]) of bits[t]

The request's own rows lie in the cache like any others: node j of a tree at position root + j. A row outside
any tree is the root of its own (root = its position, bits = 1). Split-KV: S programs share a row's keys, a
second kernel merges their partial softmaxes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._triton import Backend, cdiv, choose_backend, next_power_of_2, num_sms, tl, triton

NODES = 63  # node bits that a key can have: bit 63 is an int64's sign


@triton.jit
def _tree_attention_kernel(out_ptr, part_ptr, part_max_ptr, part_sum_ptr, q_ptr, kv_ptr, table_ptr,
                           starts_ptr, lens_ptr, root_ptr, bits_ptr, positions_ptr, sinks_ptr, k_scale_ptr,
                           v_scale_ptr, scale, softcap, window, block_size, table_stride, stride_block,
                           stride_head, stride_slot, q_stride, out_stride, heads, GROUP: tl.constexpr,
                           SPLITS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
                           BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr, TILE: tl.constexpr,
                           HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr,
                           HAS_KV_SCALE: tl.constexpr):  # fmt: skip
    """BLOCK_Q rows of a request x the heads of one KV head, over one share of the keys."""
    request = tl.program_id(0)
    kv_head = tl.program_id(1)
    block = tl.program_id(2) // SPLITS
    split = tl.program_id(2) % SPLITS
    start = tl.load(starts_ptr + request)
    rows = tl.load(starts_ptr + request + 1) - start
    if block * BLOCK_Q >= rows:
        return
    seq_len = tl.load(lens_ptr + request)

    m = tl.arange(0, BLOCK_M)
    row = block * BLOCK_Q + m // GROUP
    row_ok = (m // GROUP < BLOCK_Q) & (row < rows)
    token = (start + row).to(tl.int64)
    head = kv_head * GROUP + m % GROUP
    d = tl.arange(0, BLOCK_D)
    d_ok = d < HEAD_DIM
    q_offset = token[:, None] * q_stride + head[:, None] * HEAD_DIM + d[None, :]
    q = tl.load(q_ptr + q_offset, mask=row_ok[:, None] & d_ok[None, :], other=0.0)
    root = tl.load(root_ptr + token, mask=row_ok, other=0)
    bits = tl.load(bits_ptr + token, mask=row_ok, other=1)
    position = tl.load(positions_ptr + token, mask=row_ok, other=0)

    # Keys that any of these rows can see.
    last = tl.minimum(tl.max(tl.where(row_ok, root + tl.where(bits == 1, 0, 62), 0), 0) + 1, seq_len)
    first = tl.zeros((), tl.int64)
    if HAS_WINDOW:
        first = tl.maximum(tl.min(tl.where(row_ok, position, 1 << 40), 0) - window + 1, 0) // TILE * TILE
    share = tl.cdiv(tl.cdiv(last - first, TILE), SPLITS) * TILE
    low = first + split * share
    high = tl.minimum(low + share, last)

    best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    if HAS_SINKS:
        counted = row_ok & (split == 0)  # one more logit, in the first share
        best = tl.load(sinks_ptr + head, mask=counted, other=float("-inf")).to(tl.float32)
        total = tl.where(counted, 1.0, 0.0)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    factor = scale
    if HAS_KV_SCALE:
        factor *= tl.load(k_scale_ptr)
    n = tl.arange(0, TILE)
    for begin in range(low, high, TILE):
        key = begin + n
        key_ok = key < high
        physical = tl.load(table_ptr + request * table_stride + key // block_size, mask=key_ok, other=0)
        slot = physical.to(tl.int64) * stride_block + kv_head * stride_head + (key % block_size) * stride_slot
        kv_mask = key_ok[:, None] & d_ok[None, :]
        k = tl.load(kv_ptr + slot[:, None] + d[None, :], mask=kv_mask, other=0.0).to(q.dtype)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * factor
        if HAS_SOFTCAP:
            ratio = tl.exp(-2.0 * tl.abs(scores / softcap))  # tanh without overflow
            scores = tl.where(scores < 0, -1.0, 1.0) * softcap * (1.0 - ratio) / (1.0 + ratio)
        node = key[None, :] - root[:, None]
        in_prefix = node < 0
        if HAS_WINDOW:
            in_prefix = in_prefix & (key[None, :] > position[:, None] - window)
        shift = tl.minimum(tl.maximum(node, 0), 62)
        in_tree = (node >= 0) & (node < 63) & (((bits[:, None] >> shift) & 1) == 1)
        scores = tl.where((in_prefix | in_tree) & key_ok[None, :], scores, float("-inf"))
        new_best = tl.maximum(best, tl.max(scores, 1))
        safe = tl.where(new_best == float("-inf"), 0.0, new_best)
        weights = tl.exp(scores - safe[:, None])
        decay = tl.exp(best - safe)
        v = tl.load(kv_ptr + slot[:, None] + HEAD_DIM + d[None, :], mask=kv_mask, other=0.0).to(q.dtype)
        acc = acc * decay[:, None] + tl.dot(weights.to(q.dtype), v, input_precision="ieee")
        total = total * decay + tl.sum(weights, 1)
        best = new_best

    if HAS_KV_SCALE:
        acc *= tl.load(v_scale_ptr)
    store = row_ok[:, None] & d_ok[None, :]
    if SPLITS == 1:
        out_offset = token[:, None] * out_stride + head[:, None] * HEAD_DIM + d[None, :]
        tl.store(out_ptr + out_offset, acc / total[:, None], mask=store)
    else:
        part = (token * heads + head) * SPLITS + split
        tl.store(part_ptr + part[:, None] * HEAD_DIM + d[None, :], acc, mask=store)
        tl.store(part_max_ptr + part, best, mask=row_ok)
        tl.store(part_sum_ptr + part, total, mask=row_ok)


@triton.jit
def _merge_splits_kernel(out_ptr, part_ptr, part_max_ptr, part_sum_ptr, out_stride, heads,
                         SPLITS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
                         BLOCK_S: tl.constexpr):  # fmt: skip
    """One row and head: partial sums brought to one maximum."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    s = tl.arange(0, BLOCK_S)
    d = tl.arange(0, BLOCK_D)
    part = (token * heads + head) * SPLITS + s
    best = tl.load(part_max_ptr + part, mask=s < SPLITS, other=float("-inf"))
    total = tl.load(part_sum_ptr + part, mask=s < SPLITS, other=0.0)
    weight = tl.exp(best - tl.max(best, 0))
    mask = (s < SPLITS)[:, None] & (d < HEAD_DIM)[None, :]
    acc = tl.load(part_ptr + part[:, None] * HEAD_DIM + d[None, :], mask=mask, other=0.0)
    out = tl.sum(acc * weight[:, None], 0) / tl.sum(total * weight, 0)
    tl.store(out_ptr + token * out_stride + head * HEAD_DIM + d, out, mask=d < HEAD_DIM)


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
    kv_scales: tuple[Tensor, Tensor] | None = None,
    splits: int | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Attention output [tokens, heads, head_dim] in query's dtype; softmax in fp32.

    query [tokens, heads, head_dim], adjacent heads; kv_cache [blocks, kv_heads, block_size, 2 * head_dim]
    (keys, then values; any strides but an adjacent last dimension), this step's rows included, in query's
    dtype, or another with kv_scales (k, v), fp32 of one element each; block_table int [requests, blocks];
    query_start_loc int [requests + 1]; seq_lens int [requests], this step's rows included; root, bits,
    positions int64 [tokens]: position of the tree's root, ancestors, root + depth. max_query_len bounds a
    request's rows on the host. window: sliding window in tokens, 0 for none, longer than a tree is deep;
    softcap: 0 for none; sinks [heads].

    Raises ValueError on shapes or dtypes that do not fit.
    """
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
    if kv_cache.dtype != query.dtype and kv_scales is None:
        raise ValueError(
            f"kv_cache is {kv_cache.dtype}, query {query.dtype}: expected one dtype, or kv_scales"
        )
    if choose_backend(backend, query, kv_cache, block_table, query_start_loc, seq_lens, root) == "torch":
        return tree_attention_torch(
            query, kv_cache, block_table, query_start_loc, seq_lens, root, bits, positions, scale=scale,
            window=window, softcap=softcap, sinks=sinks, kv_scales=kv_scales,
        )  # fmt: skip
    if query.stride(2) != 1 or query.stride(1) != head_dim or kv_cache.stride(3) != 1:
        raise ValueError("query must have adjacent heads, kv_cache an adjacent last dimension")
    out = torch.empty(tokens, heads, head_dim, dtype=query.dtype, device=query.device)
    requests, group = len(seq_lens), heads // kv_heads
    if requests == 0 or tokens == 0:
        return out
    block_m = max(16, min(64, next_power_of_2(max_query_len * group)), next_power_of_2(group))
    block_q = block_m // group
    blocks = cdiv(max_query_len, block_q)
    if splits is None:
        splits = choose_splits(query.device, requests * kv_heads * blocks)
    shape = (tokens, heads, splits) if splits > 1 else (1,)
    part_max, part_sum = (torch.empty(shape, device=query.device) for _ in "ms")
    part = torch.empty(*shape, head_dim, device=query.device)
    _tree_attention_kernel[(requests, kv_heads, blocks * splits)](
        out, part, part_max, part_sum, query, kv_cache, block_table, query_start_loc, seq_lens, root, bits,
        positions, sinks, *(kv_scales or (None, None)), scale, softcap, window, kv_cache.shape[2],
        block_table.stride(0), *kv_cache.stride()[:3], query.stride(0), out.stride(0), heads, GROUP=group,
        SPLITS=splits, HEAD_DIM=head_dim, BLOCK_D=next_power_of_2(head_dim), BLOCK_Q=block_q,
        BLOCK_M=block_m, TILE=tile_of(query), HAS_WINDOW=window > 0, HAS_SOFTCAP=softcap > 0,
        HAS_SINKS=sinks is not None, HAS_KV_SCALE=kv_scales is not None, num_warps=4,
    )  # fmt: skip
    if splits > 1:
        merge_splits(out, part, part_max, part_sum)
    return out


def choose_splits(device: torch.device, programs: int) -> int:
    """Shares that keys are split into, so that `programs` per share make two waves.

    A power of two: each value is a compilation.
    """
    splits = max(1, min(16, 2 * num_sms(device) // max(1, programs)))
    return 1 << (splits.bit_length() - 1)


def tile_of(query: Tensor) -> int:
    """Keys looked at in one go; more would not fit into shared memory."""
    return 32 if next_power_of_2(query.shape[-1]) * query.element_size() > 256 else 64


def merge_splits(out: Tensor, part: Tensor, part_max: Tensor, part_sum: Tensor) -> None:
    """Merge partial softmaxes [rows, heads, splits(, head_dim)] into out [rows, heads, head_dim]."""
    rows, heads, splits, head_dim = part.shape
    _merge_splits_kernel[(rows, heads)](
        out, part, part_max, part_sum, out.stride(0), heads, SPLITS=splits, HEAD_DIM=head_dim,
        BLOCK_D=next_power_of_2(head_dim), BLOCK_S=next_power_of_2(splits), num_warps=2,
    )  # fmt: skip


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
    kv_scales: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Plain-torch twin of `tree_attention`, request by request. Reads the lengths on the host."""
    heads, head_dim = query.shape[1:]
    kv_heads, block_size = kv_cache.shape[1:3]
    k_scale, v_scale = (float(s) for s in kv_scales) if kv_scales is not None else (1.0, 1.0)
    out = torch.zeros_like(query)
    starts, lens = query_start_loc.tolist(), seq_lens.tolist()
    for request, (start, stop) in enumerate(zip(starts[:-1], starts[1:], strict=True)):
        length = lens[request]
        if stop <= start or length == 0:
            continue
        blocks = block_table[request, : cdiv(length, block_size)].long()
        kv = kv_cache[blocks].transpose(0, 1).reshape(kv_heads, -1, 2 * head_dim)[:, :length].float()
        keys, values = kv.split(head_dim, dim=-1)
        rows = slice(start, stop)
        q = (query[rows].float() * (scale * k_scale)).view(-1, kv_heads, heads // kv_heads, head_dim)
        scores = torch.einsum("tkgd,kld->tkgl", q, keys)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        visible = visible_keys(root[rows], bits[rows], positions[rows], length, window)
        scores = scores.masked_fill(~visible[:, None, None], float("-inf"))
        if sinks is not None:
            sink = sinks.float().view(1, kv_heads, -1, 1).expand(len(q), -1, -1, 1)
            scores = torch.cat([scores, sink], dim=-1)
        weights = scores.softmax(dim=-1)[..., :length]
        context = torch.einsum("tkgl,kld->tkgd", weights, values) * v_scale
        out[rows] = context.reshape(-1, heads, head_dim).to(out.dtype)
    return out


def visible_keys(root: Tensor, bits: Tensor, positions: Tensor, length: int, window: int = 0) -> Tensor:
    """The mask [rows, length] (bool) that root, bits and positions [rows] stand for."""
    key = torch.arange(length, device=root.device)
    node = key - root[:, None]
    in_prefix = node < 0
    if window:
        in_prefix &= key > positions[:, None] - window
    in_tree = (bits[:, None] >> node.clamp(0, NODES - 1)) & 1
    return in_prefix | ((node >= 0) & (node < NODES) & (in_tree == 1))
