"""Draft weights in fp8 on a GPU, where the time of a draft step of few rows is the time of reading them.

Only drafts depend on it: verification reads the target's own weights. Steps of more rows read the weights as they are,
which therefore stay in memory.
"""

import logging
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.platforms import current_platform

from vllm_eagle3.kernels import MOST_ROWS, linear_fp8, quant_fp8

logger = logging.getLogger("vllm.eagle3")


@torch.library.custom_op("eagle3::few_rows_in_fp8", mutates_args=())
def few_rows_in_fp8(
    x: torch.Tensor, weight: torch.Tensor, w8: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """x @ weight.T [n, out], for at most MOST_ROWS rows by w8 and scale. An operator, since the draft is compiled."""
    return linear_fp8(x, w8, scale) if len(x) <= MOST_ROWS else F.linear(x, weight)


@few_rows_in_fp8.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, w8: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return x.new_empty(len(x), len(weight))


class Fp8Method:
    """Takes the place of the `quant_method` of one of vLLM's linear layers, once its weights are loaded."""

    def __init__(self, layer: nn.Module) -> None:
        self.w8, self.scale = quant_fp8(layer.weight.data)  # type: ignore[arg-type]

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        out = few_rows_in_fp8(x, layer.weight, self.w8, self.scale)
        return out if bias is None else out + bias


def fp8_works(device: torch.device) -> bool:
    """Whether this device can read fp8 weights; says so at warning level if it cannot."""
    if device.type == "cuda" and current_platform.has_device_capability(89):
        return True
    logger.warning(
        "vllm-eagle3: fp8_draft is ignored: it needs a GPU of compute capability 8.9 or more, found %s",
        device,
    )
    return False


def read_in_fp8(layers: Iterable[nn.Module]) -> None:
    """Have these linear layers read rounded weights. Those that are quantised already stay as they are."""
    for layer in layers:
        if type(layer.quant_method) is UnquantizedLinearMethod:
            layer.quant_method = Fp8Method(layer)  # type: ignore[assignment]
