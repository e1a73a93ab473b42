"""Draws the children of tree nodes for requests that sample, in Model Runner V2."""

import logging
from functools import partial
from typing import Any

import torch

from vllm_eagle3.config import TreeOptions
from vllm_eagle3.runner.v2.tree_state import DrawnFrom, TreeState
from vllm_eagle3.tree.drawn import draw_children
from vllm_eagle3.tree.growth import Growth, Level

logger = logging.getLogger("vllm.eagle3")


def distributions(model: Any, requests: int, expansions: int, dtype: torch.dtype, form: str) -> DrawnFrom:
    """Room for the distributions of a draft, of so many expansions for each request; logs how much memory that is."""
    config, target_ids = model.draft_config, model.draft_to_target
    q = torch.zeros(requests, expansions, config.draft_vocab_size, dtype=dtype)
    if target_ids is None:
        target_ids = torch.arange(config.draft_vocab_size)
    draft_ids = torch.full((config.vocab_size,), -1)
    draft_ids[target_ids] = torch.arange(len(target_ids))
    logger.info(
        "vllm-eagle3: %s are drawn where requests sample; the draft's distributions take %.0f MB (%d requests, %d "
        "distributions of %d tokens for each). The option draft_sampling 'greedy' does without",
        form,
        q.nbytes / 1e6,
        requests,
        expansions,
        config.draft_vocab_size,
    )
    return DrawnFrom(q, draft_ids, target_ids)


class TreeDraws:
    """Children of nodes, drawn for requests that draw, and the distributions that they were drawn from.

    The distributions are in the tree state, where verification reads them. A step calls `begin`, then `children` for
    each level of the growth, and `record` when the trees have their final node numbers.
    """

    def __init__(self, model: Any, tree: TreeOptions, tree_state: TreeState, dtype: torch.dtype) -> None:
        """model: the draft. dtype: that the distributions are kept in."""
        self.model, self.width, self.tree_state = model, tree.topk, tree_state
        self.requests = torch.empty(0, dtype=torch.int64)
        self.active = False  # whether any request of this batch draws
        expansions = 1 + (tree.depth - 1) * tree.topk
        self.places = torch.zeros(len(tree_state.drawn), expansions, tree.topk)
        self.expanded = torch.zeros(len(tree_state.drawn), tree.nodes + 1, dtype=torch.int64)
        tree_state.draws = distributions(model, len(tree_state.drawn), expansions, dtype, "trees")

    def begin(self, requests: torch.Tensor, width: int) -> None:
        """Begin a batch of these requests (int64 [batch], request-state index) with `width` children per node."""
        self.requests, self.width = requests, width
        self.active = bool(self.tree_state.drawn[requests].any())

    def children(
        self, hidden_states: torch.Tensor, temperature: torch.Tensor, at: slice, level: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities and target ids of the children, both [n, width], of the requests `at` of the batch.

        hidden_states: normed outputs [n, h] of the nodes that a level expands, as many for each request; level 0 is the
        root's. temperature: float [requests], by request-state index.
        """
        assert self.tree_state.draws is not None
        q, _, target_ids = self.tree_state.draws
        requests = self.requests[at]
        expanded = len(hidden_states) // len(requests)
        own = slice(1 + (level - 1) * self.width if level else 0, 1 + level * self.width)
        rows = requests.repeat_interleave(expanded)
        logits = self.model.draft_logits(hidden_states)
        found = draw_children(logits, temperature[rows], self.tree_state.drawn[rows], self.width, q.dtype)
        q[requests, own] = found.q.view(len(requests), expanded, -1)
        self.places[at, own, : self.width] = found.places.view(len(requests), expanded, -1)
        return found.log_probs, target_ids[found.ids]

    def growth(self, at: slice) -> Any:
        """The class of growth for the requests `at`, which keeps nodes by their places."""
        return partial(DrawnGrowth, self.places[at, :, : self.width], self.expanded[at])

    def record(self, number: torch.Tensor, given: torch.Tensor) -> None:
        """Keep the numbers of the trees that will be verified: number and added of `tree.graft.Grafted`.

        Without a tree only roots have numbers.
        """
        state, columns = self.tree_state, number.shape[1]
        beyond = state.expanded.shape[1]
        expanded = number.new_full((len(number), beyond + 1), -1)
        if columns > 1:
            expanded.scatter_(1, number.clamp(max=beyond), self.expanded[: len(number), :columns])
        state.expanded[self.requests] = expanded[:, :beyond]
        state.given[self.requests] = given


class DrawnGrowth(Growth):
    """Growth that keeps nodes by the values of their places, and records the expansion of each node."""

    def __init__(self, places: torch.Tensor, expanded: torch.Tensor, *args: Any) -> None:
        """places: float [batch, expansions, width], read by level; expanded: int64 [batch, nodes + 1], written."""
        super().__init__(*args)
        self.places, self.expanded, self.first = places, expanded, 0

    def extend(
        self,
        log_probs: torch.Tensor,
        ids: torch.Tensor,
        states: torch.Tensor,
        places: torch.Tensor | None = None,
    ) -> Level:
        width = len(log_probs) // len(self.places)
        places = self.places[:, self.first : self.first + width]
        self.first += width
        return super().extend(log_probs, ids, states, places.reshape(log_probs.shape))

    def rerank(self, tokens: torch.Tensor, parents: torch.Tensor) -> torch.Tensor:
        super().rerank(tokens, parents)
        self.expanded[:, : tokens.shape[1] + 1] = self.tree.expanded
        return self.tree.values
