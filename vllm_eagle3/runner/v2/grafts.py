"""Grafts in Model Runner V2: tokens that followed an earlier occurrence of a request's newest tokens join its tree."""

from typing import Any, NamedTuple

import torch

from vllm_eagle3.config import GraftOptions
from vllm_eagle3.runner.v2.tree_state import TreeState
from vllm_eagle3.tree.graft import Grafted, graft, worthwhile
from vllm_eagle3.tree.lookup import look_up


class Found(NamedTuple):
    """Continuations of a batch."""

    tokens: torch.Tensor  # int64 [batch, length], -1 for none
    match: torch.Tensor  # int64 [batch], length of the match
    survival: torch.Tensor  # float [batch, length], as from MatchRates, 0 for none


class Grafts:
    """Looks up continuations in the runner's own token buffers, on the device, and merges them into grown trees."""

    def __init__(self, options: GraftOptions, req_states: Any) -> None:
        """req_states: the runner's RequestState.

        While trees grow it contains each prompt and answer, with the tokens that the last step accepted and sampled.
        """
        self.options, self.req_states = options, req_states

    def learn(self, input_batch: Any, trees: TreeState, num_sampled: torch.Tensor) -> None:
        """Learn the acceptance of a batch's last grafts.

        input_batch: the verified batch. num_sampled: int [batch], tokens that each request got.
        """
        drafted = input_batch.cu_num_logits[: input_batch.num_reqs + 1].diff().long() - 1
        trees.learn_from_grafts(input_batch.idx_mapping, drafted, num_sampled.long() - 1)

    def look_up(self, input_batch: Any, trees: TreeState) -> Found:
        """Find a batch's next continuations. Drafts of a request whose prompt is not read yet are never verified."""
        states, length = self.req_states, self.options.length
        batch, requests = input_batch.num_reqs, input_batch.idx_mapping
        longest = int(input_batch.seq_lens_cpu_upper_bound[:batch].max()) + 1  # the longest text
        texts = states.all_token_ids.gpu[requests, :longest]
        ends = states.total_len.gpu[requests].clamp(max=longest)
        found = look_up(texts, ends, length, self.options.min_match)
        survival = trees.rates.survival(requests, found.match, length)
        return Found(found.tokens, found.match, survival.masked_fill(found.match[:, None] == 0, 0.0))

    def merge(
        self,
        found: Found,
        tokens: torch.Tensor,
        parents: torch.Tensor,
        values: torch.Tensor,
        places: int,
        chain: torch.Tensor,
    ) -> Grafted:
        """The trees with those tokens of their grafts that are likelier than the nodes they replace; see `tree.graft`.

        tokens, parents: int64 [batch, nodes], the grown trees. values: float [batch, nodes], by which their nodes were
        kept. chain: bool [batch], requests that need a chain.
        """
        step = torch.arange(found.tokens.shape[1], device=tokens.device)
        beyond = step >= worthwhile(found.survival, values, places)[:, None]
        return graft(tokens, parents, found.tokens.masked_fill(beyond, -1), places, chain)
