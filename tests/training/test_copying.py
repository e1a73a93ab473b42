"""Copy supervision against a literal double loop, and that it teaches what it should."""

from __future__ import annotations

import pytest
import torch

from vllm_eagle3.training.attention import Layout
from vllm_eagle3.training.copying import copy_keys, copy_loss
from vllm_eagle3.training.data import Batch


def batch_of(*documents: list[int]) -> Batch:
    tokens = torch.tensor([t for d in documents for t in d])
    lengths = torch.tensor([len(d) for d in documents])
    return Batch(tokens, torch.ones(len(tokens), dtype=torch.bool), lengths)


def literal_keys(documents: list[list[int]], rows: list[int]) -> list[set[int]]:
    found = []
    starts = [sum(map(len, documents[:i])) for i in range(len(documents))]
    for row in rows:
        number = max(i for i, s in enumerate(starts) if s <= row)
        d, start = documents[number], starts[number]
        p = row - start
        found.append({start + t for t in range(1, p) if d[t - 1 : t + 2] == d[p : p + 3]})
    return found


def test_keys_stand_behind_the_same_two_tokens_and_what_followed_is_what_is_drafted() -> None:
    torch.manual_seed(0)
    documents = [torch.randint(0, 2, (n,)).tolist() for n in (17, 4, 23)]
    batch = batch_of(*documents)
    rows = [r for r in range(44) if r not in (15, 16, 19, 20, 42, 43)]  # the last two have no token p + 2
    layout = Layout.build(batch.lengths, torch.tensor(rows))
    got = [set(k.nonzero()[:, 0].tolist()) for k in copy_keys(batch, layout)]
    want = literal_keys(documents, rows)
    assert got == want
    assert sum(map(bool, want)) > 10


def test_loss_is_the_attention_outside_the_keys_and_nothing_without_repeats() -> None:
    batch = batch_of([1, 2, 3, 4, 1, 2, 3, 5])
    layout = Layout.build(
        batch.lengths, torch.tensor([4])
    )  # reads 1, 2; drafts 3; tokens 0, 1, 2 were the same
    q, k = torch.randn(1, 4, 8), torch.randn(8, 4, 8)
    attention = torch.softmax(torch.einsum("hd,thd->ht", q[0, 2:], k[:5, 2:]) * 8**-0.5, dim=-1)
    assert float(copy_loss(q, k, batch, layout, 2)) == pytest.approx(
        float(-attention[:, 1].log().mean()), rel=1e-5
    )
    assert float(copy_loss(q, k, batch_of([1, 2, 3, 4, 5, 6, 7, 8]), layout, 2)) == 0


def test_other_heads_get_no_gradient() -> None:
    batch = batch_of([1, 2, 3, 1, 2, 3, 1, 2])
    layout = Layout.build(batch.lengths, torch.arange(5))
    q, k = torch.randn(5, 4, 8, requires_grad=True), torch.randn(8, 4, 8, requires_grad=True)
    copy_loss(q, k, batch, layout, 1).backward()
    for x in (q, k):
        assert x.grad is not None
        assert not x.grad[:, :3].any() and x.grad[:, 3].any()
