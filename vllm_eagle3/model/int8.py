"""Draft weights in int8 on a CPU, where a draft step costs what reading its weights costs.

Only drafts depend on it: verification reads the target's own weights, so outputs stay what they were.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

MAX_ERROR = 0.03
"""Of the rounded weights, relative. An fc at 0.065 (few large weights, many small ones, as target states with large
channels make them) cost acceptance; layers and heads lie at 0.01 to 0.02 and cost nothing that was seen."""


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
    """Stand-ins for those of `layers` that have one, and lose little by it."""
    rounded = {layer: Int8Linear(layer.weight.data) for layer in layers if fits(layer)}  # type: ignore[arg-type]
    return {layer: int8 for layer, int8 in rounded.items() if int8.error <= MAX_ERROR}


def fits(layer: Any) -> bool:
    """Whether an Int8Linear can stand for this layer of vLLM's: on a CPU, bf16, whole, unquantised, without bias."""
    weight = getattr(layer, "weight", None)
    return (
        isinstance(weight, torch.Tensor)
        and weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16  # the kernel ends the process on fp16
        and layer.tp_size == 1
        and type(layer.quant_method) in (UnquantizedLinearMethod, UnquantizedEmbeddingMethod)
        and getattr(layer, "bias", None) is None
        and weight.shape[0] % 32 == 0
        and weight.shape[1] % 32 == 0
        and hasattr(torch.ops._C, "int8_scaled_mm_with_quant")
    )
