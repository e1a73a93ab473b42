"""`kernels.tree_attention` for a CPU's paged cache, with the same rule, rows and masks.

out[t] = softmax(scale * q[t] . K) V over the keys k with k < root[t] or bit (k - root[t]) of bits[t]
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..tree_attention_torch import visible_keys
from .build import native
from .call import DTYPES, Backend, choose_backend, f32, i32, i64, int32, pointer, struct
from .layout import KVLayout

_Arguments = struct(
    "out query kv_cache block_table starts lens root bits positions sinks key_offsets value_offsets",
    i64("out_stride query_stride table_stride block_stride head_stride"),
    i32("requests heads kv_heads dim block_size layout window dtype"),
    f32("scale softcap"),
)


def tree_attention(
    query: Tensor,
    kv_cache: Tensor,
    layout: KVLayout,
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
    out: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Attention output [tokens, heads, head_dim] in query's dtype, softmax in fp32; written to `out` where given.

    query [tokens, heads, head_dim], adjacent heads; kv_cache [blocks, kv_heads, block_size, 2 * head_dim] as `layout`
    orders it, this step's rows included, in query's dtype; block_table int [requests, blocks]; query_start_loc int
    [requests + 1]; seq_lens int [requests], this step's rows included; root, bits, positions int64 [tokens or more]:
    position of the tree's root, ancestors, root + depth. window: sliding window in tokens, 0 for none, longer than a
    tree is deep; softcap: 0 for none; sinks [heads]. Rows after those of the last request are not written.

    Raises ValueError on shapes or dtypes that do not fit.
    """
    rows = {"root": root, "bits": bits, "positions": positions}
    _check(query, kv_cache, layout, block_table, query_start_loc, seq_lens, rows)
    requests, (tokens, heads, head_dim) = len(seq_lens), query.shape
    if out is None:
        out = torch.zeros(tokens, heads, head_dim, dtype=query.dtype)
    if out.shape != query.shape or out.dtype != query.dtype:
        raise ValueError(
            f"out must be {query.dtype} {tuple(query.shape)}, found {out.dtype} {tuple(out.shape)}"
        )
    if choose_backend(backend) == "torch":
        return tree_attention_torch(
            query, kv_cache, layout, block_table, query_start_loc, seq_lens, root, bits, positions, out, scale=scale,
            window=window, softcap=softcap, sinks=sinks,
        )  # fmt: skip
    if query.stride()[1:] != (head_dim, 1) or out.stride()[1:] != (head_dim, 1):
        raise ValueError("query and out must have adjacent heads")
    block_table, starts, lens = int32(block_table), int32(query_start_loc), int32(seq_lens)
    sinks = None if sinks is None else sinks.float().contiguous()
    library = native()
    assert library is not None
    arguments = _Arguments(
        pointer(out), pointer(query), pointer(kv_cache), pointer(block_table), pointer(starts), pointer(lens),
        pointer(root), pointer(bits), pointer(positions), pointer(sinks), pointer(layout.keys),
        pointer(layout.values), out.stride(0), query.stride(0), block_table.stride(0), kv_cache.stride(0),
        kv_cache.stride(1), requests, heads, kv_cache.shape[1], head_dim, layout.block_size, layout.kind, window,
        DTYPES[query.dtype], scale, softcap,
    )  # fmt: skip
    if library.tree_attention(ctypes.byref(arguments)):
        raise ValueError(f"the native kernels of this machine do not take {query.dtype}")
    return out


def _check(
    query: Tensor, kv_cache: Tensor, layout: KVLayout, block_table: Tensor, query_start_loc: Tensor,
    seq_lens: Tensor, rows: dict[str, Tensor],
) -> None:  # fmt: skip
    check_cache(query, kv_cache, layout)
    tokens, requests = len(query), len(seq_lens)
    for name, t in rows.items():
        if t.dtype != torch.int64 or t.shape[0] < tokens or not t.is_contiguous():
            raise ValueError(f"{name} must be int64 [{tokens}], found {t.dtype} {tuple(t.shape)}")
    if len(query_start_loc) != requests + 1 or len(block_table) < requests:
        raise ValueError(
            f"expected query_start_loc [{requests + 1}] and block_table [{requests}, blocks] for {requests} requests, "
            f"found {tuple(query_start_loc.shape)} and {tuple(block_table.shape)}"
        )


def tree_attention_torch(
    query: Tensor,
    kv_cache: Tensor,
    layout: KVLayout,
    block_table: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    root: Tensor,
    bits: Tensor,
    positions: Tensor,
    out: Tensor,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Plain-torch twin of `tree_attention`, request by request."""
    heads, head_dim = query.shape[1:]
    kv_heads = kv_cache.shape[1]
    starts, lens = query_start_loc.tolist(), seq_lens.tolist()
    for request, (start, stop) in enumerate(zip(starts[:-1], starts[1:], strict=True)):
        length = lens[request]
        if stop <= start:
            continue
        blocks = block_table[request, : -(-length // layout.block_size)].long()
        keys, values = (x[:, :length].float() for x in layout.gather(kv_cache, blocks))
        rows = slice(start, stop)
        q = (query[rows].float() * scale).view(-1, kv_heads, heads // kv_heads, head_dim)
        scores = torch.einsum("tkgd,kld->tkgl", q, keys)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        visible = visible_keys(root[rows], bits[rows], positions[rows], length, window)[:, None, None]
        scores = scores.masked_fill(~visible, float("-inf"))
        if sinks is not None:
            sink = sinks.float().view(1, kv_heads, -1, 1).expand(len(q), -1, -1, 1)
            scores = torch.cat([scores, sink], dim=-1)
        weights = scores.softmax(dim=-1)[..., :length]
        weights = weights.masked_fill(~visible.any(-1, keepdim=True), 0.0)  # a row that sees no key
        # Keys that no row of the request sees may be NaN, and weight 0 times NaN is NaN.
        values = values.masked_fill(~visible.any(0)[0, 0, :, None], 0.0)
        context = torch.einsum("tkgl,kld->tkgd", weights, values)
        out[rows] = context.reshape(-1, heads, head_dim).to(out.dtype)
    return out


def check_cache(query: Tensor, kv_cache: Tensor, layout: KVLayout) -> None:
    """Raise ValueError if queries [..., heads, head_dim] cannot attend to this cache."""
    heads, head_dim = query.shape[-2:]
    kv_heads = kv_cache.shape[1]
    expected = (layout.block_size, 2 * layout.head_dim)
    if head_dim != layout.head_dim or kv_cache.shape[2:] != expected or heads % kv_heads:
        raise ValueError(
            f"kv_cache must be [blocks, kv_heads, {layout.block_size}, {2 * head_dim}] with kv_heads dividing {heads}, "
            f"found {tuple(kv_cache.shape)}"
        )
    if kv_cache.stride()[2:] != (2 * head_dim, 1):
        raise ValueError(f"kv_cache must have adjacent elements in a block's head, found {kv_cache.stride()}")
    if kv_cache.dtype != query.dtype or query.dtype not in DTYPES:
        raise ValueError(
            f"expected fp32, bf16 or fp16 for both, found {query.dtype} and {kv_cache.dtype} (cache)"
        )
