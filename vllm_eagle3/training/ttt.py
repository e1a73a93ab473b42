"""The training-time test (paper, section 3.2): the draft is trained on its own outputs, step by step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vllm_eagle3.reference.draft import DraftModel
from vllm_eagle3.training.attention import FlashAttention, FlexAttention, Layout
from vllm_eagle3.training.copying import copy_loss
from vllm_eagle3.training.data import Batch
from vllm_eagle3.training.features import Features
from vllm_eagle3.training.losses import FusedHeadLoss


@dataclass(frozen=True)
class Chains:
    """Which chains a batch trains. rows [R]: stream index p of each; valid [steps, R]: step j has a label.

    A chain at p reads g(p) and the token p + 1, so its step j predicts token p + j + 1 and is scored against
    the target's distribution at p + j. It is valid when tokens p + 1 .. p + j + 1 are all answer tokens of
    one document.
    """

    rows: Tensor
    valid: Tensor

    @staticmethod
    def build(batch: Batch, steps: int) -> Chains:
        total = len(batch.tokens)
        document = batch.documents()
        stream = torch.arange(total, device=batch.tokens.device)
        alive = torch.ones(total, dtype=torch.bool, device=batch.tokens.device)
        valid = []
        for offset in range(1, steps + 2):
            ahead = (stream + offset).clamp(max=total - 1)
            alive = alive & (stream + offset < total) & (document[ahead] == document) & batch.mask[ahead]
            if offset > 1:
                valid.append(alive)
        rows = valid[0].nonzero()[:, 0]
        return Chains(rows, torch.stack(valid)[:, rows])

    def at(self, offset: int, total: int) -> Tensor:
        """Stream index p + offset of every chain [R]; where that is past the stream its last index (never
        valid)."""
        return (self.rows + offset).clamp(max=total - 1)


def simulate(
    model: DraftModel,
    batch: Batch,
    features: Features,
    chains: Chains,
    steps: int,
    recompute: bool = False,
    watch: Callable[[Tensor, Tensor, Layout], None] | None = None,
) -> list[Tensor]:
    """a [R, h] of every simulated step.

    Step 1 reads the target's features; step j reads the draft's own a of step j - 1 and the true token p +
    j, at RoPE position p + j - 1, attending to step-1 keys up to p and to its own chain.
    recompute: keep only each step's inputs for backward (less memory, about a third more work).
    watch: called with the queries [R, H, d] and keys [T, H, d] of step 1.
    """
    layer, attn = model.draft_layer, model.draft_layer.self_attn
    rows = chains.rows
    layout = Layout.build(batch.lengths, rows)
    groups = model.config.num_attention_heads // model.config.num_key_value_heads
    total = len(batch.tokens)

    x, residual = layer.inputs(model.embed(batch.tokens.roll(-1)), model.fuse(features.aux))
    cos, sin = model.rotary(layout.positions)
    k1, v1 = (t.repeat_interleave(groups, dim=1) for t in attn.key_value(x, cos, sin))
    attend = (FlashAttention if k1.device.type == "cpu" else FlexAttention)(layout, k1, v1)
    q = attn.query(x[rows], cos[rows], sin[rows])
    if watch is not None:
        watch(q, k1, layout)
    none = q.new_empty(len(q), 0, *q.shape[1:])
    a = layer.output(attend(q, none, none), residual[rows])

    def one_step(
        a: Tensor, kc: Tensor, vc: Tensor, tokens: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        x, residual = layer.inputs(model.embed(tokens), model.next_g(a))
        cos, sin = model.rotary(positions)
        k, v = (t.repeat_interleave(groups, dim=1) for t in attn.key_value(x, cos, sin))
        kc, vc = torch.cat([kc, k[:, None]], dim=1), torch.cat([vc, v[:, None]], dim=1)
        return layer.output(attend(attn.query(x, cos, sin), kc, vc), residual), kc, vc

    states, kc, vc = [a], none, none
    for step in range(2, steps + 1):
        inputs = (states[-1], kc, vc, batch.tokens[chains.at(step, total)], layout.positions[rows] + step - 1)
        a, kc, vc = checkpoint(one_step, *inputs, use_reentrant=False) if recompute else one_step(*inputs)
        states.append(a)
    return states


def target_table(features: Features, head: Tensor, chains: Chains, steps: int) -> tuple[Tensor, Tensor]:
    """Target probabilities over the draft vocabulary for every position the chains are scored at.

    head [draft_vocab, ht]: the target's rows of the draft vocabulary. Returns (table [m, draft_vocab] in the
    dtype of the features, place [T]: a stream index's row in the table).
    """
    total = len(features.last)
    needed = torch.zeros(total, dtype=torch.bool, device=features.last.device)
    for step in range(1, steps + 1):
        needed[chains.at(step, total)] = True
    states = features.last[needed]
    table = states.new_empty(len(states), len(head))
    with torch.autocast(states.device.type, enabled=False):
        for start in range(0, len(states), 256):
            part = slice(start, start + 256)
            table[part] = torch.softmax((states[part] @ head.T).float(), dim=-1)
    return table, needed.cumsum(0) - 1


@dataclass(frozen=True)
class LossOptions:
    """steps: simulated steps; decay: step j weighs decay^(j-1); kind: one of losses.KINDS.

    feature_loss: weight of smooth L1 between the normed a and the normed last state of the target it stands
    for (EAGLE-2's second loss; 0: none). copy_loss: weight of `copying.copy_loss` on the query heads of the last
    key head. recompute: see `simulate`.
    """

    steps: int = 7
    decay: float = 0.8
    kind: str = "soft_ce"
    feature_loss: float = 0.0
    copy_loss: float = 0.0
    recompute: bool = False


def ttt_loss(
    model: DraftModel, batch: Batch, features: Features, head: Tensor, options: LossOptions
) -> tuple[Tensor, Tensor]:
    """Loss of a batch: (scalar, per-step means [steps], without gradient).

    The scalar is the mean over valid rows of each step, weighted decay^(j-1), over the sum of the weights.
    Raises ValueError for a batch without any chain.
    """
    steps, total = options.steps, len(batch.tokens)
    chains = Chains.build(batch, steps)
    if not len(chains.rows):
        raise ValueError(
            "a batch has no two answer tokens in a row: nothing can be drafted, so nothing learned"
        )
    table, place = target_table(features, head, chains, steps)
    copied: list[Tensor] = []

    def watch(q: Tensor, k: Tensor, layout: Layout) -> None:
        heads = model.config.num_attention_heads // model.config.num_key_value_heads
        copied.append(copy_loss(q, k, batch, layout, heads))

    states = simulate(
        model, batch, features, chains, steps, options.recompute, watch if options.copy_loss else None
    )
    a = torch.cat(states)
    weights = options.decay ** torch.arange(steps, dtype=torch.float32, device=a.device)
    means = chains.valid.float() / chains.valid.sum(1, keepdim=True).clamp(min=1)
    scale = (means * (weights / weights.sum())[:, None]).flatten()
    scored = torch.cat([chains.at(j, total) for j in range(1, steps + 1)])
    normed = model.norm(a)
    loss, rows = FusedHeadLoss.apply(normed, model.lm_head.weight, table, place[scored], scale, options.kind)
    if options.feature_loss:
        distance = F.smooth_l1_loss(normed.float(), features.last[scored].float(), reduction="none").mean(-1)
        loss = loss + options.feature_loss * (distance * scale).sum()
    if copied:
        loss = loss + options.copy_loss * copied[0]
    return loss, (rows.view(steps, -1) * means).sum(1).detach()


@torch.no_grad()
def acceptance(
    model: DraftModel, batch: Batch, features: Features, best: Tensor, steps: int
) -> tuple[Tensor, Tensor]:
    """Greedy hits of each step: (right [steps, R] bool, valid [steps, R] bool).

    best [T]: the target's argmax over the full vocabulary at every position.
    """
    chains = Chains.build(batch, steps)
    right = []
    for j, a in enumerate(simulate(model, batch, features, chains, steps), 1):
        drafted = model.draft_to_target(model.logits(a).argmax(-1))
        right.append(drafted == best[chains.at(j, len(best))])
    return torch.stack(right), chains.valid
