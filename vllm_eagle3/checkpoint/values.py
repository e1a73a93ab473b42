"""Checks that the values of a draft's tensors can be weights: finite floating-point numbers, or scaled ones."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from vllm_eagle3.checkpoint.errors import CheckpointError

PACKED_DTYPES = {torch.uint8, torch.int32}
FP8_DTYPES = {torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz}
SCALES = ("_scale", "_scale_inv")  # appended to the name of the weight
AT_A_TIME = 1 << 24  # elements checked together, so that the check needs little memory


def check_finite(name: str, tensor: Tensor, where: str) -> None:
    """Raise CheckpointError for NaN or infinity in a floating-point tensor of any shape."""
    for part in tensor.reshape(-1).split(AT_A_TIME):
        if not bool(part.float().isfinite().all()):
            raise CheckpointError(f"{where}: {name}: expected finite weights, found NaN or infinity")


def check_dtype(name: str, tensor: Tensor, where: str, quantised: bool) -> None:
    """Raise CheckpointError for integers and fp8 in a checkpoint without quantization_config."""
    if tensor.dtype in FP8_DTYPES and not quantised:
        raise CheckpointError(
            f"{where}: {name}: fp8 weights need scales, but config.json has no quantization_config"
        )
    integers = {*PACKED_DTYPES, torch.int8} if quantised else set()
    if not tensor.is_floating_point() and tensor.dtype not in integers:
        raise CheckpointError(f"{where}: {name}: expected floating-point weights, found {tensor.dtype}")


def check_scales(
    fp8: Mapping[str, str], have: Collection[str], file_of: Mapping[str, str], source: str
) -> None:
    """Raise CheckpointError if an fp8 weight has no scale. fp8: the weights' original names by canonical name."""
    for name, original in fp8.items():
        if not any(name + scale in have for scale in SCALES):
            where = file_of.get(original, source)
            raise CheckpointError(f"{where}: {original}: fp8 weights need scales, found no {name}{SCALES[0]}")
