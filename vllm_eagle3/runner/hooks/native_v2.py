"""Model Runner V2 on a CPU without Triton: the check that asks for Triton, and the kernels' CPU forms."""

from types import ModuleType
from typing import Any

from vllm import __version__ as vllm_version
from vllm.config.vllm import VllmConfig
from vllm.platforms import current_platform
from vllm.triton_utils import HAS_TRITON

WRITTEN_FOR = "0.32."
"""Version of vLLM whose kernels have CPU forms here; others have other parameters."""
_stock_validate = VllmConfig._validate_v2_model_runner


def validate_v2_model_runner(self: VllmConfig) -> None:
    """Replaces the method of this name: on a CPU, Triton may be missing where the kernels have CPU forms.

    Raises:
        ValueError: what vLLM's V2 runner does not support; names all of it.
    """
    if HAS_TRITON or not current_platform.is_cpu() or not vllm_version.startswith(WRITTEN_FOR):
        _stock_validate(self)
        return
    unsupported = self._get_v2_model_runner_unsupported_features()
    if unsupported:
        raise ValueError(f"Model Runner V2 does not yet support: {', '.join(unsupported)}")


def register_cpu_kernels(_: ModuleType) -> None:
    """Called once vLLM has imported its V2 runner for CPUs, which only a worker that will use it does."""
    from vllm_eagle3.runner.v2.cpu.register import register

    register()


def hide_attributes(ffi: ModuleType) -> None:
    """Called once llvmlite, which Numba compiles with, is imported.

    Its library object answers any attribute name, `__dict__` too, with a function; vLLM's registry of kernels, which
    reads the `__dict__` of every object that has one, fails on that.
    """
    library: Any = type(ffi.lib)
    original = library.__getattr__

    def known(self: Any, name: str) -> Any:
        if name == "__dict__":
            raise AttributeError(name)
        return original(self, name)

    library.__getattr__ = known
