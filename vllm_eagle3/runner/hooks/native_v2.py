"""Model Runner V2 on a CPU without Triton: when it is the default, vLLM's check for Triton, and the CPU forms."""

import logging
from functools import cache
from types import ModuleType
from typing import Any

from vllm import __version__ as vllm_version
from vllm import envs
from vllm.config.vllm import VllmConfig
from vllm.platforms import current_platform
from vllm.triton_utils import HAS_TRITON

logger = logging.getLogger("vllm.eagle3")

WRITTEN_FOR = "0.32."
"""The version of vLLM whose kernels have CPU forms here. In other versions the kernels have other parameters."""
_stock_validate = VllmConfig._validate_v2_model_runner
_stock_use: Any = VllmConfig.use_v2_model_runner


def has_cpu_forms() -> bool:
    """Whether this is a CPU without Triton, and a vLLM whose kernels have CPU forms here."""
    return not HAS_TRITON and current_platform.is_cpu() and vllm_version.startswith(WRITTEN_FOR)


@property  # type: ignore[misc]
def use_v2_model_runner(self: VllmConfig) -> bool:
    """Replaces the property of this name: on a CPU, engines of method eagle3 get the V2 runner.

    The variable VLLM_USE_V2_MODEL_RUNNER has priority. For settings that were not tried with V2, vLLM's choice stays,
    with one warning.
    """
    speculative = self.speculative_config
    applies = speculative is not None and speculative.method == "eagle3" and has_cpu_forms()
    if not applies or envs.VLLM_USE_V2_MODEL_RUNNER is not None:
        return bool(_stock_use.fget(self))
    not_tried = _not_tried(self)
    if not_tried:
        _warn_of_v1(", ".join(not_tried))
        return bool(_stock_use.fget(self))
    return True


def _not_tried(config: VllmConfig) -> list[str]:
    """Names of this engine's settings that the V2 runner on a CPU does not support, or was not tried with."""
    model, parallel, speculative = config.model_config, config.parallel_config, config.speculative_config
    assert speculative is not None
    settings = {
        "multimodal inputs": model.supports_multimodal_inputs,
        "M-RoPE": model.uses_mrope,
        "recurrent or hybrid layers (Mamba)": model.is_hybrid or model.is_attention_free,
        "MLA": model.use_mla,
        "prompt embeddings": model.enable_prompt_embeds,
        "trace replay": model.enable_trace_replay,
        "sampling masks": model.return_sampling_mask,
        "LoRA": config.lora_config is not None,
        "a KV connector": config.kv_transfer_config is not None,
        "adaptive verification": speculative.enable_adaptive_verification,
        "several processes": parallel.world_size > 1 or parallel.data_parallel_size > 1,
    }
    found = [name for name, present in settings.items() if present]
    return found + config._get_v2_model_runner_unsupported_features()


@cache
def _warn_of_v1(reason: str) -> None:
    logger.warning("vllm-eagle3: vLLM's V1 runner serves this engine, because of %s", reason)


def validate_v2_model_runner(self: VllmConfig) -> None:
    """Replaces the method of this name: on a CPU, Triton is not needed if the kernels have CPU forms.

    Raises:
        ValueError: the engine has settings that vLLM's V2 runner does not support; the message names all of them.
    """
    if not has_cpu_forms():
        _stock_validate(self)
        return
    unsupported = self._get_v2_model_runner_unsupported_features()
    if unsupported:
        raise ValueError(f"Model Runner V2 does not yet support: {', '.join(unsupported)}")


def register_cpu_kernels(_: ModuleType) -> None:
    """Register the CPU forms. Called when vLLM has imported its V2 runner for CPUs, which only its workers do.

    In other versions of vLLM the kernels have other parameters, and vLLM's own code runs or fails there.
    """
    from vllm_eagle3.runner.v2.cpu.register import register

    if vllm_version.startswith(WRITTEN_FOR):
        register()


def hide_attributes(ffi: ModuleType) -> None:
    """Called when llvmlite, with which Numba compiles, has been imported.

    Its library object returns a function for any attribute name, also for `__dict__`. vLLM's registry of kernels reads
    the `__dict__` of each object that has one, and fails on this object.
    """
    library: Any = type(ffi.lib)
    original = library.__getattr__

    def known(self: Any, name: str) -> Any:
        if name == "__dict__":
            raise AttributeError(name)
        return original(self, name)

    library.__getattr__ = known
