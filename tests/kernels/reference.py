"""Shared by the kernel tests: formulas in fp64, tolerances per dtype, random inputs."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Relative to the largest output. The inputs are exact, so these allow for rounding of normed inputs and outputs. To
# make bf16 the interpreter truncates, while a GPU rounds.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


def randn(*shape: int, dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    """Standard normal numbers, drawn on the CPU so that all devices get the same."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def strided(x: Tensor) -> Tensor:
    """The same values in a view whose rows are neither adjacent nor 16-byte aligned."""
    wide = torch.full((2 * x.shape[0], x.shape[1] + 3), float("nan"), dtype=x.dtype, device=x.device)
    view = wide[::2, 1 : 1 + x.shape[1]]
    view.copy_(x)
    return view


def rms_norm64(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """w * x / sqrt(mean(x^2) + eps) in fp64."""
    x = x.double()
    return weight.double() * x / torch.sqrt((x**2).sum(-1, keepdim=True) / x.shape[1] + eps)


def assert_near(out: Tensor, expected: Tensor) -> None:
    """Every entry within the dtype's tolerance of the fp64 value; NaN and inf exactly where expected."""
    out, limit = out.double().cpu(), TOLERANCE[out.dtype]
    expected = expected.cpu()
    assert out.shape == expected.shape
    finite = expected.isfinite()
    torch.testing.assert_close(out[~finite], expected[~finite], equal_nan=True)
    if finite.any():
        error = (out - expected)[finite].abs().max().item()
        assert error <= limit * max(expected[finite].abs().max().item(), 1e-3), f"off by {error}"
