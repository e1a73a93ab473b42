"""Attention of mixed batches in which requests may verify a tree: the paged prefix, then a mask of ancestors.

    out[t] = softmax(scale * q[t] . K) V over the keys k with k < root[t] or bit (k - root[t]) of bits[t]

The request's own rows lie in the cache like any others: node j of a tree is at position root + j. A row outside
any tree is the root of its own (root = its position, bits = 1). All keys before a block's first root are visible to
every row of the block, so the loop over them has no mask; at most a few tiles after it have one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._triton import Backend, choose_backend, next_power_of_2, tl, triton
from .split_kv import LEAST_KEYS, choose_splits, merge_splits, partials, tile_of
from .tree_attention_torch import tree_attention_torch


@triton.jit
def _find_block(starts_ptr, requests, index, BLOCK_Q: tl.constexpr):
    """The request that the `index`-th block of rows belongs to, and which of its blocks it is.

    Request r has its blocks from starts[r] // BLOCK_Q + r on, room enough for all of them. So the grid has about as
    many programs as there are blocks, however much longer than the others one request is.
    """
    low = 0
    high = requests
    while low < high:
        middle = (low + high) // 2
        if tl.load(starts_ptr + middle) // BLOCK_Q + middle <= index:
            low = middle + 1
        else:
            high = middle
    request = low - 1
    return request, index - (tl.load(starts_ptr + request) // BLOCK_Q + request)


@triton.jit
def _attend_tile(
    q, key, key_ok,
    best, total, acc,
    kv_ptr, kv_block_stride, kv_slot_stride,
    table_ptr,
    root, bits, position,
    factor, softcap, window,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """One step of the running softmax, over the keys at positions `key`; scores are base-2 logarithms."""
    d = tl.arange(0, BLOCK_D)
    if MASKED:
        block = tl.load(table_ptr + key // BLOCK_SIZE, mask=key_ok, other=0)
        kv_mask = key_ok[:, None] & (d < HEAD_DIM)[None, :]
    else:
        block = tl.load(table_ptr + key // BLOCK_SIZE)
        kv_mask = (d < HEAD_DIM)[None, :]
    slot = block.to(tl.int64) * kv_block_stride + (key % BLOCK_SIZE) * kv_slot_stride
    k = tl.load(kv_ptr + slot[:, None] + d[None, :], mask=kv_mask, other=0.0)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * factor
    if HAS_SOFTCAP:  # factor is the scale over the cap; tanh without overflow
        ratio = tl.exp2(-2.885390081777927 * tl.abs(scores))
        scores = (
            tl.where(scores < 0, -1.0, 1.0) * (softcap * 1.4426950408889634) * (1.0 - ratio) / (1.0 + ratio)
        )
    if MASKED:
        node = key[None, :] - root[:, None]
        in_prefix = node < 0
        if HAS_WINDOW:
            in_prefix = in_prefix & (key[None, :] > position[:, None] - window)
        shift = tl.minimum(tl.maximum(node, 0), 62).to(tl.int64)
        in_tree = (node >= 0) & (node < 63) & (((bits[:, None] >> shift) & 1) == 1)
        scores = tl.where((in_prefix | in_tree) & key_ok[None, :], scores, float("-inf"))
    new_best = tl.maximum(best, tl.max(scores, 1))
    safe = new_best
    if MASKED:  # a row may have seen no key yet
        safe = tl.where(new_best == float("-inf"), 0.0, new_best)
    weights = tl.exp2(scores - safe[:, None])
    decay = tl.exp2(best - safe)
    v = tl.load(kv_ptr + slot[:, None] + HEAD_DIM + d[None, :], mask=kv_mask, other=0.0)
    acc = acc * decay[:, None] + tl.dot(weights.to(q.dtype), v, input_precision="ieee")
    return new_best, total * decay + tl.sum(weights, 1), acc


@triton.jit
def _tree_attention_kernel(
    out_ptr, out_stride,
    lse_ptr, lse_stride,
    part_ptr, part_max_ptr, part_sum_ptr,
    q_ptr, q_stride,
    kv_ptr, kv_block_stride, kv_head_stride, kv_slot_stride,
    table_ptr, table_stride,
    starts_ptr, lens_ptr,
    root_ptr, bits_ptr, positions_ptr,
    sinks_ptr,
    requests, heads, scale, softcap, window,
    GROUP: tl.constexpr,
    SPLITS: tl.constexpr,
    LEAST_TILES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    NODES_ONLY: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """BLOCK_Q rows of a request x the heads of one KV head, over one share of the keys."""
    request, block = _find_block(starts_ptr, requests, tl.program_id(0), BLOCK_Q)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    start = tl.load(starts_ptr + request)
    rows = tl.load(starts_ptr + request + 1) - start
    if block * BLOCK_Q >= rows:
        return

    m = tl.arange(0, BLOCK_M)
    row = block * BLOCK_Q + m // GROUP
    row_ok = (m // GROUP < BLOCK_Q) & (row < rows)
    token = (start + row).to(tl.int64)
    head = kv_head * GROUP + m % GROUP
    d = tl.arange(0, BLOCK_D)
    row_mask = row_ok[:, None] & (d < HEAD_DIM)[None, :]
    q = tl.load(q_ptr + (token * q_stride + head * HEAD_DIM)[:, None] + d[None, :], mask=row_mask, other=0.0)
    bits = tl.load(bits_ptr + token, mask=row_ok, other=1)
    root = tl.load(root_ptr + token, mask=row_ok, other=0).to(tl.int32)
    position = tl.load(positions_ptr + token, mask=row_ok, other=0).to(tl.int32)

    # Keys from `first` to `last` are all that these rows can see; those before `whole` are visible to each of them.
    last = tl.max(tl.where(row_ok, root + tl.where(bits == 1, 1, 63), 0), 0)
    last = tl.minimum(last, tl.load(lens_ptr + request)).to(tl.int32)
    whole = tl.min(tl.where(row_ok, root, 1 << 30), 0)
    first = 0
    if NODES_ONLY:
        first = whole
    if HAS_WINDOW:
        first = tl.maximum(first, tl.min(tl.where(row_ok, position, 1 << 30), 0) - window + 1)
        whole = 0  # the rows' windows begin at different keys
    share = tl.maximum(tl.cdiv(tl.cdiv(last - first, TILE), SPLITS), LEAST_TILES) * TILE
    low = first + split * share
    high = tl.minimum(low + share, last)
    part = (token * heads + head) * SPLITS + split
    if low >= high:
        if SPLITS > 1:
            tl.store(part_max_ptr + part, tl.full((BLOCK_M,), float("-inf"), tl.float32), mask=row_ok)
        return

    best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    if HAS_SINKS:
        counted = row_ok & (split == 0)  # one more logit, in the first share
        best = (
            tl.load(sinks_ptr + head, mask=counted, other=float("-inf")).to(tl.float32) * 1.4426950408889634
        )
        total = tl.where(counted, 1.0, 0.0)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    factor = scale * 1.4426950408889634
    if HAS_SOFTCAP:
        factor = scale / softcap
    kv_ptr += kv_head.to(tl.int64) * kv_head_stride
    table_ptr += request.to(tl.int64) * table_stride
    n = tl.arange(0, TILE)
    middle = low + tl.maximum(tl.minimum(high, whole) - low, 0) // TILE * TILE
    if not (NODES_ONLY or HAS_WINDOW):  # there `whole` leaves nothing to this loop
        for begin in range(low, middle, TILE):
            best, total, acc = _attend_tile(
                q, begin + n, None, best, total, acc, kv_ptr, kv_block_stride, kv_slot_stride, table_ptr,
                root, bits, position, factor, softcap, window, HEAD_DIM, BLOCK_D, BLOCK_SIZE, False, HAS_WINDOW,
                HAS_SOFTCAP,
            )  # fmt: skip
    for begin in range(middle, high, TILE):
        best, total, acc = _attend_tile(
            q, begin + n, begin + n < high, best, total, acc, kv_ptr, kv_block_stride, kv_slot_stride, table_ptr,
            root, bits, position, factor, softcap, window, HEAD_DIM, BLOCK_D, BLOCK_SIZE, True, HAS_WINDOW,
            HAS_SOFTCAP,
        )  # fmt: skip

    if SPLITS == 1:
        out = token * out_stride + head * HEAD_DIM
        tl.store(out_ptr + out[:, None] + d[None, :], acc / total[:, None], mask=row_mask)
        if NODES_ONLY:
            tl.store(
                lse_ptr + head * lse_stride + token, (best + tl.log2(total)) * 0.6931471805599453, mask=row_ok
            )
    else:
        tl.store(part_ptr + part[:, None] * HEAD_DIM + d[None, :], acc, mask=row_mask)
        tl.store(part_max_ptr + part, best, mask=row_ok)
        tl.store(part_sum_ptr + part, total, mask=row_ok)


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
    (keys, then values; any strides but an adjacent last dimension) in query's dtype, this step's rows included;
    block_table int [requests, blocks]; query_start_loc int [requests + 1]; seq_lens int [requests], this step's
    rows included; root, bits, positions int64 [tokens]: position of the tree's root, ancestors, root + depth.
    max_query_len bounds a request's rows on the host. window: sliding window in tokens, 0 for none, longer than a
    tree is deep; softcap: 0 for none; sinks [heads]; out: where to write, adjacent heads.

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
    """As `tree_attention`, over the keys from the root on only: each node sees the root, its ancestors and itself.

    For rows of trees whose prefix another kernel attends to. Returns the output [tokens, heads, head_dim] and the
    logarithm of the sum of the exponentials of the scores, fp32 [heads, tokens], with which both are merged.
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
    """Raises ValueError on shapes or dtypes that do not fit, see `tree_attention`."""
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
    _tree_attention_kernel[(blocks, kv_heads, splits)](
        out, out.stride(0), lse, 0 if lse is None else lse.stride(0), *parts, query, query.stride(0), kv_cache,
        *kv_cache.stride()[:3], block_table, block_table.stride(0), query_start_loc, seq_lens, root, bits,
        positions, sinks, requests, heads, scale, softcap, window, GROUP=group, SPLITS=splits,
        LEAST_TILES=LEAST_KEYS // tile, HEAD_DIM=head_dim, BLOCK_D=next_power_of_2(head_dim), BLOCK_Q=block_q,
        BLOCK_M=block_m, BLOCK_SIZE=kv_cache.shape[2], TILE=tile, NODES_ONLY=lse is not None,
        HAS_WINDOW=window > 0, HAS_SOFTCAP=softcap > 0, HAS_SINKS=sinks is not None, num_warps=4,
    )  # fmt: skip
    if splits > 1:
        merge_splits(out, parts, query_start_loc)
