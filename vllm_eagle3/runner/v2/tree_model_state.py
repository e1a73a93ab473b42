"""The model state of Model Runner V2 for draft trees: the target's positions, masks and KV cache."""

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from vllm_eagle3.config import Eagle3Options
from vllm_eagle3.kernels import KVTable, commit_kv, cpu, kv_table
from vllm_eagle3.runner.v2.tree_attention import TreeCPUAttentionImpl, cpu_layout, with_tree
from vllm_eagle3.runner.v2.tree_flash_attention import is_flash, tree_rows
from vllm_eagle3.runner.v2.tree_limits import may_draw, needs_chain
from vllm_eagle3.runner.v2.tree_rejection_sampler import TreeRejectionSampler
from vllm_eagle3.runner.v2.tree_state import TreeState


class TreeModelState(DefaultModelState):
    """Gives a step's rows the positions and masks of trees, and moves the KV of the accepted path into the sequence.

    For the scheduler a tree of N nodes is a chain of N drafts, with the slots of linear positions. Only the model gets
    a tree.
    """

    def __init__(
        self, vllm_config: VllmConfig, model: torch.nn.Module, encoder_cache: Any, device: torch.device
    ) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        options = Eagle3Options.from_additional_config(vllm_config.additional_config)
        assert options.tree is not None
        self.max_depth = options.deepest
        self.tree_state = TreeState(
            self.max_num_reqs, vllm_config.num_speculative_tokens, self.max_num_tokens, device
        )
        self.kv_cache_groups: list[Any] = []
        self._target_caches: list[tuple[int, KVTable | cpu.KVTable]] | None = None

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        super().add_request(req_index, new_req_data)
        params = new_req_data.sampling_params
        self.tree_state.add_request(req_index, needs_chain(params, self.model_config), may_draw(params))

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
        """Attention metadata with the tree mask for the target's layers. Runs before each forward pass or graph."""
        metadata = super().prepare_attn(
            input_batch, cudagraph_mode, block_tables, slot_mappings, attn_groups, kv_cache_config, **kwargs
        )
        batch, tokens = input_batch.num_reqs, input_batch.num_tokens_after_padding
        counts = input_batch.cu_num_logits[: batch + 1].diff().long()[:, None]
        roots = input_batch.query_start_loc[1 : batch + 1].long()[:, None] - counts
        has_drafts = input_batch.num_draft_tokens > 0
        mask = self.tree_state.prepare(
            input_batch.idx_mapping[:batch],
            roots,
            counts,
            input_batch.positions[:tokens],
            slot_mappings,
            has_drafts,
        )
        scheduled = input_batch.num_scheduled_tokens[:batch]
        # A CUDA graph for one row per request is only used in steps without drafts.
        captures_trees = kwargs.get("for_capture", False) and int(scheduled.max()) > 1
        step = self.tree_state.step
        assert step is not None
        if not captures_trees and (step.linear or not has_drafts):
            return metadata  # no trees: vLLM's own attention
        layers = self.vllm_config.compilation_config.static_forward_context
        masked: dict[int, Any] = {}
        for name, layer_metadata in (metadata or {}).items():
            if not getattr(layers[name], "is_draft_layer", False):
                key = id(layer_metadata)
                if key not in masked:
                    masked[key] = with_tree(layer_metadata, mask)
                    if is_flash(layer_metadata):
                        prefix_lens = self.tree_state.prefix_lens[: len(layer_metadata.seq_lens)]
                        drafts = input_batch.num_draft_tokens_per_req
                        masked[key].tree_rows = tree_rows(
                            layer_metadata, mask, prefix_lens, scheduled, drafts
                        )
                metadata[name] = masked[key]
        return metadata

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
        """Positions `base + depth`. The batch's own positions stay linear, since vLLM computes the slots from them."""
        return {"positions": self.tree_state.mask.positions[: input_batch.num_tokens_after_padding]}

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        inputs = super().prepare_dummy_inputs(num_reqs, num_tokens)
        return {**inputs, "positions": self.tree_state.mask.positions[:num_tokens]}

    def custom_sampler(self, sampler: Any) -> tuple[Any, Any]:
        speculative = self.vllm_config.speculative_config
        return sampler, TreeRejectionSampler(self.tree_state, sampler, speculative, self.device)

    def initialize_kv_cache(self, kv_cache_config: Any, block_tables: Any) -> None:
        super().initialize_kv_cache(kv_cache_config, block_tables)
        self.kv_cache_groups, self._target_caches = kv_cache_config.kv_cache_groups, None

    @property
    def target_caches(self) -> list[tuple[int, KVTable | cpu.KVTable]]:
        """The target's caches, by KV cache group.

        They are looked up at the first use, so that nothing refers to the small cache that vLLM makes while it
        measures the memory of CUDA graphs.
        """
        if self._target_caches is None:
            layers = self.vllm_config.compilation_config.static_forward_context
            self._target_caches = []
            for group, spec in enumerate(self.kv_cache_groups):
                members = [layers[name] for name in spec.layer_names]
                targets = {  # layers that share a cache are moved once
                    layer.kv_cache.data_ptr(): layer
                    for layer in members
                    if not getattr(layer, "is_draft_layer", False)
                }
                if targets:
                    self._target_caches.append((group, cache_table(list(targets.values()))))
        return self._target_caches

    def postprocess_state(
        self,
        idx_mapping: torch.Tensor,
        num_sampled: torch.Tensor,
        num_computed_tokens: torch.Tensor | None = None,
    ) -> None:
        """Commit: the KV of the accepted path goes to the slots that follow the root."""
        step = self.tree_state.step
        if step is None or step.linear or not step.has_drafts:
            return
        drafts = slice(1, self.max_depth + 1)
        linear, accepted = step.rows[:, drafts], self.tree_state.path_rows()[:, drafts]
        for group, table in self.target_caches:
            slots = step.slot_mappings[group]
            if isinstance(table, KVTable):
                commit_kv(table, slots[accepted], slots[linear])
            else:
                cpu.commit_kv(table, slots[accepted], slots[linear])


def cache_table(layers: list[Any]) -> KVTable | cpu.KVTable:
    """The caches of some of the target's layers, for commit_kv."""
    caches = [layer.kv_cache for layer in layers]
    if isinstance(layers[0].impl, TreeCPUAttentionImpl):
        return cpu.kv_table(caches, cpu_layout(layers[0], caches[0]))
    return kv_table([keys_and_values(cache) for cache in caches])


def keys_and_values(kv_cache: torch.Tensor) -> torch.Tensor:
    """View `[blocks, 2, block_size, kv_heads, head_dim]` of a cache `[blocks, kv_heads, block_size, 2 * head_dim]`."""
    return kv_cache.unflatten(-1, (2, -1)).permute(0, 3, 2, 1, 4)
