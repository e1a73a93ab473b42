"""Copy supervision: teaches some heads of the draft to read the place where the same tokens occurred before.

Answers often repeat themselves or quote the prompt. Then the token to draft already stands in the context: it
followed an earlier occurrence of the newest tokens. One attention layer can find it, because the query contains the
embedding of the newest token, and a key contains the state of an earlier token and the embedding of the token after
it. This loss tells the heads which keys to read. With little data they would not learn it by themselves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_eagle3.training.attention import Layout
from vllm_eagle3.training.data import Batch


def copy_keys(batch: Batch, layout: Layout) -> Tensor:
    """Keys that the chain at p should read to copy its first draft, bool [R, T].

    Key t is one of them if tokens t - 1, t, t + 1 equal tokens p, p + 1, p + 2 and lie before them in the same
    document: this key contains the embedding of the token that followed the newest two tokens before.
    """
    rows, document = layout.rows, layout.document
    total = len(batch.tokens)
    stream = torch.arange(total, device=rows.device)
    keys = (stream[None] < rows[:, None]) & (layout.positions > 0)[None]
    keys &= document[None] == document[rows][:, None]
    for offset in (-1, 0, 1):
        ahead = (rows + offset + 1).clamp(max=total - 1)
        keys &= batch.tokens.roll(-offset)[None] == batch.tokens[ahead][:, None]
    return keys


def copy_loss(q: Tensor, k: Tensor, batch: Batch, layout: Layout, heads: int) -> Tensor:
    """-log of the attention that the last `heads` heads give to the copy keys, averaged over the chains with such keys.

    q [R, H, d] and k [T, H, d] of simulated step 1, rotated, keys repeated for their query heads. Returns an fp32
    scalar, 0 for a batch without repetitions.
    """
    keys = copy_keys(batch, layout)
    chains = keys.any(1).nonzero()[:, 0]
    if not len(chains):
        return q.new_zeros((), dtype=torch.float32)
    rows, document = layout.rows[chains], layout.document
    causal = torch.arange(len(k), device=q.device)[None] <= rows[:, None]
    causal &= document[None] == document[rows][:, None]
    scores = torch.einsum("rhd,thd->hrt", q[chains, -heads:], k[:, -heads:]).float() * q.shape[-1] ** -0.5
    total = scores.masked_fill(~causal, -torch.inf).logsumexp(-1)
    copied = scores.masked_fill(~keys[chains], -torch.inf).logsumexp(-1)
    return (total - copied).mean()
