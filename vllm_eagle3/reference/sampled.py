"""Drafts that are drawn from the draft's own distribution q, and the rules that verify them without loss.

A draft x that was not drawn is accepted with probability p(x). One that was drawn from q is accepted with probability
min(1, p(x) / q(x)); over all x that sums to the overlap of p and q. If it is refused, the next token is drawn from the
residual norm(max(p - q, 0)).
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_eagle3.reference.decode import Proposer, Tree, Verifier
from vllm_eagle3.reference.draft import KV, DraftModel


def sampled_tree(
    depth: int, topk: int, nodes: int, temperature: float, generator: torch.Generator | None
) -> Proposer:
    """A tree of drawn children. With topk 1 and nodes = depth it is a drawn chain.

    An expanded node draws `topk` children from q (the draft at `temperature`) without replacement: it takes the
    largest values of log q + Gumbel noise. The `topk` nodes with the likeliest paths in each level are expanded.
    At the end the `nodes` best *places* are kept. The value of a place is the likelihood of its parent's path times
    the part of q that the siblings drawn before it have left. This value must not depend on the token drawn there;
    otherwise the kept tokens would no longer be draws from q. It falls from parent to child and from sibling to
    sibling, so the kept nodes are connected, and a node keeps its first children.
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
        keep = best[places[best] > 0].tolist()  # q had no probability left for the other places
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
    """A distribution over the draft's vocabulary as a distribution over the target's, [vocab]."""
    ids = draft.draft_to_target(torch.arange(len(q), device=q.device))
    return q.new_zeros(draft.config.vocab_size).index_add_(0, ids, q)


def residual(p: Tensor, q: Tensor, weight: float = 1.0) -> tuple[Tensor, float]:
    """norm(max(weight * p - q, 0)) and the sum before norming. If rounding leaves nothing, p is returned."""
    rest = (weight * p - q).clamp(min=0)
    total = float(rest.sum())
    return (rest / total if total > 0 else p), total


class Node:
    """What verification knows of a node: the target's distribution p, and q for its next child."""

    def __init__(self, tree: Tree, node: int, logits: Tensor, temperature: float) -> None:
        self.p = (logits[node].float() / temperature).softmax(-1)
        self.q = tree.q.get(node)
        self.children = [child for child, parent in enumerate(tree.parents) if parent == node]
        self.tree = tree

    def candidate(self, child: int) -> tuple[int, Tensor]:
        """A child's token and the distribution that it was drawn from. A token that was not drawn has probability 1."""
        token = self.tree.tokens[child]
        if child in self.tree.drawn:
            assert self.q is not None
            return token, self.q
        return token, torch.zeros_like(self.p).index_fill_(0, torch.tensor(token, device=self.p.device), 1.0)

    def drop(self, child: int) -> None:
        """Remove a token from q: draws are without replacement, so the later siblings come from what is left.

        The token of a graft is tried before them and never again, so it is removed from q as well.
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
    """Recursive rejection (arXiv 2305.09781, 2310.15141): the path and the token after it, as in `decode.accept`.

    A node's children are tried in turn; each is accepted with probability min(1, p(x) / q(x)). After a refusal, p
    becomes the residual, and the token is removed from q. If no child is accepted, the next token is drawn from the
    last residual. For children that were not drawn, this gives the same distribution as `decode.accept`.
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
    """Traversal verification (arXiv 2505.12398); on a chain it is block verification (arXiv 2403.10444).

    Each node has a weight w: the probability with which the path to it may be accepted. The root's is 1, a child's is
    min(1, w p(x) / q(x)). The subtrees of a node's children are tried first, one after the other. If all nodes of a
    subtree are refused, p becomes the normed residual max(w p - q, 0), whose sum is s, and w becomes
    s / (s + 1 - w). If no child is left, the node itself is accepted with probability w, and the next token is drawn
    from p. So the probability that any node of a subtree is accepted equals the first w of the subtree's root,
    whatever the subtree contains.
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
