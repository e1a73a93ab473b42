"""Attention backends that read tree masks: vLLM hands them the KV cache, and `kernels` compute the attention."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend, TritonAttentionImpl

from vllm_eagle3.kernels import path_attention, tree_attention
from vllm_eagle3.runner.v2.tree_limits import USE_A_CHAIN
from vllm_eagle3.tree.mask import TreeMask


def with_tree(metadata: Any, mask: TreeMask) -> Any:
    """A copy of a layer's attention metadata that carries a tree mask.

    Target and draft layers may share one metadata object, and only the target's layers may see the mask.
    """
    masked = copy.copy(metadata)
    masked.tree = mask
    return masked


@dataclass
class PathMetadata:
    """Stands in for a draft layer's attention metadata while the draft runs over the nodes of one level.

    The keys and values of nodes go to scratch memory, never to the sequence's cache. In a tree that expands k nodes
    a level, level l (from 1) owns the slots (l - 1) k to l k - 1 of its request's row.
    """

    block_table: torch.Tensor  # int [batch, max_blocks], of the draft layer's cache
    prefix_lens: torch.Tensor  # int [batch]
    keys: torch.Tensor  # [>= batch, slots, kv_heads, head_dim], scratch
    values: torch.Tensor
    paths: torch.Tensor  # int64 [batch, k, l]: slots of each node's ancestors and, last, its own


def attend_paths(
    impl: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    metadata: PathMetadata,
    output: torch.Tensor,
) -> torch.Tensor:
    """Attention of one level's nodes; query `[batch * k, heads, head_dim]`, key and value alike."""
    batch, nodes, level = metadata.paths.shape
    slots = slice((level - 1) * nodes, level * nodes)
    metadata.keys[:batch, slots] = key.view(batch, nodes, *key.shape[1:])
    metadata.values[:batch, slots] = value.view(batch, nodes, *value.shape[1:])
    out = path_attention(
        query.view(batch, nodes, *query.shape[1:]), kv_cache, metadata.block_table, metadata.prefix_lens,
        metadata.keys, metadata.values, metadata.paths, scale=impl.scale, window=window_of(impl),
    )  # fmt: skip
    output[: batch * nodes] = out.flatten(0, 1)
    return output


def window_of(impl: Any) -> int:
    """Sliding window of an attention implementation in tokens, 0 for none."""
    window = impl.sliding_window
    if isinstance(window, tuple):  # (left, right), left excludes the row itself
        window = window[0] + 1
    return window if window and window > 0 else 0


def attend_tree(
    impl: Any,
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    metadata: Any,
    mask: TreeMask,
    output: torch.Tensor,
) -> torch.Tensor:
    """Attention of a batch with trees; query `[tokens or more, heads, head_dim]`."""
    tokens = metadata.num_actual_tokens
    output[:tokens] = tree_attention(
        query[:tokens],
        kv_cache,
        metadata.block_table,
        metadata.query_start_loc,
        metadata.seq_lens,
        *mask,
        max_query_len=metadata.max_query_len,
        scale=impl.scale,
        window=window_of(impl),
        softcap=impl.logits_soft_cap,
        sinks=impl.sinks,
    )
    return output


def refuse_layer(impl: Any) -> None:
    """Raises ValueError if tree attention cannot compute this layer. Called when a layer is built."""
    found = [
        name
        for name, present in (
            ("ALiBi", impl.alibi_slopes is not None),
            (f"attention of type {impl.attn_type}", impl.attn_type != AttentionType.DECODER),
        )
        if present
    ]
    if found:
        raise ValueError(f"draft trees do not support {', '.join(found)}; {USE_A_CHAIN}")


class TreeCPUAttentionBackend(CPUAttentionBackend):
    """Overrides CPU_ATTN for a whole engine: torch attention on an unpacked cache, for steps with and without trees."""

    @staticmethod
    def get_impl_cls() -> type["TreeCPUAttentionImpl"]:
        return TreeCPUAttentionImpl


class TreeCPUAttentionImpl(CPUAttentionBackendImpl):
    """Keeps keys and values unpacked in `[blocks, kv_heads, block_size, 2 * head_dim]`, unlike vLLM's backend."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        refuse_layer(self)

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        tokens = slot_mapping.shape[0]
        valid = slot_mapping >= 0
        slots = slot_mapping[valid].long()
        rows = torch.cat([key[:tokens][valid], value[:tokens][valid]], dim=-1)
        block_size = kv_cache.shape[2]
        kv_cache[slots // block_size, :, slots % block_size] = rows.to(kv_cache.dtype)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if attn_metadata is None:  # memory profiling
            return output.zero_()
        if isinstance(attn_metadata, PathMetadata):
            return attend_paths(self, query, key, value, kv_cache, attn_metadata, output)
        mask = getattr(attn_metadata, "tree", None) or causal_mask(attn_metadata)
        return attend_tree(self, query, kv_cache, attn_metadata, mask, output)


class TreeTritonAttentionBackend(TritonAttentionBackend):
    """vLLM's Triton attention, with this project's kernel for batches that verify trees."""

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type["TreeTritonAttentionImpl"]:
        return TreeTritonAttentionImpl


class TreeTritonAttentionImpl(TritonAttentionImpl):
    """Reads the cache of vLLM's backend, `[blocks, kv_heads, block_size, 2 * head_dim]`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        refuse_layer(self)

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        return False

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if isinstance(attn_metadata, PathMetadata):
            return attend_paths(self, query, key, value, kv_cache, attn_metadata, output)
        mask = getattr(attn_metadata, "tree", None)
        if mask is None:
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
            )
        return attend_tree(self, query, kv_cache, attn_metadata, mask, output)


def causal_mask(metadata: Any) -> TreeMask:
    """The mask of a batch without trees: each row sees its own position and all positions before it."""
    ends = metadata.query_start_loc[1:].long()
    lens = metadata.query_start_loc.diff().long()
    tokens = metadata.num_actual_tokens
    shift = metadata.seq_lens[: len(lens)].long() - ends
    position = torch.arange(tokens, device=shift.device)
    position = position + torch.repeat_interleave(shift, lens, output_size=tokens)
    return TreeMask(position, torch.ones_like(position), position)
