"""The EAGLE-3 draft as a vLLM module: vLLM's own layers, loaded from the canonical form, with a cheaper step.

Beside vLLM's `forward` (one fused layer over all rows, used where CUDA graphs capture it) there is `step`: it
writes keys and values for all rows but computes attention, MLP and output only for the rows that draft. A draft has
one layer, so nothing else ever reads the other rows.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.models.llama_eagle3 import Eagle3LlamaForCausalLM
from vllm.model_executor.models.qwen3_eagle3 import Eagle3Qwen3ForCausalLM

from vllm_eagle3.checkpoint import canonical_tensors
from vllm_eagle3.config import Eagle3Options
from vllm_eagle3.kernels.concat_fc import concat_fc
from vllm_eagle3.model.activate import draft_config


class _DraftMixin(nn.Module):
    """What this project adds to vLLM's EAGLE-3 modules; the base class comes second in the MRO."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.draft_config = draft_config(vllm_config)
        self.fused_kernels = Eagle3Options.from_additional_config(vllm_config.additional_config).fused_kernels
        self.source = vllm_config.speculative_config.draft_model_config.model
        self.draft_to_target: torch.Tensor | None = None
        """[draft_vocab] int64: target id of each draft id; None where the vocabularies are equal."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load tensors of any dialect. Raises CheckpointError on what is missing, unknown or misshapen."""
        super().load_weights(canonical_tensors(self.draft_config, weights, source=self.source))
        offsets = self.draft_id_to_target_id
        if offsets is not None:
            self.draft_to_target = torch.arange(len(offsets), device=offsets.device) + offsets.data

    def fuse(self, states: Sequence[torch.Tensor]) -> torch.Tensor:
        """g [n, h] = fc([low; mid; high]) from the target's states, each [n, h_target]."""
        fc, norms = self.model.fc, self.model.fc_norm
        if not (self.fused_kernels and states[0].is_cuda and type(fc.quant_method) is UnquantizedLinearMethod):
            return self.combine_hidden_states(torch.cat(tuple(states), dim=-1))
        return concat_fc(
            states,
            fc.weight,
            norm_weights=None if norms is None else [norm.weight for norm in norms],
            input_norm=self.model.input_norm.weight if self.model.norm_before_fc else None,
            eps=self.config.rms_norm_eps,
        )

    def get_top_tokens(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Most likely target ids [n] int64 for normed outputs [n, h]: argmax in the draft vocabulary, then mapped."""
        ids = self.logits_processor.get_top_tokens(self.lm_head, hidden_states)
        return ids if self.draft_to_target is None else self.draft_to_target[ids]

    def draft_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits [n, draft_vocab] for normed outputs [n, h], not scattered into the target's vocabulary."""
        return self.logits_processor(self.lm_head, hidden_states)

    def step(
        self,
        input_ids: torch.Tensor,
        hidden_states: torch.Tensor,
        positions: torch.Tensor,
        slot_mapping: torch.Tensor | None,
        attn_metadata: Any,
        rows: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One draft step over n rows of which r draft.

        Args:
            input_ids: [n] token after each row's state.
            hidden_states: [n, h] g of each row (or a of its parent).
            positions: [n] positions of the states.
            slot_mapping: [n] KV slots of the rows; None writes no KV (profiling).
            attn_metadata: metadata of the backend for r queries, one a request; None skips attention.
            rows: [r] indices of the rows that draft; None means all.

        Returns:
            (norm(a), what the next step takes for g), both [r, h].
        """
        layer, model = self.model.layers[0], self.model
        attention, attn = layer.self_attn, layer.self_attn.attn
        embeds = layer.input_layernorm(model.embed_tokens(input_ids))
        normed, residual = layer._residual_norm(hidden_states=hidden_states)
        qkv, _ = attention.qkv_proj(torch.cat([embeds, normed], dim=-1))
        query, key, value = self._rotated(attention, qkv, positions)
        key = key.view(-1, attention.num_kv_heads, attention.head_dim)
        value = value.view(-1, attention.num_kv_heads, attention.head_dim)
        if slot_mapping is not None:
            attn.impl.do_kv_cache_update(attn, key, value, attn.kv_cache, slot_mapping)
        if rows is not None:
            query, key, value, residual = query[rows], key[rows], value[rows], residual[rows]
        query = query.view(-1, attention.num_heads, attention.head_dim)
        context = torch.empty_like(query)
        attn.impl.forward(attn, query, key, value, attn.kv_cache, attn_metadata, output=context)
        output, _ = attention.o_proj(context.view(len(context), -1))
        output, residual = layer.post_attention_layernorm(output, residual)
        output, prenorm = model.norm(layer.mlp(output), residual)
        return output, output if model.norm_output else prenorm

    @staticmethod
    def _rotated(
        attention: nn.Module, qkv: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        query, key, value = qkv.split([attention.q_size, attention.kv_size, attention.kv_size], dim=-1)
        if hasattr(attention, "q_norm"):  # Qwen3: a norm per head
            heads = (-1, attention.head_dim)
            query = attention.q_norm(query.unflatten(-1, heads)).flatten(-2)
            key = attention.k_norm(key.unflatten(-1, heads)).flatten(-2)
        query, key = attention.rotary_emb(positions, query, key)
        return query, key, value


class Eagle3LlamaDraft(_DraftMixin, Eagle3LlamaForCausalLM):
    """Draft with a Llama-style layer."""


class Eagle3Qwen3Draft(_DraftMixin, Eagle3Qwen3ForCausalLM):
    """Draft with a Qwen3-style layer (norms on q and k)."""
