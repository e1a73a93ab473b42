"""How Python calls the C++ kernels: with one struct of pointers and numbers per call."""

from __future__ import annotations

import ctypes
from typing import Any, Literal

import torch
from torch import Tensor

from .build import native

Backend = Literal["native", "torch"]
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

Field = tuple[str, Any]


def i64(names: str) -> list[Field]:
    return [(name, ctypes.c_int64) for name in names.split()]


def i32(names: str) -> list[Field]:
    return [(name, ctypes.c_int32) for name in names.split()]


def f32(names: str) -> list[Field]:
    return [(name, ctypes.c_float) for name in names.split()]


def struct(pointers: str, *numbers: list[Field]) -> type[ctypes.Structure]:
    """A struct of pointers, then numbers, in the order in which the C++ side declares them."""
    fields = [(name, ctypes.c_void_p) for name in pointers.split()] + sum(numbers, [])
    return type("Arguments", (ctypes.Structure,), {"_fields_": fields})


def pointer(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def int32(t: Tensor) -> Tensor:
    """t as int32 with a contiguous last dimension. Makes no copy of vLLM's own tables."""
    t = t if t.dtype == torch.int32 else t.int()
    return t if t.stride(-1) == 1 else t.contiguous()


def choose_backend(backend: Backend | None) -> Backend:
    """Backend of a call: the given one, or else the compiled kernels if they exist.

    Raises ValueError for an unknown name, or if "native" is given and the kernels cannot be compiled.
    """
    if backend not in ("native", "torch", None):
        raise ValueError(f'backend must be "native", "torch" or None, found {backend!r}')
    if backend == "native" and native() is None:
        raise ValueError('backend "native" needs a C++ compiler; install one, or pass backend="torch"')
    return backend or ("torch" if native() is None else "native")
