"""Chooses the attention backend of the layers in an engine with draft trees."""

from typing import Any

from vllm.platforms import current_platform
from vllm.v1.attention import selector
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from vllm_eagle3.runner.v2 import tree_attention, tree_flash_attention
from vllm_eagle3.runner.v2.tree_limits import USE_A_CHAIN


def select_tree_attention(vllm_config: Any) -> None:
    """Make the layers that this process builds from now on use tree attention.

    On a GPU it is based on FlashAttention if that fits, otherwise on Triton, or on the one of the two that the user
    chose. The CPU platform ignores the selected backend, so there its only backend is replaced.

    Raises:
        ValueError: the user chose another backend, or FlashAttention where it does not fit.
    """
    if current_platform.is_cpu():
        register_backend(AttentionBackendEnum.CPU_ATTN, f"{tree_attention.__name__}.TreeCPUAttentionBackend")
    else:
        register_backend(AttentionBackendEnum.CUSTOM, gpu_backend(vllm_config))
        vllm_config.attention_config.backend = AttentionBackendEnum.CUSTOM
    selector._cached_get_attn_backend.cache_clear()


def gpu_backend(vllm_config: Any) -> str:
    """Path of the backend's class for a GPU; see `select_tree_attention`."""
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
