"""Triton growth equals torch growth bit for bit. About 30 s interpreted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_eagle3.kernels.tree_growth import TreeGrowth
from vllm_eagle3.tree.growth import Growth


@settings(
    max_examples=12, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(
    batch=st.integers(1, 3),
    depth=st.integers(1, 4),
    topk=st.integers(1, 6),
    nodes=st.integers(1, 62),
    token_dtype=st.sampled_from([torch.int32, torch.int64]),
    ties=st.booleans(),
    data=st.data(),
    seed=st.integers(0, 99),
)
def test_growth_is_that_of_torch(batch, depth, topk, nodes, token_dtype, ties, data, seed, device):
    """Chains among the trees, equal scores, positions beyond the last one, more nodes than candidates."""
    generator = torch.Generator().manual_seed(seed)
    chain = torch.tensor(data.draw(st.lists(st.booleans(), min_size=batch, max_size=batch)), device=device)
    last = torch.randint(0, 50, (batch,), generator=generator).to(device)
    both = [kind(depth, topk, chain, last, 30, token_dtype) for kind in (Growth, TreeGrowth)]
    for level in range(depth):
        rows = batch * (topk if level else 1)
        log_probs = -torch.rand(rows, topk, generator=generator).mul(4 if ties else 1)
        log_probs = log_probs.round() if ties else log_probs
        log_probs = log_probs.sort(dim=1, descending=True).values.to(device)
        ids = torch.randint(0, 1000, (rows, topk), generator=generator).to(device)
        states = torch.randn(rows, 3, generator=generator).to(device)
        expected, found = (growth.extend(log_probs, ids, states) for growth in both)
        for name in expected._fields:
            a, b = getattr(expected, name), getattr(found, name)
            assert a.dtype == b.dtype and torch.equal(a, b), name
    wide = torch.full(
        (2, 2, batch, 70), 9, device=device
    )  # rows further apart than nodes, as in the speculator
    outs = [wide[i, :, :, :nodes] for i in range(2)]
    scores = [growth.rerank(*out) for growth, out in zip(both, outs, strict=True)]
    assert torch.equal(outs[0], outs[1]) and torch.equal(*scores)
    assert (wide[:, :, :, nodes:] == 9).all()


@pytest.mark.parametrize(("depth", "topk", "nodes"), [(6, 10, 60), (2, 32, 62)])
def test_the_largest_levels(depth, topk, nodes, device):
    torch.manual_seed(0)
    chain = torch.tensor([False, True], device=device)
    last = torch.tensor([5, 700], device=device)
    both = [kind(depth, topk, chain, last, 800, torch.int32) for kind in (Growth, TreeGrowth)]
    for level in range(depth):
        rows = 2 * (topk if level else 1)
        log_probs = -torch.rand(rows, topk, device=device).sort(dim=1).values
        ids, states = torch.randint(0, 9999, (rows, topk), device=device), torch.randn(rows, 4, device=device)
        for a, b in zip(*(growth.extend(log_probs, ids, states) for growth in both), strict=True):
            assert torch.equal(a, b)
    outs = torch.zeros(2, 2, 2, nodes, dtype=torch.int64, device=device)
    scores = [growth.rerank(*out) for growth, out in zip(both, outs, strict=True)]
    assert torch.equal(outs[0], outs[1]) and torch.equal(*scores)
