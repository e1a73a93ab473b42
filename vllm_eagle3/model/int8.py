"""Draft weights in int8 on a CPU, where a draft step takes as long as reading its weights.

The target keeps its own weights, so this changes which tokens are drafted and never the output.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

MAX_ERROR = 0.03
"""Largest relative error of the rounded weights.

An fc with an error of 0.065 lowered acceptance: target states with a few large channels had given it a few large
weights among many small ones. Layers and heads have errors of 0.01 to 0.02, which did not lower it measurably.
"""


class Int8Linear:
    """x @ weight.T with int8 weights scaled by output row and activations scaled by input row.

    vLLM's `int8_scaled_mm_with_quant` (csrc/cpu/sgl-kernels) does the product, at any number of rows.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        """weight [out, in]; both multiples of 32."""
        scale = weight.float().abs().amax(dim=1).clamp_min(1e-12) / 127
        rounded = (weight.float() / scale[:, None]).round().to(torch.int8)
        self.error = float(
            (rounded * scale[:, None] - weight).norm() / weight.float().norm().clamp_min(1e-12)
        )
        """Relative error of the rounded weights."""
        self.weight = torch.ops._C.convert_weight_packed(rounded)
        self.scale = scale

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[n, in] -> [n, out], bf16."""
        return torch.ops._C.int8_scaled_mm_with_quant(
            x.contiguous(), self.weight, self.scale, None, x.dtype, True
        )


def int8_layers(layers: Iterable[nn.Module]) -> dict[nn.Module, Int8Linear]:
    """Int8 forms of those of `layers` that support it and whose rounding error is at most MAX_ERROR."""
    rounded = {layer: Int8Linear(layer.weight.data) for layer in layers if supports(layer)}  # type: ignore[arg-type]
    return {layer: int8 for layer, int8 in rounded.items() if int8.error <= MAX_ERROR}


def supports(layer: Any) -> bool:
    """Whether an Int8Linear can replace this layer of vLLM: on a CPU, bf16, neither sharded nor quantised, no bias."""
    weight = getattr(layer, "weight", None)
    return (
        isinstance(weight, torch.Tensor)
        and weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16  # the kernel aborts on fp16
        and layer.tp_size == 1
        and type(layer.quant_method) in (UnquantizedLinearMethod, UnquantizedEmbeddingMethod)
        and getattr(layer, "bias", None) is None
        and weight.shape[0] % 32 == 0
        and weight.shape[1] % 32 == 0
        and hasattr(torch.ops._C, "int8_scaled_mm_with_quant")
    )
