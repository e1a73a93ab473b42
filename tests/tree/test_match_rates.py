"""Acceptance by match length against a literal count (2 s)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_eagle3.tree.lookup import MAX_MATCH
from vllm_eagle3.tree.match_rates import KEEP, POOLED_WEIGHT, PRIOR, PRIOR_WEIGHT, MatchRates

LENGTH = 5


def literal(steps):
    """Counts by match length of (match, verified, accepted) in turn."""
    tried, right = [0.0] * (MAX_MATCH + 1), [0.0] * (MAX_MATCH + 1)
    for match, verified, accepted in steps:
        seen = {}
        for j in range(min(accepted + 1, verified)):
            seen.setdefault(min(match + j, MAX_MATCH), []).append(j < accepted)
        for size, results in seen.items():
            tried[size] = tried[size] * KEEP ** len(results) + len(results)
            right[size] = right[size] * KEEP ** len(results) + sum(results)
    return tried, right


@st.composite
def verification(draw):
    match, verified = draw(st.integers(1, MAX_MATCH)), draw(st.integers(0, LENGTH))
    return match, verified, draw(st.integers(0, verified))


@settings(max_examples=100, deadline=None)
@given(steps=st.lists(verification(), max_size=12), match=st.integers(1, MAX_MATCH))
def test_one_request_against_a_literal_count(steps, match):
    rates = MatchRates(3)
    request = torch.tensor([2])
    for step in steps:
        rates.observe(request, *(torch.tensor([value]) for value in step), LENGTH)
    tried, right = literal(steps)
    assert rates.own_tried[2].tolist() == pytest.approx(tried, abs=1e-4)
    assert rates.tried.tolist() == pytest.approx(tried, abs=1e-4)
    expected, product = [], 1.0
    for j in range(LENGTH):
        size = min(match + j, MAX_MATCH)
        pooled = (right[size] + PRIOR_WEIGHT * PRIOR[size]) / (tried[size] + PRIOR_WEIGHT)
        product *= (right[size] + POOLED_WEIGHT * pooled) / (tried[size] + POOLED_WEIGHT)
        expected.append(product)
    assert rates.survival(request, torch.tensor([match]), LENGTH)[0].tolist() == pytest.approx(
        expected, abs=1e-4
    )
    assert rates.own_tried[:2].eq(0).all()


def test_a_request_differs_from_the_others_and_is_forgotten():
    rates = MatchRates(2)
    both, match = torch.tensor([0, 1]), torch.tensor([3, 3])
    for _ in range(100):
        rates.observe(both, match, torch.tensor([4, 4]), torch.tensor([4, 0]), LENGTH)
    good, bad = rates.survival(both, match, 1)[:, 0].tolist()
    assert good > 0.95 and bad < 0.1
    assert 0.4 < float(rates.right[3] / rates.tried[3]) < 0.6
    rates.forget(1)
    assert 0.4 < float(rates.survival(both[1:], match[1:], 1)) < 0.6
