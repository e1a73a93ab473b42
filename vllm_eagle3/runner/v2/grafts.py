"""Grafts in Model Runner V2: what followed a request's newest tokens before joins its draft tree."""

from typing import Any

import torch

from vllm_eagle3.config import GraftOptions
from vllm_eagle3.tree.graft import Grafted, graft
from vllm_eagle3.tree.lookup import look_up


class Grafts:
    """Looks up continuations in the runner's own token buffers, on the device, and merges them into grown trees."""

    def __init__(self, options: GraftOptions, req_states: Any) -> None:
        """req_states: the runner's RequestState.

        When trees grow it holds each prompt and answer, with the tokens that the last step accepted and sampled.
        """
        self.options, self.req_states = options, req_states

    def merge(
        self,
        requests: torch.Tensor,
        tokens: torch.Tensor,
        parents: torch.Tensor,
        places: int,
        chain: torch.Tensor,
        longest: int,
    ) -> Grafted:
        """The trees with their grafts; see `tree.graft.graft`.

        requests: int64 [batch], request-state index. tokens, parents: int64 [batch, nodes], the grown trees. chain:
        bool [batch], requests that need a chain. longest: an upper bound, known on the host, of the lengths of texts
        that are decoded. The drafts of a request whose prompt is not read yet are never verified.
        """
        states, options = self.req_states, self.options
        texts = states.all_token_ids.gpu[requests, :longest]
        ends = states.total_len.gpu[requests].clamp(max=longest)
        length = min(options.length, (places + 1) // 2)  # a weak match must not displace a small tree
        found = look_up(texts, ends, length, options.min_match)
        return graft(tokens, parents, found.tokens, places, chain)
