"""The EAGLE-3 speculator on vLLM's V2 model runner."""

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.v1.worker.gpu.spec_decode import init_speculator as stock_init_speculator
from vllm.v1.worker.gpu.spec_decode.eagle.speculator import EagleSpeculator

from vllm_eagle3.config import Eagle3Options
from vllm_eagle3.model.activate import activate
from vllm_eagle3.runner.startup_log import report, report_lookahead


def init_speculator(vllm_config: VllmConfig, device: torch.device, req_states: Any) -> Any:
    """Replaces vLLM's function of this name: our speculator for the drafts we serve, vLLM's for everything else."""
    ours = activate(vllm_config)
    if ours is None:
        return stock_init_speculator(vllm_config, device, req_states)
    options = Eagle3Options.from_additional_config(vllm_config.additional_config)
    if options.tree is not None:
        from vllm_eagle3.runner.v2.tree_speculator import make_tree_speculator

        report(ours, "V2", vllm_config, "tree")
        report_lookahead(vllm_config, options.tree)
        return make_tree_speculator(vllm_config, device, options)
    report(ours, "V2", vllm_config, "chain")
    return Eagle3Speculator(vllm_config, device)


class Eagle3Speculator(EagleSpeculator):
    """vLLM's EagleSpeculator with this project's draft: states fused without concatenation, argmax in the draft's
    own vocabulary."""

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

        Upstream concatenates the aux states and fuses them; handing it g as the last hidden states skips both.
        """
        g = self.model.fuse(aux_hidden_states) if aux_hidden_states else last_hidden_states
        return super().propose(input_batch, attn_metadata, slot_mappings, g, None, *args, **kwargs)

    def get_draft_top_tokens(self, hidden_states: torch.Tensor, spec_step_idx: int) -> torch.Tensor:
        return self.model.get_top_tokens(hidden_states)

    def sample_draft(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Draft ids [num_reqs]; arguments as upstream's (0.33 has one more than 0.32).

        Greedy drafts need no logits in the target's vocabulary. The others do, because there the rejection sampler
        (or the acceptance estimator of adaptive verification) compares distributions.
        """
        if self.draft_logits is None and self.acceptance_estimator is None:
            return self.model.get_top_tokens(hidden_states)
        return super().sample_draft(hidden_states, *args, **kwargs)
