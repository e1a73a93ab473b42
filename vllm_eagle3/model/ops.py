"""Calls vLLM's kernels directly.

Outside of torch.compile, vLLM's modules run separate PyTorch operations. On a CPU these take longer than the matrix
products of a draft step.
"""

from typing import Any

import torch
from vllm import _custom_ops as ops


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm of x [n, h] by weight [h]; a new tensor."""
    x = x.contiguous()
    out = torch.empty_like(x)
    ops.rms_norm(out, x, weight, eps)
    return out


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(RMSNorm(x + residual), x + residual), each [n, h]; x is overwritten, residual is not."""
    total = residual.clone()
    ops.fused_add_rms_norm(x, total, weight, eps)
    return x, total


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up for x = [gate; up] of shape [n, 2 d]; returns [n, d]."""
    out = x.new_empty(len(x), x.shape[-1] // 2)
    torch.ops._C.silu_and_mul(out, x)
    return out


def linear(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """Apply one of vLLM's linear layers, quantised or not, to x [n, in]. Sharded layers are called as modules."""
    if layer.tp_size > 1:
        return layer(x)[0]
    return layer.quant_method.apply(layer, x, layer.bias)
