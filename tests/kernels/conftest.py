"""Kernel tests run the Triton kernels on CPU tensors, under Triton's interpreter.

Triton decides at import time whether it interprets, so these tests need a process of their own:

    TRITON_INTERPRET=1 pytest tests/kernels

Without the variable and without a CUDA device this directory is ignored; without the variable but with a CUDA
device the kernels run on the GPU.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from vllm_eagle3.runner import triton_interpreter

sys.path.insert(0, str(Path(__file__).parent))  # reference.py

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"


if INTERPRETED:
    triton_interpreter.repair_interpreter(importlib.import_module("triton.runtime.interpreter"))
elif DEVICE == "cpu":
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def device() -> str:
    """Device of the tensors: the CPU under the interpreter, else CUDA."""
    return DEVICE


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Fill every torch.empty with NaN (floats) or the largest value (integers), so that unwritten outputs are seen."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    was = torch.are_deterministic_algorithms_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(was)
    torch.utils.deterministic.fill_uninitialized_memory = before
