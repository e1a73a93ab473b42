"""Kernel tests run the Triton kernels on CPU tensors, under Triton's interpreter.

Triton decides at import time whether it interprets, so these tests need a process of their own:

    TRITON_INTERPRET=1 pytest tests/kernels

Without the variable and without a CUDA device this directory is ignored; without the variable but with a CUDA
device the kernels run on the GPU.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # reference.py

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"


def _repair_interpreter() -> None:
    """Two faults of the interpreter of triton 3.9, absent from compiled kernels.

    1. A comparison's result keeps its operands' dtype, so a scalar mask widens when splat.
    2. tl.dot multiplies the bit patterns of bf16 operands (numpy has no bf16).
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    binary_op = InterpreterBuilder.binary_op

    def fixed_binary_op(self, lhs, rhs, op):
        handle = binary_op(self, lhs, rhs, op)
        if handle.data.dtype == np.bool_:
            handle.dtype = tl.int1
        return handle

    def fixed_create_dot(self, a, b, d, *args):
        def widen(t):
            return self.cast_impl(t, tl.float32) if t.dtype.scalar == tl.bfloat16 else t

        a, b = widen(a), widen(b)
        return TensorHandle(np.matmul(a.data, b.data, dtype=d.data.dtype) + d.data, d.dtype.scalar)

    InterpreterBuilder.binary_op, InterpreterBuilder.create_dot = fixed_binary_op, fixed_create_dot


if INTERPRETED:
    _repair_interpreter()
elif DEVICE == "cpu":
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def device() -> str:
    """Device of the tensors: the CPU under the interpreter, else CUDA."""
    return DEVICE


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Fill every torch.empty with NaN (floats) or the largest value (integers): unwritten outputs show."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    was = torch.are_deterministic_algorithms_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(was)
    torch.utils.deterministic.fill_uninitialized_memory = before
