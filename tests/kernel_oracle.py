"""Runs a function of vLLM twice, with its Triton kernels interpreted and with their CPU forms.

All values that they write are compared: integers exactly, floats up to rounding. Memory that was not written has the
same poison values in both runs.
"""

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from vllm.triton_utils.dispatcher import KernelOverride

RTOL, ATOL = 2e-5, 2e-6


@cache
def forms() -> dict[str, Any]:
    from vllm_eagle3.runner.v2.cpu.register import cpu_forms

    return cpu_forms()


def agree(function: Callable[..., Any], *args: Any, on: tuple[Any, ...] = (), **kwargs: Any) -> Any:
    """Call `function` both ways on copies of its arguments, compare, and return the result of the CPU forms.

    `on`: further modules whose kernels `function` launches. In the copies, a tensor and its views share one storage as
    before.
    """
    modules = {sys.modules[function.__module__], *on}
    results = []
    for native in (False, True):
        own_args, own_kwargs = copy.deepcopy((args, kwargs))
        with poisoned(), replaced(modules) if native else _nothing():
            result = function(*own_args, **own_kwargs)
        results.append((result, own_args, own_kwargs))
    expected, found = (list(tensors(result)) for result in results)
    assert len(expected) == len(found)
    for left, right in zip(expected, found, strict=True):
        same(left, right)
    return results[1][0]


def same(left: torch.Tensor, right: torch.Tensor) -> None:
    assert (left.shape, left.dtype) == (right.shape, right.dtype)
    if left.is_floating_point():
        loose = 5e-3 if left.dtype != torch.float32 and left.dtype != torch.float64 else RTOL
        torch.testing.assert_close(right, left, rtol=loose, atol=ATOL, equal_nan=True)
    else:
        assert torch.equal(left, right), (left, right)


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """All tensors within nested tuples, lists, dicts and objects."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))
    elif isinstance(value, tuple | list):
        for part in value:
            yield from tensors(part)
    elif hasattr(value, "__dict__"):
        yield from tensors(vars(value))


@contextmanager
def replaced(modules: set[Any]) -> Iterator[None]:
    """A context in which the kernels of `modules` are their CPU forms, called as vLLM's registry calls them."""
    names = [
        (module, name)
        for module in modules
        for name in vars(module)
        if f"{module.__name__}.{name}" in forms()
    ]
    assert names
    kernels = {(module, name): getattr(module, name) for module, name in names}
    for (module, name), kernel in kernels.items():
        setattr(module, name, KernelOverride(kernel, forms()[f"{module.__name__}.{name}"]))
    try:
        yield
    finally:
        for (module, name), kernel in kernels.items():
            setattr(module, name, kernel)


@contextmanager
def poisoned() -> Iterator[None]:
    """A context in which torch fills uninitialised memory with NaN or with the largest integer."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def _nothing() -> Iterator[None]:
    yield
