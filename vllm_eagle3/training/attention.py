"""Attention of the training-time test (paper, figure 6).

A row reads the keys of step 1 up to its own place, and the keys of its own chain in later steps."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention


@dataclass(frozen=True)
class Layout:
    """The places of packed documents: a stream of T tokens, which attention reads as a padded [B, L].

    document [T]: number of a token's document; positions [T]: place of a token in its document; slot [T]: its place
    in the flat padded [B * L]; rows [R]: stream indices at which trained chains start; lengths [B] of the documents.
    """

    document: Tensor
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
        return Layout(doc, positions, doc * width + positions, rows, lengths)

    def pad(self, x: Tensor) -> Tensor:
        """[T, heads, d] -> [B, heads, L, d], with zeros after the end of each document."""
        b, length = self.shape
        out = x.new_zeros(b * length, *x.shape[1:]).index_copy(0, self.slot, x)
        return out.view(b, length, *x.shape[1:]).transpose(1, 2)


def ttt_mask(documents: Tensor, steps: int) -> Tensor:
    """The whole mask of `steps` simulated steps over a packed stream. True means that a query reads a key.

    documents [T]: document number of each token. Returns [steps * T, steps * T]: row s*T + p is the query of step
    s + 1 of the chain that starts at p, and column s*T + p is its key. A query reads all step-1 keys of its document
    up to p. Of later steps it reads only the keys of its own chain (the diagonals of figure 6).
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


def join_chain(out1: Tensor, lse1: Tensor, q: Tensor, kc: Tensor, vc: Tensor) -> Tensor:
    """Join a causal part, given by its output [R, H, d] and log-sum-exp [R, H], with c chain keys in one softmax.

    q [R, H, d]; kc, vc [R, c, H, d]. The chain costs c dot products per row, as in the paper. Computes in fp32.
    """
    scores = (q.float()[:, None] * kc.float()).sum(-1) * q.shape[-1] ** -0.5
    lse = torch.logsumexp(torch.cat([lse1[:, None], scores], dim=1), dim=1)
    p = (scores - lse[:, None]).exp()
    return out1.float() * (lse1 - lse).exp()[..., None] + (p[..., None] * vc.float()).sum(1)


class FlexAttention:
    """The attention for GPUs: flex attention over the step-1 keys of each document, joined with the chain."""

    def __init__(self, layout: Layout, k1: Tensor, v1: Tensor) -> None:
        """k1, v1 [T, H, d]."""
        document = layout.document
        rows = layout.rows

        def causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            row = rows[query]
            return (document[row] == document[key]) & (key <= row)

        self.mask = create_block_mask(causal, None, None, len(rows), len(document), device=k1.device)
        self.k1, self.v1 = k1.transpose(0, 1)[None], v1.transpose(0, 1)[None]
        self.flex = compiled_flex() if k1.is_cuda else flex_attention

    def __call__(self, q: Tensor, kc: Tensor, vc: Tensor) -> Tensor:
        """q [R, H, d]; kc, vc [R, c, H, d]. Returns [R, H, d]."""
        out, aux = self.flex(
            q.transpose(0, 1)[None], self.k1, self.v1, block_mask=self.mask, return_aux=AuxRequest(lse=True)
        )
        return join_chain(out[0].transpose(0, 1), aux.lse[0].T, q, kc, vc).to(q.dtype)


@functools.cache
def compiled_flex() -> Any:
    return torch.compile(flex_attention, dynamic=True)


class FlashAttention:
    """The attention for CPUs: flash attention over padded documents, joined with the chain in one operation."""

    def __init__(self, layout: Layout, k1: Tensor, v1: Tensor) -> None:
        """k1, v1 [T, H, d]."""
        self.slot = layout.slot[layout.rows]
        self.k1, self.v1 = layout.pad(k1), layout.pad(v1)

    def __call__(self, q: Tensor, kc: Tensor, vc: Tensor) -> Tensor:
        """q [R, H, d]; kc, vc [R, c, H, d]. Returns [R, H, d]."""
        return ChainAttention.apply(q, self.k1, self.v1, kc, vc, self.slot)


class ChainAttention(torch.autograd.Function):
    """Softmax attention over causal step-1 keys and a row's own chain keys, without a [L, L] matrix.

    Flash attention gives the step-1 part and its log-sum-exp. The chain is a few dot products per row, as in the
    paper. One softmax joins both. The backward pass of flash attention receives the joint output and log-sum-exp;
    from these it computes the gradients of its part of the joint softmax.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k1: Tensor, v1: Tensor, kc: Tensor, vc: Tensor, slot: Tensor) -> Tensor:
        """q [R, H, d]; k1, v1 [B, H, L, d]; kc, vc [R, c, H, d]; slot [R] rows in [B * L]. Returns [R, H, d]."""
        b, h, length, d = k1.shape
        queries = q.new_zeros(b * length, h, d).index_copy(0, slot, q).view(b, length, h, d).transpose(1, 2)
        out1, lse1 = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(queries, k1, v1, 0.0, True)
        lse1_rows = lse1.transpose(1, 2).reshape(b * length, h)[slot]
        out1_rows = out1.transpose(1, 2).reshape(b * length, h, d)[slot].float()
        scores = (q.float()[:, None] * kc.float()).sum(-1) * d**-0.5
        lse = torch.logsumexp(torch.cat([lse1_rows[:, None], scores], dim=1), dim=1)
        p = (scores - lse[:, None]).exp()
        out = out1_rows * (lse1_rows - lse).exp()[..., None] + (p[..., None] * vc.float()).sum(1)
        out = out.to(q.dtype)
        lse1 = lse1.transpose(1, 2).reshape(b * length, h).index_copy(0, slot, lse)
        ctx.save_for_backward(
            q, queries, k1, v1, kc, vc, slot, p, out, lse1.view(b, length, h).transpose(1, 2)
        )
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
        ds = p * ((go[:, None] * vc.float()).sum(-1) - delta[:, None]) * d**-0.5
        gq_rows = gq.transpose(1, 2).reshape(b * length, h, d)[slot].float()
        gq_rows = gq_rows + (ds[..., None] * kc.float()).sum(1)
        gkc = (ds[..., None] * q.float()[:, None]).to(kc.dtype)
        gvc = (p[..., None] * go[:, None]).to(vc.dtype)
        return gq_rows.to(q.dtype), gk1, gv1, gkc, gvc, None
