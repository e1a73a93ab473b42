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

from vllm_eagle3.model.activate import activate
from vllm_eagle3.runner.chain import draft_chain
from vllm_eagle3.runner.policy_install import in_charge
from vllm_eagle3.runner.startup_log import report

logger = logging.getLogger("vllm.eagle3")


class Eagle3Proposer(EagleProposer):
    """vLLM's EagleProposer with this project's draft, which drafts in its own vocabulary.

    vLLM also builds it for other methods, and for drafts that this project leaves to vLLM. Then `draft_config` is None
    and every override calls super().
    """

    model: Any

    def __init__(self, vllm_config: VllmConfig, device: torch.device | str, runner: Any = None) -> None:
        device = torch.device(device)  # vLLM takes a name as well
        self.draft_config = activate(vllm_config)
        super().__init__(vllm_config, device, runner)
        # Where no CUDA graph is captured, one step over the drafting rows is faster than vLLM's padded loop.
        self.direct = self.draft_config is not None and device.type == "cpu"
        self.may_stop = (
            self.direct
            and in_charge(vllm_config)
            and not vllm_config.scheduler_config.async_scheduling  # it has announced the number of drafts already
            and vllm_config.parallel_config.world_size == 1  # otherwise no rank sees all logits
        )

    def load_model(self, target_model: torch.nn.Module) -> None:
        super().load_model(target_model)
        if self.draft_config is not None:
            # A target with LoRA shares an embedding whose wrapper expects the rows of the target's step.
            model = self.model.model
            model.embed_tokens = getattr(model.embed_tokens, "base_layer", model.embed_tokens)
            form = "graphs" if not self.direct else "direct, int8" if self.model.int8 else "direct"
            report(self.draft_config, "V1", self.vllm_config, form)
        if self.direct:
            # Loading replaced some weights by packed ones. The old ones print an error if they are freed while
            # torch.compile traces.
            gc.collect()

    def _greedy_sample(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.draft_config is None:
            return super()._greedy_sample(hidden_states)
        return self.model.get_top_tokens(hidden_states)

    def _sample_draft_tokens(
        self, hidden_states: torch.Tensor, sampling_metadata: SamplingMetadata
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Draft ids [n] and, for probabilistic drafts, their distribution [n, vocab] for the rejection sampler."""
        if (
            self.draft_config is None
            or not self._enable_probabilistic_draft_probs
            or sampling_metadata.all_greedy
        ):
            return super()._sample_draft_tokens(hidden_states, sampling_metadata)
        logits = self.model.draft_logits(hidden_states)
        ids, draft_probs = compute_probs_and_sample_next_token(
            logits, sampling_metadata, self.use_fp64_gumbel
        )
        for seeded in (
            sampling_metadata.generators
        ):  # upstream draws without seeds, so requests with a seed draft the best token
            ids[seeded] = draft_probs[seeded].argmax()
            draft_probs[seeded] = 0.0
            draft_probs[seeded, ids[seeded]] = 1.0
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
        """Draft ids [batch, num_speculative_tokens], or one list per request if chains may stop early.

        The arguments are upstream's.
        """
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
        rows = token_indices_to_sample
        return self._propose_direct(
            target_token_ids,
            target_positions,
            self.model.combine_hidden_states(target_hidden_states),
            next_token_ids,
            common_attn_metadata.query_start_loc[1:] - 1 if rows is None else rows,
            common_attn_metadata,
            sampling_metadata,
            num_rejected_tokens_gpu,
        )

    def _propose_direct(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        g: torch.Tensor,
        next_token_ids: torch.Tensor,
        rows: torch.Tensor,
        metadata: CommonAttentionMetadata,
        sampling_metadata: SamplingMetadata,
        num_rejected: torch.Tensor | None,
    ) -> torch.Tensor | list[list[int]]:
        """As `propose`: one step over all rows, then one step per draft over the rows that draft.

        token_ids, positions, g: of all n rows of the batch, g [n, h]. next_token_ids [batch]: the last token of each
        request. rows [batch]: the row of each request that drafts. num_rejected: drafts that each request rejected.
        """
        self._last_draft_probs = None
        drafting = self._one_query_per_request(metadata, num_rejected)
        hidden_states, g = self._first_step(
            token_ids, positions, g, next_token_ids, rows, metadata.slot_mapping, drafting
        )
        if self.num_speculative_tokens == 0:
            return torch.empty(drafting.num_reqs, 0, dtype=torch.int64)
        return self._extend_chain(hidden_states, g, positions[rows], drafting, sampling_metadata)

    def _first_step(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        g: torch.Tensor,
        next_token_ids: torch.Tensor,
        rows: torch.Tensor,
        slot_mapping: torch.Tensor,
        drafting: CommonAttentionMetadata,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the draft's keys and values of all rows. Returns (norm(a), next g) of the rows that draft, [batch, h].

        If there are no drafts to make, no row drafts, and the step only extends the draft's KV cache as the target's.
        """
        # [a1, b1, b2, c1, c2] -> [a2, b2, b3, c2, c3]: each row has a state and the token after it.
        input_ids = torch.roll(token_ids, -1)
        input_ids[rows] = next_token_ids.to(input_ids.dtype)
        inputs = (input_ids, g, positions, slot_mapping[: len(input_ids)])
        if self.num_speculative_tokens == 0:
            self.model.write_keys_values(*inputs)
            return g[:0], g[:0]
        return self.model.step(*inputs, self._metadata(drafting, 0), rows=rows)

    def _extend_chain(
        self,
        hidden_states: torch.Tensor,
        g: torch.Tensor,
        positions: torch.Tensor,
        metadata: CommonAttentionMetadata,
        sampling_metadata: SamplingMetadata,
    ) -> torch.Tensor | list[list[int]]:
        """Draft from the output of the first step, until num_speculative_tokens or until every chain has stopped."""
        sampled = self._enable_probabilistic_draft_probs and not sampling_metadata.all_greedy
        may_stop = self.may_stop and not sampled
        probs: list[torch.Tensor] = []

        def next_step(
            index: int, ids: torch.Tensor, state: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            nonlocal positions
            self.positions[: len(positions)] = positions
            positions = self._update_positions_dependent_metadata(
                positions, metadata, len(positions), len(positions), self.block_size
            )
            return self.model.step(
                ids, state, positions, metadata.slot_mapping, self._metadata(metadata, index)
            )

        def sample(index: int, states: torch.Tensor) -> torch.Tensor:
            ids, step_probs = self._sample_draft_tokens(states, sampling_metadata)
            if step_probs is not None:
                probs.append(step_probs)
            return ids

        first, most = (hidden_states, g), self.num_speculative_tokens

        def confident(index: int, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.model.get_confident_tokens(states)

        chain = draft_chain(first, most, next_step, sample, confident if may_stop else None)
        if probs:
            self._last_draft_probs = torch.stack(probs, dim=1).contiguous()
        drafts = torch.stack(chain.ids, dim=1)
        if not may_stop:
            return drafts
        return [row[:n] for row, n in zip(drafts.tolist(), chain.lengths.tolist(), strict=True)]

    def _one_query_per_request(
        self, cad: CommonAttentionMetadata, num_rejected: torch.Tensor | None
    ) -> CommonAttentionMetadata:
        """The attention metadata of the rows that draft: one query per request, after its accepted tokens."""
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
        """Warm-up and profiling. Runs the layer without attention, and compiles nothing that serving does not use."""
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
