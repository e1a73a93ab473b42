"""How often a looked-up token equals the target's, by the length of the match. Grafts are cut by these rates."""

import torch
from torch import Tensor

from vllm_eagle3.tree.lookup import MAX_MATCH

PRIOR = (0.0, 0.2, 0.4, 0.55, 0.65, 0.7, 0.75, 0.8, 0.85)
"""Rates by match length, 0 to MAX_MATCH, until others were seen: a guess."""
PRIOR_WEIGHT = 8.0  # weight of PRIOR, in observations
POOLED_WEIGHT = 4.0  # weight of the rates of all requests beside a request's own, in observations
KEEP = 0.98  # share of a match length's counts that is kept after each of its observations


class MatchRates:
    """The rates of all requests together and of each request, on the device, learned from verifications.

    Each accepted token of a graft makes the match one token longer. So if all tokens before it are accepted, the token
    at place j of a graft whose match had m tokens is accepted with the rate of matches of m + j tokens. Matches of
    MAX_MATCH tokens and more share one rate.
    """

    def __init__(self, requests: int, device: torch.device | str = "cpu") -> None:
        """requests: the most requests of an engine."""
        sizes = MAX_MATCH + 1
        self.prior = torch.tensor(PRIOR, device=device)
        self.tried = torch.zeros(sizes, device=device)
        self.right = torch.zeros(sizes, device=device)
        self.own_tried = torch.zeros(requests, sizes, device=device)
        self.own_right = torch.zeros(requests, sizes, device=device)

    def forget(self, request: int) -> None:
        """Forget a request, because another one gets its index of request states."""
        self.own_tried[request] = 0
        self.own_right[request] = 0

    def observe(
        self, requests: Tensor, match: Tensor, verified: Tensor, accepted: Tensor, length: int
    ) -> None:
        """Learn from a verification. Recent observations have more weight.

        requests: int64 [batch], request-state index. match: int64 [batch], length of the match of each graft. verified,
        accepted: int64 [batch], how many nodes of the graft were verified and accepted. length: the most nodes of a
        graft.
        """
        step, size = self._steps(match, length)
        tried = ((step < verified[:, None]) & (step <= accepted[:, None])).float()
        right = (step < torch.minimum(verified, accepted)[:, None]).float()
        new_tried = torch.zeros_like(self.own_tried[requests]).scatter_add_(1, size, tried)
        new_right = torch.zeros_like(new_tried).scatter_add_(1, size, right)
        kept = KEEP**new_tried
        self.own_tried[requests] = kept * self.own_tried[requests] + new_tried
        self.own_right[requests] = kept * self.own_right[requests] + new_right
        kept = KEEP ** new_tried.sum(0)
        self.tried.mul_(kept).add_(new_tried.sum(0))
        self.right.mul_(kept).add_(new_right.sum(0))

    def survival(self, requests: Tensor, match: Tensor, length: int) -> Tensor:
        """Probability that a graft is accepted up to and with each of its tokens, float [batch, length].

        requests, match: as in `observe`. Without a match the result has no meaning.
        """
        pooled = (self.right + PRIOR_WEIGHT * self.prior) / (self.tried + PRIOR_WEIGHT)
        own = (self.own_right[requests] + POOLED_WEIGHT * pooled) / (self.own_tried[requests] + POOLED_WEIGHT)
        return own.gather(1, self._steps(match, length)[1]).cumprod(dim=1)

    @staticmethod
    def _steps(match: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Places of a graft [length], and the length of the match at each of them [batch, length]."""
        step = torch.arange(length, device=match.device)
        return step, (match[:, None] + step).clamp(max=MAX_MATCH)
