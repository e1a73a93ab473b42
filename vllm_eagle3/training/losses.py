"""Losses of the draft against the target's distribution.

They are fused with the head, so that the logits [rows, vocab] are never kept.

The paper uses soft cross-entropy, -sum q log p. Forward KL is the same minus the target's entropy, so its gradient is
the same. tv = 1 - sum min(p, q) is the probability that one token is refused, and lk = -log sum min(p, q) is the
negative logarithm of the probability that it is accepted.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vllm_eagle3.training.settings import KINDS

logger = logging.getLogger(__name__)
# Rows whose logits and gradients are in memory at the same time: few enough for a CPU's cache, and enough to keep a
# GPU busy.
CHUNK = {"cpu": 512, "cuda": 4096}
RowLoss = Callable[[Tensor, Tensor, Tensor, Tensor, str], tuple[Tensor, Tensor]]


def loss_and_grad(logits: Tensor, q: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Loss [n] of fp32 logits [n, v] against probabilities q [n, v], and its gradient [n, v]."""
    top = logits.amax(-1, keepdim=True)
    e = (logits - top).exp()
    total = e.sum(-1, keepdim=True)
    p = e / total
    if kind in ("soft_ce", "kl"):
        loss = (top + total.log())[:, 0] - (q * logits).sum(-1)
        if kind == "kl":
            loss = loss + torch.xlogy(q, q).sum(-1)
        return loss, p - q
    # d(sum min(p, q)) / d logits = p * (1[p < q] - sum over p < q of p)
    below = (p < q).to(p.dtype) * p
    overlap = torch.minimum(p, q).sum(-1)
    d_overlap = below - p * below.sum(-1, keepdim=True)
    if kind == "tv":
        return 1 - overlap, -d_overlap
    if kind == "lk":
        overlap = overlap.clamp_min(1e-6)
        return -overlap.log(), -d_overlap / overlap[:, None]
    raise ValueError(f"loss must be one of {', '.join(KINDS)}, found {kind!r}")


def row_loss(logits: Tensor, table: Tensor, index: Tensor, scale: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Losses [n] in fp32 of logits [n, v] against table[index], and their gradient times scale.

    The gradient has the dtype of the logits.
    """
    loss, grad = loss_and_grad(logits.float(), table[index].float(), kind)
    return loss, (grad * scale[:, None]).to(logits.dtype)


@functools.cache
def compiled_row_loss(kind: str, dtype: torch.dtype, device: str) -> RowLoss:
    """`row_loss` as one compiled function, which reads the logits once instead of a dozen times.

    If nothing can be compiled (on a CPU without a C++ compiler) it is `row_loss` itself, with a warning.
    """
    compiled: RowLoss = torch.compile(row_loss, dynamic=True)
    sample = torch.zeros(2, 8, dtype=dtype, device=device)
    place = torch.zeros(2, dtype=torch.int64, device=device)
    try:
        compiled(sample, sample, place, sample[:, 0].float(), kind)
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        logger.warning("the loss is not compiled, and several times slower: %s", reason)
        return row_loss
    return compiled


class FusedHeadLoss(torch.autograd.Function):
    """Weighted sum of the row losses of logits = x @ weight.T, computed in chunks together with its gradients."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, table: Tensor, index: Tensor, scale: Tensor, kind: str
    ) -> tuple[Tensor, Tensor]:
        """Compute the losses, and keep the gradients for the backward pass.

        x [n, h]; weight [v, h]; table [m, v] target probabilities; index [n] into it; scale [n] row weights.

        Returns the scalar sum(scale * loss) and the row losses [n] (without gradient).
        """
        chunk, compute = CHUNK[x.device.type], compiled_row_loss(kind, x.dtype, str(x.device))
        with torch.autocast(x.device.type, enabled=False):
            w = weight.to(x.dtype)
            losses = x.new_empty(len(x), dtype=torch.float32)
            grad_x, grad_weight = torch.empty_like(x), torch.zeros_like(w, dtype=torch.float32)
            for start in range(0, len(x), chunk):
                part = slice(start, start + chunk)
                losses[part], d_logits = compute(x[part] @ w.T, table, index[part], scale[part], kind)
                grad_x[part] = d_logits @ w
                grad_weight += d_logits.T @ x[part]
            ctx.save_for_backward(grad_x, grad_weight)
        ctx.mark_non_differentiable(losses)
        return (losses * scale).sum(), losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_weight = ctx.saved_tensors
        return grad_x * grads[0], grad_weight * grads[0], None, None, None, None


def eager_head_loss(
    x: Tensor, weight: Tensor, table: Tensor, index: Tensor, scale: Tensor, kind: str
) -> Tensor:
    """The same scalar in plain autograd operations. Tests and benchmarks compare the fused form with it."""
    log_p = torch.log_softmax((x @ weight.T).float(), dim=-1)
    q = table[index].float()
    if kind == "soft_ce":
        loss = -(q * log_p).sum(-1)
    elif kind == "kl":
        loss = (torch.xlogy(q, q) - q * log_p).sum(-1)
    else:
        overlap = torch.minimum(log_p.exp(), q).sum(-1)
        loss = 1 - overlap if kind == "tv" else -overlap.clamp_min(1e-6).log()
    return (loss * scale).sum()
