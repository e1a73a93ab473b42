"""The only file that imports Triton. Chooses backends, and replaces Triton's names if it is not installed."""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

Backend = Literal["triton", "torch"]

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False

    class _Absent:
        """Replaces `triton` and `tl`, so that kernel files can be imported without Triton. No kernel runs with it."""

        constexpr = Any

        @staticmethod
        def jit(fn: Any = None, **options: Any) -> Any:
            return fn if fn is not None else lambda kernel: kernel

    triton = tl = _Absent()  # type: ignore[assignment]

# SMs of an H100 or H200, used where no CUDA device can be asked (interpreter, offline compilation).
_DEFAULT_SMS = 132


def choose_backend(backend: Backend | None, *tensors: Tensor | None) -> Backend:
    """Backend of a call: the given one, or else "triton" for CUDA tensors and "torch" for others.

    Raises ValueError for an unknown name, for tensors on different devices, or if Triton is needed and not installed.
    """
    device = None
    for t in tensors:
        if t is not None:
            if device is not None and t.device != device:
                raise ValueError(f"all tensors must be on one device, found {device} and {t.device}")
            device = t.device
    if backend is None:
        backend = "triton" if device is not None and device.type == "cuda" else "torch"
    if backend not in ("triton", "torch"):
        raise ValueError(f'backend must be "triton", "torch" or None, found {backend!r}')
    if backend == "triton" and not HAS_TRITON:
        raise ValueError('backend "triton" needs the package triton; install it, or pass backend="torch"')
    return backend


@cache
def num_sms(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device."""
    if device.type != "cuda":
        return _DEFAULT_SMS
    return torch.cuda.get_device_properties(device).multi_processor_count


def row_stride(x: Tensor) -> int:
    """Row stride of a 2-D tensor. For a single row it is the row's length, because torch may report any value."""
    return x.stride(0) if x.shape[0] > 1 else x.shape[1]


def cdiv(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Smallest power of two >= n (1 for n <= 1)."""
    return 1 << max(n - 1, 0).bit_length()
