"""The head with its top-k over the draft's vocabulary. A program reduces its logits at once and never stores them.

    logits = logit_scale * x @ W^T;  top-k (ties: lowest id), log-sum-exp;  target id = id + d2t[id]

vLLM computes the head, scatters its logits into a `-inf` tensor of the target's vocabulary, then takes the argmax
(`model_executor/models/llama_eagle3.py`, `compute_logits`). The draft's vocabulary gives the same tokens directly.

A logit and its id are packed into one int64 key, ordered by logit and then by lower id. So one integer maximum finds
both, all keys are different, and the j-th best is the largest key below the (j-1)-th. NaN counts as the largest
logit, as in torch.topk.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._triton import Backend, cdiv, choose_backend, next_power_of_2, row_stride, tl, triton

MAX_K = 64


class HeadTopK(NamedTuple):
    """Per row: target-vocabulary ids [n, k] int64, draft ids [n, k] int64, logits [n, k] fp32, lse [n] fp32.

    Logits fall from left to right; exp(logits - lse[:, None]) are the draft's probabilities.
    """

    ids: Tensor
    draft_ids: Tensor
    logits: Tensor
    lse: Tensor


@triton.jit
def _pack_keys(logits, ids):
    """int64 keys from fp32 logits and int32 ids."""
    bits = (logits + 0.0).to(tl.int32, bitcast=True)  # + 0.0 makes one zero of -0 and +0
    bits = tl.where(logits != logits, 0x7FC00000, bits)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - ids).to(tl.int64)


@triton.jit
def _finite_or_zero(m):
    """0 for an infinity, else m: the value to subtract inside exp, so that log-sum-exp of infinities is right."""
    return tl.where(tl.abs(m) == float("inf"), 0.0, m)


@triton.jit(do_not_specialize=["n"])  # or some numbers of rows would compile while requests wait
def _block_topk_kernel(
    x_ptr, x_stride,
    weight_ptr, weight_stride,
    scale_ptr,
    keys_ptr, lse_ptr,
    n, vocab, h, vocab_start, logit_scale,
    K: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """keys[m, block, :K] and lse[m, block] of BLOCK_V vocabulary rows; W is read once per BLOCK_M rows."""
    block = tl.program_id(1)
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_v = block * BLOCK_V + tl.arange(0, BLOCK_V)
    offs_k = tl.arange(0, BLOCK_K)
    m_ok = offs_m < n
    v_ok = offs_v < vocab
    x_rows = x_ptr + offs_m.to(tl.int64)[None, :] * x_stride
    w_rows = weight_ptr + offs_v.to(tl.int64)[:, None] * weight_stride

    acc = tl.zeros((BLOCK_V, BLOCK_M), tl.float32)
    for k in range(0, h, BLOCK_K):
        cols = k + offs_k
        w_mask = v_ok[:, None]
        x_mask = m_ok[None, :]
        if not EVEN_K:
            w_mask = w_mask & (cols < h)[None, :]
            x_mask = x_mask & (cols < h)[:, None]
        w = tl.load(w_rows + cols[None, :], mask=w_mask, other=0.0)
        x = tl.load(x_rows + cols[:, None], mask=x_mask, other=0.0)
        acc = tl.dot(w.to(x.dtype), x, acc, input_precision="ieee")
    if HAS_SCALE:
        acc *= tl.load(scale_ptr + offs_v, mask=v_ok, other=0.0)[:, None]
    # Rows beyond the vocabulary get -inf and the highest ids, so that all real rows come before them.
    logits = tl.where(v_ok[:, None], acc * logit_scale, float("-inf"))

    offset = offs_m.to(tl.int64) * tl.num_programs(1) + block
    m = _finite_or_zero(tl.max(logits, 0))
    tl.store(lse_ptr + offset, m + tl.log(tl.sum(tl.exp(logits - m[None, :]), 0)), mask=m_ok)

    lowest = tl.full((BLOCK_V, BLOCK_M), -0x8000000000000000, tl.int64)
    keys = _pack_keys(logits, tl.broadcast_to((vocab_start + offs_v)[:, None], (BLOCK_V, BLOCK_M)))
    for j in range(K):
        best = tl.max(keys, 0)
        tl.store(keys_ptr + offset * K + j, best, mask=m_ok)
        keys = tl.where(keys == best[None, :], lowest, keys)


@triton.jit
def _merge_kernel(keys_ptr, lse_parts_ptr, d2t_ptr, d2t_size, ids_ptr, draft_ids_ptr, logits_ptr, lse_ptr,
                  num_keys, num_parts, K: tl.constexpr, HAS_D2T: tl.constexpr,
                  BLOCK: tl.constexpr):  # fmt: skip
    """One row: the K largest of its keys, unpacked and mapped; log-sum-exp over its parts."""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    lowest = tl.full((BLOCK,), -0x8000000000000000, tl.int64)
    # Keys are >= lowest + 2^31, so the first round lets every key pass and skips the fill value.
    below = tl.full((), 0x7FFFFFFFFFFFFFFF, tl.int64)
    for j in range(K):
        best = lowest
        for start in range(0, num_keys, BLOCK):
            keys = tl.load(keys_ptr + row * num_keys + start + offs, mask=start + offs < num_keys, other=0)
            keys = tl.where((start + offs < num_keys) & (keys < below), keys, lowest)
            best = tl.maximum(best, keys)
        below = tl.max(best, 0)
        ordered = (below >> 32).to(tl.int32)
        logit = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        draft_id = 0x7FFFFFFF - (below & 0x7FFFFFFF)
        target_id = draft_id
        if HAS_D2T:
            target_id += tl.load(d2t_ptr + draft_id, mask=draft_id < d2t_size, other=0)
        tl.store(logits_ptr + row * K + j, logit)
        tl.store(draft_ids_ptr + row * K + j, draft_id)
        tl.store(ids_ptr + row * K + j, target_id)

    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(0, num_parts, BLOCK):
        ok = start + offs < num_parts
        part = tl.load(lse_parts_ptr + row * num_parts + start + offs, mask=ok, other=float("-inf"))
        top = tl.maximum(top, part)
    m = _finite_or_zero(tl.max(top, 0))
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, num_parts, BLOCK):
        ok = start + offs < num_parts
        part = tl.load(lse_parts_ptr + row * num_parts + start + offs, mask=ok, other=float("-inf"))
        total += tl.exp(part - m)
    tl.store(lse_ptr + row, m + tl.log(tl.sum(total, 0)))


def head_topk(
    x: Tensor,
    weight: Tensor,
    k: int,
    *,
    d2t: Tensor | None = None,
    logit_scale: float = 1.0,
    weight_scale: Tensor | None = None,
    backend: Backend | None = None,
) -> HeadTopK:
    """Top-k of logit_scale * x @ weight^T in the draft's vocabulary, mapped to target ids.

    x [n, h]; weight [V, h] of x's dtype, or float8_e4m3fn with weight_scale fp32 [V] as from `quant_fp8`; d2t int64 [V]
    offsets (None: both vocabularies are the same); 1 <= k <= min(V, 64). Ties go to the lowest draft id. On CUDA the
    logits are fp32 sums; on a CPU the matrix product rounds them to x's dtype.
    Raises ValueError on arguments that do not fit together.
    """
    if d2t is not None and (tuple(d2t.shape) != (weight.shape[0],) or d2t.dtype != torch.int64):
        raise ValueError(f"d2t must be int64 [{weight.shape[0]}], found {d2t.dtype} {tuple(d2t.shape)}")
    if not 1 <= k <= weight.shape[0]:
        raise ValueError(f"k must be in 1..{weight.shape[0]} (the draft vocabulary), found {k}")
    return block_topk(x, weight, k, 0, logit_scale, d2t, weight_scale, backend)


def pack_keys(logits: Tensor, ids: Tensor) -> Tensor:
    """int64 keys ordered by (logit, then lower id), from fp32 logits and integer ids; twin of `_pack_keys`."""
    bits = torch.where(logits.isnan(), 0x7FC00000, (logits + 0.0).view(torch.int32))
    bits ^= (bits >> 31).bitwise_and_(0x7FFFFFFF)
    keys = bits.to(torch.int64).bitwise_left_shift_(32)
    return keys.bitwise_or_(0x7FFFFFFF - ids.to(torch.int64))


def unpack_keys(keys: Tensor) -> tuple[Tensor, Tensor]:
    """(logits fp32, ids int64) of packed keys."""
    ordered = (keys >> 32).to(torch.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32), 0x7FFFFFFF - (keys & 0x7FFFFFFF)


def block_topk(
    x: Tensor,
    weight: Tensor,
    k: int,
    vocab_start: int,
    logit_scale: float,
    d2t: Tensor | None,
    weight_scale: Tensor | None,
    backend: Backend | None,
) -> HeadTopK:
    """Top-k over rows of the head that start at draft id vocab_start."""
    _check(x, weight, weight_scale, k)
    n, (vocab, h) = x.shape[0], weight.shape
    assert vocab_start + vocab < 2**31, "ids fill 31 bits of a key"
    if choose_backend(backend, x, weight, d2t) == "torch":
        if weight_scale is not None:
            weight = (weight.float() * weight_scale[:, None]).to(x.dtype)
        return _head_torch(x, weight, k, vocab_start, logit_scale, d2t)
    assert x.stride(1) == 1 and weight.stride(1) == 1, "columns of x and weight: adjacent"
    block_m = min(max(next_power_of_2(n), 16), 64)
    block_v = 128 if block_m == 16 else 64
    block_k = 128 if h >= 1024 and x.dtype != torch.float32 else 64
    blocks = cdiv(vocab, block_v)
    keys = torch.empty(n, blocks * k, dtype=torch.int64, device=x.device)
    lse = torch.empty(n, blocks, dtype=torch.float32, device=x.device)
    if lse.numel() > 0:
        _block_topk_kernel[(cdiv(n, block_m), blocks)](
            x, row_stride(x), weight, weight.stride(0), weight_scale, keys, lse, n, vocab, h, vocab_start, logit_scale,
            K=k, HAS_SCALE=weight_scale is not None, EVEN_K=h % block_k == 0, BLOCK_M=block_m, BLOCK_V=block_v,
            BLOCK_K=block_k, num_warps=4, num_stages=3,
        )  # fmt: skip
    return merge_keys(keys, lse, k, d2t)


def _head_torch(
    x: Tensor,
    weight: Tensor,
    k: int,
    vocab_start: int,
    logit_scale: float,
    d2t: Tensor | None,
) -> HeadTopK:
    """Plain-torch twin of the head, and its CPU path. Computes logits of the draft's vocabulary only."""
    logits = F.linear(x, weight).float()
    if logit_scale != 1.0:
        logits *= logit_scale
    lse = logits.logsumexp(dim=-1)
    if k == 1:  # argmax returns the first of equal maxima
        draft_ids = logits.argmax(dim=-1, keepdim=True)
        return mapped(
            logits.gather(1, draft_ids), draft_ids + vocab_start if vocab_start else draft_ids, lse, d2t
        )
    ids = torch.arange(vocab_start, vocab_start + weight.shape[0], device=x.device)
    return mapped(*unpack_keys(pack_keys(logits, ids).topk(k, dim=-1).values), lse, d2t)


def mapped(logits: Tensor, draft_ids: Tensor, lse: Tensor, d2t: Tensor | None) -> HeadTopK:
    """The result with target ids."""
    return HeadTopK(draft_ids if d2t is None else draft_ids + d2t[draft_ids], draft_ids, logits, lse)


def merge_keys(keys: Tensor, lse: Tensor, k: int, d2t: Tensor | None) -> HeadTopK:
    """Launch the merge of candidate keys [n, >= k] and log-sum-exp parts [n, p]."""
    n = keys.shape[0]
    ids, draft_ids = torch.empty(2, n, k, dtype=torch.int64, device=keys.device)
    logits = torch.empty(n, k, dtype=torch.float32, device=keys.device)
    out_lse = torch.empty(n, dtype=torch.float32, device=keys.device)
    if n > 0:
        block = min(max(next_power_of_2(keys.shape[1]), 128), 4096)
        _merge_kernel[(n,)](
            keys.contiguous(), lse.contiguous(), d2t, 0 if d2t is None else d2t.shape[0],
            ids, draft_ids, logits, out_lse, keys.shape[1], lse.shape[1], K=k, HAS_D2T=d2t is not None,
            BLOCK=block, num_warps=4 if block < 4096 else 8,
        )  # fmt: skip
    return HeadTopK(ids, draft_ids, logits, out_lse)


def _check(x: Tensor, weight: Tensor, weight_scale: Tensor | None, k: int) -> None:
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"x must be [n, h] and weight [V, h], found {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if k > MAX_K:
        raise ValueError(f"k must be at most {MAX_K}, found {k}")
    if weight_scale is not None:
        if weight.dtype != torch.float8_e4m3fn or weight_scale.shape != weight.shape[:1]:
            found = f"{weight.dtype}, {tuple(weight_scale.shape)}"
            raise ValueError(
                f"a weight with a scale is float8_e4m3fn with [{len(weight)}] scales, found {found}"
            )
    elif weight.dtype != x.dtype:
        raise ValueError(f"x and weight must share a dtype, found {x.dtype} and {weight.dtype}")
