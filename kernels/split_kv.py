"""Split-KV: several programs share the keys of a row, and a second kernel merges their partial softmaxes.

A program writes the largest score of its share (base-2 logarithms), the sum of its weights and the weighted sum of
values. A program whose share is empty writes a largest score of -inf and sum 0, and no values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._triton import next_power_of_2, num_sms, tl, triton

MOST_SPLITS = 16
MOST_PARTIAL_BYTES = 64 << 20  # of the partial sums of values in one call
LEAST_KEYS = 256  # of a share; smaller shares would cost more to merge than to read


@triton.jit(do_not_specialize=["requests"])
def _merge_splits_kernel(
    out_ptr, out_stride,
    part_ptr, part_max_ptr, part_sum_ptr,
    starts_ptr, requests,
    heads,
    SPLITS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    HAS_STARTS: tl.constexpr,
):  # fmt: skip
    """Merge the shares of one row and head. Rows of no request, which pad a batch, become 0."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    s = tl.arange(0, BLOCK_S)
    d = tl.arange(0, BLOCK_D)
    real = True
    if HAS_STARTS:
        real = token < tl.load(starts_ptr + requests)
    part = (token * heads + head) * SPLITS + s
    best = tl.load(part_max_ptr + part, mask=(s < SPLITS) & real, other=float("-inf"))
    used = best > float("-inf")
    total = tl.load(part_sum_ptr + part, mask=used, other=0.0)
    largest = tl.max(best, 0)
    weight = tl.where(used, tl.exp2(best - tl.where(largest > float("-inf"), largest, 0.0)), 0.0)
    mask = used[:, None] & (d < HEAD_DIM)[None, :]
    acc = tl.load(part_ptr + part[:, None] * HEAD_DIM + d[None, :], mask=mask, other=0.0)
    sum_of_weights = tl.sum(total * weight, 0)
    out = tl.sum(acc * weight[:, None], 0) / tl.where(sum_of_weights > 0.0, sum_of_weights, 1.0)
    tl.store(out_ptr + token * out_stride + head * HEAD_DIM + d, out, mask=d < HEAD_DIM)


def choose_splits(device: torch.device, programs: int, bytes_a_split: int) -> int:
    """Number of shares of the keys: enough programs to fill the device twice, within the bound on memory.

    programs: programs per share; bytes_a_split: bytes of partial sums per share. The number is a power of two, because
    the kernel is compiled for each value.
    """
    splits = max(1, min(MOST_SPLITS, 2 * num_sms(device) // max(1, programs)))
    splits = max(1, min(splits, MOST_PARTIAL_BYTES // max(1, bytes_a_split)))
    return 1 << (splits.bit_length() - 1)


def tile_of(query: Tensor) -> int:
    """Number of keys that a program reads at a time. More would not fit into shared memory."""
    return 32 if next_power_of_2(query.shape[-1]) * query.element_size() > 256 else 64


def partials(rows: int, heads: int, head_dim: int, splits: int, device: torch.device) -> tuple[Tensor, ...]:
    """Scratch for the partial sums [rows, heads, splits, head_dim], maxima and weights [rows, heads, splits].

    Without splits it is not used and has one element.
    """
    shape = (rows, heads, splits) if splits > 1 else (1,)
    return (
        torch.empty(*shape, head_dim, device=device),
        torch.empty(shape, device=device),
        torch.empty(shape, device=device),
    )


def merge_splits(out: Tensor, parts: tuple[Tensor, ...], starts: Tensor | None = None) -> None:
    """Merge the partial softmaxes in `parts` (from `partials`) into out [rows, heads, head_dim].

    starts: int [requests + 1]; rows from starts[-1] on belong to no request and become 0.
    """
    part, part_max, part_sum = parts
    rows, heads, splits, head_dim = part.shape
    _merge_splits_kernel[(rows, heads)](
        out, out.stride(0), part, part_max, part_sum, starts, 0 if starts is None else len(starts) - 1, heads,
        SPLITS=splits, HEAD_DIM=head_dim, BLOCK_D=next_power_of_2(head_dim), BLOCK_S=next_power_of_2(splits),
        HAS_STARTS=starts is not None, num_warps=2,
    )  # fmt: skip
