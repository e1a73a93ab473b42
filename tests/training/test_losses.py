"""Fused losses against autograd through plain operations, and against their definitions (2 s)."""

import pytest
import torch

from vllm_eagle3.training import losses
from vllm_eagle3.training.losses import KINDS, FusedHeadLoss, eager_head_loss, loss_and_grad


@pytest.mark.parametrize("kind", KINDS)
def test_fused_equals_eager(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks smaller than the rows, rows that share a place in the table, rows of weight 0."""
    monkeypatch.setitem(losses.CHUNK, "cpu", 4)
    torch.manual_seed(0)
    x, weight = torch.randn(23, 16, requires_grad=True), torch.randn(37, 16, requires_grad=True)
    table, index = torch.randn(11, 37).mul(3).softmax(-1), torch.randint(0, 11, (23,))
    scale = torch.rand(23)
    scale[3] = 0
    fused, _ = FusedHeadLoss.apply(x, weight, table, index, scale, kind)
    eager = eager_head_loss(x, weight, table, index, scale, kind)
    torch.testing.assert_close(fused, eager)
    for a, b in zip(
        torch.autograd.grad(fused, (x, weight)), torch.autograd.grad(eager, (x, weight)), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_definitions() -> None:
    p, q = torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([[0.5, 0.25, 0.25]])
    got = {kind: float(loss_and_grad(p.log(), q, kind)[0]) for kind in KINDS}
    overlap = 0.5 + 0.2 + 0.1
    assert got["soft_ce"] == pytest.approx(float(-(q * p.log()).sum()))
    assert got["kl"] == pytest.approx(float((q * (q / p).log()).sum()))
    assert got["tv"] == pytest.approx(float(0.5 * (p - q).abs().sum()))
    assert got["tv"] == pytest.approx(1 - overlap)
    assert got["lk"] == pytest.approx(-torch.tensor(overlap).log().item())


def test_unknown_loss() -> None:
    with pytest.raises(ValueError, match="loss must be one of soft_ce, kl, tv, lk, found 'l1'"):
        loss_and_grad(torch.zeros(1, 3), torch.full((1, 3), 1 / 3), "l1")
