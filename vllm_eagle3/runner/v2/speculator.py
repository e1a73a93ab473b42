"""Chains on vLLM's V2 model runner."""

from typing import Any

import torch
from vllm.v1.worker.gpu.spec_decode.eagle.speculator import EagleSpeculator
from vllm.v1.worker.gpu.spec_decode.target_dependent_ar.speculator import prepare_prefill_inputs


class Eagle3Speculator(EagleSpeculator):
    """vLLM's EagleSpeculator with this project's draft.

    It fuses the target's states without concatenating them, and takes the argmax in the draft's own vocabulary.
    """

    model: Any

    def load_model(self, target_model: torch.nn.Module) -> None:
        """As upstream's; then compiles the draft's kernels, which requests would otherwise wait for."""
        super().load_model(target_model)
        with torch.no_grad():
            self.model.round_weights()
            self.model.warm_up()

    def propose(
        self,
        input_batch: Any,
        attn_metadata: dict[str, Any],
        slot_mappings: dict[str, torch.Tensor],
        last_hidden_states: torch.Tensor,
        aux_hidden_states: list[torch.Tensor] | None,
        num_sampled: torch.Tensor,
        num_rejected: torch.Tensor,
        last_sampled: torch.Tensor,
        next_prefill_tokens: torch.Tensor,
        temperature: torch.Tensor,
        seeds: torch.Tensor,
        *args: Any,
        dummy_run: bool = False,
        num_speculative_tokens: int | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Draft ids [num_reqs, num_speculative_tokens]; arguments as upstream's.

        Upstream concatenates the aux states and fuses them. It does neither when it gets g as the last hidden states.
        Where nothing is to be drafted it runs the whole layer and the head: here only keys and values are written.
        """
        g = self.model.fuse(aux_hidden_states) if aux_hidden_states else last_hidden_states
        if num_speculative_tokens == 0 and self._writes_only() and not dummy_run:
            prepare_prefill_inputs(
                self.last_token_indices, self.current_draft_step, self.input_buffers, input_batch, num_sampled,
                num_rejected, last_sampled, next_prefill_tokens, self.max_num_reqs,
            )  # fmt: skip
            return self._write_keys_values(input_batch, slot_mappings, g)
        kwargs |= {"dummy_run": dummy_run, "num_speculative_tokens": num_speculative_tokens}
        return super().propose(
            input_batch, attn_metadata, slot_mappings, g, None, num_sampled, num_rejected, last_sampled,
            next_prefill_tokens, temperature, seeds, *args, **kwargs,
        )  # fmt: skip

    def _writes_only(self) -> bool:
        """Whether a step that drafts nothing can leave out what is behind the layer's keys and values."""
        return not (self.supports_mm_inputs or self.pcp_manager)

    def _write_keys_values(
        self, input_batch: Any, slot_mappings: dict[str, torch.Tensor], g: torch.Tensor
    ) -> torch.Tensor:
        """Keep the draft's cache in step with the target's. Returns drafts that are none, [num_reqs, drafts]."""
        (layer,) = self.draft_attn_layer_names
        tokens, buffers = input_batch.num_tokens, self.input_buffers
        self.model.write_keys_values(
            buffers.input_ids[:tokens], g[:tokens], buffers.positions[:tokens], slot_mappings[layer][:tokens]
        )
        return self.draft_tokens[: input_batch.num_reqs].fill_(-1)

    def get_draft_top_tokens(self, hidden_states: torch.Tensor, spec_step_idx: int) -> torch.Tensor:
        return self.model.get_top_tokens(hidden_states)

    def sample_draft(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Draft ids [num_reqs]; arguments as upstream's (0.33 has one more than 0.32).

        Greedy drafts need no logits in the target's vocabulary. The others do, because the rejection sampler (or the
        acceptance estimator of adaptive verification) then compares distributions.
        """
        if self.draft_logits is None and self.acceptance_estimator is None:
            return self.model.get_top_tokens(hidden_states)
        return super().sample_draft(hidden_states, *args, **kwargs)
