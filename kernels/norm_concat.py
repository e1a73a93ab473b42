"""Input of the draft layer's QKV product: [RMSNorm(embedding) ; RMSNorm(g)] written side by side.

Paper: EAGLE-3 (arXiv 2503.01840), section 3.1. vLLM: embedding, two RMSNorms and a `torch.cat`
(`model_executor/models/llama_eagle3.py`, `LlamaDecoderLayer.forward`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._triton import Backend, choose_backend, next_power_of_2, row_stride, tl, triton

MAX_HIDDEN = 16384  # a row is held in registers


class NormConcat(NamedTuple):
    """x [n, 2h]: input of QKV; residual [n, h]: what the layer adds to attention's output, or None if not
    asked for."""

    x: Tensor
    residual: Tensor | None


@triton.jit
def _norm_concat_kernel(embed_ptr, embed_stride, num_embeds, ids_ptr, g_ptr, g_stride, g_rows_ptr,
                        w_in_ptr, w_hidden_ptr, x_ptr, residual_ptr, h, eps, HAS_IDS: tl.constexpr,
                        HAS_G_ROWS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, NORMED_RESIDUAL: tl.constexpr,
                        BLOCK: tl.constexpr):  # fmt: skip
    """Program (row, side): side 0 writes norm(e) to x[row, :h], side 1 norm(g) to x[row, h:] and the
    residual."""
    row = tl.program_id(0).to(tl.int64)
    side = tl.program_id(1)
    cols = tl.arange(0, BLOCK)
    ok = cols < h
    if side == 0:
        source = row
        if HAS_IDS:
            source = tl.load(ids_ptr + row).to(tl.int64)
            source = tl.minimum(tl.maximum(source, 0), num_embeds - 1)
        raw = tl.load(embed_ptr + source * embed_stride + cols, mask=ok, other=0.0)
        weight = tl.load(w_in_ptr + cols, mask=ok, other=0.0)
    else:
        source = row
        if HAS_G_ROWS:
            source = tl.load(g_rows_ptr + row).to(tl.int64)
        raw = tl.load(g_ptr + source * g_stride + cols, mask=ok, other=0.0)
        weight = tl.load(w_hidden_ptr + cols, mask=ok, other=0.0)
    wide = raw.to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(wide * wide, 0) / h + eps)
    normed = (wide * rstd).to(raw.dtype)  # rounded before the weight, as vLLM does
    normed = (normed.to(tl.float32) * weight.to(tl.float32)).to(raw.dtype)
    tl.store(x_ptr + (row * 2 + side) * h + cols, normed, mask=ok)
    if HAS_RESIDUAL:  # noqa: SIM102 (a compile-time branch around a run-time one)
        if side == 1:
            residual = raw
            if NORMED_RESIDUAL:
                residual = normed
            tl.store(residual_ptr + row * h + cols, residual, mask=ok)


def norm_concat(
    embeddings: Tensor,
    g: Tensor,
    w_in: Tensor,
    w_hidden: Tensor,
    *,
    ids: Tensor | None = None,
    g_rows: Tensor | None = None,
    eps: float = 1e-6,
    norm_before_residual: bool | None = None,
    backend: Backend | None = None,
) -> NormConcat:
    """x = [w_in * norm(e) ; w_hidden * norm(g[g_rows])], shape [n, 2h], statistics in fp32.

    embeddings: e itself [n, h], or with ids (int [n]) the table [vocab, h] to look up; ids are clamped into
    the table, so that those of padding rows never read wild memory. g [n_g, h]; g_rows int [n] picks each
    row's g (a tree node's parent state), in 0..n_g-1, unchecked on CUDA. w_in, w_hidden [h]:
    `input_layernorm`, `hidden_norm`. norm_before_residual: None for no residual, else the residual is the
    picked g after (True) or before (False) its norm. All of one dtype.

    Raises ValueError on shapes or dtypes that do not fit together.
    """
    _check(embeddings, g, w_in, w_hidden, ids, g_rows)
    if choose_backend(backend, embeddings, g, w_in, w_hidden, ids, g_rows) == "torch":
        return norm_concat_torch(
            embeddings,
            g,
            w_in,
            w_hidden,
            ids=ids,
            g_rows=g_rows,
            eps=eps,
            norm_before_residual=norm_before_residual,
        )
    n, h = _num_rows(embeddings, ids), g.shape[1]
    assert h <= MAX_HIDDEN, f"hidden size {h} above {MAX_HIDDEN}"
    assert embeddings.stride(1) == 1 and g.stride(1) == 1 and w_in.stride(0) == 1 and w_hidden.stride(0) == 1
    assert (ids is None or ids.is_contiguous()) and (g_rows is None or g_rows.is_contiguous())
    x = torch.empty(n, 2 * h, dtype=g.dtype, device=g.device)
    residual = None if norm_before_residual is None else torch.empty(n, h, dtype=g.dtype, device=g.device)
    if n > 0:
        block = next_power_of_2(h)
        _norm_concat_kernel[(n, 2)](
            embeddings, row_stride(embeddings), embeddings.shape[0], ids, g, row_stride(g), g_rows,
            w_in, w_hidden, x, residual, h, eps, HAS_IDS=ids is not None, HAS_G_ROWS=g_rows is not None,
            HAS_RESIDUAL=residual is not None, NORMED_RESIDUAL=bool(norm_before_residual), BLOCK=block,
            num_warps=min(max(block // 512, 1), 8),
        )  # fmt: skip
    return NormConcat(x, residual)


def norm_concat_torch(
    embeddings: Tensor,
    g: Tensor,
    w_in: Tensor,
    w_hidden: Tensor,
    *,
    ids: Tensor | None = None,
    g_rows: Tensor | None = None,
    eps: float = 1e-6,
    norm_before_residual: bool | None = None,
) -> NormConcat:
    """Plain-torch twin of `norm_concat`, and its CPU path."""
    if ids is not None:
        embeddings = F.embedding(ids.clamp(0, embeddings.shape[0] - 1), embeddings)
    if g_rows is not None:
        g = g[g_rows]
    normed = F.rms_norm(g, w_hidden.shape, w_hidden, eps)
    x = torch.cat([F.rms_norm(embeddings, w_in.shape, w_in, eps), normed], dim=-1)
    return NormConcat(x, None if norm_before_residual is None else normed if norm_before_residual else g)


def _num_rows(embeddings: Tensor, ids: Tensor | None) -> int:
    return embeddings.shape[0] if ids is None else ids.shape[0]


def _check(
    embeddings: Tensor, g: Tensor, w_in: Tensor, w_hidden: Tensor, ids: Tensor | None, g_rows: Tensor | None
) -> None:
    if embeddings.dim() != 2 or g.dim() != 2 or embeddings.shape[1] != g.shape[1]:
        found = f"{tuple(embeddings.shape)} and {tuple(g.shape)}"
        raise ValueError(f"embeddings and g must be 2-D and equally wide, found {found}")
    for name, weight in (("w_in", w_in), ("w_hidden", w_hidden)):
        if weight.shape != g.shape[1:]:
            raise ValueError(f"{name} must be [{g.shape[1]}], found {tuple(weight.shape)}")
    if not embeddings.dtype == g.dtype == w_in.dtype == w_hidden.dtype:
        found = f"{embeddings.dtype}, {g.dtype}, {w_in.dtype}, {w_hidden.dtype}"
        raise ValueError(f"embeddings, g, w_in and w_hidden must share a dtype, found {found}")
    for name, index in (("ids", ids), ("g_rows", g_rows)):
        if index is not None and (index.dim() != 1 or index.dtype not in (torch.int32, torch.int64)):
            raise ValueError(
                f"{name} must be a 1-D int32 or int64 tensor, found {index.dtype} {tuple(index.shape)}"
            )
    n, picked = _num_rows(embeddings, ids), g.shape[0] if g_rows is None else g_rows.shape[0]
    if n != picked:
        raise ValueError(f"{n} embedding rows do not match {picked} rows of g")
