"""What Model Runner V2 keeps per request to verify a draft tree: its ModelState and rejection sampler."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler

from vllm_eagle3.config import Eagle3Options
from vllm_eagle3.kernels import KVTable, ancestor_bits, commit_kv, kv_table
from vllm_eagle3.runner.v2.tree_attention import with_tree
from vllm_eagle3.runner.v2.tree_limits import needs_chain
from vllm_eagle3.tree.acceptance import accept
from vllm_eagle3.tree.mask import TreeMask


@dataclass
class TreeStep:
    """Where the rows of this step's trees are. Entries past a request's drafts repeat its root's row."""

    requests: torch.Tensor  # int64 [batch], request-state index
    rows: torch.Tensor  # int64 [batch, nodes + 1], row of each node in the batch
    slot_mappings: torch.Tensor  # int64 [kv_cache_groups, tokens], linear positions
    has_drafts: bool


class TreeModelState(DefaultModelState):
    """Gives a step's rows tree positions and masks, and moves the accepted path's KV into the sequence.

    To the scheduler a tree of N nodes is a chain of N drafts: slots are those of linear positions. Only what
    the model sees is a tree. Per-request state lies on the device, indexed by request state.
    """

    def __init__(
        self, vllm_config: VllmConfig, model: torch.nn.Module, encoder_cache: Any, device: torch.device
    ) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        options = Eagle3Options.from_additional_config(vllm_config.additional_config)
        assert options.tree is not None
        self.max_depth = options.tree.depth
        nodes = vllm_config.num_speculative_tokens + 1
        requests, tokens = self.max_num_reqs, self.max_num_tokens

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(*shape, dtype=torch.int64, device=device)

        self.node_ids = torch.arange(nodes, device=device)
        self.parents = zeros(requests, nodes) - 1  # column 0, the root's, is ignored
        self.depth = zeros(requests, nodes)
        self.path = self.node_ids.repeat(requests, 1)
        self.chain_only = torch.zeros(requests, dtype=torch.bool, device=device)
        # Addresses that a CUDA graph of the target may keep.
        self.mask = TreeMask(root=zeros(tokens), bits=zeros(tokens) + 1, positions=zeros(tokens))
        self.step: TreeStep | None = None
        self.kv_cache_groups: list[Any] = []
        self._target_caches: list[tuple[int, KVTable]] | None = None

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        super().add_request(req_index, new_req_data)
        self.parents[req_index] = -1  # the slot's former request may have left a tree
        self.chain_only[req_index] = needs_chain(new_req_data.sampling_params, self.model_config)

    def prepare_attn(  # type: ignore[override]
        self,
        input_batch: Any,
        cudagraph_mode: Any,
        block_tables: Any,
        slot_mappings: torch.Tensor,
        attn_groups: Any,
        kv_cache_config: Any,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Attention metadata, with the tree mask on the target's layers. Runs before the forward, also of
        a graph.
        """
        metadata = super().prepare_attn(
            input_batch, cudagraph_mode, block_tables, slot_mappings, attn_groups, kv_cache_config, **kwargs
        )
        batch, tokens = input_batch.num_reqs, input_batch.num_tokens_after_padding
        requests = input_batch.idx_mapping[:batch]
        logits = input_batch.cu_num_logits[: batch + 1].diff().long()[:, None]
        root = input_batch.query_start_loc[1 : batch + 1].long()[:, None] - logits
        used = self.node_ids < logits
        rows = torch.where(used, root + self.node_ids, root)
        self.step = TreeStep(requests, rows, slot_mappings, input_batch.num_draft_tokens > 0)

        depth, bits = ancestor_bits(self.parents[requests])
        self.depth[requests] = depth.long()
        self.path[requests] = self.node_ids
        mask = TreeMask(*(buffer[:tokens] for buffer in self.mask))
        mask.fill(input_batch.positions, rows, used, depth, bits)

        if not (self.step.has_drafts or kwargs.get("for_capture")):
            return metadata  # no trees: stock attention
        layers = self.vllm_config.compilation_config.static_forward_context
        masked: dict[int, Any] = {}
        for name, layer_metadata in (metadata or {}).items():
            if not getattr(layers[name], "is_draft_layer", False):
                key = id(layer_metadata)
                masked[key] = masked.get(key) or with_tree(layer_metadata, mask)
                metadata[name] = masked[key]
        return metadata

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
        """Positions `base + depth`; the batch's own stay linear, for slots and everything that counts
        tokens.
        """
        return {"positions": self.mask.positions[: input_batch.num_tokens_after_padding]}

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        inputs = super().prepare_dummy_inputs(num_reqs, num_tokens)
        return {**inputs, "positions": self.mask.positions[:num_tokens]}

    def custom_sampler(self, sampler: Any) -> tuple[Any, Any]:
        assert self.vllm_config.speculative_config is not None
        rejection_sampler = TreeRejectionSampler(sampler, self.vllm_config.speculative_config, self.device)
        rejection_sampler.trees = self
        return sampler, rejection_sampler

    def initialize_kv_cache(self, kv_cache_config: Any, block_tables: Any) -> None:
        super().initialize_kv_cache(kv_cache_config, block_tables)
        self.kv_cache_groups, self._target_caches = kv_cache_config.kv_cache_groups, None

    @property
    def target_caches(self) -> list[tuple[int, KVTable]]:
        """The target's caches, by KV cache group. Looked up when first needed: a cache that vLLM makes to measure the
        memory of CUDA graphs is not held on to."""
        if self._target_caches is None:
            layers = self.vllm_config.compilation_config.static_forward_context
            self._target_caches = []
            for group, spec in enumerate(self.kv_cache_groups):
                members = [layers[name] for name in spec.layer_names]
                caches = {  # layers that share a cache are moved once
                    layer.kv_cache.data_ptr(): layer.kv_cache
                    for layer in members
                    if not getattr(layer, "is_draft_layer", False)
                }
                if caches:
                    table = kv_table([keys_and_values(cache) for cache in caches.values()])
                    self._target_caches.append((group, table))
        return self._target_caches

    def postprocess_state(
        self,
        idx_mapping: torch.Tensor,
        num_sampled: torch.Tensor,
        num_computed_tokens: torch.Tensor | None = None,
    ) -> None:
        """Commit: the KV of the accepted path goes to the slots that follow the root."""
        step = self.step
        if step is None or not step.has_drafts:
            return
        deepest = slice(1, self.max_depth + 1)
        linear = step.rows[:, deepest]
        accepted = step.rows.gather(1, self.path[step.requests][:, deepest])
        for group, table in self.target_caches:
            slots = step.slot_mappings[group]
            commit_kv(table, slots[accepted], slots[linear])


def keys_and_values(kv_cache: torch.Tensor) -> torch.Tensor:
    """View `[blocks, 2, block_size, kv_heads, head_dim]` of a cache `[blocks, kv_heads, block_size, 2 *
    head_dim]`.
    """
    return kv_cache.unflatten(-1, (2, -1)).permute(0, 3, 2, 1, 4)


class TreeRejectionSampler(RejectionSampler):
    """Verifies trees: the target draws at every node, the walk follows the draws (`verification.tree.walk`).

    The draw at a node has the noise key (seed, base + depth) that plain sampling has at that position,
    so with per-request seeds a tree's output is the unspeculated one token for token.
    """

    trees: TreeModelState

    def _verify(self, logits: torch.Tensor, draft_logits: torch.Tensor | None, draft_sampled: torch.Tensor,
                pos: torch.Tensor, cu_num_logits: torch.Tensor, idx_mapping: torch.Tensor,
                idx_mapping_np: np.ndarray, expanded_idx_mapping: torch.Tensor, expanded_local_pos:
                torch.Tensor, seq_lens_upper_bound_np: np.ndarray, verify_draft_sampled: torch.Tensor,
                ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
        trees, states = self.trees, self.sampler.sampling_states
        node = expanded_local_pos.long()
        position = pos - node + trees.depth[expanded_idx_mapping, node]
        processed = self.sampler.apply_sampling_params(
            logits, expanded_idx_mapping, idx_mapping, idx_mapping_np, position, draft_sampled,
            expanded_local_pos, seq_lens_upper_bound_np,
        )  # fmt: skip
        drawn = gumbel_sample(
            processed, expanded_idx_mapping, states.temperature.gpu, states.seeds.gpu, position,
            apply_temperature=False, is_drafting=False, use_fp64=self.sampler.use_fp64_gumbel,
        )  # fmt: skip

        first, last = cu_num_logits[:-1].long()[:, None], cu_num_logits[1:].long()[:, None]
        used = trees.node_ids < last - first
        rows = torch.where(used, first + trees.node_ids, first)
        tokens = torch.where(used, verify_draft_sampled[rows].long(), -1)
        path, emitted, count = accept(trees.parents[idx_mapping], tokens, drawn[rows])
        trees.path[idx_mapping] = path

        # Logprobs and sampling masks read row i as the i-th emitted token's: bring the path's rows in front.
        if states.max_num_logprobs(idx_mapping_np) != -1 or self.sampler.return_sampling_mask:
            order = torch.arange(len(logits), device=logits.device)
            order[rows] = rows.gather(1, path)
            in_place = processed is logits
            logits.copy_(logits[order])
            processed = logits if in_place else processed[order]
        return processed, emitted, count
