"""Losses of the draft against the target's distribution, fused with the head so that no [rows, vocab] logits
are kept.

Soft cross-entropy -sum q log p is the paper's; forward KL differs from it by the target's entropy (same
gradient). tv = 1 - sum min(p, q) is the rejection probability of one token, lk = -log sum min(p, q) its
likelihood form.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

KINDS = ("soft_ce", "kl", "tv", "lk")
CHUNK = 256  # rows whose fp32 logits exist at a time
BLOCK = 2048  # rows whose logit gradients exist at a time


def loss_and_grad(logits: Tensor, q: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Loss [n] of fp32 logits [n, v] against probabilities q [n, v], and its gradient [n, v]."""
    lse = torch.logsumexp(logits, dim=-1, keepdim=True)
    p = (logits - lse).exp()
    if kind in ("soft_ce", "kl"):
        loss = lse[:, 0] - (q * logits).sum(-1)
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


class FusedHeadLoss(torch.autograd.Function):
    """Weighted sum of row losses of logits = x @ weight.T, made block by block with its gradients."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, table: Tensor, index: Tensor, scale: Tensor, kind: str
    ) -> tuple[Tensor, Tensor]:
        """x [n, h]; weight [v, h]; table [m, v] target probabilities; index [n] into it; scale [n] row
        weights.

        Returns the scalar sum(scale * loss) and the row losses [n] (without gradient).
        """
        with torch.autocast(x.device.type, enabled=False):
            w = weight.to(x.dtype)
            losses = x.new_empty(len(x), dtype=torch.float32)
            grad_x, grad_weight = torch.empty_like(x), torch.zeros_like(w, dtype=torch.float32)
            for first in range(0, len(x), BLOCK):
                block = x[first : first + BLOCK]
                d_logits = x.new_empty(len(block), len(w))
                for start in range(0, len(block), CHUNK):
                    part = slice(first + start, min(first + start + CHUNK, first + len(block)))
                    loss, grad = loss_and_grad((x[part] @ w.T).float(), table[index[part]].float(), kind)
                    losses[part] = loss
                    d_logits[start : start + CHUNK] = grad.mul_(scale[part, None])
                grad_x[first : first + BLOCK] = d_logits @ w
                grad_weight += d_logits.T @ block
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
    """The same scalar in plain autograd operations: the twin the fused form is tested and timed against."""
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
