"""The head's top-k under tensor parallelism: each rank has some rows of the head, and only its candidates travel.

A rank sends 2 k + 1 numbers a row in place of its share of the logits: 84 bytes for the ten children of a node, where a
draft vocabulary of 32,000 on two ranks would send 32,000.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ._triton import Backend, choose_backend
from .head_topk import HeadTopK, block_topk, mapped, merge_keys, pack_keys, unpack_keys


def sharded_topk(
    x: Tensor,
    weight: Tensor,
    k: int,
    *,
    vocab_start: int,
    gather: Callable[[Tensor], Tensor],
    d2t: Tensor | None = None,
    logit_scale: float = 1.0,
    weight_scale: Tensor | None = None,
    backend: Backend | None = None,
) -> HeadTopK:
    """`head_topk` of the whole head, on every rank; weight [V_rank, h] are this rank's rows, from vocab_start on.

    gather: joins the tensors [n, c] of all ranks along their columns, in the order of the ranks. Called once, with fp32
    whose bits must arrive as they are.
    """
    local = local_topk(
        x,
        weight,
        k,
        vocab_start=vocab_start,
        logit_scale=logit_scale,
        weight_scale=weight_scale,
        backend=backend,
    )
    missing = (0, k - local.logits.shape[1])
    ids = F.pad(local.draft_ids, missing).int().view(torch.float32)
    own = torch.cat([F.pad(local.logits, missing, value=float("-inf")), ids, local.lse[:, None]], dim=1)
    parts = []
    for part in gather(own).split(2 * k + 1, dim=1):
        draft_ids = part[:, k : 2 * k].contiguous().view(torch.int32).long()
        parts.append(HeadTopK(draft_ids, draft_ids, part[:, :k], part[:, -1]))
    return merge_topk(parts, k, d2t=d2t, backend=backend)


def local_topk(
    x: Tensor,
    weight: Tensor,
    k: int,
    *,
    vocab_start: int,
    logit_scale: float = 1.0,
    weight_scale: Tensor | None = None,
    backend: Backend | None = None,
) -> HeadTopK:
    """Top-k over one rank's rows of the head, weight [V_rank, h], which start at draft id vocab_start.

    Like `head_topk` without d2t; ids are draft ids of the whole vocabulary. A rank with V_rank < k rows returns V_rank
    columns.
    """
    return block_topk(
        x, weight, min(k, weight.shape[0]), vocab_start, logit_scale, None, weight_scale, backend
    )


def merge_topk(
    parts: Sequence[HeadTopK], k: int, *, d2t: Tensor | None = None, backend: Backend | None = None
) -> HeadTopK:
    """Top-k of the whole vocabulary from the `local_topk` of all ranks. Equals `head_topk` of the unsplit head.

    Raises ValueError if the parts hold fewer than k candidates.
    """
    draft_ids = torch.cat([p.draft_ids for p in parts], dim=1)
    if draft_ids.shape[1] < k:
        raise ValueError(f"k={k} exceeds the {draft_ids.shape[1]} candidates of {len(parts)} parts")
    keys = pack_keys(torch.cat([p.logits for p in parts], dim=1), draft_ids)
    lse = torch.stack([p.lse for p in parts], dim=1)
    if choose_backend(backend, draft_ids, d2t) == "torch":
        return mapped(*unpack_keys(keys.topk(k, dim=-1).values), lse.logsumexp(dim=-1), d2t)
    return merge_keys(keys, lse, k, d2t)
