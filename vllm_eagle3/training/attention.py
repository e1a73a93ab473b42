"""Attention of the training-time test (paper, figure 6): causal on step 1, one's own chain after it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Where the packed documents lie: a stream of T tokens, seen as a padded [B, L] for attention.

    positions [T]: place of a token in its document; slot [T]: its place in the flat padded [B * L];
    rows [R]: stream indices whose chains are trained; lengths [B].
    """

    positions: Tensor
    slot: Tensor
    rows: Tensor
    lengths: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.lengths), int(self.lengths.max())

    @staticmethod
    def build(lengths: Tensor, rows: Tensor) -> Layout:
        """Layout of documents of `lengths` [B] laid end to end, with chains starting at `rows` [R]."""
        width = int(lengths.max())
        doc = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
        start = (lengths.cumsum(0) - lengths)[doc]
        positions = torch.arange(len(doc), device=lengths.device) - start
        return Layout(positions, doc * width + positions, rows, lengths)

    def pad(self, x: Tensor) -> Tensor:
        """[T, heads, d] -> [B, heads, L, d], zeros where a document has ended."""
        b, length = self.shape
        out = x.new_zeros(b * length, *x.shape[1:]).index_copy(0, self.slot, x)
        return out.view(b, length, *x.shape[1:]).transpose(1, 2)


def ttt_mask(documents: Tensor, steps: int) -> Tensor:
    """The literal mask of `steps` simulated steps over a packed stream; True = may be read.

    documents [T]: document number of every token. Returns [steps * T, steps * T]: row s*T + p is the query
    of step s + 1 of the chain that starts at p, column s*T + p its key. All step-1 keys up to p of the same document
    can be read, and of later steps only the chain's own keys (the diagonals of figure 6).
    """
    n = len(documents)
    causal = torch.ones(n, n, dtype=torch.bool).tril() & (documents[:, None] == documents[None])
    own = torch.eye(n, dtype=torch.bool)
    mask = torch.zeros(steps, n, steps, n, dtype=torch.bool)
    for step in range(steps):
        mask[step, :, 0] = causal
        for earlier in range(1, step + 1):
            mask[step, :, earlier] = own
    return mask.view(steps * n, steps * n)


class ChainAttention(torch.autograd.Function):
    """Softmax attention over causal step-1 keys and a row's own chain keys, without a [L, L] matrix.

    Flash attention gives the step-1 part and its log-sum-exp; the chain is a few dot products a row (as the paper
    suggests); one softmax joins them. Backward hands flash the joint output and log-sum-exp, which is all it
    needs to yield the gradients of its part of the joint softmax.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k1: Tensor, v1: Tensor, kc: Tensor, vc: Tensor, slot: Tensor) -> Tensor:
        """q [R, H, d]; k1, v1 [B, H, L, d]; kc, vc [R, c, H, d]; slot [R] rows in [B * L]. Returns [R, H, d]."""
        b, h, length, d = k1.shape
        queries = q.new_zeros(b * length, h, d).index_copy(0, slot, q).view(b, length, h, d).transpose(1, 2)
        out1, lse1 = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(queries, k1, v1, 0.0, True)
        lse1_rows = lse1.transpose(1, 2).reshape(b * length, h)[slot]
        out1_rows = out1.transpose(1, 2).reshape(b * length, h, d)[slot].float()
        scores = torch.einsum("rhd,rchd->rch", q.float(), kc.float()) * d**-0.5
        lse = torch.logsumexp(torch.cat([lse1_rows[:, None], scores], dim=1), dim=1)
        p = (scores - lse[:, None]).exp()
        out = out1_rows * (lse1_rows - lse).exp()[..., None] + torch.einsum("rch,rchd->rhd", p, vc.float())
        out = out.to(q.dtype)
        lse1 = lse1.transpose(1, 2).reshape(b * length, h).index_copy(0, slot, lse)
        ctx.save_for_backward(q, queries, k1, v1, kc, vc, slot, p, out, lse1.view(b, length, h).transpose(1, 2))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, queries, k1, v1, kc, vc, slot, p, out, lse = ctx.saved_tensors
        b, h, length, d = k1.shape
        grad = grads[0].to(q.dtype)

        def padded(x: Tensor) -> Tensor:
            full = x.new_zeros(b * length, h, d).index_copy(0, slot, x)
            return full.view(b, length, h, d).transpose(1, 2)

        gq, gk1, gv1 = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            padded(grad), queries, k1, v1, padded(out), lse.contiguous(), 0.0, True
        )
        go = grad.float()
        delta = (go * out.float()).sum(-1)
        ds = p * (torch.einsum("rhd,rchd->rch", go, vc.float()) - delta[:, None]) * d**-0.5
        gq_rows = gq.transpose(1, 2).reshape(b * length, h, d)[slot].float()
        gq_rows = gq_rows + torch.einsum("rch,rchd->rhd", ds, kc.float())
        gkc = torch.einsum("rch,rhd->rchd", ds, q.float()).to(kc.dtype)
        gvc = torch.einsum("rch,rhd->rchd", p, go).to(vc.dtype)
        return gq_rows.to(q.dtype), gk1, gv1, gkc, gvc, None
