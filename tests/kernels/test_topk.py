"""The likeliest tokens in plain torch: ties, broken logits, log-probabilities (2 s)."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_eagle3.kernels import UNLIKELY, top_children, top_k


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=30), st.data())
def test_top_k_breaks_ties_by_index(values, data):
    k = data.draw(st.integers(1, len(values)))
    found, indices = top_k(torch.tensor(values, dtype=torch.float32), k)
    expected = sorted(range(len(values)), key=lambda i: (-np.float32(values[i]), i))[:k]
    assert indices.tolist() == expected
    assert found.tolist() == [float(np.float32(values[i])) for i in expected]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_broken_draft_makes_a_tree_of_valid_ids(bad):
    log_probs, ids = top_children(torch.full((2, 9), bad), 4)
    assert ids.tolist() == [[0, 1, 2, 3]] * 2
    assert (log_probs == UNLIKELY).all()
    log_probs, ids = top_children(torch.tensor([[0.0, bad, 1.0, 0.5]]), 3)
    assert set(ids[0].tolist()) <= set(range(4))
    assert log_probs.isfinite().all()


def test_children_are_log_probabilities():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)) * 4
    log_probs, ids = top_children(logits, 5)
    torch.testing.assert_close(log_probs, logits.log_softmax(-1).gather(1, ids))
