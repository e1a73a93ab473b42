"""Draws and verifies chains for requests that sample, in Model Runner V2 on a CPU."""

from typing import Any

import numpy as np
import torch
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler

from vllm_eagle3.runner.v2.tree_draws import distributions
from vllm_eagle3.runner.v2.tree_limits import may_draw
from vllm_eagle3.tree.drawn import DrawnTrees, accept_drawn, draw_children


class ChainDraws:
    """The distributions that the drafts of chains were drawn from, over the draft's own vocabulary."""

    def __init__(self, model: Any, requests: int, drafts: int, dtype: torch.dtype) -> None:
        """model: the draft. requests, drafts: the most of a batch and of a request. dtype: of the distributions."""
        self.model = model
        self.drawn_from = distributions(model, requests, drafts, dtype, "chains")
        self.drawn = torch.zeros(requests, dtype=torch.bool)  # requests whose drafts are drawn

    def active(self, requests: torch.Tensor) -> bool:
        """Whether some of these requests (int64 [batch], request-state index) draws."""
        return bool(self.drawn[requests].any())

    def draw(
        self, hidden_states: torch.Tensor, requests: torch.Tensor, temperature: torch.Tensor, step: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Target ids and probabilities [batch] of the drafts of a step, which are drawn if the request draws.

        hidden_states: normed outputs [batch, h]. temperature: float [requests], by request-state index.
        """
        q, _, target_ids = self.drawn_from
        logits, drawn = self.model.draft_logits(hidden_states), self.drawn[requests]
        found = draw_children(logits, temperature[requests], drawn, 1, q.dtype)
        q[requests, step] = found.q
        return target_ids[found.ids[:, 0]], found.log_probs[:, 0].exp()

    def chains(self, requests: torch.Tensor, columns: int) -> DrawnTrees:
        """The data that verification needs for the chains of these requests, of up to `columns` - 1 drafts."""
        q, draft_ids, target_ids = self.drawn_from
        step = torch.arange(columns)
        expanded = torch.where(step < q.shape[1], step, -1).repeat(len(requests), 1)
        return DrawnTrees(q[requests], expanded, torch.zeros(len(requests)).long(), draft_ids, target_ids)


class ChainModelState(DefaultModelState):
    """Keeps which requests may draw, and verifies their drafts by another rule."""

    draws: ChainDraws  # set by the speculator

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        super().add_request(req_index, new_req_data)
        self.draws.drawn[req_index] = may_draw(new_req_data.sampling_params)

    def custom_sampler(self, sampler: Any) -> tuple[Any, Any]:
        speculative = self.vllm_config.speculative_config
        return sampler, ChainRejectionSampler(self, sampler, speculative, self.device)


class ChainRejectionSampler(RejectionSampler):
    """Verifies drawn chains by `tree.drawn.accept_drawn`, others by vLLM's rule for drafts without a distribution."""

    def __init__(self, state: ChainModelState, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.state = state

    def _verify(self, logits: torch.Tensor, draft_logits: torch.Tensor | None, draft_sampled: torch.Tensor,
                pos: torch.Tensor, cu_num_logits: torch.Tensor, idx_mapping: torch.Tensor,
                idx_mapping_np: np.ndarray, expanded_idx_mapping: torch.Tensor, expanded_local_pos:
                torch.Tensor, seq_lens_upper_bound_np: np.ndarray, verify_draft_sampled: torch.Tensor,
                ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
        draws = self.state.draws
        at = draws.drawn[idx_mapping].nonzero()[:, 0]
        if len(at) < len(idx_mapping):
            processed, sampled, count = super()._verify(
                logits, draft_logits, draft_sampled, pos, cu_num_logits, idx_mapping, idx_mapping_np,
                expanded_idx_mapping, expanded_local_pos, seq_lens_upper_bound_np, verify_draft_sampled,
            )  # fmt: skip
        else:
            processed = self.sampler.apply_sampling_params(
                logits, expanded_idx_mapping, idx_mapping, idx_mapping_np, pos, draft_sampled,
                expanded_local_pos, seq_lens_upper_bound_np,
            )  # fmt: skip
            sampled = torch.zeros(len(at), self.num_speculative_steps + 1, dtype=torch.int64)
            count = torch.zeros(len(at), dtype=torch.int32)
        if len(at):
            first, last = cu_num_logits[:-1].long()[at, None], cu_num_logits[1:].long()[at, None]
            step = torch.arange(sampled.shape[1])
            rows = torch.where(first + step < last, first + step, first)
            tokens = verify_draft_sampled[rows].long().masked_fill(first + step >= last, -1)
            parents = (step - 1).repeat(len(at), 1)
            chains = draws.chains(idx_mapping[at], len(step))
            _, emitted, number = accept_drawn(parents, tokens, processed, rows, chains)
            sampled[at], count[at] = emitted.to(sampled.dtype), number.to(count.dtype)
        return processed, sampled, count
