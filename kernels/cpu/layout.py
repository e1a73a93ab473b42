"""The order of keys and values inside a block of a CPU's paged cache.

The cache is [blocks, kv_heads, block_size, 2 * head_dim]. The elements of its last two dimensions have another order
for each instruction set of vLLM's CPU attention (`isa` in v1/attention/backends/cpu_attn.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

LANES = 16  # tokens or columns that are adjacent in PAIRS; block_size and head_dim must be multiples

COLUMNS, PAIRS, TABLE = range(3)  # as in attention.h


@dataclass(frozen=True, eq=False)
class KVLayout:
    """Offset of each element within a block of one head. Use one of the functions below to make it.

    keys, values: int32 [block_size, head_dim].
    """

    keys: Tensor
    values: Tensor

    def __post_init__(self) -> None:
        size, dim = self.keys.shape
        if size % LANES or dim % LANES:
            raise ValueError(
                f"block size and head size must be multiples of {LANES} for attention on a CPU, found {size} "
                f"and {dim}"
            )

    @property
    def block_size(self) -> int:
        return self.keys.shape[0]

    @property
    def head_dim(self) -> int:
        return self.keys.shape[1]

    @cached_property
    def kind(self) -> int:
        """COLUMNS and PAIRS have fast code in the kernels. For any other order (TABLE) they look up each element."""
        for kind, known in ((COLUMNS, columns), (PAIRS, pairs)):
            other = known(self.block_size, self.head_dim)
            if torch.equal(self.keys, other.keys) and torch.equal(self.values, other.values):
                return kind
        return TABLE

    def gather(self, kv_cache: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, each [kv_heads, len(blocks) * block_size, head_dim], of `blocks` (int64) in order."""
        flat = kv_cache[blocks].flatten(2).transpose(0, 1)  # [kv_heads, blocks, block_size * 2 * head_dim]
        shape = (flat.shape[0], -1, self.head_dim)
        return (
            flat[..., self.keys.flatten()].reshape(shape),
            flat[..., self.values.flatten()].reshape(shape),
        )


def columns(block_size: int, head_dim: int) -> KVLayout:
    """vLLM's `vec` and `vec16`: keys [head_dim, block_size], then values [block_size, head_dim]."""
    token, column = _grid(block_size, head_dim)
    return _layout(
        column * block_size + token, block_size * head_dim + token * head_dim + column, (block_size, head_dim)
    )


def pairs(block_size: int, head_dim: int) -> KVLayout:
    """vLLM's `amx`.

    Keys [block_size / 16, head_dim / 2, 16 tokens, 2], then values [head_dim / 16, block_size / 2, 16 columns, 2
    tokens].
    """
    token, column = _grid(block_size, head_dim)
    keys = token // LANES * LANES * head_dim + column // 2 * 2 * LANES + token % LANES * 2 + column % 2
    values = column // LANES * LANES * block_size + token // 2 * 2 * LANES + column % LANES * 2 + token % 2
    return _layout(keys, block_size * head_dim + values, (block_size, head_dim))


def rows(block_size: int, head_dim: int) -> KVLayout:
    """A token's keys, then its values: the layout of vLLM's Triton attention."""
    token, column = _grid(block_size, head_dim)
    at = token * 2 * head_dim + column
    return _layout(at, at + head_dim, (block_size, head_dim))


def observed(write: Callable[[Tensor, Tensor, Tensor], None], block_size: int, head_dim: int, dtype: torch.dtype,
             ) -> KVLayout:  # fmt: skip
    """The layout that `write` uses, found by writing known numbers.

    write(key [block_size, 1, head_dim], value alike, kv_cache [1, 1, block_size, 2 * head_dim]) stores tokens to the
    slots 0 to block_size - 1 of the cache. Raises ValueError unless it stores each element exactly once.
    """
    count = 2 * block_size * head_dim
    numbers = torch.arange(1, count + 1)
    found = torch.zeros(count, dtype=torch.int64)
    # One bit of the numbers at a time, because every dtype represents 0 and 1 exactly.
    for bit in range(count.bit_length()):
        key, value = (numbers >> bit & 1).to(dtype).view(2, block_size, 1, head_dim)
        kv_cache = torch.zeros(1, 1, block_size, 2 * head_dim, dtype=dtype)
        write(key, value, kv_cache)
        found += (kv_cache.flatten() != 0).long() << bit
    if not torch.equal(found.sort().values, numbers):
        raise ValueError(
            "the layout of the cache is unknown: expected each element of keys and values in it exactly once"
        )
    keys, values = found.argsort().view(2, block_size, head_dim).int()
    return KVLayout(keys.contiguous(), values.contiguous())


def _grid(block_size: int, head_dim: int) -> tuple[Tensor, Tensor]:
    return torch.arange(block_size)[:, None], torch.arange(head_dim)[None]


def _layout(keys: Tensor, values: Tensor, shape: tuple[int, int]) -> KVLayout:
    return KVLayout(keys.expand(shape).int().contiguous(), values.expand(shape).int().contiguous())
