"""The training-time test (paper, section 3.2): the draft is trained on its own outputs, step by step."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vllm_eagle3.reference.draft import DraftModel
from vllm_eagle3.training.attention import FlashAttention, FlexAttention, Layout
from vllm_eagle3.training.copying import copy_loss
from vllm_eagle3.training.data import Batch
from vllm_eagle3.training.features import Features, TargetHead
from vllm_eagle3.training.losses import FusedHeadLoss
from vllm_eagle3.training.settings import LossOptions


@dataclass(frozen=True)
class Chains:
    """The chains that a batch trains.

    rows [R]: stream index p of each chain; valid [steps, R]: whether step j has a label; later [R']: the rows
    (0..R-1) that are simulated beyond step 1.

    A chain at p reads g(p) and token p + 1. So its step j predicts token p + j + 1 and is scored against the target's
    distribution at p + j. This is valid if tokens p + 1 .. p + j + 1 are all answer tokens of one document.
    """

    rows: Tensor
    valid: Tensor
    later: Tensor
    candidates: int
    """Number of chains with a label at step 2. `later` is drawn from these."""

    @staticmethod
    def build(
        batch: Batch, steps: int, share: float = 1.0, generator: torch.Generator | None = None
    ) -> Chains:
        """The chains of a batch.

        share: the part of the chains with a label at step 2 that is simulated beyond step 1, drawn by `generator`.
        """
        total = len(batch.tokens)
        document = batch.documents()
        stream = torch.arange(total, device=batch.tokens.device)
        alive = torch.ones(total, dtype=torch.bool, device=batch.tokens.device)
        labelled = []
        for offset in range(1, steps + 2):
            ahead = (stream + offset).clamp(max=total - 1)
            alive = alive & (stream + offset < total) & (document[ahead] == document) & batch.mask[ahead]
            if offset > 1:
                labelled.append(alive)
        rows = labelled[0].nonzero()[:, 0]
        valid = torch.stack(labelled)[:, rows]
        longer = valid[min(1, steps - 1)].nonzero()[:, 0]
        later = longer
        if share < 1:
            drawn = torch.randperm(len(longer), generator=generator)[: math.ceil(share * len(longer))]
            later = longer[drawn.sort().values.to(longer.device)]
        return Chains(rows, valid, later, len(longer))

    def at(self, offset: int, total: int) -> Tensor:
        """Stream index p + offset of each chain [R]. Beyond the stream it is the last index, which is never valid."""
        return (self.rows + offset).clamp(max=total - 1)

    def scored(self, weights: Tensor) -> list[tuple[Tensor, Tensor]]:
        """For each step: the rows that the head scores, and the weight of each row's loss.

        The sum over rows of weight times loss is weights[j] times the mean over all valid rows of step j. If only
        some chains are simulated, it is an unbiased estimate: each chain in `later` represents candidates / R' chains.
        """
        parts = []
        for j, (valid, weight) in enumerate(zip(self.valid, weights, strict=True)):
            scale = weight / valid.sum().clamp(min=1)
            if j == 0:
                parts.append((torch.arange(len(self.rows), device=valid.device), scale.expand(len(valid))))
            else:
                rows = self.later[valid[self.later]]
                parts.append((rows, (scale * self.candidates / max(1, len(self.later))).expand(len(rows))))
        return parts


@dataclass(frozen=True)
class Simulated:
    """The result of a simulation.

    states: a of each simulated step, [R, h] for step 1 and [R', h] for later steps; q [R, H, d] and k [T, H, d] of
    step 1, with keys repeated for their query heads.
    """

    states: list[Tensor]
    q: Tensor
    k: Tensor
    layout: Layout


def simulate(
    model: DraftModel,
    batch: Batch,
    features: Features,
    chains: Chains,
    steps: int,
    recompute: bool = False,
) -> Simulated:
    """Simulate the steps of all chains.

    Step 1 reads the target's features. Step j, only for the chains in `chains.later`, reads the draft's own a of step
    j - 1 and the true token p + j at RoPE position p + j - 1. It attends to the step-1 keys up to p and to the keys
    of its own chain.
    recompute: keep only each step's inputs for the backward pass (less memory, about a third more work).
    """
    layer, attn = model.draft_layer, model.draft_layer.self_attn
    rows, later = chains.rows, chains.later
    layout = Layout.build(batch.lengths, rows)
    groups = model.config.num_attention_heads // model.config.num_key_value_heads
    total = len(batch.tokens)

    x, residual = layer.inputs(model.embed(batch.tokens.roll(-1)), model.fuse(features.aux))
    cos, sin = model.rotary(layout.positions)
    k1, v1 = (t.repeat_interleave(groups, dim=1) for t in attn.key_value(x, cos, sin))
    attention = FlashAttention if k1.device.type == "cpu" else FlexAttention
    q = attn.query(x[rows], cos[rows], sin[rows])
    none = q.new_empty(len(q), 0, *q.shape[1:])
    a = layer.output(attention(layout, k1, v1)(q, none, none), residual[rows])
    states = [a]
    if steps == 1:
        return Simulated(states, q, k1, layout)
    attend = attention(replace(layout, rows=rows[later]), k1, v1)

    def one_step(
        a: Tensor, kc: Tensor, vc: Tensor, tokens: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        x, residual = layer.inputs(model.embed(tokens), model.next_g(a))
        cos, sin = model.rotary(positions)
        k, v = (t.repeat_interleave(groups, dim=1) for t in attn.key_value(x, cos, sin))
        kc, vc = torch.cat([kc, k[:, None]], dim=1), torch.cat([vc, v[:, None]], dim=1)
        return layer.output(attend(attn.query(x, cos, sin), kc, vc), residual), kc, vc

    a, kc, vc = a[later], none[later], none[later]
    for step in range(2, steps + 1):
        inputs = (
            a,
            kc,
            vc,
            batch.tokens[chains.at(step, total)[later]],
            layout.positions[rows[later]] + step - 1,
        )
        a, kc, vc = checkpoint(one_step, *inputs, use_reentrant=False) if recompute else one_step(*inputs)
        states.append(a)
    return Simulated(states, q, k1, layout)


def target_table(features: Features, head: TargetHead, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Target probabilities over the draft vocabulary at the stream indices `positions` (with repeats).

    head: the rows of the target's head for the draft's vocabulary. Returns (table [m, draft_vocab] in the dtype of
    the features, index [len(positions)]: each position's row in the table).
    """
    needed, index = positions.unique(return_inverse=True)
    states = features.last[needed]
    table = states.new_empty(len(states), len(head.weight))
    with torch.autocast(states.device.type, enabled=False):
        for start in range(0, len(states), 256):
            part = slice(start, start + 256)
            table[part] = torch.softmax(head.logits(states[part]), dim=-1)
    return table, index


def ttt_loss(
    model: DraftModel,
    batch: Batch,
    features: Features,
    head: TargetHead,
    options: LossOptions,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss of a batch: (scalar, mean of each step [steps] without gradient).

    The scalar is the weighted mean over the steps, with weight decay^(j-1), of the mean over the valid rows of step j.
    With `chain_share` below 1 it is an unbiased estimate of it from the chains that `generator` draws.
    Raises ValueError for a batch without any chain.
    """
    steps, total = options.steps, len(batch.tokens)
    chains = Chains.build(batch, steps, options.chain_share, generator)
    if not len(chains.rows):
        raise ValueError(
            "a batch has no two answer tokens in a row: nothing can be drafted, so nothing learned"
        )
    run = simulate(model, batch, features, chains, steps, options.recompute)
    weights = options.decay ** torch.arange(steps, dtype=torch.float32, device=run.q.device)
    scored = chains.scored(weights / weights.sum())
    positions = torch.cat([chains.at(j, total)[rows] for j, (rows, _) in enumerate(scored, 1)])
    place = torch.full_like(chains.rows, -1)  # row of a chain in the states of the later steps
    place[chains.later] = torch.arange(len(chains.later), device=place.device)
    a = torch.cat(
        [run.states[0], *(s[place[rows]] for s, (rows, _) in zip(run.states[1:], scored[1:], strict=True))]
    )
    scale = torch.cat([scale for _, scale in scored])
    table, index = target_table(features, head, positions)
    normed = model.norm(a)
    loss, losses = FusedHeadLoss.apply(normed, model.lm_head.weight, table, index, scale, options.kind)
    if options.feature_loss:
        distance = F.smooth_l1_loss(normed.float(), features.last[positions].float(), reduction="none").mean(
            -1
        )
        loss = loss + options.feature_loss * (distance * scale).sum()
    if options.copy_loss:
        heads = model.config.num_attention_heads // model.config.num_key_value_heads
        loss = loss + options.copy_loss * copy_loss(run.q, run.k, batch, run.layout, heads)
    parts = (losses * scale).split([len(rows) for rows, _ in scored])
    return loss, torch.stack([part.sum() for part in parts]).detach() / (weights / weights.sum())


@torch.no_grad()
def acceptance(
    model: DraftModel, batch: Batch, features: Features, steps: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Greedy chains of `steps` drafts against the text: (rows [R], right [steps, R] bool, valid [steps, R] bool).

    Step j of the chain at p is right if the drafted token is token p + j + 1. The next step reads that token of the
    text. On a greedy answer, decoding accepts exactly the right drafts.
    """
    chains = Chains.build(batch, steps)
    right = torch.zeros_like(chains.valid)
    for j, a in enumerate(simulate(model, batch, features, chains, steps).states, 1):
        rows = slice(None) if j == 1 else chains.later
        drafted = model.draft_to_target(model.logits(a).argmax(-1))
        right[j - 1, rows] = drafted == batch.tokens[chains.at(j + 1, len(batch.tokens))][rows]
    return chains.rows, right & chains.valid, chains.valid
