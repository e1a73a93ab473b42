"""Validation: tokens per verification on held-out greedy answers, without running the target again.

Decoding would write a greedy answer again, and would draft the same chains at its places. So validation can follow
decoding through the answer: the accepted drafts of a chain, then one token of the target, then the next chain. The
result is the tau of decoding on these prompts.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from vllm_eagle3.reference.draft import DraftModel
from vllm_eagle3.training.data import Document, make_batch, plan_batches
from vllm_eagle3.training.features import Target
from vllm_eagle3.training.metrics_log import Validation
from vllm_eagle3.training.ranks import Ranks
from vllm_eagle3.training.ttt import acceptance

logger = logging.getLogger(__name__)
ALL = "all"


def choose(
    documents: Sequence[Document], groups: Mapping[str, Sequence[str]], limit: int
) -> dict[str, list[Document]]:
    """At most `limit` greedy answers, the same number for each group of sources. Without groups, all are one group.

    If no answer is greedy, it warns and takes answers at other temperatures. Decoding would not write these answers
    again, so the tau that validation measures is then too low.
    """
    greedy = [d for d in documents if d.temperature == 0]
    if documents and not greedy:
        logger.warning("no held-out answer is greedy: validation is on sampled answers and will be too low")
        greedy = list(documents)
    of = {source: name for name, sources in groups.items() for source in sources}
    chosen: dict[str, list[Document]] = {name: [] for name in groups or [ALL]}
    each = max(1, limit // len(chosen))
    for document in greedy:
        name = of.get(document.source) if groups else ALL
        if name is not None and len(chosen[name]) < each:
            chosen[name].append(document)
    for name, found in chosen.items():
        if groups and not found:
            logger.warning("validation group %s: no held-out greedy answer of its sources", name)
    return {name: found for name, found in chosen.items() if found}


class ValidationSet:
    """Held-out documents in batches, with the target's features."""

    def __init__(self, target: Target, groups: Mapping[str, Sequence[Document]], batch_tokens: int) -> None:
        self.names = list(groups)
        documents = [d for found in groups.values() for d in found]
        group_of = [i for i, name in enumerate(groups) for _ in groups[name]]
        self.batches = []
        for places in plan_batches([len(d.tokens) for d in documents], batch_tokens, 0, 0):
            batch = make_batch([documents[i] for i in places]).to(target.device)
            self.batches.append((batch, target.features(batch), [group_of[i] for i in places]))

    def measure(self, model: DraftModel, steps: int, ranks: Ranks | None = None) -> Validation:
        """Validate greedy chains of `steps` drafts with the present weights."""
        ranks = ranks or Ranks()
        hits, chances = torch.zeros(2, steps, dtype=torch.float64)
        tries, streaks = torch.zeros(2, len(self.names), steps, dtype=torch.float64)
        for batch, features, group_of in self.batches[ranks.rank :: ranks.world]:
            rows, right, valid = (x.cpu() for x in acceptance(model, batch, features, steps))
            hits += right.sum(1)
            chances += valid.sum(1)
            document = batch.documents().cpu()[rows]
            starts = walk(rows, right, valid)
            group = torch.tensor(group_of)[document[starts]]
            streak = right[:, starts].long().cumprod(0)
            first = torch.ones_like(streak[:1])
            for g in range(len(self.names)):
                mine = group == g
                tries[g] += torch.cat([first, streak[:-1]])[:, mine].sum(1)
                streaks[g] += streak[:, mine].sum(1)
        hits, chances, tries, streaks = (ranks.sum(x) for x in (hits, chances, tries, streaks))
        taus = 1 + streaks.sum(1) / tries[:, 0].clamp(min=1)
        n_alpha = streaks.sum(0) / tries.sum(0).clamp(min=1)
        return Validation(
            (hits / chances.clamp(min=1)).tolist(),
            n_alpha.tolist(),
            float(taus.mean()),
            dict(zip(self.names, taus.tolist(), strict=True)),
        )


def walk(rows: Tensor, right: Tensor, valid: Tensor) -> Tensor:
    """The chains that decoding would start, as indices into `rows`.

    rows [R]: stream indices, ascending; right, valid [steps, R]: from `acceptance`. After a chain at p with n accepted
    drafts, the next chain starts at p + n + 1. A chain that is right up to the end of its answer is left out, because
    the text beyond the end is not known.
    """
    accepted = right.long().cumprod(0).sum(0).numpy()
    known = (accepted == len(right)) | (accepted < valid.sum(0).numpy())
    at, starts, end = rows.numpy(), [], -1
    for i, p in enumerate(at):
        if p < end and at[i - 1] == p - 1:
            continue  # an earlier chain of this answer has accepted this place
        end = p + accepted[i] + 1
        if known[i]:
            starts.append(i)
    return torch.from_numpy(np.array(starts, dtype=np.int64))
