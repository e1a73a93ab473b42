"""C++ growth equals torch growth bit for bit, and `top_children` equals its torch twin."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_eagle3.kernels import cpu
from vllm_eagle3.kernels.topk import UNLIKELY
from vllm_eagle3.tree import growth as torch_growth

BACKENDS = ["native", "torch"]


@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(1, 6),
    vocab=st.integers(1, 700),
    k=st.integers(1, 12),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    steps=st.sampled_from([0, 3]),
    spoilt=st.lists(st.sampled_from([float("nan"), float("inf"), float("-inf")]), max_size=3),
    mapped=st.booleans(),
    seed=st.integers(0, 99),
)
def test_top_children(rows, vocab, k, dtype, steps, spoilt, mapped, seed):
    """Ties (steps of a third), broken logits, and rows apart."""
    k = min(k, vocab)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocab + 5, generator=generator) * 8
    if steps:
        logits = (logits * steps / 8).round() / steps
    logits = logits.to(dtype)[:, :vocab]
    for value in spoilt:
        logits[int(torch.randint(0, rows, (), generator=generator))].masked_fill_(
            torch.rand(vocab, generator=generator) < 0.3, value
        )
    to_target = torch.randperm(vocab + 9, generator=generator)[:vocab] if mapped else None
    twin, ids = cpu.top_children(logits, k, to_target, backend="torch")
    log_probs, found = cpu.top_children(logits, k, to_target, backend="native")
    assert torch.equal(found, ids)
    torch.testing.assert_close(log_probs, twin, atol=2e-5, rtol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_top_children_by_hand(backend):
    logits = torch.log(torch.tensor([[0.1, 0.4, 0.4, 0.1], [1.0, 0.0, 0.0, 0.0]]))
    log_probs, ids = cpu.top_children(logits, 3, backend=backend)
    assert ids.tolist() == [[1, 2, 0], [0, 1, 2]]
    expected = torch.tensor([[0.4, 0.4, 0.1], [1.0, 0.0, 0.0]]).log().clamp(min=UNLIKELY)
    torch.testing.assert_close(log_probs, expected)


@settings(max_examples=150, deadline=None)
@given(
    batch=st.integers(1, 5),
    depth=st.integers(1, 6),
    topk=st.integers(1, 6),
    nodes=st.integers(1, 63),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    token_dtype=st.sampled_from([torch.int32, torch.int64]),
    ties=st.booleans(),
    data=st.data(),
    seed=st.integers(0, 99),
)
def test_growth_is_that_of_torch(batch, depth, topk, nodes, dtype, token_dtype, ties, data, seed):
    """Chains among the trees, equal scores, positions beyond the last one."""
    generator = torch.Generator().manual_seed(seed)
    chain = torch.tensor(data.draw(st.lists(st.booleans(), min_size=batch, max_size=batch)))
    last = torch.randint(0, 100, (batch,), generator=generator)
    made = [
        kind(depth, topk, chain, last, max_position=60, token_dtype=token_dtype)
        for kind in (cpu.Growth, torch_growth.Growth)
    ]
    width = 1
    for _ in range(depth):
        log_probs = -torch.rand(batch * width, topk, generator=generator).sort(dim=1).values * 3
        log_probs = log_probs.round() if ties else log_probs
        ids = torch.randint(0, 1000, (batch * width, topk), generator=generator)
        states = torch.randn(batch * width, 9, generator=generator).to(dtype)[:, :7]
        levels = [growth.extend(log_probs, ids, states) for growth in made]
        for native, twin in zip(*levels, strict=True):
            assert native.dtype == twin.dtype and torch.equal(native, twin)
        width = topk
    trees = []
    for growth in made:
        tokens, parents = (torch.full((batch, nodes + 2), -7)[:, :nodes] for _ in "tp")
        trees.append((growth.rerank(tokens, parents), tokens, parents))
    for native, twin in zip(*trees, strict=True):
        assert torch.equal(native, twin)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="logits must be"):
        cpu.top_children(torch.zeros(1, 3), 4)
    with pytest.raises(ValueError, match="to_target must be"):
        cpu.top_children(torch.zeros(1, 3), 2, torch.zeros(2).long())
    with pytest.raises(ValueError, match="chain must be bool"):
        cpu.Growth(2, 3, torch.zeros(1), torch.zeros(1).long(), 10, torch.int64)
    growth = cpu.Growth(1, 3, torch.zeros(1).bool(), torch.zeros(1).long(), 10, torch.int64)
    with pytest.raises(ValueError, match="expected log_probs"):
        growth.extend(torch.zeros(1, 2), torch.zeros(1, 2).long(), torch.zeros(1, 4))
    growth.extend(torch.zeros(1, 3), torch.zeros(1, 3).long(), torch.zeros(1, 4))
    with pytest.raises(ValueError, match="no level 2"):
        growth.extend(torch.zeros(3, 3), torch.zeros(3, 3).long(), torch.zeros(3, 4))
    with pytest.raises(ValueError, match="parents must be int64"):
        growth.rerank(torch.zeros(1, 3).long(), torch.zeros(1, 3))
