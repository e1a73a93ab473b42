"""Paged caches in the layouts of CPU attention, filled token by token. Places without a token hold NaN."""

from __future__ import annotations

import torch

from vllm_eagle3.kernels.cpu import layout as layouts

LAYOUTS = {"columns": layouts.columns, "pairs": layouts.pairs, "rows": layouts.rows}
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}  # of the largest value: 1


def write(kv_cache, layout, block, offset, key, value):
    """Write one token of all heads in the layout's order."""
    flat = kv_cache.flatten(2)
    flat[block][:, layout.keys[offset].long()] = key
    flat[block][:, layout.values[offset].long()] = value


def fill(lens, layout, kv_heads, dtype, generator):
    """(keys, values) of each request [len, kv_heads, head_dim], the cache that holds them, and its block table."""
    blocks = -(-max(lens, default=1) // layout.block_size)
    table = torch.randperm(blocks * len(lens) + 3, generator=generator)
    table = table[: blocks * len(lens)].view(len(lens), blocks).int()
    shape = (blocks * len(lens) + 3, kv_heads, layout.block_size, 2 * layout.head_dim)
    cache = torch.full(shape, float("nan"), dtype=dtype)
    kv = [
        [torch.randn(n, kv_heads, layout.head_dim, generator=generator).to(dtype) for n in lens] for _ in "kv"
    ]
    for row, length, key, value in zip(table.tolist(), lens, *kv, strict=True):
        for slot in range(length):
            block = row[slot // layout.block_size]
            write(cache, layout, block, slot % layout.block_size, key[slot], value[slot])
    return kv, cache, table
