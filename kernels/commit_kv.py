"""Moves the accepted path's KV rows to linear slots, for all layers of a cache group in one launch.

After verification, node path[i] of a request becomes its i-th token, so its keys and values move from slot(path[i])
to slot(i). Since path[i] >= i, moves in ascending i never overwrite a row that a later move reads. The kernel moves
all rows of a request together, so it reads all of them before it stores any.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ._triton import Backend, cdiv, choose_backend, next_power_of_2, tl, triton

_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}


@dataclass(frozen=True)
class KVTable:
    """The caches of one cache group, and the table of their addresses on the same device. `kv_table` makes it once.

    caches: one view [num_blocks, 2, block_size, heads, head_dim] per layer, in words of up to 8 bytes. They are
    kept so that the addresses stay valid. Make a new table when the caches are reallocated.
    """

    caches: tuple[Tensor, ...]
    pointers: Tensor


def kv_table(kv_caches: Sequence[Tensor]) -> KVTable:
    """Table of a cache group's layers.

    kv_caches: one tensor per layer, permuted to [num_blocks, 2 (key, value), block_size, heads, head_dim], with
    contiguous head_dim and any other strides. Raises ValueError if their shapes, strides, dtypes or devices differ.
    """
    if not kv_caches:
        raise ValueError("kv_caches is empty: expected one cache a layer")
    first = kv_caches[0]
    if first.dim() != 5 or first.shape[1] != 2 or first.stride(4) != 1:
        raise ValueError(
            "a KV cache must be a view [num_blocks, 2, block_size, heads, head_dim] with adjacent head_dim, "
            f"found shape {tuple(first.shape)}, strides {first.stride()}"
        )
    for i, kv in enumerate(kv_caches):
        if (kv.shape, kv.stride(), kv.dtype, kv.device) != (
            first.shape,
            first.stride(),
            first.dtype,
            first.device,
        ):
            raise ValueError(
                f"KV cache of layer {i} differs in shape, strides, dtype or device from layer 0's"
            )
    views = tuple(_as_words(kv, _word_bytes(kv_caches)) for kv in kv_caches)
    return KVTable(views, torch.tensor([v.data_ptr() for v in views], dtype=torch.int64, device=first.device))


def _word_bytes(kv_caches: Sequence[Tensor]) -> int:
    """Widest word that divides a head's row, every stride and every address."""
    kv = kv_caches[0]
    size = kv.element_size()
    lengths: list[int] = [kv.shape[4] * size, *(int(s) * size for s in kv.stride()[:4])]
    lengths += [address for t in kv_caches for address in (t.data_ptr(), int(t.storage_offset()) * size)]
    return next(w for w in _WORDS if w >= size and all(length % w == 0 for length in lengths) or w == 1)


def _as_words(kv: Tensor, word: int) -> Tensor:
    """The same memory as integers of `word` bytes; only the last dimension shrinks."""
    ratio = word // kv.element_size()
    shape = (*kv.shape[:4], kv.shape[4] // ratio)
    stride = (*(s // ratio for s in kv.stride()[:4]), 1)
    flat = torch.empty(0, dtype=_WORDS[word], device=kv.device)
    return flat.set_(kv.untyped_storage(), kv.storage_offset() // ratio, shape, stride)


@triton.jit
def _commit_kernel(pointers_ptr, like_ptr, src_ptr, dst_ptr, moves, num_slots, block_size, stride_block,
                   stride_kv, stride_slot, stride_head, heads, head_words, BLOCK_P: tl.constexpr,
                   BLOCK_W: tl.constexpr):  # fmt: skip
    """Program (request, layer, share of a token's words): every source row is read before any is stored."""
    request = tl.program_id(0).to(tl.int64)
    base = tl.load(pointers_ptr + tl.program_id(1)).to(like_ptr.dtype)
    p = tl.arange(0, BLOCK_P)
    src = tl.load(src_ptr + request * moves + p, mask=p < moves, other=-1).to(tl.int64)
    dst = tl.load(dst_ptr + request * moves + p, mask=p < moves, other=-1).to(tl.int64)
    moved = (src != dst) & (src >= 0) & (dst >= 0) & (src < num_slots) & (dst < num_slots)

    # A token's words, keys then values: [2, heads, head_words] flattened.
    word = tl.program_id(2) * BLOCK_W + tl.arange(0, BLOCK_W)
    per_side = heads * head_words
    in_side = word % per_side
    column = (word // per_side).to(tl.int64) * stride_kv + (in_side // head_words).to(tl.int64) * stride_head
    column += in_side % head_words
    mask = moved[:, None] & (word < 2 * per_side)[None, :]
    source = (src // block_size) * stride_block + (src % block_size) * stride_slot
    target = (dst // block_size) * stride_block + (dst % block_size) * stride_slot
    rows = tl.load(base + source[:, None] + column[None, :], mask=mask, other=0)
    tl.debug_barrier()
    tl.store(base + target[:, None] + column[None, :], rows, mask=mask)


def commit_kv(
    table: KVTable, src_slots: Tensor, dst_slots: Tensor, *, backend: Backend | None = None
) -> None:
    """For every request r, move i and layer: cache[dst_slots[r, i]] = cache[src_slots[r, i]], in place.

    src_slots, dst_slots int32 or int64 [b, moves], moves <= 64: slots (block * block_size + offset) of the
    accepted path and of its linear places. A move with equal slots, a negative slot or a slot beyond the cache
    does nothing. Within a request all reads come before all writes. Two requests must not use the same slot.

    Raises ValueError on shapes or dtypes that do not fit.
    """
    if src_slots.shape != dst_slots.shape or src_slots.dim() != 2 or src_slots.shape[1] > 64:
        shapes = f"{tuple(src_slots.shape)} and {tuple(dst_slots.shape)}"
        raise ValueError(f"src_slots and dst_slots must both be [b, moves <= 64], found {shapes}")
    for name, t in (("src_slots", src_slots), ("dst_slots", dst_slots)):
        if t.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{name} must be int32 or int64, found {t.dtype}")
    if choose_backend(backend, table.pointers, src_slots, dst_slots) == "torch":
        commit_kv_torch(table, src_slots, dst_slots)
        return
    b, moves = src_slots.shape
    if b == 0 or moves == 0:
        return
    first = table.caches[0]
    num_blocks, _, block_size, heads, head_words = first.shape
    stride_block, stride_kv, stride_slot, stride_head, _ = first.stride()
    words = 2 * heads * head_words
    block_p = next_power_of_2(moves)
    block_w = min(next_power_of_2(words), 2048 // block_p)
    _commit_kernel[(b, len(table.caches), cdiv(words, block_w))](
        table.pointers, first, src_slots.contiguous(), dst_slots.contiguous(), moves, num_blocks * block_size,
        block_size, stride_block, stride_kv, stride_slot, stride_head, heads, head_words, BLOCK_P=block_p,
        BLOCK_W=block_w, num_warps=4,
    )  # fmt: skip


def commit_kv_torch(table: KVTable, src_slots: Tensor, dst_slots: Tensor) -> None:
    """Plain-torch twin of `commit_kv`. Indexing makes a copy, so all rows are read before the first write."""
    num_blocks, _, size = table.caches[0].shape[:3]
    src, dst = src_slots.long().flatten(), dst_slots.long().flatten()
    inside = (src >= 0) & (dst >= 0) & (src < num_blocks * size) & (dst < num_blocks * size)
    keep = (src != dst) & inside
    src, dst = src[keep], dst[keep]
    if src.numel() == 0:
        return
    for kv in table.caches:
        kv[dst // size, :, dst % size] = kv[src // size, :, src % size]
