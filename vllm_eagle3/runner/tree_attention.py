"""Attention backends that read tree masks: vLLM hands them the cache, `verification` and `drafting` do the maths."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from vllm.v1.attention import selector
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from vllm_eagle3.drafting.attention import path_attention
from vllm_eagle3.verification.attention import TreeMask, tree_attention


def select_tree_attention() -> None:
    """Have the layers that this process builds from now on use tree attention.

    The CPU platform ignores the selected backend, so its only one is overridden.
    """
    register_backend(AttentionBackendEnum.CPU_ATTN, f"{__name__}.TreeCPUAttentionBackend")
    selector._cached_get_attn_backend.cache_clear()


def deselect_tree_attention() -> None:
    """Undo `select_tree_attention`, for a process that builds another engine after one with trees."""
    AttentionBackendEnum.CPU_ATTN.clear_override()
    selector._cached_get_attn_backend.cache_clear()


def with_tree(metadata: Any, mask: TreeMask) -> Any:
    """A copy of a layer's attention metadata that carries a tree mask.

    A copy, because target and draft layers may share one object and only the target's may see the mask.
    """
    masked = copy.copy(metadata)
    masked.tree = mask
    return masked


@dataclass
class PathMetadata:
    """Stands in for a draft layer's attention metadata while the nodes of one level are run.

    The nodes' keys and values go to scratch, never to the sequence's cache. Level l (from 1) of a tree that
    expands k nodes a level owns the slots (l - 1) k to l k - 1 of its request's row.
    """

    block_table: torch.Tensor  # int [batch, max_blocks], of the draft layer's cache
    prefix_lens: torch.Tensor  # int [batch]
    max_prefix_len: int
    keys: torch.Tensor  # [>= batch, slots, kv_heads, head_dim], scratch
    values: torch.Tensor
    paths: torch.Tensor  # int64 [batch, k, l]: slots of each node's ancestors and, last, its own


def attend_paths(impl: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                 kv_cache: torch.Tensor, metadata: PathMetadata, output: torch.Tensor) -> torch.Tensor:
    """Attention of one level's nodes; query `[batch * k, heads, head_dim]`, key and value alike."""
    batch, nodes, level = metadata.paths.shape
    slots = slice((level - 1) * nodes, level * nodes)
    metadata.keys[:batch, slots] = key.view(batch, nodes, *key.shape[1:])
    metadata.values[:batch, slots] = value.view(batch, nodes, *value.shape[1:])
    row = torch.arange(batch, device=query.device)[:, None, None]
    out = path_attention(
        query.view(batch, nodes, *query.shape[1:]), kv_cache, metadata.block_table, metadata.prefix_lens,
        metadata.max_prefix_len, metadata.keys[row, metadata.paths], metadata.values[row, metadata.paths],
        impl.scale, window_of(impl),
    )  # fmt: skip
    output[: batch * nodes] = out.flatten(0, 1)
    return output


def window_of(impl: Any) -> int:
    """Sliding window of an attention implementation in tokens, 0 for none."""
    window = impl.sliding_window
    if isinstance(window, tuple):  # (left, right), left excludes the row itself
        window = window[0] + 1
    return window if window and window > 0 else 0


class TreeCPUAttentionBackend(CPUAttentionBackend):
    """Overrides CPU_ATTN for a whole engine: torch attention on an unpacked cache, with or without trees."""

    forward_includes_kv_cache_update = False

    @staticmethod
    def get_impl_cls() -> type["TreeCPUAttentionImpl"]:
        return TreeCPUAttentionImpl


class TreeCPUAttentionImpl(CPUAttentionBackendImpl):
    """Keys and values lie unpacked in `[blocks, kv_heads, block_size, 2 * head_dim]`, unlike the stock backend's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        unsupported = [
            name
            for name, found in (
                ("ALiBi", self.alibi_slopes is not None),
                ("a quantised KV cache on CPU", self.is_fp8_kv_cache),
                (f"attention of type {self.attn_type}", self.attn_type != AttentionType.DECODER),
            )
            if found
        ]
        if unsupported:
            raise ValueError(f"draft trees: {', '.join(unsupported)} not supported; use a chain (no 'tree' option)")

    def do_kv_cache_update(self, layer: torch.nn.Module, key: torch.Tensor, value: torch.Tensor,
                           kv_cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
        tokens = slot_mapping.shape[0]
        valid = slot_mapping >= 0
        slots = slot_mapping[valid].long()
        rows = torch.cat([key[:tokens][valid], value[:tokens][valid]], dim=-1)
        block_size = kv_cache.shape[2]
        kv_cache[slots // block_size, :, slots % block_size] = rows.to(kv_cache.dtype)

    def forward(self, layer: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                kv_cache: torch.Tensor, attn_metadata: Any, output: torch.Tensor,
                output_scale: torch.Tensor | None = None,
                output_block_scale: torch.Tensor | None = None) -> torch.Tensor:
        if attn_metadata is None:  # memory profiling
            return output.zero_()
        if isinstance(attn_metadata, PathMetadata):
            return attend_paths(self, query, key, value, kv_cache, attn_metadata, output)
        tokens = attn_metadata.num_actual_tokens
        mask = getattr(attn_metadata, "tree", None)
        if mask is None:
            mask = causal_mask(attn_metadata.query_start_loc, attn_metadata.seq_lens, tokens)
        output[:tokens] = tree_attention(
            query[:tokens], kv_cache, attn_metadata.block_table, attn_metadata.query_start_loc,
            attn_metadata.seq_lens, mask, self.scale, window_of(self), self.logits_soft_cap, self.sinks,
        )  # fmt: skip
        return output


def causal_mask(query_start_loc: torch.Tensor, seq_lens: torch.Tensor, tokens: int) -> TreeMask:
    """Rows outside any tree: each sees its own position and all before it."""
    lens = (query_start_loc[1:] - query_start_loc[:-1]).long()
    requests = len(lens)
    row = torch.arange(tokens, device=seq_lens.device)
    shift = seq_lens[:requests].long() - query_start_loc[1:].long()
    position = row + torch.repeat_interleave(shift, lens, output_size=tokens)
    return TreeMask(position, torch.ones_like(position), position)
