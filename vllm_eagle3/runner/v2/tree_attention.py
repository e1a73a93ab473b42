"""Attention backends for batches with trees. `kernels` compute the attention over vLLM's KV cache."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend, TritonAttentionImpl

from vllm_eagle3.kernels import cpu, path_attention, tree_attention
from vllm_eagle3.runner.v2.tree_limits import USE_A_CHAIN
from vllm_eagle3.tree.mask import TreeMask


def with_tree(metadata: Any, mask: TreeMask) -> Any:
    """A copy of a layer's attention metadata with a tree mask.

    Target and draft layers may share one metadata object, but only the target's layers may use the mask.
    """
    masked = copy.copy(metadata)
    masked.tree = mask
    return masked


@dataclass
class PathMetadata:
    """A draft layer's attention metadata while the draft runs over the nodes of one level.

    The keys and values of nodes go to scratch memory and never to the sequence's cache. If each level expands k nodes,
    level l (from 1) owns the slots (l - 1) k to l k - 1 of its request's row.
    """

    block_table: torch.Tensor  # int [batch, max_blocks], of the draft layer's cache
    prefix_lens: torch.Tensor  # int [batch]
    keys: torch.Tensor  # [>= batch, slots, kv_heads, head_dim], scratch
    values: torch.Tensor
    paths: torch.Tensor  # int64 [batch, k, l]: slots of each node's ancestors and, last, its own slot


def window_of(impl: Any) -> int:
    """Sliding window of an attention implementation in tokens, 0 for none."""
    window = impl.sliding_window
    if isinstance(window, tuple):  # (left, right), left excludes the row itself
        window = window[0] + 1
    return window if window and window > 0 else 0


def refuse_layer(impl: Any) -> None:
    """Raise ValueError if tree attention cannot compute this layer. Called when a layer is built."""
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


class TreeLayer:
    """What an attention layer does in an engine with trees. vLLM's implementation is the second base class.

    This one computes nodes and trees with the Triton kernels, on a cache [blocks, kv_heads, block_size, 2 * head_dim].
    """

    scale: float
    logits_soft_cap: float
    sinks: torch.Tensor | None
    TREES = "tree"
    """Name of the metadata's attribute that only batches with trees have."""

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
        """Attention of a batch; query, key and value [tokens or more, heads, head_dim]. Writes and returns output."""
        if isinstance(attn_metadata, PathMetadata):
            self.attend_paths(layer, query, key, value, kv_cache, attn_metadata, output)
            return output
        upstream = partial(
            super().forward,  # type: ignore[misc]
            layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale,
        )  # fmt: skip
        if getattr(attn_metadata, self.TREES, None) is None:
            return upstream()
        self.attend_trees(layer, query, kv_cache, attn_metadata, output, upstream)
        return output

    def attend_paths(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: PathMetadata,
        output: torch.Tensor,
    ) -> None:
        """Attention of one level's nodes; query [batch * k, heads, head_dim], key and value alike."""
        batch, nodes, level = metadata.paths.shape
        slots = slice((level - 1) * nodes, level * nodes)
        metadata.keys[:batch, slots] = key.view(batch, nodes, *key.shape[1:])
        metadata.values[:batch, slots] = value.view(batch, nodes, *value.shape[1:])
        out = path_attention(
            query.view(batch, nodes, *query.shape[1:]), kv_cache, metadata.block_table, metadata.prefix_lens,
            metadata.keys, metadata.values, metadata.paths, scale=self.scale, window=window_of(self),
        )  # fmt: skip
        output[: batch * nodes] = out.flatten(0, 1)

    def attend_trees(
        self,
        layer: Any,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: Any,
        output: torch.Tensor,
        upstream: Callable[[], torch.Tensor],
    ) -> None:
        """Attention of a batch with trees. `upstream` is vLLM's own, which knows no trees."""
        tokens = metadata.num_actual_tokens
        output[:tokens] = tree_attention(
            query[:tokens],
            kv_cache,
            metadata.block_table,
            metadata.query_start_loc,
            metadata.seq_lens,
            *metadata.tree,
            max_query_len=metadata.max_query_len,
            scale=self.scale,
            window=window_of(self),
            softcap=self.logits_soft_cap,
            sinks=self.sinks,
        )


class TreeCPUAttentionBackend(CPUAttentionBackend):
    """vLLM's CPU attention, with this project's kernels for batches that verify trees."""

    @staticmethod
    def get_impl_cls() -> type["TreeCPUAttentionImpl"]:
        return TreeCPUAttentionImpl


class TreeCPUAttentionImpl(TreeLayer, CPUAttentionBackendImpl):
    """Uses the C++ kernels. The cache is vLLM's, in the order that it has for each instruction set."""

    def attend_paths(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: PathMetadata,
        output: torch.Tensor,
    ) -> None:
        rows = metadata.paths.shape[0] * metadata.paths.shape[1]
        cpu.path_attention(
            query[:rows], kv_cache, cpu_layout(layer, kv_cache), metadata.block_table, metadata.prefix_lens,
            metadata.keys, metadata.values, metadata.paths, scale=self.scale, window=window_of(self),
            new=(key[:rows], value[:rows]), out=output[:rows],
        )  # fmt: skip

    def attend_trees(
        self,
        layer: Any,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: Any,
        output: torch.Tensor,
        upstream: Callable[[], torch.Tensor],
    ) -> None:
        tokens = metadata.num_actual_tokens
        cpu.tree_attention(
            query[:tokens], kv_cache, cpu_layout(layer, kv_cache), metadata.block_table, metadata.query_start_loc,
            metadata.seq_lens, *metadata.tree, scale=self.scale, window=window_of(self),
            softcap=self.logits_soft_cap, sinks=self.sinks, out=output[:tokens],
        )  # fmt: skip


def cpu_layout(layer: Any, kv_cache: torch.Tensor) -> cpu.KVLayout:
    """The order in which vLLM's CPU attention stores the keys and values of a block of this layer's cache."""
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


class TreeTritonAttentionImpl(TreeLayer, TritonAttentionImpl):
    """Reads the cache of vLLM's backend, `[blocks, kv_heads, block_size, 2 * head_dim]`."""

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        return False
