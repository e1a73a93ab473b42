"""Trees on vLLM's FlashAttention: it attends to the prefix of each tree, `node_attention` to the nodes.

Requests without drafts, prefills above all, are FlashAttention alone, as without this project. FlashAttention has no
mask of ancestors, but without a causal mask it is exact over the prefix, which every node sees whole. Its log-sum-exp
and that of the nodes merge both parts.
"""

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
from vllm_eagle3.runner.v2.tree_attention import (
    PathMetadata,
    attend_paths,
    attend_tree,
    refuse_layer,
    window_of,
)
from vllm_eagle3.tree.mask import TreeMask


def flash_attention_fits(vllm_config: Any) -> bool:
    """Whether trees can build on FlashAttention 2 or 3 here: a GPU that has it, 16-bit weights, a supported head size.

    FlashAttention 4 is left to the Triton backend, since nobody has tried its log-sum-exp with a paged cache.
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
    """The rows of a batch that verify trees, as a batch of their own."""

    rows: torch.Tensor | None  # int64 [tokens], which rows of the whole batch; None: all of them, in order
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
    """Which rows of a batch verify trees.

    metadata: of a layer. prefix_lens: int32 [requests], tokens before each request's root. scheduled, drafts: int
    [requests] on the host, rows and drafts of each request; drafts is None in the dummy batch of a CUDA graph's
    capture, where every request verifies a tree. A decoding request without drafts counts as a tree of one node, so
    that a batch that only decodes is taken whole, and a CUDA graph can hold it.
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
    """A full CUDA graph holds batches whose requests all verify equally many rows: in others trees are found anew."""

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        return AttentionCGSupport.UNIFORM_BATCH


class TreeFlashAttentionBackend(FlashAttentionBackend):
    """vLLM's FlashAttention, which shares rows that verify trees with this project's kernel."""

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type["TreeFlashAttentionImpl"]:
        return TreeFlashAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[TreeFlashAttentionBuilder]:
        return TreeFlashAttentionBuilder


class TreeFlashAttentionImpl(FlashAttentionImpl):
    """The cache is the stock backend's, `[blocks, kv_heads, block_size, 2 * head_dim]`."""

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
            return attend_paths(self, query, key, value, kv_cache, attn_metadata, output)
        trees: TreeRows | None = getattr(attn_metadata, "tree_rows", None)
        if trees is not None and (window_of(self) or self.sinks is not None):
            # A node's window begins where its depth says, and a sink must be counted once: one kernel does both.
            return attend_tree(self, query, kv_cache, attn_metadata, attn_metadata.tree, output)
        if trees is None or trees.rows is not None:
            super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
            )
        if trees is not None:
            self._attend_trees(query, kv_cache, attn_metadata, trees, output)
        return output

    def _attend_trees(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: Any,
        trees: TreeRows,
        output: torch.Tensor,
    ) -> None:
        """Write the rows of `trees` in output [tokens or more, heads, head_dim], over what is there."""
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
