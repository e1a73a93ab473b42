"""FP8 weights for the draft's layer and head, made from bf16 at load time: a step reads half as many bytes.

    w8[j] = round_e4m3(W[j] / scale[j]),  scale[j] = max|W[j]| / 448;   y = scale * (x @ w8^T)

The draft's weights never change the output, because the target verifies every token. They only change how many drafts
are accepted.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._triton import Backend, choose_backend
from .skinny_gemm import skinny_gemm

MOST_ROWS = 64
"""Above, reading weights is not what a product takes its time for, and it is left to the unrounded weights."""
FP8_MAX = torch.finfo(torch.float8_e4m3fn).max  # 448


def quant_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(w8 float8_e4m3fn [out, in], scale fp32 [out]): one scale per output row. A row of zeros gets scale 1.

    Raises ValueError for a weight that is not 2-D or not finite, because one NaN or infinity would ruin its whole row.
    """
    if weight.dim() != 2:
        raise ValueError(f"weight must be [out, in], found {tuple(weight.shape)}")
    wide = weight.float()
    if not wide.isfinite().all():
        raise ValueError("weight has NaN or infinite entries: cannot be quantized to fp8")
    top = wide.abs().amax(dim=1)
    scale = torch.where(top > 0, top / FP8_MAX, 1.0)
    return (wide / scale[:, None]).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scale


def linear_fp8(x: Tensor, w8: Tensor, scale: Tensor, *, backend: Backend | None = None) -> Tensor:
    """y [n, out] = scale * (x @ w8^T) in x's dtype (fp16, bf16 or fp32), sums in fp32 on CUDA.

    x [n, in], w8 float8_e4m3fn [out, in], scale fp32 [out]. Raises ValueError on shapes or dtypes that do not
    fit.
    """
    if x.dim() != 2 or w8.dim() != 2 or x.shape[1] != w8.shape[1]:
        raise ValueError(f"x must be [n, in] and w8 [out, in], found {tuple(x.shape)} and {tuple(w8.shape)}")
    if w8.dtype != torch.float8_e4m3fn or scale.dtype != torch.float32 or scale.shape != w8.shape[:1]:
        found = f"{w8.dtype}, {scale.dtype} {tuple(scale.shape)}"
        raise ValueError(f"w8 must be float8_e4m3fn and scale fp32 [{w8.shape[0]}], found {found}")
    if choose_backend(backend, x, w8, scale) == "torch":
        return linear_fp8_torch(x, w8, scale)
    return skinny_gemm([x], w8, scale=scale)


def linear_fp8_torch(x: Tensor, w8: Tensor, scale: Tensor) -> Tensor:
    """Plain-torch twin of `linear_fp8`. It stores the weight in a wider dtype, so it is a reference and not fast."""
    return (F.linear(x, w8.to(x.dtype)) * scale).to(x.dtype)
