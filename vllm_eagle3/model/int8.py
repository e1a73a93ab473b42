"""Draft weights in int8 on a CPU, where a draft step costs what reading its weights costs.

Only drafts depend on it: verification reads the target's own weights, so outputs stay what they were.
"""

from typing import Any

import torch
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod


class Int8Linear:
    """x @ weight.T with int8 weights scaled by output row and activations scaled by input row.

    vLLM's `int8_scaled_mm_with_quant` (csrc/cpu/sgl-kernels) does the product, at any number of rows.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        """weight [out, in]; both multiples of 32."""
        scale = weight.float().abs().amax(dim=1).clamp_min(1e-12) / 127
        rounded = (weight.float() / scale[:, None]).round().to(torch.int8)
        self.weight = torch.ops._C.convert_weight_packed(rounded)
        self.scale = scale

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[n, in] -> [n, out], bf16."""
        return torch.ops._C.int8_scaled_mm_with_quant(
            x.contiguous(), self.weight, self.scale, None, x.dtype, True
        )


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
