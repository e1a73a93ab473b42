"""Draft trees as EAGLE-2 grows them (arXiv 2406.16858, section 4): expand level by level, then rerank.

Pure tensor code with shapes that depend on depth, topk and batch only; nothing waits for the device.
"""

from typing import NamedTuple

import torch

from vllm_eagle3.kernels import top_k

UNUSED = -1  # parent of an unused node


def candidates(depth: int, topk: int) -> int:
    """Nodes that an expansion scores: topk at the first level, topk * topk at each later one."""
    return topk + (depth - 1) * topk * topk


class Tree(NamedTuple):
    """`nodes` drafts per request in order of rank: a prefix of them is the best smaller tree.

    Node 0 is the root (the last sampled token) and has no column; node i + 1 is column i. Parents come before
    children. An unused node has token 0, parent -1 and score -inf, and comes after all used ones.
    """

    tokens: torch.Tensor  # [batch, nodes] int64, ids of the target vocabulary
    parents: torch.Tensor  # [batch, nodes] int64, node numbers
    scores: torch.Tensor  # [batch, nodes] float32, log-probability of the path in the draft


class Frontier(NamedTuple):
    """The `topk` nodes of the newest level whose children are scored next."""

    tokens: torch.Tensor  # [batch, topk] int64, ids of the target vocabulary
    parents: torch.Tensor  # [batch, topk] int64, index in the previous frontier (0 at the first level)


class Expansion:
    """Scores candidates level by level. A candidate's score is the sum of log-probabilities along its path.

    1. The root's topk children are the first level. All of them are expanded.
    2. Each expanded node has topk children. The topk best of a level's topk^2 candidates are expanded next.
    3. At the end the `nodes` best candidates of all levels are kept. A child never scores above its parent and is
       listed after it, so that the kept candidates are connected: equal scores go to the lower index.

    Requests in `chain` (bool `[batch]`) keep only the greedy path: every other candidate scores -inf.
    """

    def __init__(self, topk: int, chain: torch.Tensor) -> None:
        self.topk, self.chain = topk, chain[:, None]
        self.tokens: list[torch.Tensor] = []
        self.scores: list[torch.Tensor] = []
        self.parents: list[torch.Tensor] = []  # index among all candidates, -1 for the root
        self._candidate = torch.full_like(self.chain, -1, dtype=torch.int64)  # the frontier's indices
        self._score = torch.zeros_like(self.chain, dtype=torch.float32)

    def grow(self, log_probs: torch.Tensor, tokens: torch.Tensor) -> Frontier:
        """Add the children of the frontier, both `[batch, frontier, topk]` (frontier is 1 for the root's).

        Children come in order of falling probability. Returns the new frontier.
        """
        scores = (self._score[..., None] + log_probs).flatten(1)
        only_first = torch.arange(scores.shape[1], device=scores.device) > 0
        scores = scores.masked_fill(self.chain & only_first, float("-inf"))
        base = sum(level.shape[1] for level in self.scores)
        self.tokens.append(tokens.flatten(1))
        self.scores.append(scores)
        self.parents.append(self._candidate.repeat_interleave(self.topk, dim=1))
        self._score, index = top_k(scores, self.topk)
        self._candidate = base + index
        return Frontier(self.tokens[-1].gather(1, index), index // self.topk)

    def rerank(self, nodes: int) -> Tree:
        """The best `nodes` candidates as a tree; missing ones are unused."""
        all_scores, all_parents = torch.cat(self.scores, 1), torch.cat(self.parents, 1)
        kept = min(nodes, all_scores.shape[1])
        scores, index = top_k(all_scores, kept)
        node = torch.zeros_like(all_parents).scatter(
            1, index, torch.arange(1, kept + 1, device=index.device).expand_as(index)
        )
        parent = all_parents.gather(1, index)
        parents = torch.where(parent < 0, 0, node.gather(1, parent.clamp(min=0)))
        tokens = torch.cat(self.tokens, 1).gather(1, index)
        dead = torch.isneginf(scores)
        pad = (0, nodes - kept)
        return Tree(
            torch.nn.functional.pad(tokens.masked_fill(dead, 0), pad),
            torch.nn.functional.pad(parents.masked_fill(dead, UNUSED), pad, value=UNUSED),
            torch.nn.functional.pad(scores, pad, value=float("-inf")),
        )
