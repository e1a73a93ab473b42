"""g = W_fc [l; m; h]: the draft's input from the target's aux states, without a concatenated tensor.

Paper: EAGLE-3 (arXiv 2503.01840), section 3.1. vLLM: `torch.cat` of the states, then `fc`
(`model_executor/models/llama_eagle3.py`, `combine_hidden_states`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ._triton import Backend, choose_backend
from .skinny_gemm import skinny_gemm

# CUDA tensors of at most this many rows use the split-K kernel. With more rows the product is bound by arithmetic, and
# cuBLAS on the concatenated states should be faster. This limit has not been measured on a GPU yet;
# benchmarks/bench_concat_fc.py times both.
SPLIT_K_MAX_ROWS = 64


def concat_fc(
    states: Sequence[Tensor],
    weight: Tensor,
    *,
    norm_weights: Sequence[Tensor] | None = None,
    input_norm: Tensor | None = None,
    eps: float = 1e-6,
    backend: Backend | None = None,
) -> Tensor:
    """Fuse the aux states: out[m] = weight @ concat_c(f_c(states[c][m])), shape [n, h].

    states: tensors [n, h_c] of one dtype, rows of any stride; weight [h, sum h_c], same dtype. norm_weights: RMSNorm
    weights [h_c], one per state (checkpoints with `fc_norm`); or input_norm [sum h_c], one RMSNorm over the
    concatenation (`norm_before_fc`). backend: None chooses by device and number of rows, "triton" is the split-K
    kernel, "torch" the plain twin.

    Raises ValueError on shapes or dtypes that do not fit together.
    """
    _check(states, weight, norm_weights, input_norm)
    chosen = choose_backend(backend, *states, weight, input_norm, *(norm_weights or ()))
    if chosen == "torch" or (backend is None and len(states[0]) > SPLIT_K_MAX_ROWS):
        return concat_fc_torch(states, weight, norm_weights=norm_weights, input_norm=input_norm, eps=eps)
    norms = norm_weights
    if input_norm is not None:
        norms = input_norm.split([x.shape[1] for x in states])
    return skinny_gemm(states, weight, norms=norms, whole=input_norm is not None, eps=eps)


def concat_fc_torch(
    states: Sequence[Tensor],
    weight: Tensor,
    *,
    norm_weights: Sequence[Tensor] | None = None,
    input_norm: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Plain-torch twin of `concat_fc`, and its CPU path.

    It is one product over the concatenation. On a CPU, three partial products (addmm) took 9 to 44 % longer in bf16,
    and between 11 % less and 5 % more in fp32 (medians, benchmarks/results/concat_fc_cpu_*.json).
    """
    if norm_weights is not None:
        states = [F.rms_norm(x, w.shape, w, eps) for x, w in zip(states, norm_weights, strict=True)]
    x = torch.cat(list(states), dim=-1)
    if input_norm is not None:
        x = F.rms_norm(x, input_norm.shape, input_norm, eps)
    return F.linear(x, weight)


def _check(
    states: Sequence[Tensor],
    weight: Tensor,
    norm_weights: Sequence[Tensor] | None,
    input_norm: Tensor | None,
) -> None:
    widths = []
    for x in states:
        if x.dim() != 2 or x.shape[0] != states[0].shape[0]:
            shapes = [tuple(x.shape) for x in states]
            raise ValueError(f"states must be 2-D with equal numbers of rows, found shapes {shapes}")
        if x.dtype != weight.dtype:
            raise ValueError(f"states and weight must share a dtype, found {x.dtype} and {weight.dtype}")
        if x.stride(1) != 1:
            raise ValueError(f"columns of states must be adjacent in memory, found strides {x.stride()}")
        widths.append(x.shape[1])
    if weight.dim() != 2 or weight.shape[1] != sum(widths):
        raise ValueError(
            f"weight must be [h, {sum(widths)}] for widths {widths}, found {tuple(weight.shape)}"
        )
    if weight.stride(1) != 1:
        raise ValueError(f"columns of weight must be adjacent in memory, found strides {weight.stride()}")
    if norm_weights is not None and input_norm is not None:
        raise ValueError("give norm_weights (one a chunk) or input_norm (over all chunks), not both")
    if norm_weights is not None and [w.numel() for w in norm_weights] != widths:
        raise ValueError(f"norm_weights must have sizes {widths}, found {[w.numel() for w in norm_weights]}")
    if input_norm is not None and tuple(input_norm.shape) != (sum(widths),):
        raise ValueError(f"input_norm must be [{sum(widths)}], found {tuple(input_norm.shape)}")
