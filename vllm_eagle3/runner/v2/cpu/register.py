"""Registers the CPU forms of this folder in a worker that runs Model Runner V2 on a CPU without Triton."""

import importlib
import pkgutil
import warnings
from collections.abc import Callable
from typing import Any

from vllm.triton_utils import HAS_TRITON, triton
from vllm.triton_utils.dispatcher import register_kernels

from vllm_eagle3.runner.v2 import cpu


def cpu_forms() -> dict[str, Callable[..., Any]]:
    """Every CPU form, by the qualified name of the kernel that it stands in for."""
    modules = [
        importlib.import_module(f"{cpu.__name__}.{info.name}") for info in pkgutil.iter_modules(cpu.__path__)
    ]
    return {
        f"{module.UPSTREAM}.{name}": function
        for module in modules
        if hasattr(module, "UPSTREAM")
        for name, function in vars(module).items()
        if name.endswith("_kernel")
    }


def register() -> None:
    """To be called once vLLM has imported its V2 runner for CPUs, and with it every kernel."""
    if HAS_TRITON:
        return
    if not hasattr(triton, "next_power_of_2"):  # vLLM's placeholder for Triton lacks it
        triton.next_power_of_2 = lambda n: 1 << max(n - 1, 0).bit_length()
    with warnings.catch_warnings():
        # The registry looks at every attribute of every module, and torch.distributed.reduce_op warns when looked at.
        warnings.simplefilter("ignore", FutureWarning)
        register_kernels(cpu_forms())
