"""Drawn drafts: the joint distribution of three tokens under each rule and shape (chi-squared), acceptance (30 s).

Target and draft are tables of a Markov chain over five tokens, so the exact distribution is known.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from vllm_eagle3.reference.decode import Proposer, Tree, grafted
from vllm_eagle3.reference.sampled import RULES, accept_bottom_up, accept_top_down, sampled_tree

VOCAB, TEMPERATURE = 5, 0.8
DRAFT_IDS = torch.tensor([0, 2, 3, 4])  # token 1 is not in the draft's vocabulary
P_LOGITS = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(5)) * 1.5
Q_LOGITS = (P_LOGITS + torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(6)))[:, DRAFT_IDS]


class MarkovDraft:
    """The part of a draft that a proposer uses. Its `a` is the newest token."""

    config = SimpleNamespace(draft_vocab_size=len(DRAFT_IDS), vocab_size=VOCAB)

    def __init__(self, q_logits: Tensor = Q_LOGITS) -> None:
        self.q_logits = q_logits

    def embed(self, tokens: Tensor) -> Tensor:
        return tokens[:, None].float()

    def layer(self, e: Tensor, g: Tensor, positions: Tensor, kv: Any, mask: Tensor) -> tuple[Tensor, Any]:
        assert mask.shape[0] == len(e) == len(positions)
        return e, kv

    def next_g(self, a: Tensor) -> Tensor:
        return a

    def logits(self, a: Tensor) -> Tensor:
        return self.q_logits[a[:, 0].long()]

    def draft_to_target(self, ids: Tensor) -> Tensor:
        return DRAFT_IDS[ids]


def verify(rule: Any, propose: Proposer, text: list[int], draft: Any, noise: torch.Generator) -> list[int]:
    kv = torch.zeros(len(text) - 1, 1, 1), torch.zeros(len(text) - 1, 1, 1)
    tree = propose(draft, torch.tensor([[float(text[-1])]]), kv, text)
    path, token = rule(tree, P_LOGITS[tree.tokens], TEMPERATURE, noise)
    return [*(tree.tokens[node] for node in path[1:]), token]


def exact(start: int) -> Tensor:
    """The joint distribution of three tokens after `start`, [125]."""
    p = (P_LOGITS / TEMPERATURE).softmax(-1)
    return (p[start][:, None, None] * p[:, :, None] * p[None]).flatten()


SHAPES = {
    "chain": lambda noise: sampled_tree(3, 1, 3, TEMPERATURE, noise),
    "tree": lambda noise: sampled_tree(3, 3, 6, TEMPERATURE, noise),
    "whole vocabulary": lambda noise: sampled_tree(2, 4, 20, TEMPERATURE, noise),
    "other temperature": lambda noise: sampled_tree(3, 2, 5, 0.4, noise),
    "chain and graft": lambda noise: grafted(sampled_tree(2, 1, 2, TEMPERATURE, noise), 3, 1),
    "tree and graft": lambda noise: grafted(sampled_tree(2, 3, 5, TEMPERATURE, noise), 3, 1),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", SHAPES)
def test_three_tokens_follow_the_target(rule: str, shape: str) -> None:
    noise = torch.Generator().manual_seed(20260301)
    propose, n, counts = SHAPES[shape](noise), 1500, torch.zeros(VOCAB, VOCAB, VOCAB)
    start, accepted = [3, 0, 4, 2, 1, 3], 0
    for _ in range(n):
        text = list(start)
        while len(text) < len(start) + 3:
            new = verify(RULES[rule], propose, text, MarkovDraft(), noise)
            accepted += len(new) - 1
            text += new
        counts[tuple(text[len(start) : len(start) + 3])] += 1
    expected = exact(start[-1]) * n
    big = expected >= 5
    observed = torch.cat([counts.flatten()[big], counts.flatten()[~big].sum()[None]])
    expected = torch.cat([expected[big], expected[~big].sum()[None]])
    statistic, freedom = float(((observed - expected) ** 2 / expected).sum()), len(expected) - 1
    assert freedom >= 25 and accepted > n / 2
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5  # 4 sigma


@pytest.mark.parametrize("rule", RULES)
def test_a_drawn_token_is_accepted_with_the_overlap(rule: str) -> None:
    noise = torch.Generator().manual_seed(1)
    propose, n = sampled_tree(1, 1, 1, TEMPERATURE, noise), 3000
    accepted = sum(len(verify(RULES[rule], propose, [0, 4], MarkovDraft(), noise)) - 1 for _ in range(n))
    p, q = (P_LOGITS[4] / TEMPERATURE).softmax(-1), torch.zeros(VOCAB)
    q[DRAFT_IDS] = (Q_LOGITS[4] / TEMPERATURE).softmax(-1)
    overlap = float(torch.minimum(p, q).sum())
    assert 0.2 < overlap < 0.9
    assert abs(accepted / n - overlap) < 4 * (overlap * (1 - overlap) / n) ** 0.5


def test_bottom_up_accepts_more() -> None:
    noise = torch.Generator().manual_seed(2)
    mean = {}
    for rule in RULES:
        propose = SHAPES["tree"](noise)
        lengths = [len(verify(RULES[rule], propose, [1, 4], MarkovDraft(), noise)) for _ in range(1500)]
        mean[rule] = sum(lengths) / 1500
    assert mean["bottom-up"] > mean["top-down"]


def test_a_draft_that_is_the_target_is_always_accepted() -> None:
    noise = torch.Generator().manual_seed(3)
    draft = MarkovDraft()
    propose = sampled_tree(3, 1, 3, TEMPERATURE, noise)
    p_logits = P_LOGITS.clone()
    p_logits[:, 1] = -1e9  # the target gives only tokens of the draft's vocabulary
    for rule in (accept_top_down, accept_bottom_up):
        for _ in range(50):
            draft.q_logits = p_logits[:, DRAFT_IDS]
            tree = propose(draft, torch.tensor([[2.0]]), (torch.zeros(1, 1, 1),) * 2, [0, 2])
            path, _ = rule(tree, p_logits[tree.tokens], TEMPERATURE, noise)
            assert path == [0, 1, 2, 3]


@pytest.mark.parametrize("hot", [0, 3])
def test_a_certain_draft(hot: int) -> None:
    """With a one-hot q its token is tried first. The other places have no probability left and are not kept."""
    noise = torch.Generator().manual_seed(4)
    q = torch.full((VOCAB, len(DRAFT_IDS)), -1e9)
    q[:, hot] = 0
    tree = sampled_tree(2, 3, 8, TEMPERATURE, noise)(
        MarkovDraft(q), torch.tensor([[2.0]]), (torch.zeros(1, 1, 1),) * 2, [0, 2]
    )
    assert tree.tokens == [2] + [int(DRAFT_IDS[hot])] * 2
    for rule in (accept_top_down, accept_bottom_up):
        counts = torch.zeros(VOCAB)
        for _ in range(1000):
            path, token = rule(tree, P_LOGITS[tree.tokens], TEMPERATURE, noise)
            counts[tree.tokens[1] if len(path) > 1 else token] += 1
        p = (P_LOGITS[2] / TEMPERATURE).softmax(-1)
        assert float(((counts - p * 1000) ** 2 / (p * 1000)).sum()) < VOCAB - 1 + 4 * (2 * (VOCAB - 1)) ** 0.5


def test_temperature_zero_is_refused() -> None:
    for rule in RULES.values():
        with pytest.raises(ValueError, match="temperature above 0"):
            rule(Tree([0], [-1]), P_LOGITS[:1], 0.0, None)
