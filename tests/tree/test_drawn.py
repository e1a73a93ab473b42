"""Drawn trees, batched: the joint distribution of three tokens (chi-squared), and the reference's acceptance (10 s).

Target and draft are tables of a Markov chain over five tokens, so the exact distribution is known.
"""

import pytest
import torch

from vllm_eagle3.reference.decode import Tree
from vllm_eagle3.reference.sampled import Node, over_targets, residual
from vllm_eagle3.tree.drawn import DrawnTrees, accept_drawn, draw_children
from vllm_eagle3.tree.graft import graft
from vllm_eagle3.tree.growth import Expansion

VOCAB, TEMPERATURE = 5, 0.8
TARGET_IDS = torch.tensor([0, 2, 3, 4])  # token 1 is not in the draft's vocabulary
DRAFT_IDS = torch.tensor([0, -1, 1, 2, 3])
P_LOGITS = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(5)) * 1.5
Q_LOGITS = (P_LOGITS + torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(6)))[:, TARGET_IDS]


def draft_trees(last, depth, topk, nodes, continuation=None, dtype=torch.float32, chain=False):
    """Grow trees as the speculator does. `last` int64 [batch] is the newest token of each text."""
    batch = len(last)
    drawn = torch.ones(batch, dtype=torch.bool)
    expansion = Expansion(topk, torch.full((batch,), chain))
    frontier, qs = last[:, None], []
    for _ in range(depth):
        width = frontier.shape[1]
        hot = torch.full((batch * width,), TEMPERATURE)
        logits = Q_LOGITS[frontier.flatten()]
        children = draw_children(logits, hot, drawn.repeat_interleave(width), topk, dtype)
        qs.append(children.q.view(batch, width, -1))
        shape = (batch, width, topk)
        grown = expansion.grow(
            children.log_probs.view(shape), TARGET_IDS[children.ids].view(shape), children.places.view(shape)
        )
        frontier = grown.tokens
    tree = expansion.rerank(nodes)
    tokens, parents, expanded, given = tree.tokens, tree.parents, tree.expanded, torch.zeros(batch).long()
    if continuation is not None:
        merged = graft(tokens, parents, continuation, nodes)
        tokens, parents, given = merged.tokens, merged.parents, merged.added
        expanded = torch.full((batch, nodes + 2), -1).scatter(1, merged.number, expanded)[:, : nodes + 1]
    return tokens, parents, DrawnTrees(torch.cat(qs, 1), expanded, given, DRAFT_IDS, TARGET_IDS)


def verify(last, tokens, parents, trees):
    tokens = torch.cat([last[:, None], tokens], 1)
    parents = torch.nn.functional.pad(parents, (1, 0), value=-1)
    logits = P_LOGITS[tokens.flatten()] / TEMPERATURE  # the target's, one row a node
    rows = torch.arange(tokens.numel()).view(tokens.shape)
    return accept_drawn(parents, tokens, logits, rows, trees)


SHAPES = {
    "chain": {"depth": 3, "topk": 1, "nodes": 3},
    "tree": {"depth": 3, "topk": 3, "nodes": 6},
    "whole vocabulary": {"depth": 2, "topk": 4, "nodes": 20},
    "rounded q": {"depth": 3, "topk": 3, "nodes": 7, "dtype": torch.bfloat16},
    "a chain in a tree's places": {"depth": 3, "topk": 3, "nodes": 6, "chain": True},
    "graft": {"depth": 2, "topk": 3, "nodes": 6, "continuation": [2, 4, 0]},
    "graft outside the draft's vocabulary": {"depth": 2, "topk": 2, "nodes": 5, "continuation": [1, 1, -1]},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_three_tokens_follow_the_target(shape):
    torch.manual_seed(20260301)
    n, start = 8000, 3
    options = dict(SHAPES[shape])
    if "continuation" in options:
        options["continuation"] = torch.tensor([options["continuation"]]).expand(n, -1)
    texts = torch.full((n, 12), -1)
    lengths, last, accepted = torch.zeros(n, 1).long(), torch.full((n,), start), 0
    for _ in range(3):
        tokens, parents, trees = draft_trees(last, **options)
        path, emitted, count = verify(last, tokens, parents, trees)
        assert (path[:, 0] == 0).all()
        accepted += int(count.sum()) - n
        for i in range(4):
            here = (i < count) & (lengths[:, 0] + i < 12)
            at = (lengths + i).clamp(max=11)
            texts = torch.where(here[:, None], texts.scatter(1, at, emitted[:, i : i + 1]), texts)
        lengths = lengths + count[:, None]
        last = emitted.gather(1, count[:, None].long() - 1)[:, 0]
    p = (P_LOGITS / TEMPERATURE).softmax(-1)
    exact = (p[start][:, None, None] * p[:, :, None] * p[None]).flatten() * n
    seen = torch.bincount(texts[:, 0] * VOCAB**2 + texts[:, 1] * VOCAB + texts[:, 2], minlength=VOCAB**3)
    big = exact >= 5
    observed = torch.cat([seen[big], seen[~big].sum()[None]])
    expected = torch.cat([exact[big], exact[~big].sum()[None]])
    statistic, freedom = float(((observed - expected) ** 2 / expected).sum()), len(expected) - 1
    assert freedom >= 40 and accepted > n
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5  # 4 sigma


def expected_accepted(tree, node=0):
    """The expected number of accepted drafts under the reference's top-down rule, computed exactly."""
    here, reached, total = Node(tree, node, P_LOGITS[tree.tokens], TEMPERATURE), 1.0, 0.0
    for child in here.children:
        token, q = here.candidate(child)
        rate = min(1.0, float(here.p[token] / q[token]))
        total += reached * rate * (1 + expected_accepted(tree, child))
        reached *= 1 - rate
        here.p, _ = residual(here.p, q)
        here.drop(child)
    return total


@pytest.mark.parametrize("continuation", [None, [2, 4, 0]])
def test_acceptance_is_the_references(continuation):
    """One tree is verified 4,000 times; the mean acceptance is that of the reference's rule."""
    torch.manual_seed(7)
    last, n = torch.tensor([3]), 4000
    given = None if continuation is None else torch.tensor([continuation])
    tokens, parents, trees = draft_trees(last, 3, 3, 7, given)
    draft = type(
        "Draft",
        (),
        {
            "draft_to_target": lambda self, ids: TARGET_IDS[ids],
            "config": type("C", (), {"vocab_size": VOCAB}),
        },
    )()
    q = {
        node: over_targets(draft, trees.q[0, expansion])
        for node, expansion in enumerate(trees.expanded[0].tolist())
        if expansion >= 0
    }
    used = int((parents[0] >= 0).sum())
    tree = Tree(
        [3, *tokens[0, :used].tolist()], [-1, *parents[0, :used].tolist()], q,
        frozenset(range(1 + int(trees.given), used + 1)),
    )  # fmt: skip
    many = DrawnTrees(*(t.expand(n, *t.shape[1:]) for t in trees[:3]), DRAFT_IDS, TARGET_IDS)
    _, _, count = verify(last.expand(n), tokens.expand(n, -1), parents.expand(n, -1), many)
    accepted = count.double() - 1
    assert abs(float(accepted.mean()) - expected_accepted(tree)) < 4 * float(accepted.std()) / n**0.5


def test_children_that_are_not_drawn_are_the_likeliest():
    logits = torch.randn(3, 9, generator=torch.Generator().manual_seed(0))
    drawn = torch.tensor([False, True, False])
    children = draw_children(logits, torch.tensor([0.0, 0.7, 0.0]), drawn, 4)
    expected = logits.log_softmax(-1).topk(4)
    for row in (0, 2):
        torch.testing.assert_close(children.log_probs[row], expected.values[row])
        assert torch.equal(children.places[row], children.log_probs[row])
        assert children.ids[row].tolist() == expected.indices[row].tolist()
    assert children.places[1, 0] == 0 and (children.places[1].diff() <= 0).all()
    assert (children.places[1] >= children.log_probs[1]).all()


def test_a_certain_draft_fills_one_place():
    logits = torch.full((1, 4), -1e9)
    logits[0, 2] = 0
    children = draw_children(logits, torch.ones(1), torch.ones(1, dtype=torch.bool), 3)
    assert children.ids[0, 0] == 2 and torch.isneginf(children.places[0, 1:]).all()
