"""Which attention backend the layers of an engine with draft trees get."""

from typing import Any

from vllm.platforms import current_platform
from vllm.v1.attention import selector
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from vllm_eagle3.runner.v2 import tree_attention, tree_flash_attention
from vllm_eagle3.runner.v2.tree_limits import USE_A_CHAIN


def select_tree_attention(vllm_config: Any) -> None:
    """Have the layers that this process builds from now on use tree attention.

    On a GPU it builds on FlashAttention where that fits, otherwise on Triton, or on the one of both that was asked for.
    The CPU platform ignores the selected backend, so there its only one is overridden.

    Raises:
        ValueError: another backend was asked for, or FlashAttention where it does not fit.
    """
    if current_platform.is_cpu():
        register_backend(AttentionBackendEnum.CPU_ATTN, f"{tree_attention.__name__}.TreeCPUAttentionBackend")
    else:
        register_backend(AttentionBackendEnum.CUSTOM, gpu_backend(vllm_config))
        vllm_config.attention_config.backend = AttentionBackendEnum.CUSTOM
    selector._cached_get_attn_backend.cache_clear()


def gpu_backend(vllm_config: Any) -> str:
    """Path of the class that a GPU takes; see `select_tree_attention`."""
    flash = f"{tree_flash_attention.__name__}.TreeFlashAttentionBackend"
    triton = f"{tree_attention.__name__}.TreeTritonAttentionBackend"
    asked = vllm_config.attention_config.backend
    fits = tree_flash_attention.flash_attention_fits(vllm_config)
    if asked in (None, AttentionBackendEnum.CUSTOM):
        return flash if fits else triton
    if asked == AttentionBackendEnum.TRITON_ATTN:
        return triton
    if asked == AttentionBackendEnum.FLASH_ATTN and fits:
        return flash
    raise ValueError(
        "attention_config.backend: draft trees need this project's attention, which builds on FLASH_ATTN "
        "(FlashAttention 2 or 3, 16-bit weights) or TRITON_ATTN; expected one of these or no backend, found "
        f"{asked.name}. Leave it out, or {USE_A_CHAIN}"
    )
