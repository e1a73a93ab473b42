"""Trees with vLLM's FlashAttention, which attends to the prefix of each tree. `node_attention` attends to the nodes.

Requests without drafts, such as prefills, use FlashAttention alone, as without this project. FlashAttention has no mask
of ancestors. But every node sees the whole prefix, so without a causal mask it is exact over the prefix. The two parts
are merged by their log-sum-exp.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.platforms import current_platform
from vllm.utils.torch_utils import async_tensor_h2d, canonicalize_singleton_dim_strides
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends import fa_utils
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)
from vllm.v1.attention.ops.merge_attn_states import merge_attn_states

from vllm_eagle3.kernels import node_attention
from vllm_eagle3.runner.v2.tree_attention import TreeLayer, window_of
from vllm_eagle3.tree.mask import TreeMask


def flash_attention_fits(vllm_config: Any) -> bool:
    """Whether trees can use FlashAttention 2 or 3: on a GPU that has it, with 16-bit weights and a supported head size.

    With FlashAttention 4 trees use the Triton backend, since nobody has tried its log-sum-exp with a paged cache.
    """
    model = vllm_config.model_config
    capability = current_platform.get_device_capability()
    return (
        fa_utils.is_flash_attn_varlen_func_available()
        and capability is not None
        and FlashAttentionBackend.supports_compute_capability(capability)
        and model.dtype in FlashAttentionBackend.supported_dtypes
        and FlashAttentionBackend.supports_head_size(model.get_head_size())
        and fa_utils.get_flash_attn_version(head_size=model.get_head_size()) in (2, 3)
    )


@dataclass
class TreeRows:
    """The rows of a batch that verify trees, as a separate batch."""

    rows: torch.Tensor | None  # int64 [tokens], indices in the whole batch; None: all rows, in order
    query_start_loc: torch.Tensor  # int32 [requests + 1]
    block_table: torch.Tensor  # int32 [requests, blocks]
    seq_lens: torch.Tensor  # int32 [requests], this step's rows included
    prefix_lens: torch.Tensor  # int32 [requests], tokens before the root
    mask: TreeMask
    max_query_len: int


def tree_rows(
    metadata: Any,
    mask: TreeMask,
    prefix_lens: torch.Tensor,
    scheduled: np.ndarray,
    drafts: np.ndarray | None,
) -> TreeRows:
    """The rows of a batch that verify trees.

    metadata: attention metadata of a layer. prefix_lens: int32 [requests], tokens before each request's root.
    scheduled, drafts: int [requests] on the host, rows and drafts of each request; drafts is None in the dummy batch
    of a CUDA graph's capture, where every request verifies a tree. A decoding request without drafts counts as a tree
    of one node. So a batch of decoding requests is used as a whole, and a CUDA graph can contain it.
    """
    if drafts is None or bool((scheduled == drafts + 1).all()):
        return TreeRows(
            None,
            metadata.query_start_loc,
            metadata.block_table,
            metadata.seq_lens,
            prefix_lens,
            mask,
            metadata.max_query_len,
        )
    device = metadata.seq_lens.device
    requests = np.flatnonzero(drafts > 0)
    lens = drafts[requests] + 1
    ends = np.cumsum(scheduled)[requests]
    rows = np.concatenate([np.arange(end - n, end) for end, n in zip(ends, lens, strict=True)])
    starts = np.concatenate([[0], np.cumsum(lens)]).astype(np.int32)
    row_ids = async_tensor_h2d(rows.astype(np.int64), device=device)
    request_ids = async_tensor_h2d(requests.astype(np.int64), device=device)
    return TreeRows(
        row_ids,
        async_tensor_h2d(starts, device=device),
        metadata.block_table[request_ids],
        metadata.seq_lens[request_ids],
        prefix_lens[request_ids],
        TreeMask(*(t[row_ids] for t in mask)),
        int(lens.max()),
    )


class TreeFlashAttentionBuilder(FlashAttentionMetadataBuilder):
    """Allows full CUDA graphs only if all requests verify equally many rows; else the trees' rows are looked up."""

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        return AttentionCGSupport.UNIFORM_BATCH


class TreeFlashAttentionBackend(FlashAttentionBackend):
    """vLLM's FlashAttention, together with this project's kernel for rows that verify trees."""

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type["TreeFlashAttentionImpl"]:
        return TreeFlashAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[TreeFlashAttentionBuilder]:
        return TreeFlashAttentionBuilder


class TreeFlashAttentionImpl(TreeLayer, FlashAttentionImpl):
    """The cache is vLLM's, `[blocks, kv_heads, block_size, 2 * head_dim]`."""

    TREES = "tree_rows"

    def attend_trees(
        self,
        layer: Any,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: Any,
        output: torch.Tensor,
        upstream: Callable[[], torch.Tensor],
    ) -> None:
        trees: TreeRows = metadata.tree_rows
        if window_of(self) or self.sinks is not None:
            # A node's window depends on its depth, and a sink must be counted once, so one kernel computes all keys.
            super().attend_trees(layer, query, kv_cache, metadata, output, upstream)
            return
        if trees.rows is not None:
            upstream()
        self._attend_trees(query, kv_cache, metadata, trees, output)

    def _attend_trees(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: Any,
        trees: TreeRows,
        output: torch.Tensor,
    ) -> None:
        """Overwrite the rows of `trees` in output [tokens or more, heads, head_dim]."""
        rows = query[: metadata.num_actual_tokens] if trees.rows is None else query[trees.rows]
        keys, values = (
            canonicalize_singleton_dim_strides(cache)
            for cache in kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        )
        prefix, prefix_lse = fa_utils.flash_attn_varlen_func(
            q=rows,
            k=keys,
            v=values,
            cu_seqlens_q=trees.query_start_loc,
            max_seqlen_q=trees.max_query_len,
            seqused_k=trees.prefix_lens,
            max_seqlen_k=metadata.max_seq_len,
            softmax_scale=self.scale,
            causal=False,
            block_table=trees.block_table,
            softcap=self.logits_soft_cap,
            return_softmax_lse=True,
            fa_version=self.vllm_flash_attn_version,  # type: ignore[arg-type]  # as vLLM's own backend
            num_splits=metadata.max_num_splits,
        )
        nodes, nodes_lse = node_attention(
            rows,
            kv_cache,
            trees.block_table,
            trees.query_start_loc,
            trees.seq_lens,
            *trees.mask,
            max_query_len=trees.max_query_len,
            scale=self.scale,
            softcap=self.logits_soft_cap,
        )
        merged = output[: len(rows)] if trees.rows is None else torch.empty_like(rows)
        merge_attn_states(merged, prefix, prefix_lse, nodes, nodes_lse)
        if trees.rows is not None:
            output[trees.rows] = merged


def is_flash(metadata: Any) -> bool:
    """Whether a layer's metadata is FlashAttention's."""
    return isinstance(metadata, FlashAttentionMetadata)
