"""FlashAttention in plain torch, in the place where vLLM looks for the one for GPUs."""

from typing import Any

import pytest
import torch
from vllm.v1.attention.backends import fa_utils, flash_attn


def varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, cu_seqlens_q: torch.Tensor, seqused_k: torch.Tensor,
    block_table: torch.Tensor, softmax_scale: float, causal: bool, out: torch.Tensor | None = None,
    softcap: float = 0.0, window_size: Any = None, return_softmax_lse: bool = False, **unused: Any,
) -> Any:  # fmt: skip
    """The part of vLLM's `flash_attn_varlen_func` that its backend uses. The causal mask ends at the bottom right."""
    out = torch.zeros_like(q) if out is None else out
    lse = torch.full((q.shape[1], len(q)), float("-inf"))
    group = q.shape[1] // k.shape[2]
    left = -1 if window_size is None else window_size[0]
    for request, length in enumerate(seqused_k.tolist()):
        rows = slice(int(cu_seqlens_q[request]), int(cu_seqlens_q[request + 1]))
        blocks = block_table[request, : -(-length // k.shape[1])].long()
        keys, values = (t[blocks].flatten(0, 1)[:length].repeat_interleave(group, 1).float() for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[rows].float() * softmax_scale, keys)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        distance = torch.arange(length) - (length - scores.shape[1] + torch.arange(scores.shape[1]))[:, None]
        hidden = (distance > 0) & torch.tensor(causal)
        if left >= 0:
            hidden |= distance < -left
        scores = scores.masked_fill(hidden, float("-inf"))
        out[rows] = torch.einsum("hqk,khd->qhd", scores.softmax(-1).nan_to_num(), values).to(out.dtype)
        lse[:, rows] = scores.logsumexp(-1)
    return (out, lse) if return_softmax_lse else out


def store(key: torch.Tensor, value: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor,
          *unused: Any) -> None:  # fmt: skip
    """vLLM's `reshape_and_cache_flash`. Caches [blocks, block_size, kv_heads, head_dim]; slot -1 is skipped."""
    valid = slots >= 0
    at = slots[valid].long()
    block, offset = at // keys.shape[1], at % keys.shape[1]
    keys[block, offset], values[block, offset] = key[: len(slots)][valid], value[: len(slots)][valid]


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make vLLM's FlashAttention backend run on a CPU, as version 3."""
    for module in (fa_utils, flash_attn):
        monkeypatch.setattr(module, "flash_attn_varlen_func", varlen, raising=False)
        monkeypatch.setattr(module, "get_flash_attn_version", lambda *args, **kwargs: 3)
    monkeypatch.setattr(flash_attn, "reshape_and_cache_flash", store, raising=False)
    monkeypatch.setattr(flash_attn, "get_scheduler_metadata", lambda **kwargs: None, raising=False)
    monkeypatch.setattr(flash_attn, "flash_attn_supports_quant_query_input", lambda: False)
