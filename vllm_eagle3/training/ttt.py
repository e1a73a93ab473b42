"""The training-time test (paper, section 3.2): the draft is trained on its own outputs, step by step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_eagle3.training.attention import ChainAttention, Layout
from vllm_eagle3.training.data import Batch
from vllm_eagle3.training.features import Features
from vllm_eagle3.training.losses import FusedHeadLoss
from vllm_eagle3.training.model import DraftModel


@dataclass(frozen=True)
class Chains:
    """Which chains a batch trains. rows [R]: stream index p of each; valid [steps, R]: step j has a label.

    A chain at p reads g(p) and the token p + 1, so its step j predicts token p + j + 1 and is scored against the
    target's distribution at p + j. It is valid when tokens p + 1 .. p + j + 1 are all answer tokens of one document.
    """

    rows: Tensor
    valid: Tensor

    @staticmethod
    def build(batch: Batch, steps: int) -> Chains:
        total = len(batch.tokens)
        doc = torch.repeat_interleave(torch.arange(len(batch.lengths), device=batch.tokens.device), batch.lengths)
        alive = torch.ones(total, dtype=torch.bool, device=batch.tokens.device)
        valid = []
        for offset in range(1, steps + 2):
            ahead = torch.arange(total, device=alive.device) + offset
            inside = ahead < total
            ahead = ahead.clamp(max=total - 1)
            alive = alive & inside & (doc[ahead] == doc) & batch.mask[ahead]
            if offset > 1:
                valid.append(alive)
        rows = valid[0].nonzero()[:, 0]
        return Chains(rows, torch.stack(valid)[:, rows])


def simulate(model: DraftModel, batch: Batch, features: Features, rows: Tensor, steps: int) -> list[Tensor]:
    """a [R, h] of every simulated step for the chains at `rows` [R] (stream indices).

    Step 1 reads the target's features; step j reads the draft's own a of step j - 1 and the true token p + j, at
    RoPE position p + j - 1, attending to step-1 keys up to p and to its own chain.
    """
    layer, attn = model.draft_layer, model.draft_layer.self_attn
    layout = Layout.build(batch.lengths, rows)
    last = len(batch.tokens) - 1
    groups = model.config.num_attention_heads // model.config.num_key_value_heads

    def ahead(offset: int) -> Tensor:
        return batch.tokens[(rows + offset).clamp(max=last)]

    x, residual = layer.inputs(model.embed(batch.tokens.roll(-1)), model.fuse(features.aux))
    cos, sin = model.rotary(layout.positions)
    k1, v1 = (layout.pad(t.repeat_interleave(groups, dim=1)) for t in attn.key_value(x, cos, sin))
    slot = layout.slot[rows]
    x, residual, cos, sin = x[rows], residual[rows], cos[rows], sin[rows]
    chain_k: list[Tensor] = []
    chain_v: list[Tensor] = []
    out = []
    for step in range(1, steps + 1):
        if step > 1:
            x, residual = layer.inputs(model.embed(ahead(step)), model.next_g(out[-1]))
            cos, sin = model.rotary(layout.positions[rows] + step - 1)
            k, v = attn.key_value(x, cos, sin)
            chain_k.append(k.repeat_interleave(groups, dim=1))
            chain_v.append(v.repeat_interleave(groups, dim=1))
        q = attn.query(x, cos, sin)
        kc = torch.stack(chain_k, dim=1) if chain_k else q.new_empty(len(q), 0, *q.shape[1:])
        vc = torch.stack(chain_v, dim=1) if chain_v else kc
        out.append(layer.output(ChainAttention.apply(q, k1, v1, kc, vc, slot), residual))
    return out


def target_table(features: Features, head: Tensor, rows: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Target probabilities over the draft vocabulary for every position the chains are scored at.

    head [draft_vocab, ht]: the target's rows of the draft vocabulary. Returns (table [m, draft_vocab] in the dtype of
    the features, place [T]: a stream index's row in the table).
    """
    total = len(features.last)
    needed = torch.zeros(total, dtype=torch.bool, device=rows.device)
    for step in range(1, steps + 1):
        needed[(rows + step).clamp(max=total - 1)] = True
    place = needed.cumsum(0) - 1
    states = features.last[needed]
    table = states.new_empty(len(states), len(head))
    for start in range(0, len(states), 256):
        part = slice(start, start + 256)
        table[part] = torch.softmax((states[part] @ head.T).float(), dim=-1)
    return table, place


def ttt_loss(
    model: DraftModel, batch: Batch, features: Features, head: Tensor, steps: int, decay: float, kind: str
) -> tuple[Tensor, Tensor]:
    """Loss of a batch: (scalar, per-step means [steps], without gradient).

    The scalar is sum_j decay^(j-1) * mean over valid rows of step j, over the sum of the weights.
    """
    chains = Chains.build(batch, steps)
    table, place = target_table(features, head, chains.rows, steps)
    states = simulate(model, batch, features, chains.rows, steps)
    weights = decay ** torch.arange(steps, dtype=torch.float32)
    weights = weights / weights.sum()
    total = torch.zeros((), device=batch.tokens.device)
    means = []
    for j, (a, valid) in enumerate(zip(states, chains.valid, strict=True)):
        index = place[(chains.rows + j + 1).clamp(max=len(place) - 1)]
        scale = valid.float() / valid.sum().clamp(min=1)
        loss, rows = FusedHeadLoss.apply(model.norm(a), model.lm_head.weight, table, index, scale, kind)
        total = total + weights[j] * loss
        means.append((rows * scale).sum())
    return total, torch.stack(means).detach()


@torch.no_grad()
def acceptance(model: DraftModel, batch: Batch, features: Features, best: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Greedy hits of each step: (right [steps, R] bool, valid [steps, R] bool).

    best [T]: the target's argmax over the full vocabulary at every position.
    """
    chains = Chains.build(batch, steps)
    right = []
    for j, a in enumerate(simulate(model, batch, features, chains.rows, steps)):
        drafted = model.draft_to_target(model.logits(a).argmax(-1))
        right.append(drafted == best[(chains.rows + j + 1).clamp(max=len(best) - 1)])
    return torch.stack(right), chains.valid
