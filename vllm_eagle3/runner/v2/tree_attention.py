"""Attention backends that read tree masks: vLLM hands them the KV cache, and `kernels` compute the attention."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend, TritonAttentionImpl

from vllm_eagle3.kernels import cpu, path_attention, tree_attention
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
    """vLLM's CPU attention, with this project's kernels for batches that verify trees."""

    @staticmethod
    def get_impl_cls() -> type["TreeCPUAttentionImpl"]:
        return TreeCPUAttentionImpl


class TreeCPUAttentionImpl(CPUAttentionBackendImpl):
    """The cache is the stock backend's, in the order that it gives each instruction set."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        refuse_layer(self)

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
            paths = attn_metadata
            rows = paths.paths.shape[0] * paths.paths.shape[1]
            cpu.path_attention(
                query[:rows], kv_cache, cpu_layout(layer, kv_cache), paths.block_table, paths.prefix_lens, paths.keys,
                paths.values, paths.paths, scale=self.scale, window=window_of(self), new=(key[:rows], value[:rows]),
                out=output[:rows],
            )  # fmt: skip
            return output
        mask = getattr(attn_metadata, "tree", None)
        if mask is None:
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
            )
        tokens = attn_metadata.num_actual_tokens
        cpu.tree_attention(
            query[:tokens], kv_cache, cpu_layout(layer, kv_cache), attn_metadata.block_table,
            attn_metadata.query_start_loc, attn_metadata.seq_lens, *mask, scale=self.scale, window=window_of(self),
            softcap=self.logits_soft_cap, sinks=self.sinks, out=output[:tokens],
        )  # fmt: skip
        return output


def cpu_layout(layer: Any, kv_cache: torch.Tensor) -> cpu.KVLayout:
    """How vLLM's CPU attention orders the keys and values of a block of this layer's cache."""
    block_size, width = kv_cache.shape[2:]
    key = (layer.isa, block_size, width, kv_cache.dtype)
    if key not in _layouts:

        def write(keys: torch.Tensor, values: torch.Tensor, block: torch.Tensor) -> None:
            layer.impl.do_kv_cache_update(layer, keys, values, block, torch.arange(block_size))

        _layouts[key] = cpu.observed(write, block_size, width // 2, kv_cache.dtype)
    return _layouts[key]


_layouts: dict[tuple[Any, ...], cpu.KVLayout] = {}


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
