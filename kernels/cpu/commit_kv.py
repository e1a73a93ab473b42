"""`kernels.commit_kv` for CPU caches: moves the accepted path's KV to linear slots, for all layers in one call."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .build import native
from .call import Backend, choose_backend, i32, i64, pointer, struct
from .layout import KVLayout

_Arguments = struct(
    "caches src dst key_offsets value_offsets",
    i64("num_blocks block_stride head_stride"),
    i32("layers batch moves kv_heads dim block_size item_size"),
)


@dataclass(frozen=True, eq=False)
class KVTable:
    """The caches of one cache group and their addresses. Make a new one when the caches are reallocated."""

    caches: tuple[Tensor, ...]
    layout: KVLayout
    pointers: Tensor


def kv_table(kv_caches: Sequence[Tensor], layout: KVLayout) -> KVTable:
    """Table of a cache group's layers.

    kv_caches: one tensor [num_blocks, kv_heads, block_size, 2 * head_dim] per layer, in the order of `layout`. Raises
    ValueError if their shapes, strides or dtypes differ or do not fit the layout.
    """
    if not kv_caches:
        raise ValueError("kv_caches is empty: expected one cache a layer")
    first = kv_caches[0]
    inner = (layout.block_size, 2 * layout.head_dim)
    if first.dim() != 4 or first.shape[2:] != inner or first.stride()[2:] != (inner[1], 1):
        raise ValueError(
            f"a KV cache must be [num_blocks, kv_heads, {inner[0]}, {inner[1]}] with adjacent elements in a block's "
            f"head, found {tuple(first.shape)}, strides {first.stride()}"
        )
    for i, kv in enumerate(kv_caches):
        if (kv.shape, kv.stride(), kv.dtype) != (first.shape, first.stride(), first.dtype):
            raise ValueError(f"KV cache of layer {i} differs in shape, strides or dtype from layer 0's")
    return KVTable(tuple(kv_caches), layout, torch.tensor([kv.data_ptr() for kv in kv_caches]))


def commit_kv(
    table: KVTable, src_slots: Tensor, dst_slots: Tensor, *, backend: Backend | None = None
) -> None:
    """For every request r, move i and layer: cache[dst_slots[r, i]] = cache[src_slots[r, i]], in place.

    src_slots, dst_slots int32 or int64 [b, moves]: slots (block * block_size + offset) of the accepted path and of its
    linear places. A move with equal slots, a negative slot or a slot beyond the cache does nothing. Within a request
    all reads come before all writes. Two requests must not use the same slot.

    Raises ValueError on shapes or dtypes that do not fit.
    """
    if src_slots.shape != dst_slots.shape or src_slots.dim() != 2:
        shapes = f"{tuple(src_slots.shape)} and {tuple(dst_slots.shape)}"
        raise ValueError(f"src_slots and dst_slots must both be [b, moves], found {shapes}")
    for name, t in (("src_slots", src_slots), ("dst_slots", dst_slots)):
        if t.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{name} must be int32 or int64, found {t.dtype}")
    if choose_backend(backend) == "torch":
        commit_kv_torch(table, src_slots, dst_slots)
        return
    src, dst = src_slots.long().contiguous(), dst_slots.long().contiguous()
    first, layout = table.caches[0], table.layout
    library = native()
    assert library is not None
    arguments = _Arguments(
        pointer(table.pointers), pointer(src), pointer(dst), pointer(layout.keys), pointer(layout.values),
        len(first), first.stride(0), first.stride(1), len(table.caches), *src.shape, first.shape[1],
        layout.head_dim, layout.block_size, first.element_size(),
    )  # fmt: skip
    if library.commit_kv(ctypes.byref(arguments)):
        raise ValueError(f"the native kernels do not move elements of {first.dtype}")


def commit_kv_torch(table: KVTable, src_slots: Tensor, dst_slots: Tensor) -> None:
    """Plain-torch twin of `commit_kv`. Indexing makes a copy, so all rows are read before the first write."""
    layout = table.layout
    src, dst = src_slots.long().flatten(), dst_slots.long().flatten()
    most = len(table.caches[0]) * layout.block_size
    keep = (src != dst) & (src >= 0) & (dst >= 0) & (src < most) & (dst < most)
    src, dst = src[keep], dst[keep]
    elements = torch.cat([layout.keys, layout.values], dim=1).long()  # [block_size, 2 * head_dim]
    from_block, to_block = (x[:, None, None] // layout.block_size for x in (src, dst))
    from_element, to_element = (elements[x % layout.block_size][:, None] for x in (src, dst))
    for kv in table.caches:
        flat, head = kv.flatten(2), torch.arange(kv.shape[1])[:, None]
        flat[to_block, head, to_element] = flat[from_block, head, from_element]
