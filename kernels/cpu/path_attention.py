"""`kernels.path_attention` for a CPU's paged cache: the prefix in the cache, then each node's own path in scratch.

out[b, n] = softmax(scale * q[b, n] . K) V over request b's prefix and the slots paths[b, n] of scratch
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .build import native
from .call import DTYPES, Backend, choose_backend, f32, i32, i64, int32, pointer, struct
from .layout import KVLayout
from .tree_attention import check_cache

LONGEST = 64  # nodes of a path

_Arguments = struct(
    "out query cache table prefix keys values paths new_keys new_values key_offsets value_offsets",
    i64(
        "query_stride new_key_stride new_value_stride table_stride block_stride head_stride path_request "
        "path_node"
    ),
    i32("batch nodes length slots heads kv_heads dim block_size layout window dtype"),
    f32("scale"),
)


def path_attention(
    query: Tensor,
    kv_cache: Tensor,
    layout: KVLayout,
    block_table: Tensor,
    prefix_lens: Tensor,
    keys: Tensor,
    values: Tensor,
    paths: Tensor,
    *,
    scale: float,
    window: int = 0,
    new: tuple[Tensor, Tensor] | None = None,
    out: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Attention output [batch * nodes, heads, head_dim] in query's dtype; softmax in fp32; to `out` where given.

    query [batch * nodes, heads, head_dim], adjacent heads; kv_cache [blocks, kv_heads, block_size, 2 * head_dim] as
    `layout` orders it, in query's dtype; block_table int [batch or more, blocks]; prefix_lens int [batch], cached
    tokens that all nodes of a request read; keys, values [batch or more, slots, kv_heads, head_dim], contiguous: the
    scratch; paths int64 [batch, nodes, 1 to 64]: slots of each node's ancestors and, last, its own slot. window:
    sliding window in tokens, 0 for none, longer than a path; a node is at position prefix_len - 1 + length. new: this
    level's keys and values [batch * nodes, kv_heads, head_dim], which are first written to the nodes' own slots.

    Raises ValueError on shapes or dtypes that do not fit.
    """
    _check(query, kv_cache, layout, block_table, prefix_lens, keys, values, paths, new)
    if out is None:
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
    if out.shape != query.shape or out.dtype != query.dtype or not out.is_contiguous():
        raise ValueError(f"out must be {query.dtype} {tuple(query.shape)}, contiguous")
    if choose_backend(backend) == "torch":
        return path_attention_torch(
            query, kv_cache, layout, block_table, prefix_lens, keys, values, paths, out, scale=scale,
            window=window, new=new,
        )  # fmt: skip
    heads, head_dim = query.shape[1:]
    if any(t.stride()[1:] != (head_dim, 1) for t in (query, *(new or ()))):
        raise ValueError("query and new must have adjacent heads")
    block_table, prefix = int32(block_table), int32(prefix_lens)
    paths = paths if paths.stride(2) == 1 else paths.contiguous()
    new_keys, new_values = new or (None, None)
    library = native()
    assert library is not None
    arguments = _Arguments(
        pointer(out), pointer(query), pointer(kv_cache), pointer(block_table), pointer(prefix), pointer(keys),
        pointer(values), pointer(paths), pointer(new_keys), pointer(new_values), pointer(layout.keys),
        pointer(layout.values), query.stride(0), new_keys.stride(0) if new_keys is not None else 0,
        new_values.stride(0) if new_values is not None else 0, block_table.stride(0), kv_cache.stride(0),
        kv_cache.stride(1), paths.stride(0), paths.stride(1), *paths.shape, keys.shape[1], heads,
        kv_cache.shape[1], head_dim, layout.block_size, layout.kind, window, DTYPES[query.dtype], scale,
    )  # fmt: skip
    if library.path_attention(ctypes.byref(arguments)):
        raise ValueError(f"the native kernels of this machine do not take {query.dtype}")
    return out


def _check(
    query: Tensor, kv_cache: Tensor, layout: KVLayout, block_table: Tensor, prefix_lens: Tensor, keys: Tensor,
    values: Tensor, paths: Tensor, new: tuple[Tensor, Tensor] | None,
) -> None:  # fmt: skip
    check_cache(query, kv_cache, layout)
    rows, _, head_dim = query.shape
    batch, nodes, length = paths.shape
    kv_heads = kv_cache.shape[1]
    for name, t in (("keys", keys), ("values", values)):
        good = t.shape == keys.shape and t.shape[2:] == (kv_heads, head_dim) and len(t) >= batch
        if not (good and t.dtype == query.dtype and t.is_contiguous()):
            raise ValueError(
                f"{name} must be {query.dtype} [{batch} or more, slots, {kv_heads}, {head_dim}], contiguous, found "
                f"{t.dtype} {tuple(t.shape)}"
            )
    if paths.dtype != torch.int64 or rows != batch * nodes or not 1 <= length <= LONGEST:
        raise ValueError(
            f"paths must be int64 [batch, nodes, 1 to {LONGEST}] for {rows} rows, found {paths.dtype} "
            f"{tuple(paths.shape)}"
        )
    if len(prefix_lens) != batch or len(block_table) < batch:
        raise ValueError(
            f"expected prefix_lens [{batch}] and block_table [{batch} or more, blocks], found "
            f"{tuple(prefix_lens.shape)} and {tuple(block_table.shape)}"
        )
    for t in new or ():
        if t.shape != (rows, kv_heads, head_dim) or t.dtype != query.dtype:
            raise ValueError(
                f"new must be {query.dtype} [{rows}, {kv_heads}, {head_dim}], found {t.dtype} {tuple(t.shape)}"
            )


def path_attention_torch(
    query: Tensor,
    kv_cache: Tensor,
    layout: KVLayout,
    block_table: Tensor,
    prefix_lens: Tensor,
    keys: Tensor,
    values: Tensor,
    paths: Tensor,
    out: Tensor,
    *,
    scale: float,
    window: int = 0,
    new: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Plain-torch twin of `path_attention`, request by request."""
    batch, nodes, length = paths.shape
    heads, head_dim = query.shape[1:]
    kv_heads = kv_cache.shape[1]
    request = torch.arange(batch)[:, None]
    if new is not None:
        for scratch, rows in zip((keys, values), new, strict=True):
            scratch[request, paths[..., -1]] = rows.view(batch, nodes, kv_heads, head_dim)
    q = (query.float() * scale).view(batch, nodes, kv_heads, heads // kv_heads, head_dim)
    context = torch.empty(q.shape)
    for r, prefix in enumerate(prefix_lens.tolist()):
        blocks = block_table[r, : -(-prefix // layout.block_size)].long()
        first = max(prefix + length - window, 0) if window else 0
        cached_keys, cached_values = (
            x[:, first:prefix].float() for x in layout.gather(kv_cache, blocks)
        )  # [kv_heads, tokens, head_dim]
        own_keys, own_values = keys[r, paths[r]].float(), values[r, paths[r]].float()
        in_prefix = torch.einsum("nkgd,kpd->nkgp", q[r], cached_keys)
        in_path = torch.einsum("nkgd,nlkd->nkgl", q[r], own_keys)
        weights = torch.cat([in_prefix, in_path], dim=-1).softmax(dim=-1)
        in_prefix, in_path = weights.split([in_prefix.shape[-1], length], dim=-1)
        context[r] = torch.einsum("nkgp,kpd->nkgd", in_prefix, cached_values)
        context[r] += torch.einsum("nkgl,nlkd->nkgd", in_path, own_values)
    return out.copy_(context.view(out.shape))
