"""The EAGLE-3 proposer on vLLM's V1 model runner."""

import gc
import logging
from dataclasses import replace
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.spec_decode.eagle import EagleProposer
from vllm.v1.spec_decode.llm_base_proposer import compute_probs_and_sample_next_token

from vllm_eagle3.config import Eagle3Options
from vllm_eagle3.model.activate import activate
from vllm_eagle3.runner.policy_scheduler import in_charge
from vllm_eagle3.runner.startup_log import report

logger = logging.getLogger("vllm.eagle3")


class Eagle3Proposer(EagleProposer):
    """vLLM's EagleProposer with this project's draft, drafting in the draft's own vocabulary.

    Stands in for EagleProposer under its name, so it also serves what is not ours (other methods; drafts left to
    stock vLLM): then `ours` is None and every override steps aside.
    """

    model: Any
    STOP = 0.2
    """Under policy "auto", a chain goes on while the draft gives it this probability of holding so far. See
    docs/policy.md."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, runner: Any = None) -> None:
        self.ours = activate(vllm_config)
        if self.ours is not None and Eagle3Options.from_additional_config(vllm_config.additional_config).tree:
            raise ValueError(
                "additional_config: option 'eagle3.tree': draft trees need vLLM's V2 model runner, found the V1 "
                "runner. Unset VLLM_USE_V2_MODEL_RUNNER=0, or leave the option out to draft chains"
            )
        super().__init__(vllm_config, device, runner)
        # Where nothing is captured in graphs, one step over the drafting rows beats vLLM's padded loop.
        self.direct = self.ours is not None and device.type == "cpu"
        self.may_stop = (
            self.direct
            and in_charge(vllm_config)
            and not vllm_config.scheduler_config.async_scheduling  # which has promised the drafts already
            and vllm_config.parallel_config.world_size == 1  # otherwise no rank sees all logits
        )

    def load_model(self, target_model: torch.nn.Module) -> None:
        super().load_model(target_model)
        if self.ours is not None:
            form = "graphs" if not self.direct else "direct, int8" if self.model.int8 else "direct"
            report(self.ours, "V1", self.vllm_config, form)
        if self.direct:
            gc.collect()  # packed weights that loading replaced: freed while torch.compile traces, they print an error

    def _greedy_sample(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.ours is None:
            return super()._greedy_sample(hidden_states)
        return self.model.get_top_tokens(hidden_states)

    def _sample_draft_tokens(
        self, hidden_states: torch.Tensor, sampling_metadata: SamplingMetadata
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Draft ids [n] and, for probabilistic drafts, their distribution [n, vocab] for the rejection sampler."""
        if self.ours is None or not self._enable_probabilistic_draft_probs or sampling_metadata.all_greedy:
            return super()._sample_draft_tokens(hidden_states, sampling_metadata)
        logits = self.model.draft_logits(hidden_states)
        ids, draft_probs = compute_probs_and_sample_next_token(
            logits, sampling_metadata, self.use_fp64_gumbel
        )
        if self.model.draft_to_target is None:
            return ids, draft_probs
        probs = draft_probs.new_zeros(len(ids), self.model.config.vocab_size)
        probs[:, self.model.draft_to_target] = draft_probs
        return self.model.draft_to_target[ids], probs

    def propose(  # type: ignore[override]  # the runner takes lists too, as from vLLM's n-gram proposer
        self,
        num_speculative_tokens: int,
        target_token_ids: torch.Tensor,
        target_positions: torch.Tensor,
        target_hidden_states: torch.Tensor,
        next_token_ids: torch.Tensor,
        token_indices_to_sample: torch.Tensor | None,
        common_attn_metadata: CommonAttentionMetadata,
        sampling_metadata: SamplingMetadata,
        mm_embed_inputs: Any = None,
        num_rejected_tokens_gpu: torch.Tensor | None = None,
        slot_mappings: Any = None,
    ) -> torch.Tensor | list[list[int]]:
        """Draft ids [batch, num_speculative_tokens], or a list a request where chains may stop early; arguments
        as upstream's."""
        if not self.direct or self.supports_mm_inputs or self.uses_mrope:
            return super().propose(
                num_speculative_tokens,
                target_token_ids,
                target_positions,
                target_hidden_states,
                next_token_ids,
                token_indices_to_sample,
                common_attn_metadata,
                sampling_metadata,
                mm_embed_inputs,
                num_rejected_tokens_gpu,
                slot_mappings,
            )
        self.num_speculative_tokens = num_speculative_tokens
        self._last_draft_probs = None
        cad = common_attn_metadata
        if token_indices_to_sample is None:
            token_indices_to_sample = cad.query_start_loc[1:] - 1
        g = self.model.combine_hidden_states(target_hidden_states)
        # [a1, b1, b2, c1, c2] -> [a2, b2, b3, c2, c3]: each row joins a state with the token after it.
        input_ids = torch.roll(target_token_ids, -1)
        input_ids[token_indices_to_sample] = next_token_ids.to(input_ids.dtype)
        cad = self._one_query_per_request(cad, num_rejected_tokens_gpu)
        slot_mapping = common_attn_metadata.slot_mapping[: len(input_ids)]
        if num_speculative_tokens == 0:  # keep the draft's KV in step with the target's, and no more
            none = token_indices_to_sample[:0]
            self.model.step(input_ids, g, target_positions, slot_mapping, None, rows=none)
            return torch.empty(cad.num_reqs, 0, dtype=torch.int64)
        hidden_states, g = self.model.step(
            input_ids,
            g,
            target_positions,
            slot_mapping,
            self._metadata(cad, 0),
            rows=token_indices_to_sample,
        )
        positions = target_positions[token_indices_to_sample]
        ids: list[torch.Tensor] = []
        probs: list[torch.Tensor] = []
        sampled = self._enable_probabilistic_draft_probs and not sampling_metadata.all_greedy
        may_stop = self.may_stop and not sampled
        trust, lengths = torch.ones(cad.num_reqs), torch.zeros(cad.num_reqs, dtype=torch.int64)
        for index in range(num_speculative_tokens):
            going_on = trust >= self.STOP
            if not going_on.any():
                break
            lengths += going_on
            if index > 0:
                self.positions[: len(positions)] = positions
                positions = self._update_positions_dependent_metadata(
                    positions, cad, len(positions), len(positions), self.block_size
                )
                hidden_states, g = self.model.step(
                    ids[-1], g, positions, cad.slot_mapping, self._metadata(cad, index)
                )
            if may_stop and index + 1 < num_speculative_tokens:
                step_ids, confidence = self.model.get_confident_tokens(hidden_states)
                trust, step_probs = trust * confidence, None
            else:
                step_ids, step_probs = self._sample_draft_tokens(hidden_states, sampling_metadata)
            ids.append(step_ids)
            if step_probs is not None:
                probs.append(step_probs)
        if probs:
            self._last_draft_probs = torch.stack(probs, dim=1).contiguous()
        drafts = torch.stack(ids, dim=1)
        if not may_stop:
            return drafts
        return [row[:n] for row, n in zip(drafts.tolist(), lengths.tolist(), strict=True)]

    def _one_query_per_request(
        self, cad: CommonAttentionMetadata, num_rejected: torch.Tensor | None
    ) -> CommonAttentionMetadata:
        """The batch as the drafting rows see it: one query a request, at the end of what was accepted."""
        num_reqs = cad.num_reqs
        return replace(
            cad,
            num_actual_tokens=num_reqs,
            max_query_len=1,
            query_start_loc=self.arange[: num_reqs + 1],
            query_start_loc_cpu=torch.from_numpy(self.token_arange_np[: num_reqs + 1]),
            seq_lens=cad.seq_lens.clone() if num_rejected is None else cad.seq_lens - num_rejected,
        )

    def _metadata(self, cad: CommonAttentionMetadata, draft_index: int) -> Any:
        return self.build_per_group_and_layer_attn_metadata(cad, draft_index)[0][0]

    def dummy_run(self, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Warm-up and profiling: the layer without attention, so that nothing is compiled that is never used."""
        if not self.direct or self.supports_mm_inputs or self.uses_mrope:
            return super().dummy_run(num_tokens, *args, **kwargs)
        with set_forward_context(None, self.vllm_config, num_tokens=num_tokens):
            hidden_states, _ = self.model.step(
                self.input_ids[:num_tokens],
                self.hidden_states[:num_tokens],
                self.positions[:num_tokens],
                None,
                None,
            )
            self.model.get_top_tokens(hidden_states)
        return None
