"""Drafts that are drawn from the draft's own distribution q, and the rules that verify them without loss.

A fixed draft x is accepted with p(x). One that was drawn from q is accepted with min(1, p(x) / q(x)), which in
all is the overlap of p and q; if it is refused, the next token comes from the residual norm(max(p - q, 0)).
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_eagle3.reference.decode import Proposer, Tree, Verifier
from vllm_eagle3.reference.draft import KV, DraftModel


def sampled_tree(
    depth: int, topk: int, nodes: int, temperature: float, generator: torch.Generator | None
) -> Proposer:
    """A tree of drawn children; with topk 1 and nodes = depth a drawn chain.

    An expanded node draws `topk` children from q (the draft at `temperature`) without replacement: the order of
    log q + Gumbel noise. The `topk` nodes of each level with the likeliest paths are expanded. The `nodes`
    likeliest *places* are kept: a place is worth the likelihood of its parent's path times the part of q that the
    siblings drawn before left over. The value of a place must not depend on the token drawn there, or the kept
    tokens would no longer be draws from q. It falls from parent to child and from sibling to sibling, so what is
    kept is connected and a node keeps its first children.
    """

    def propose(draft: DraftModel, a: Tensor, kv: KV, text: list[int]) -> Tree:
        position, past = len(text) - 2, kv[0].shape[0]
        k = min(topk, draft.config.draft_vocab_size)
        tokens, parents = a.new_empty(0, dtype=torch.long), a.new_empty(0, dtype=torch.long)
        paths, places = a.new_empty(0, dtype=torch.float), a.new_empty(0, dtype=torch.float)
        drawn_from: dict[int, Tensor] = {}  # by candidate, -1 = root
        rows = torch.tensor([-1], device=a.device)  # candidate of each row of `a`
        seen = torch.zeros(1, 0, dtype=torch.bool, device=a.device)  # this tree's KV, read by row
        for level in range(1, depth + 1):
            q = (draft.logits(a).float() / temperature).softmax(-1)  # [rows, draft vocabulary]
            gumbel = -torch.empty_like(q).exponential_(generator=generator).log()
            ids = (q.log() + gumbel).topk(k).indices
            picked = q.gather(1, ids)
            left = (1 - picked.cumsum(1) + picked).clamp(min=0).cummin(1).values  # before each draw
            path = paths[rows][:, None] if level > 1 else q.new_ones(1, 1)
            first = len(tokens)
            tokens = torch.cat([tokens, draft.draft_to_target(ids).flatten()])
            paths = torch.cat([paths, (path * picked).flatten()])
            places = torch.cat([places, (path * left).flatten()])
            parents = torch.cat([parents, rows.repeat_interleave(k)])
            drawn_from |= dict(zip(rows.tolist(), q, strict=True))
            if level == depth:
                break
            best = (path * picked).flatten().sort(descending=True, stable=True).indices[:k]  # expand these
            of = best // k  # their parents' rows of `a`
            seen = torch.cat([seen[of], torch.eye(len(best), dtype=torch.bool, device=a.device)], 1)
            mask = torch.cat([seen.new_ones(len(best), past), seen], 1)
            rows = first + best
            positions = torch.full_like(rows, position + level)
            a, kv = draft.layer(draft.embed(tokens[rows]), draft.next_g(a[of]), positions, kv, mask)
        best = places.sort(descending=True, stable=True).indices[:nodes]
        keep = best[places[best] > 0].tolist()  # nothing was left to draw for the others
        place = {-1: 0} | {candidate: node for node, candidate in enumerate(keep, 1)}
        drawn = [place[parent] for parent in parents[keep].tolist()]
        q_of = {node: drawn_from[c] for c, node in place.items() if node in drawn}
        return Tree(
            [text[-1], *tokens[keep].tolist()],
            [-1, *drawn],
            {node: over_targets(draft, row) for node, row in q_of.items()},
            frozenset(range(1, len(keep) + 1)),
        )

    return propose


def over_targets(draft: DraftModel, q: Tensor) -> Tensor:
    """A distribution over the draft's vocabulary as one over the target's, [vocab]."""
    ids = draft.draft_to_target(torch.arange(len(q), device=q.device))
    return q.new_zeros(draft.config.vocab_size).index_add_(0, ids, q)


def residual(p: Tensor, q: Tensor, weight: float = 1.0) -> tuple[Tensor, float]:
    """norm(max(weight * p - q, 0)) and the sum before norming. Where rounding leaves nothing, p stays."""
    rest = (weight * p - q).clamp(min=0)
    total = float(rest.sum())
    return (rest / total if total > 0 else p), total


class Node:
    """What verification knows of a node: the target's distribution there, and q for its children in turn."""

    def __init__(self, tree: Tree, node: int, logits: Tensor, temperature: float) -> None:
        self.p = (logits[node].float() / temperature).softmax(-1)
        self.q = tree.q.get(node)
        self.children = [child for child, parent in enumerate(tree.parents) if parent == node]
        self.tree = tree

    def candidate(self, child: int) -> tuple[int, Tensor]:
        """A child's token and the distribution it was drawn from: a given token is drawn with certainty."""
        token = self.tree.tokens[child]
        if child in self.tree.drawn:
            assert self.q is not None
            return token, self.q
        return token, torch.zeros_like(self.p).index_fill_(0, torch.tensor(token, device=self.p.device), 1.0)

    def drop(self, child: int) -> None:
        """The later siblings were drawn from what is left of q, because draws are without replacement.

        The token of a graft is tried before them and not again, so they are draws from q without it.
        """
        if self.q is not None:
            rest = self.q.clone()
            rest[self.tree.tokens[child]] = 0
            self.q = rest / rest.sum().clamp(min=1e-30)


def uniform(generator: torch.Generator | None, device: torch.device) -> float:
    return float(torch.rand((), generator=generator, device=device))


def accept_top_down(
    tree: Tree, logits: Tensor, temperature: float, generator: torch.Generator | None
) -> tuple[list[int], int]:
    """Recursive rejection (arXiv 2305.09781, 2310.15141): the path and the token after it, as `decode.accept`.

    At a node the children are tried in turn, each with min(1, p(x) / q(x)); after a refusal p becomes the
    residual and q what is left of it. If none is accepted the token comes from the last residual. For children
    that were not drawn this is `decode.accept`'s rule in distribution.
    """
    if temperature == 0:
        raise ValueError("drawn drafts need a temperature above 0")
    path = [0]
    while True:
        here = Node(tree, path[-1], logits, temperature)
        for child in here.children:
            token, q = here.candidate(child)
            if uniform(generator, logits.device) * float(q[token]) < float(here.p[token]):
                path.append(child)
                break
            here.p, _ = residual(here.p, q)
            here.drop(child)
        else:
            return path, int(torch.multinomial(here.p, 1, generator=generator))


def accept_bottom_up(
    tree: Tree, logits: Tensor, temperature: float, generator: torch.Generator | None
) -> tuple[list[int], int]:
    """Traversal verification (arXiv 2505.12398); on a chain block verification (2403.10444).

    A node carries the weight w with which the path to it may be accepted, the root 1. A child's is
    min(1, w p(x) / q(x)). The subtree of each child is tried first; if all of it is refused, p becomes the
    residual of w p over q, of sum s, and w becomes s / (s + 1 - w). When no child is left the node itself is
    accepted with w, and the token after it comes from p. Some node of a subtree is so accepted with exactly its
    root's first w, whatever hangs below.
    """
    if temperature == 0:
        raise ValueError("drawn drafts need a temperature above 0")

    def accepted(path: list[int], w: float) -> tuple[list[int], int] | None:
        here = Node(tree, path[-1], logits, temperature)
        for child in here.children:
            token, q = here.candidate(child)
            ratio = w * float(here.p[token]) / max(float(q[token]), 1e-30)
            if (found := accepted([*path, child], min(1.0, ratio))) is not None:
                return found
            here.p, total = residual(here.p, q, w)
            w = total / max(total + 1 - w, 1e-30) if w < 1 else 1.0
            here.drop(child)
        if uniform(generator, logits.device) < w:
            return path, int(torch.multinomial(here.p, 1, generator=generator))
        return None

    found = accepted([0], 1.0)
    assert found is not None, "the root's weight is 1"
    return found


RULES: dict[str, Verifier] = {"top-down": accept_top_down, "bottom-up": accept_bottom_up}
