"""Chains on vLLM's V2 model runner."""

from typing import Any

import torch
from vllm.v1.worker.gpu.spec_decode.eagle.speculator import EagleSpeculator


class Eagle3Speculator(EagleSpeculator):
    """vLLM's EagleSpeculator with this project's draft.

    It fuses the target's states without concatenating them, and takes the argmax in the draft's own vocabulary.
    """

    model: Any

    def propose(
        self,
        input_batch: Any,
        attn_metadata: dict[str, Any],
        slot_mappings: dict[str, torch.Tensor],
        last_hidden_states: torch.Tensor,
        aux_hidden_states: list[torch.Tensor] | None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Draft ids [num_reqs, num_speculative_tokens]; arguments as upstream's.

        Upstream concatenates the aux states and fuses them. It does neither when it gets g as the last hidden states.
        """
        g = self.model.fuse(aux_hidden_states) if aux_hidden_states else last_hidden_states
        return super().propose(input_batch, attn_metadata, slot_mappings, g, None, *args, **kwargs)

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
