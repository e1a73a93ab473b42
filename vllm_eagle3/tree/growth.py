"""Draft trees as in EAGLE-2 (arXiv 2406.16858, section 4): expand level by level, then rerank.

Pure tensor code. Shapes depend only on depth, topk and batch, and the host never waits for the device.
"""

from typing import NamedTuple

import torch

from vllm_eagle3.kernels import top_k
from vllm_eagle3.kernels.cpu import Level

UNUSED = -1  # parent of an unused node


def candidates(depth: int, topk: int) -> int:
    """Number of nodes that an expansion scores: topk in the first level, topk * topk in each later level."""
    return topk + (depth - 1) * topk * topk


class Tree(NamedTuple):
    """`nodes` drafts per request, best first, so that the first n of them are the best tree of n nodes.

    Node 0 is the root (the last sampled token) and has no column; node i + 1 is column i. Parents come before
    children. An unused node has token 0, parent -1 and score -inf, and comes after all used nodes.
    """

    tokens: torch.Tensor  # [batch, nodes] int64, ids of the target vocabulary
    parents: torch.Tensor  # [batch, nodes] int64, node numbers
    scores: torch.Tensor  # [batch, nodes] float32, log-probability of the path in the draft
    values: (
        torch.Tensor
    )  # [batch, nodes] float32, what nodes are kept by, falling: scores or, of drawn ones, places
    expanded: torch.Tensor
    """[batch, nodes + 1] int64, root first: number of each node's expansion, -1 for none"""


class Frontier(NamedTuple):
    """The `topk` nodes of the newest level whose children are scored next."""

    tokens: torch.Tensor  # [batch, topk] int64, ids of the target vocabulary
    parents: torch.Tensor  # [batch, topk] int64, index in the previous frontier (0 at the first level)


class Expansion:
    """Scores candidates level by level. A candidate's score is the sum of log-probabilities along its path.

    1. The root's topk children are the first level. All of them are expanded.
    2. Each expanded node has topk children. The topk best of a level's topk^2 candidates are expanded next.
    3. At the end the `nodes` best candidates of all levels are kept; of equal scores, the lower index wins. A child
       never scores above its parent and has a higher index, so the kept candidates are connected.

    Requests in `chain` (bool `[batch]`) keep only the greedy path: every other candidate scores -inf.

    Children that were drawn (`tree/drawn.py`) are kept by the values of their places, which do not depend on the tokens
    drawn there. Expansions are numbered in order: the root's is 0, then topk per level.
    """

    def __init__(self, topk: int, chain: torch.Tensor) -> None:
        self.topk, self.chain = topk, chain[:, None]
        self.tokens: list[torch.Tensor] = []
        self.scores: list[torch.Tensor] = []
        self.places: list[torch.Tensor] = []  # what candidates are kept by
        self.parents: list[torch.Tensor] = []  # index among all candidates, -1 for the root
        self.frontiers: list[torch.Tensor] = []  # candidates of each level that may be expanded
        self._candidate = torch.full_like(self.chain, -1, dtype=torch.int64)  # the frontier's indices
        self._score = torch.zeros_like(self.chain, dtype=torch.float32)

    def grow(
        self, log_probs: torch.Tensor, tokens: torch.Tensor, places: torch.Tensor | None = None
    ) -> Frontier:
        """Add the children of the frontier, all `[batch, frontier, topk]`. The first frontier is the root alone.

        Children come in order of falling probability or, if they were drawn, in the order of the draws. `places` are
        the log-values of drawn children's places. Returns the new frontier.
        """
        only_first = torch.arange(log_probs[0].numel(), device=log_probs.device) > 0

        def along_path(values: torch.Tensor) -> torch.Tensor:
            summed = (self._score[..., None] + values).flatten(1)
            return summed.masked_fill(self.chain & only_first, float("-inf"))

        scores = along_path(log_probs)
        self.places.append(scores if places is None else along_path(places))
        base = sum(level.shape[1] for level in self.scores)
        self.tokens.append(tokens.flatten(1))
        self.scores.append(scores)
        self.parents.append(self._candidate.repeat_interleave(self.topk, dim=1))
        self._score, index = top_k(scores, self.topk)
        self._candidate = base + index
        self.frontiers.append(self._candidate)
        return Frontier(self.tokens[-1].gather(1, index), index // self.topk)

    def rerank(self, nodes: int) -> Tree:
        """The best `nodes` candidates as a tree. If there are fewer candidates, the last nodes are unused."""
        all_parents = torch.cat(self.parents, 1)
        kept = min(nodes, all_parents.shape[1])
        places, index = top_k(torch.cat(self.places, 1), kept)
        node = torch.zeros_like(all_parents).scatter(
            1, index, torch.arange(1, kept + 1, device=index.device).expand_as(index)
        )
        parent = all_parents.gather(1, index)
        parents = torch.where(parent < 0, 0, node.gather(1, parent.clamp(min=0)))
        tokens = torch.cat(self.tokens, 1).gather(1, index)
        dead = torch.isneginf(places)
        scores = torch.cat(self.scores, 1).gather(1, index).masked_fill(dead, float("-inf"))
        expansions = torch.cat(self.frontiers[:-1] or [index[:, :0]], 1)  # the last level is not expanded
        numbers = torch.arange(1, expansions.shape[1] + 1, device=index.device).expand_as(expansions)
        expanded = torch.full_like(all_parents, -1).scatter(1, expansions, numbers).gather(1, index)
        pad = (0, nodes - kept)
        return Tree(
            torch.nn.functional.pad(tokens.masked_fill(dead, 0), pad),
            torch.nn.functional.pad(parents.masked_fill(dead, UNUSED), pad, value=UNUSED),
            torch.nn.functional.pad(scores, pad, value=float("-inf")),
            torch.nn.functional.pad(places, pad, value=float("-inf")),
            torch.nn.functional.pad(
                torch.nn.functional.pad(expanded.masked_fill(dead, -1), (1, 0), value=0), pad, value=-1
            ),
        )


class Growth:
    """An expansion together with the draft's inputs for the next level. `kernels.cpu.Growth` is its C++ form.

    If k nodes are expanded in each level, level l (from 1) owns the scratch slots (l - 1) k to l k - 1.
    """

    def __init__(
        self,
        depth: int,
        topk: int,
        chain: torch.Tensor,
        last: torch.Tensor,
        max_position: int,
        token_dtype: torch.dtype,
    ) -> None:
        """Begin the trees of a batch.

        depth: the greatest number of levels. chain: bool [batch], requests that keep only the greedy path. last:
        int64 [batch], position of the row that each tree grows from. token_dtype: dtype of the next level's tokens.
        """
        self.topk, self.last, self.max_position, self.token_dtype = topk, last, max_position, token_dtype
        self.expansion = Expansion(topk, chain)
        self.paths = torch.zeros(len(chain), 1, 0, dtype=torch.int64, device=chain.device)

    def extend(
        self,
        log_probs: torch.Tensor,
        ids: torch.Tensor,
        states: torch.Tensor,
        places: torch.Tensor | None = None,
    ) -> Level:
        """Add the children of the frontier; the new frontier is what the draft takes next.

        log_probs, ids: [batch * width, topk] in order of falling probability; width is 1 for the roots, else topk.
        states: [batch * width, hidden], what the draft hands on to the children. places: see `Expansion.grow`.
        """
        batch, width, level = self.paths.shape
        shape = (batch, width, self.topk)
        frontier = self.expansion.grow(
            log_probs.view(shape), ids.view(shape), None if places is None else places.view(shape)
        )
        parents = frontier.parents[..., None]
        own = level * self.topk + torch.arange(self.topk, device=parents.device).expand(batch, self.topk)
        paths = self.paths.gather(1, parents.expand(-1, -1, level))
        self.paths = torch.cat([paths, own[..., None]], dim=-1)
        states = states.view(batch, width, -1)
        positions = (self.last[:, None] + level + 1).clamp(max=self.max_position).repeat(1, self.topk)
        return Level(
            frontier.tokens.flatten().to(self.token_dtype),
            positions.flatten(),
            states.gather(1, parents.expand(-1, -1, states.shape[-1])).flatten(0, 1),
            self.paths,
        )

    def rerank(self, tokens: torch.Tensor, parents: torch.Tensor) -> torch.Tensor:
        """Write the best nodes to tokens and parents, int64 [batch, nodes]; returns their scores."""
        tree = self.tree = self.expansion.rerank(tokens.shape[1])
        tokens.copy_(tree.tokens)
        parents.copy_(tree.parents)
        return tree.scores
