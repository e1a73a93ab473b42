"""Split-K product of a few rows with a large weight: the matrix product of `concat_fc` and `linear_fp8`.

    out[m, :] = scale * sum_c W[:, c] @ f_c(x_c[m])      f_c: nothing, or RMSNorm

Below about 64 rows the product takes as long as reading W once. Each program takes a tile of output columns and one
share of one chunk's inner dimension, so that all SMs of the GPU read even a narrow W. Partial sums go to fp32 scratch,
and a second launch adds them in a fixed order. Without float atomics the results repeat bit for bit.
W is the left operand of the tile product: the 64-row side of wgmma is filled by rows of W instead of the few rows of
the input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ._triton import cdiv, next_power_of_2, num_sms, row_stride, tl, triton

ROWS_OF_EACH_TILE = (1, 17, 33)
"""A number of rows for each tile of 16, 32 and 64 rows that `concat_fc`, `linear_fp8` and `head_topk` choose.

Launched with these, they have compiled what any other number of rows needs (`linear_fp8` and `concat_fc` up to 64).
"""


@dataclass(frozen=True)
class SplitKConfig:
    """Tile sizes of one launch; `splits` is the number of shares of each chunk's inner dimension."""

    block_m: int
    block_n: int
    block_k: int
    splits: int
    num_warps: int
    num_stages: int


def split_k_config(n: int, h: int, widths: Sequence[int], sms: int, fp32: bool = False) -> SplitKConfig:
    """Tiles for n rows, h output columns and chunks of the given widths, by fixed rules without autotuning.

    It aims at four programs per SM, each with at least four tiles to pipeline (two for narrow chunks).
    """
    block_m = min(max(next_power_of_2(n), 16), 64)
    block_n = 64
    block_k = 128 if min(widths) >= 1024 and not fp32 else 64
    programs = cdiv(n, block_m) * cdiv(h, block_n) * len(widths)
    most = max(1, min(widths) // (block_k * (4 if block_k == 128 else 2)))
    splits = min(cdiv(4 * sms, programs), most)
    return SplitKConfig(block_m, block_n, block_k, splits, num_warps=4, num_stages=4 if block_m < 64 else 3)


@triton.jit
def _rstd_kernel(
    x_ptrs, x_strides, widths,
    rstd_ptr,
    n_chunks: tl.constexpr, eps,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """rstd[m, c] = 1 / sqrt(mean(x_c[m]^2) + eps), the mean over chunk c or (WHOLE) over all chunks."""
    m = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    whole_sum = 0.0
    whole_width = 0
    for c in tl.static_range(n_chunks):
        acc = tl.zeros((BLOCK,), tl.float32)
        for k in range(0, widths[c], BLOCK):
            x = tl.load(x_ptrs[c] + m * x_strides[c] + k + offs, mask=k + offs < widths[c], other=0.0)
            x = x.to(tl.float32)
            acc += x * x
        square_sum = tl.sum(acc, 0)
        if WHOLE:
            whole_sum += square_sum
            whole_width += widths[c]
        else:
            tl.store(rstd_ptr + m * n_chunks + c, 1.0 / tl.sqrt(square_sum / widths[c] + eps))
    if WHOLE:
        for c in tl.static_range(n_chunks):
            tl.store(rstd_ptr + m * n_chunks + c, 1.0 / tl.sqrt(whole_sum / whole_width + eps))


# Long: a quarter is the signature, and the steps of one program share too many values to be functions of their own.
@triton.jit(do_not_specialize=["n"])  # or some numbers of rows would compile while requests wait
def _split_k_kernel(
    x_ptrs, x_strides, widths,
    weight_ptr, weight_stride,
    rstd_ptr, norm_ptrs,
    partial_ptr,
    n, h,
    n_chunks: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """partial[share, m, j] = sum over the share's columns k of W[j, start_c + k] * f_c(x_c[m, k])."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    share = tl.program_id(2)
    chunk = share // SPLITS
    m_ok = offs_m < n
    n_ok = offs_n < h

    x_ptr = x_ptrs[0]
    x_stride = x_strides[0]
    width = widths[0]
    start = 0
    for c in tl.static_range(1, n_chunks):
        if chunk == c:
            x_ptr = x_ptrs[c]
            x_stride = x_strides[c]
            width = widths[c]
        # Arithmetic instead of a branch, so that the compiler can still prove 16-byte alignment.
        start += widths[c - 1] * (chunk >= c).to(tl.int32)
    k_share = tl.cdiv(tl.cdiv(width, SPLITS), BLOCK_K) * BLOCK_K
    k_begin = (share % SPLITS) * k_share
    k_end = tl.minimum(k_begin + k_share, width)

    if HAS_NORM:
        norm_ptr = norm_ptrs[0]
        for c in tl.static_range(1, n_chunks):
            if chunk == c:
                norm_ptr = norm_ptrs[c]
        rstd = tl.load(rstd_ptr + offs_m * n_chunks + chunk, mask=m_ok, other=0.0)
    offs_k = tl.arange(0, BLOCK_K)
    x_rows = x_ptr + offs_m.to(tl.int64)[None, :] * x_stride
    w_rows = weight_ptr + offs_n.to(tl.int64)[:, None] * weight_stride + start

    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k in range(k_begin, k_end, BLOCK_K):
        cols = k + offs_k
        w_mask = n_ok[:, None]
        x_mask = m_ok[None, :]
        if not EVEN_K:
            w_mask = w_mask & (cols < width)[None, :]
            x_mask = x_mask & (cols < width)[:, None]
        w = tl.load(w_rows + cols[None, :], mask=w_mask, other=0.0)
        x = tl.load(x_rows + cols[:, None], mask=x_mask, other=0.0)
        if HAS_NORM:
            norm = tl.load(norm_ptr + cols, mask=cols < width, other=0.0)
            normed = (x.to(tl.float32) * rstd[None, :]).to(x.dtype)  # rounded before the weight, as vLLM does
            x = (normed.to(tl.float32) * norm.to(tl.float32)[:, None]).to(x.dtype)
        acc = tl.dot(w.to(x.dtype), x, acc, input_precision="ieee")
    out = partial_ptr + (share.to(tl.int64) * n + offs_m[None, :]) * h + offs_n[:, None]
    tl.store(out, acc, mask=n_ok[:, None] & m_ok[None, :])


@triton.jit
def _reduce_kernel(
    partial_ptr, share_stride,
    scale_ptr,
    out_ptr,
    h, n_shares,
    HAS_SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """out[m, j] = scale[j] * sum over shares of partial[share, m, j], added in the order of the shares."""
    m = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = cols < h
    acc = tl.zeros((BLOCK,), tl.float32)
    source = partial_ptr + m * h + cols
    for _ in range(n_shares):
        acc += tl.load(source, mask=ok, other=0.0)
        source += share_stride
    if HAS_SCALE:
        acc *= tl.load(scale_ptr + cols, mask=ok, other=0.0)
    tl.store(out_ptr + m * h + cols, acc.to(out_ptr.dtype.element_ty), mask=ok)


def skinny_gemm(
    states: Sequence[Tensor],
    weight: Tensor,
    *,
    norms: Sequence[Tensor] | None = None,
    whole: bool = False,
    eps: float = 1e-6,
    scale: Tensor | None = None,
) -> Tensor:
    """Launch the split-K product: states [n, h_c] each, weight [h, sum h_c] -> [n, h] in the states' dtype.

    norms: one RMSNorm weight [h_c] per chunk, with one statistic over all chunks if `whole`; scale [h] fp32 multiplies
    the output columns (fp8 weights). The public functions check the arguments; this asserts only what the kernels
    assume about memory.
    """
    x0, h = states[0], weight.shape[0]
    widths = tuple(x.shape[1] for x in states)
    n = x0.shape[0]
    assert all(x.stride(1) == 1 and x.dtype == x0.dtype for x in states), (
        "states: one dtype, columns adjacent"
    )
    assert weight.stride(1) == 1 and weight.shape[1] == sum(widths), (
        "weight: [h, sum of widths], columns adjacent"
    )
    assert weight.dtype == x0.dtype or scale is not None, (
        "weight of another dtype than the states needs a scale"
    )
    assert norms is None or all(w.is_contiguous() for w in norms), "norms: contiguous"
    assert scale is None or (scale.is_contiguous() and scale.dtype == torch.float32), (
        "scale: contiguous, fp32"
    )

    out = torch.empty(n, h, dtype=x0.dtype, device=x0.device)
    if n == 0:
        return out
    cfg = split_k_config(n, h, widths, num_sms(x0.device), fp32=x0.dtype == torch.float32)
    n_chunks, x_strides = len(states), tuple(row_stride(x) for x in states)
    shares = n_chunks * cfg.splits
    partial = torch.empty(shares, n, h, dtype=torch.float32, device=x0.device)
    rstd = None
    if norms is not None:
        rstd = torch.empty(n, n_chunks, dtype=torch.float32, device=x0.device)
        _rstd_kernel[(n,)](
            tuple(states), x_strides, widths, rstd, n_chunks, eps, WHOLE=whole, BLOCK=1024, num_warps=4,
        )  # fmt: skip
    _split_k_kernel[(cdiv(n, cfg.block_m), cdiv(h, cfg.block_n), shares)](
        tuple(states), x_strides, widths, weight, weight.stride(0), rstd, tuple(norms or states),
        partial, n, h, n_chunks, SPLITS=cfg.splits, HAS_NORM=norms is not None,
        EVEN_K=all(w % cfg.block_k == 0 for w in widths), BLOCK_M=cfg.block_m, BLOCK_N=cfg.block_n,
        BLOCK_K=cfg.block_k, num_warps=cfg.num_warps, num_stages=cfg.num_stages,
    )  # fmt: skip
    _reduce_kernel[(n, cdiv(h, 1024))](
        partial, partial.stride(0), scale, out, h, shares, HAS_SCALE=scale is not None, BLOCK=1024, num_warps=4,
    )  # fmt: skip
    return out
